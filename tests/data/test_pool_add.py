"""Adding to a pool: what is refused, what an interruption leaves, and many writers at once."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.core.net import net
from ray_dfml.data import weights_file
from ray_dfml.data.pool import Added, Pool, add_file
from ray_dfml.errors import RejectedError, ResourceError, UsageError
from tests.data.pools import CLASSES, IMAGE, add, edit, state, two_teachers


@pytest.fixture
def pool(tmp_path) -> Pool:
    """A pool of two sound teachers, `a` and `b`."""
    return two_teachers(tmp_path / "pool")


@pytest.mark.parametrize("id", ["../x", "a/b", "", ".hidden", "a b", "a\n", "x" * 200, "..", "a\\b", "é"])
def test_unsafe_ids(pool, id):
    with pytest.raises(UsageError, match=r"an id has letters"):
        add(pool, id)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "../evil.py"}, "arch: unknown architecture '../evil.py'"),
        ({"classes": ["x", "x", "y"]}, "classes: class 'x' appears twice"),
        ({"accuracy": {"reported": 120}}, "accuracy.reported: input should be less than or equal to 100, got 120.0"),
        ({"accuracy": {"top5": 99}}, "accuracy.top5: unknown key"),
        ({"source": "two\nlines"}, "source: expected one line of printable text"),
    ],
)
def test_add_refuses_what_the_manifest_cannot_hold(pool, fields, message):
    before = (pool.path / "pool.yaml").read_bytes()
    with pytest.raises(UsageError) as caught:
        add(pool, "c", **fields)
    assert str(caught.value).startswith(message)
    assert (pool.path / "pool.yaml").read_bytes() == before


def test_duplicate_id_keeps_the_first(pool):
    other = Pool.open(pool.path)
    add(other, "c", state(7))
    with pytest.raises(UsageError, match=r"id 'c' is taken"):
        add(pool, "c", state(8))  # this object was opened before `c` came
    assert np.array_equal(Pool.open(pool.path).load("c")[0], other.load("c")[0])


def test_id_whose_file_belongs_to_another_teacher(pool):
    edit(pool, 0, id="renamed")
    with pytest.raises(UsageError, match=r"id 'a' is taken"):
        add(pool, "a", state(8))
    Pool.open(pool.path).load("renamed")


@pytest.mark.parametrize("after", [0, 1])
def test_interrupted_add_leaves_the_old_pool(pool, monkeypatch, after):
    """The disk fills up before the weights, or between the weights and the manifest; the add can be repeated."""
    before, replace, calls = (pool.path / "pool.yaml").read_bytes(), os.replace, []

    def fail_later(*args: Any) -> None:
        calls.append(args)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_later)
        with pytest.raises(ResourceError, match=r"No space left on device"):
            add(pool, "c", state(3))
    assert (pool.path / "pool.yaml").read_bytes() == before
    assert not list(pool.path.rglob("*.tmp"))
    assert [card.id for card in pool.cards] == [card.id for card in Pool.open(pool.path).cards] == ["a", "b"]
    add(pool, "c", state(4))
    assert all(result["ok"] for result in Pool.open(pool.path).check())


def test_threads_add_at_once(pool):
    states = [state(number) for number in range(3)]

    def work(name: str) -> None:
        mine = Pool.open(pool.path)
        for number, tensors in enumerate(states):
            add(mine, f"{name}{number}", tensors)

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Pool.open(pool.path)
    assert {card.id for card in found.cards} == {"a", "b"} | {
        f"{name}{number}" for name in "xyz" for number in range(3)
    }
    assert all(result["ok"] for result in found.check())


ADD_MANY = """
import sys
import torch
from ray_dfml.data.pool import Pool
from ray_dfml.types import ImageSpec
from ray_dfml.core.net import net

torch.set_num_threads(1)
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
pool, model = Pool.open(path), net("conv4", (1, 16, 16), 3)
theta = model.layout.unflatten(model.init(torch.Generator().manual_seed(len(name))))
tensors = theta | model.stats_layout.unflatten(model.initial_stats())
image = ImageSpec(channels=1, height=16, width=16, mean=(0.4,), std=(0.3,))
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    pool.add(f"{name}{number}", tensors, arch="conv4", image=image, classes=list("abc"), accuracy=None, source="")
"""


def start_adding(pool: Pool, name: str, count: int) -> subprocess.Popen[str]:
    """A process that is ready to add `count` teachers as soon as it gets a line."""
    command = [sys.executable, "-c", ADD_MANY, str(pool.path), name, str(count)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_add_at_once_and_one_is_killed(pool):
    """Neither loses a teacher to the other; the one killed in the middle leaves a pool that still works."""
    steady, doomed = start_adding(pool, "x", 12), start_adding(pool, "k", 100_000)
    for process in (steady, doomed):
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in (steady, doomed):
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    steady.communicate(timeout=60)
    doomed.kill()
    doomed.communicate()
    assert steady.returncode == 0
    found = Pool.open(pool.path)
    ids = [card.id for card in found.cards]
    survived = sum(id.startswith("k") for id in ids)
    wanted = {"a", "b"} | {f"x{number}" for number in range(12)} | {f"k{number}" for number in range(survived)}
    assert len(ids) == len(wanted)
    assert set(ids) == wanted
    for id in ids:
        found.load(id)
    add(found, f"k{survived}", state(1))
    found.load(f"k{survived}")


# --- add_file


def add_weights(pool: Pool, path: Path, **changes: Any) -> Added:
    """`add_file` with arguments that fit `state()`."""
    fields = {"arch": "conv4", "input": "1x16x16", "mean": [0.4], "std": [0.3], "classes": CLASSES, "accuracy": 90}
    return add_file(pool, path, **fields | changes)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_add_file_converts_and_names_by_stem(pool, tmp_path, suffix):
    path, tensors = tmp_path / f"bird{suffix}", state(4)
    if suffix == ".safetensors":
        weights_file.write(path, tensors)
    else:
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    assert add_weights(pool, path, source="a page", authorization="letter").id == "bird"
    card = Pool.open(pool.path).cards[-1]
    assert (card.id, card.image, card.classes, card.accuracy) == ("bird", IMAGE, CLASSES, 90.0)
    assert np.array_equal(pool.load("bird")[0], net("conv4", IMAGE.shape, 3).layout.flatten(tensors).numpy())
    assert (pool.path / "weights/bird.safetensors").exists()
    assert add_weights(pool, path, id="second").id == "second"


def test_add_file_without_normalisation(pool, tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    add_weights(pool, tmp_path / "w.pt", mean=None, std=None, accuracy=None)
    card = pool.cards[-1]
    assert (card.image.mean, card.image.std, card.accuracy) == ((0.0,), (1.0,), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "16x16"}, "input '16x16': expected CHANNELSxHEIGHTxWIDTH, such as 3x32x32"),
        ({"input": "1x16x16x1"}, "input '1x16x16x1': expected"),
        ({"input": "0x16x16"}, "input.channels: input should be greater than or equal to 1"),
        ({"classes": list("abcd")}, "weights have 3 outputs, --classes names 4"),
        ({"classes": ["a", "b", "a"]}, "classes: class 'a' appears twice"),
        ({"mean": [0.1] * 3}, "mean: expected 1 values, got 3 - the model takes 1 channels"),
        ({"arch": "conv6"}, "arch: unknown architecture 'conv6'"),
        ({"id": "a"}, "id 'a' is taken"),
        ({"id": "a/../b"}, "id: 'a/../b': an id has"),
        ({"accuracy": -1}, "accuracy.reported: input should be greater"),
    ],
)
def test_add_file_usage(pool, tmp_path, changes, message):
    torch.save(state(), tmp_path / "w.pt")
    with pytest.raises(UsageError) as caught:
        add_weights(pool, tmp_path / "w.pt", **changes)
    assert str(caught.value).startswith(message)
    assert len(pool.cards) == len(Pool.open(pool.path).cards) == 2


def test_add_file_runs_the_weights_once(pool, tmp_path):
    torch.save(state() | {"head.weight": torch.zeros(3, 32)}, tmp_path / "w.pt")
    with pytest.raises(RejectedError, match=r"^w: gives the same logits for different images"):
        add_weights(pool, tmp_path / "w.pt")
    torch.save(state(arch="conv4-adaptive"), tmp_path / "s.pt")  # its shapes do not depend on the image
    with pytest.raises(RejectedError, match=r"^s: cannot run on images of \(1, 8, 8\)"):
        add_weights(pool, tmp_path / "s.pt", arch="conv4-adaptive", input="1x8x8")


def test_add_file_never_executes_a_pickle(pool, tmp_path):
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {marker}",)

    torch.save(state() | {"x": Malicious()}, tmp_path / "w.pt")
    with pytest.raises(RejectedError, match=r"posix.system"):
        add_weights(pool, tmp_path / "w.pt")
    assert not marker.exists()
    assert len(Pool.open(pool.path).cards) == 2


# --- what people write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [217.97], "std": [80.94]}, "mean: [217.97] is not of pixels in [0, 1]; if it is of pixels in 0-255, "
         "write 0.8548"),
        ({"std": [80.94]}, "std: [80.94] is not of pixels in [0, 1]; if it is of pixels in 0-255, write 0.3174"),
        ({"accuracy": 0.815}, "accuracy 0.815: give percent, 81.5 if this is a fraction"),
        ({"accuracy": 1}, "accuracy 1: give percent, 100 if this is a fraction"),
        ({"classes": ["a", "b", "c\u2028d"]}, "classes[2]: expected one line of printable text, got 'c\\u2028d'"),
    ],
)  # fmt: skip
def test_values_on_another_scale_are_refused_with_the_right_ones(pool, tmp_path, changes, message):
    torch.save(state(), tmp_path / "w.pt")
    with pytest.raises(UsageError) as caught:
        add_weights(pool, tmp_path / "w.pt", **changes)
    assert str(caught.value).startswith(message)


def test_a_manifest_on_another_scale_is_refused_too(pool):
    edit(pool, 0, mean=[127.5])
    with pytest.raises(RejectedError, match=r"teachers\[0\]\.mean: \[127\.5\] is not of pixels in \[0, 1\]"):
        Pool.open(pool.path)


def test_an_accuracy_below_chance_is_noted(pool):
    edit(pool, 0, accuracy={"reported": 0.9})
    assert Pool.open(pool.path).check()[0] == {
        "id": "a", "ok": True, "reason": "reports an accuracy of 0.9 %, below chance; is it a fraction, 90 %?"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "advice"),
    [("ckpt_epoch=09 best.pth", "--id ckpt_epoch-09-best"), ("模型.pt", "--id teacher"), ("caf\udce9.pt", "--id caf")],
)
def test_a_file_name_that_is_no_id_gets_a_proposal(pool, tmp_path, name, advice):
    torch.save(state(), tmp_path / "w.pt")
    weights = (tmp_path / "w.pt").rename(tmp_path / name)
    with pytest.raises(UsageError, match=r"cannot be the id of a teacher|not UTF-8") as caught:
        add_weights(pool, weights)
    assert str(caught.value).endswith(advice) or "rename it" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "id"), [("c.pth.tar", "c"), ("v1.2.ckpt", "v1.2"), ("pytorch_model.bin", "pytorch_model")]
)
def test_the_id_is_the_name_without_the_suffixes_of_weights(pool, tmp_path, name, id):
    torch.save(state(), tmp_path / name)
    assert add_weights(pool, tmp_path / name).id == id


# --- the first teacher


def test_a_refused_first_teacher_leaves_no_pool(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    for changes in ({"classes": list("abcd")}, {"arch": "conv6"}, {"mean": [100.0]}):
        with pytest.raises(UsageError):
            add_weights(Pool.at(tmp_path / "pool"), tmp_path / "w.pt", **changes)
    assert not (tmp_path / "pool").exists()
    add_weights(Pool.at(tmp_path / "pool"), tmp_path / "w.pt")
    assert [card.id for card in Pool.open(tmp_path / "pool").cards] == ["w"]
    assert [card.id for card in Pool.at(tmp_path / "pool").cards] == ["w"]


def test_the_first_teachers_of_many_at_once_are_all_kept(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    pools = [Pool.at(tmp_path / "pool") for _ in range(4)]

    def work(number: int) -> None:
        add_weights(pools[number], tmp_path / "w.pt", id=f"t{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {card.id for card in Pool.open(tmp_path / "pool").cards} == {f"t{number}" for number in range(4)}


def test_a_folder_of_other_things_is_no_new_pool(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "thesis.tex").touch()
    torch.save(state(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="is not an empty folder"):
        add_weights(Pool.at(tmp_path / "pool"), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="is a file"):
        Pool.at(tmp_path / "w.pt")
