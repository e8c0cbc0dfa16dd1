"""A pool keeps what it is given, says where a manifest is wrong, and loads nothing that is not what it claims to be."""

import hashlib
import os

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ray_dfml.core.net import net
from ray_dfml.data import weights_file
from ray_dfml.data.pool import Pool
from ray_dfml.errors import RejectedError, ResourceError, UsageError
from ray_dfml.types import ImageSpec
from tests.data.pools import IMAGE, add, edit, raising, state, swap, two_teachers
from tests.support import PROPERTY


@pytest.fixture
def pool(tmp_path) -> Pool:
    """A pool of two sound teachers, `a` and `b`."""
    return two_teachers(tmp_path / "pool")


# --- what is kept


@PROPERTY
@given(
    arch=st.sampled_from(["conv4", "conv4-64", "conv4-adaptive"]),
    channels=st.integers(1, 4),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    classes=st.lists(st.text(min_size=1).filter(str.isprintable), min_size=2, max_size=6, unique=True),
    accuracy=st.one_of(st.none(), st.floats(0, 100)),
    seed=st.integers(0, 2**31),
)
def test_round_trip(tmp_path_factory, arch, channels, height, width, classes, accuracy, seed):
    rng = np.random.default_rng(seed)
    image = ImageSpec(
        channels=channels,
        height=height,
        width=width,
        mean=tuple(rng.uniform(-1, 1, size=channels)),
        std=tuple(rng.uniform(0.1, 1, size=channels)),
    )
    made = Pool.create(tmp_path_factory.mktemp("round") / "pool")
    tensors = state(seed, arch=arch, image=image, ways=len(classes))
    made.add("t.1", tensors, arch=arch, image=image, classes=classes, accuracy={"reported": accuracy}, source="s: 'x'")
    found = Pool.open(made.path)
    assert found.cards == made.cards
    (card,) = found.cards
    assert (card.id, card.arch, card.image, card.classes) == ("t.1", arch, image, tuple(classes))
    assert (card.access, card.accuracy) == ("weights", accuracy)
    assert card.sha256 == hashlib.sha256((made.path / "weights/t.1.safetensors").read_bytes()).hexdigest()
    theta, stats = found.load("t.1")
    model = net(arch, image.shape, len(classes))
    assert theta.dtype == stats.dtype == np.float32
    assert np.array_equal(theta, model.layout.flatten(tensors).numpy())
    assert np.array_equal(stats, model.stats_layout.flatten(tensors).numpy())


def test_resnet_round_trip_and_check(tmp_path):
    image = ImageSpec(channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    made = Pool.create(tmp_path / "pool")
    tensors = state(arch="resnet10", image=image, ways=5)
    made.add("r", tensors, arch="resnet10", image=image, classes=list("abcde"), accuracy=None, source="")
    assert np.array_equal(made.load("r")[0], net("resnet10", image.shape, 5).layout.flatten(tensors).numpy())
    assert made.check() == [{"id": "r", "ok": True, "reason": ""}]


def test_manifest_keeps_every_field(pool):
    add(pool, "c", accuracy={"reported": 91.5, "best": 92, "last": None}, source="a page", authorization="letter 7")
    entry = Pool.open(pool.path).entry("c")
    assert entry.accuracy.model_dump() == {"reported": 91.5, "best": 92.0, "last": None}
    assert (entry.source, entry.authorization, entry.weights) == ("a page", "letter 7", "weights/c.safetensors")
    assert yaml.safe_load((pool.path / "pool.yaml").read_text())["version"] == 1


def test_a_manifest_that_grows_has_the_text_of_one_written_whole(tmp_path, monkeypatch):
    """The second teacher and each later one is appended, and nothing is read again that nobody else has changed."""
    whole, grown = Pool.create(tmp_path / "whole"), Pool.create(tmp_path / "grown")
    for number, id in enumerate("abc"):
        add(whole, id, state(number), source="ä: 'x'")
        whole = Pool.open(whole.path)
    for number, id in enumerate("abc"):
        add(grown, id, state(number), source="ä: 'x'")
        monkeypatch.setattr("ray_dfml.data.pool.read_manifest", raising(AssertionError("read again")))
    assert (grown.path / "pool.yaml").read_bytes() == (whole.path / "pool.yaml").read_bytes()
    assert grown.cards == whole.cards
    assert grown.sha256() == whole.sha256()


def test_a_teacher_that_another_process_added_stays(pool):
    other = Pool.open(pool.path)
    add(other, "c")
    add(other, "d")
    add(pool, "e")
    with pytest.raises(UsageError, match="id 'e' is taken"):
        add(other, "e")
    add(other, "f")
    assert [card.id for card in other.cards] == list("abcdef")
    assert Pool.open(pool.path).cards == other.cards


def test_cards_are_in_file_order_and_sha256_is_not(tmp_path):
    pools = []
    for order in ("ba", "ab"):
        made = Pool.create(tmp_path / order)
        for id in order:
            add(made, id, state(ord(id)))
        assert [card.id for card in made.cards] == list(order)
        pools.append(made)
    assert pools[0].sha256() == pools[1].sha256() == Pool.open(pools[0].path).sha256()
    add(pools[0], "c")
    assert pools[0].sha256() != pools[1].sha256()


def test_half_precision_is_stored_as_float32(pool):
    tensors = {name: tensor.half() for name, tensor in state(5).items()}
    add(pool, "h", tensors)
    model = net("conv4", IMAGE.shape, 3)
    assert np.array_equal(pool.load("h")[0], model.layout.flatten(tensors).float().numpy())


# --- create and open


def test_create_refuses_what_is_not_empty(tmp_path, pool):
    with pytest.raises(UsageError, match=r"already holds a pool"):
        Pool.create(pool.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"not an empty folder"):
        Pool.create(tmp_path / "full")
    assert not (tmp_path / "full" / "pool.yaml").exists()
    with pytest.raises(UsageError, match=r"is a file"):
        Pool.create(tmp_path / "full" / "thesis.txt")
    assert [card.id for card in Pool.open(pool.path).cards] == ["a", "b"]


def test_create_in_an_empty_folder_or_a_new_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "new" / "deep", str(tmp_path / "text")):
        assert Pool.create(path).cards == Pool.open(path).cards == ()


def test_interrupted_create_can_be_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
        with pytest.raises(ResourceError, match=r"No space left"):
            Pool.create(tmp_path / "pool")
    with pytest.raises(UsageError, match=r"no pool here"):
        Pool.open(tmp_path / "pool")
    assert Pool.create(tmp_path / "pool").cards == ()


def test_open_where_there_is_no_pool(tmp_path):
    with pytest.raises(UsageError, match=r"no pool here \(no pool.yaml\)"):
        Pool.open(tmp_path)


def test_unknown_id(pool):
    add(pool, "teacher-1")
    with pytest.raises(UsageError, match=r"no teacher 'teacher-2' .*\(did you mean 'teacher-1'\?\)"):
        pool.load("teacher-2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.1, 0.2, 0.3]}, "teachers[1].mean: expected 1 values, got 3 - the model takes 1 channels"),
        ({"std": [0.0]}, "teachers[1].std: expected positive numbers, got [0.0]"),
        ({"mean": [float("nan")]}, "teachers[1].mean: expected finite numbers, got [nan]"),
        ({"mean": "0.1"}, "teachers[1].mean: input should be a valid list, got '0.1'"),
        ({"arch": "conv5"}, "teachers[1].arch: unknown architecture 'conv5' (did you mean 'conv4'?); known: conv4, "),
        ({"classes": ["x"]}, "teachers[1].classes: list should have at least 2 items"),
        ({"classes": ["x", "y", "x"]}, "teachers[1].classes: class 'x' appears twice"),
        ({"classes": ["x", ""]}, "teachers[1].classes: a class name is empty"),
        ({"classes": ["x", 3]}, "teachers[1].classes[1]: expected text, got 3 - put it in quotes"),
        ({"classes": ["x", "\x1b[2Jy"]}, "teachers[1].classes[1]: expected one line of printable text"),
        ({"input": {"channels": 1, "height": 16}}, "teachers[1].input.width: required"),
        ({"input": {"channels": 1, "height": 10**6, "width": 1}}, "teachers[1].input.height: input should be less"),
        ({"access": "root"}, "teachers[1].access: input should be 'weights', 'logits', 'probs' or 'label', got 'root'"),
        ({"accuracy": {"reported": 101.0}}, "teachers[1].accuracy.reported: input should be less than or equal to 100"),
        ({"sha256": "abc"}, "teachers[1].sha256: string should match pattern"),
        ({"sha256": None}, "teachers[1].sha256: required where there is no api"),
        (
            {"weights": "../../etc/x.safetensors"},
            "teachers[1].weights: '../../etc/x.safetensors' leaves the pool folder",
        ),
        ({"weights": "/etc/x.safetensors"}, "teachers[1].weights: '/etc/x.safetensors' leaves the pool folder"),
        ({"weights": "weights/a.pt"}, "teachers[1].weights: 'weights/a.pt' is not a .safetensors file"),
        ({"id": "../a"}, "teachers[1].id: '../a': an id has letters"),
        ({"id": "a"}, "teachers[1].id: 'a' is taken by teachers[0]"),
        ({"colour": "red"}, "teachers[1].colour: unknown key"),
        ({"a\nb": "red"}, "teachers[1].'a\\nb': unknown key"),
    ],
)
def test_manifest_fault_is_one_line_with_its_place(pool, changes, message):
    edit(pool, 1, **changes)
    with pytest.raises(RejectedError) as caught:
        Pool.open(pool.path)
    assert str(caught.value).startswith(f"pool.yaml: {message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2\nteachers: []\n", "version: input should be 1, got 2"),
        ("teachers: []\n", "version: required"),
        ("version: 1\nteachers: [\n", "line 3: not YAML"),
        ("version: 1\nteachers: !!python/object/apply:os.system ['true']\n", "not YAML: could not determine"),
        ("", "input should be a valid dictionary"),
        ("- 1\n", "input should be a valid dictionary"),
        ("\x00", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_manifest_that_is_not_one(pool, text, message):
    (pool.path / "pool.yaml").write_text(text)
    with pytest.raises(RejectedError) as caught:
        Pool.open(pool.path)
    assert str(caught.value).startswith("pool.yaml: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- load


def bad_states() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Weights that must not be used, with a part of the reason."""
    nan, variance = (dict(state()) for _ in range(2))
    nan["head.weight"] = torch.full((3, 32), float("nan"))
    variance["blocks.2.norm.running_var"] = torch.full((32,), -1.0)
    fewer = {name: tensor for name, tensor in state().items() if name != "head.bias"}
    return {
        "nan": (nan, "head.weight: 96 of 96 values are NaN or infinite"),
        "variance": (variance, "blocks.2.norm.running_var: a running variance is negative"),
        "shape": (state(ways=5), "needs shape [3, 32], the file has [5, 32]"),
        "missing": (fewer, "no tensor head.bias [3]"),
        "architecture": (state(arch="conv4-64"), "needs shape [32, 1, 3, 3], the file has [64, 1, 3, 3]"),
    }


@pytest.mark.parametrize("case", ["nan", "variance", "shape", "missing", "architecture"])
def test_bad_weights_are_neither_added_nor_loaded(pool, case):
    tensors, reason = bad_states()[case]
    with pytest.raises(RejectedError) as caught:
        add(pool, "c", tensors)
    assert str(caught.value).startswith("c: ")
    assert reason in str(caught.value)
    assert not (pool.path / "weights/c.safetensors").exists()
    swapped = swap(pool, "b", tensors)
    with pytest.raises(RejectedError) as caught:
        swapped.load("b")
    assert str(caught.value).startswith("b: ")
    assert reason in str(caught.value)
    swapped.load("a")
    good, bad = swapped.check()
    assert good["ok"]
    assert not bad["ok"]
    assert reason in bad["reason"]


def test_changed_file_has_another_sha256(pool):
    weights_file.write(pool.path / "weights/a.safetensors", state(9))
    with pytest.raises(RejectedError, match=r"^a: weights/a.safetensors has sha256 .* pool.yaml says"):
        pool.load("a")


def test_truncated_file(pool):
    file = pool.path / "weights/a.safetensors"
    data = file.read_bytes()[:-5]
    file.write_bytes(data)
    edit(pool, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(RejectedError, match=r"^a: the header promises"):
        Pool.open(pool.path).load("a")


def test_missing_file(pool):
    (pool.path / "weights/a.safetensors").unlink()
    with pytest.raises(RejectedError, match=r"^a: cannot be read: No such file"):
        pool.load("a")


def test_link_out_of_the_folder_is_not_followed(pool, tmp_path):
    inside, outside = pool.path / "weights/a.safetensors", tmp_path / "a.safetensors"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(RejectedError, match=r"^a: weights/a.safetensors leaves the pool folder"):
        pool.load("a")


# --- check


def test_check_of_sound_teachers(pool):
    add(pool, "twin", state(0))
    assert pool.check() == [
        {"id": "a", "ok": True, "reason": ""},
        {"id": "b", "ok": True, "reason": ""},
        {"id": "twin", "ok": True, "reason": "same weights as a"},
    ]
    assert pool.check() == pool.check()


def test_check_runs_the_teacher(pool):
    constant, huge, dead = (dict(state()) for _ in range(3))
    constant["head.weight"] = torch.zeros(3, 32)
    huge["head.weight"] = torch.full((3, 32), 3e38)
    dead["head.weight"] = state()["head.weight"] * torch.tensor([[1.0], [0.0], [1.0]])
    for id, tensors in {"constant": constant, "huge": huge, "dead": dead}.items():
        add(pool, id, tensors)
    results = {result["id"]: result for result in pool.check()}
    assert results["constant"] == {
        "id": "constant",
        "ok": False,
        "reason": "gives the same logits for different images",
    }
    assert results["huge"] == {"id": "huge", "ok": False, "reason": "gives NaN or infinite logits on random images"}
    assert results["dead"] == {"id": "dead", "ok": True, "reason": "constant output for glyphs/b"}
    assert results["a"]["ok"]
    assert results["b"]["ok"]


def test_check_survives_any_file(pool):
    for data in (b"", b"\xff" * 8, b"\x00" * 64, os.urandom(200)):
        (pool.path / "weights/a.safetensors").write_bytes(data)
        edit(pool, sha256=hashlib.sha256(data).hexdigest())
        first, second = Pool.open(pool.path).check()
        assert not first["ok"]
        assert first["reason"]
        assert second["ok"]
