"""Options that commands share."""

import click
import pytest

from ray_dfml.cli import main
from ray_dfml.cli.options import SHARE


@pytest.mark.parametrize(
    ("said", "parts"), [("1/3", 3), ("0.5", 2), ("0.33", 3), ("1/7", 7), ("1", 1), (1, 1), ("1/100", 100)]
)
def test_a_share_of_a_gpu_is_one_of_equal_parts_which_fit_together(said: str, parts: int) -> None:
    share = SHARE.convert(said, None, None)
    assert round(1 / share) == parts
    assert sum(round(share * 10_000) for _ in range(parts)) <= 10_000
    assert share * 10_000 == pytest.approx(round(share * 10_000)), "Ray counts in 1/10000"


def test_no_share_is_none() -> None:
    assert [SHARE.convert(said, None, None) for said in ("0", 0.0)] == [0.0, 0.0]


@pytest.mark.parametrize("said", ["0.4", "2/3", "0.3", "2", "-1", "1/0", "half", "nan", "1/", "0.0001", "1/2/3", "inf"])
def test_other_shares_are_refused(said: str) -> None:
    with pytest.raises(click.BadParameter, match=r"a process gets a whole GPU \(1\), one of k equal parts"):
        SHARE.convert(said, None, None)


@pytest.mark.parametrize(("words", "nearest"), [
    ("trian free", "train"), ("pool chekc p", "check"), ("train fre --run-dir r", "free"),
    ("train free --pol p --run-dir r", "--pool"), ("train free --run-dir r --preset quikstart", "quickstart"),
    ("train free --run-dir r --backend rya", "ray"), ("data check glyps", "glyphs"),
    ("data check Omniglt:p", "omniglot"), ("evaluate w --data glyphs --split tset", "test"),
    ("train free --pool p --run-dir r --set method.round=3", "rounds"),
    ("pool build --data glyphs --models 2 --arch conv --out p", "conv4"), ("serve p --access prob", "probs"),
    ("pool add p --input 1x8x8 --adapter jsn", "json"),
])  # fmt: skip
def test_the_error_for_a_wrong_word_names_the_nearest(words: str, nearest: str, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert f"id you mean '{nearest}'" in said or f"id you mean one of: '{nearest}'" in said, said
    assert list(tmp_path.iterdir()) == []
