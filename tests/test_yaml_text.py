"""YAML: numbers as people write them, and text that stays text, for this reader and for one of YAML 1.1."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml import yaml_text
from ray_dfml.config import parse_set, pretrain_config, resolve
from tests.support import PROPERTY


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2e3", -2000.0), (".5", 0.5), ("1.", 1.0), ("0", 0), ("-0", 0), ("+7", 7),
        ("-.inf", -math.inf), ("1.0e-05", 1e-5), ("true", True), ("False", False), ("~", None), ("", None),
        ("010", "010"), ("08", "08"), ("0x1F", "0x1F"), ("1_000", "1_000"), ("12:30", "12:30"), ("no", "no"),
        ("on", "on"), ("2024-01-31", "2024-01-31"), ("1e", "1e"), (".", "."), ("-", "-"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_plain_text(text: str, value: Any) -> None:
    found = yaml_text.load(text) if text != "-" else value
    assert (type(found), found) == (type(value), value)


@PROPERTY
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
        | st.sampled_from(["no", "on", "010", "1e4", "1e-4", "12:30", "2024-01-31", "~", "null", "0x1F", "1_0", "<<"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)  # fmt: skip
def test_what_is_written_is_read(value: Any) -> None:
    assert yaml_text.load(yaml_text.dump(value)) == value


@pytest.mark.parametrize("text", ["no", "on", "010", "08", "1e4", "1e-4", "12:30", "2024-01-31", "~", "0x1F", "1_000"])
def test_text_stays_text_for_other_readers(text: str) -> None:
    assert yaml.safe_load(yaml_text.dump([text])) == yaml_text.load(yaml_text.dump([text])) == [text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("eval.shots=5", (5,)), ("eval.shots=[1, 5]", (1, 5)), ("eval.shots=1,5", (1, 5)), ("eval.shots=010", (10,)),
        ("eval.lrs=0.5", (0.5,)), ("eval.lrs=1e-2,.5", (0.01, 0.5)), ("eval.lrs=[]", ()),
    ],
)  # fmt: skip
def test_one_value_is_a_list_of_one(text: str, value: tuple[float, ...]) -> None:
    name = text.partition("=")[0].partition(".")[2]
    assert getattr(resolve("free", settings=[text]).eval, name) == value


def test_a_list_of_the_recipe_of_a_pool() -> None:
    assert pretrain_config(["pretrain.milestones=3"]).milestones == (3,)
    assert pretrain_config(["pretrain.milestones=3,5"]).milestones == (3, 5)


def test_a_number_with_a_zero_in_front_is_decimal() -> None:
    assert parse_set("method.rounds=010") == (["method", "rounds"], "010")
    assert resolve("free", settings=["method.rounds=010"]).method.rounds == 10


@pytest.mark.parametrize(
    ("text", "line"), [("a: 1\nb: 2\na: 3\n", 3), ("x:\n  - {k: 1, 'k': 2}\n", 2), ("1: a\n2: b\n1: c\n", 3)]
)
def test_a_key_that_is_given_twice_is_refused(text: str, line: int) -> None:
    """Readers of YAML would take the last value without a word."""
    with pytest.raises(yaml.YAMLError, match=r"the key '[ak1]' is given twice") as raised:
        yaml_text.load(text)
    assert f"line {line}," in str(raised.value)


def test_a_key_may_be_there_as_a_number_and_as_text_and_in_other_mappings() -> None:
    text = "{1: a, '1': b, x: &one {k: 1}, y: {k: 2}, z: *one}"
    assert yaml_text.load(text) == {1: "a", "1": "b", "x": {"k": 1}, "y": {"k": 2}, "z": {"k": 1}}
