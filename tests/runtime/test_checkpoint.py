"""Checkpoints: whole or absent, the last two, in the same bits, only what is new, and safetensors and JSON only."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open

from ray_dfml.errors import RejectedError
from ray_dfml.methods import bank as bank_of
from ray_dfml.runtime.checkpoint import Checkpoints
from ray_dfml.runtime.storage import Folder
from tests.runtime import toy
from tests.support import PROPERTY

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=8)
ARRAYS = st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(), st.text(max_size=8),
    ARRAYS, ARRAYS.map(torch.tensor), st.lists(st.integers(0, 9), max_size=3),
)  # fmt: skip
STATES = st.dictionaries(NAMES, st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3)))


def open_(path: Path) -> Checkpoints:
    """The checkpoints of a folder, as a new process finds them."""
    return Checkpoints(Folder(path))


def loaded(path: Path) -> list[Any]:
    """Rounds and state of the newest checkpoint."""
    found = open_(path).load()
    assert found is not None
    return [found[0].rounds, found[1]]


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def images(first: int, count: int, shape: tuple[int, ...] = (1, 8, 16)) -> np.ndarray:
    """uint8 images, each of noise of its own."""
    made = [np.random.default_rng(first + i).integers(0, 256, shape, dtype=np.uint8) for i in range(count)]
    return np.stack(made) if made else np.zeros((0, *shape), np.uint8)


@PROPERTY
@given(states=st.lists(STATES, min_size=1, max_size=4))
def test_nested_states_come_back_in_the_same_bits(tmp_path_factory: Any, states: list[dict[str, Any]]) -> None:
    """Checkpoints follow each other, written by one process, or each by a new one."""
    for fresh in (False, True):
        folder = tmp_path_factory.mktemp("c")
        writer = open_(folder)
        for rounds, state in enumerate(states, 1):
            if fresh:
                writer = open_(folder)
                writer.load()
            saved = writer.save(rounds, state, {"round": rounds})
            found = open_(folder).load()
            assert found is not None
            assert found[0] == saved
            assert found[2] == {"round": rounds}
            toy.assert_equal(found[1], state)


@PROPERTY
@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5)), min_size=1, max_size=14),
    capacity=st.integers(1, 9),
    restart=st.booleans(),
)
def test_a_bank_comes_back_whatever_was_added_and_dropped(
    tmp_path_factory: Any, steps: list[tuple[str, int]], capacity: int, restart: bool
) -> None:
    """Two tasks of one class, or more than it can hold, in one round too; files stay at twice the bank."""
    folder = tmp_path_factory.mktemp("bank")
    writer, bank, made = open_(folder), {}, 0
    for rounds, (key, count) in enumerate(steps, 1):
        for part in (count, rounds % 3):
            if part:
                bank = bank_of.add(bank, key, images(made, part), capacity)
                made += part
        if restart:
            writer = open_(folder)
            writer.load()
        writer.save(rounds, {"bank": bank, "theta": torch.full((50,), float(rounds))})
        if restart or rounds == len(steps):
            toy.assert_equal(loaded(folder), [rounds, {"bank": bank, "theta": torch.full((50,), float(rounds))}])
    held = json.loads((folder / f"round-{len(steps) - 1:06d}.json").read_text())["files"]
    size = sum(sum(x.nbytes for x in safetensors.numpy.load_file(folder / name).values()) for name in held)
    assert size <= 2 * (sum(x.nbytes for x in bank.values()) + 200)


def test_a_checkpoint_writes_what_is_new(tmp_path: Path) -> None:
    """A bank of 64 classes of 400 images each, of which a round adds 30 to 20: its bytes follow the new ones."""
    rows, new, touched = 400, 30, 20
    bank = {f"c/{i:02d}": images(1000 * i, rows) for i in range(64)}
    writer = open_(tmp_path)
    writer.save(1, {"bank": bank, "theta": torch.zeros(1000)})
    whole = sum(file.stat().st_size for file in tmp_path.iterdir())
    written = []
    for r in range(2, 8):
        before = {p.name for p in tmp_path.iterdir()}
        for i in range(touched):
            key = f"c/{(i + 7 * r) % 64:02d}"
            bank = bank_of.add(bank, key, images(10**6 * r + 100 * i, new), rows)
        writer.save(r, {"bank": bank, "theta": torch.full((1000,), float(r))})
        fresh = [p for p in tmp_path.iterdir() if p.name not in before]
        assert sorted(p.name.split("-")[0] for p in fresh) == ["bank", "round", "theta"]
        written.append(sum(p.stat().st_size for p in fresh if p.suffix == ".safetensors"))
    image = images(0, 1).nbytes
    assert max(written) < 1.2 * touched * new * image + 4000 + 10_000
    assert max(written) < whole / 30
    assert loaded(tmp_path)[0] == 7
    toy.assert_equal(loaded(tmp_path)[1]["bank"], bank)


def test_images_of_teachers_that_did_not_move_are_not_written_again(tmp_path: Path) -> None:
    """As PURER's: floats and moments, in new objects where a teacher was visited."""
    store = {f"t{i}": {name: torch.randn(20, 3, 8, 8) for name in "xmv"} | {"step": 0} for i in range(50)}
    writer = open_(tmp_path)
    writer.save(1, {"images": store})
    whole = (tmp_path / "images-000000.safetensors").stat().st_size
    for r in range(2, 5):
        moved = {name: torch.randn(20, 3, 8, 8) for name in "xmv"} | {"step": r}
        store = {**store, f"t{r}": moved, f"t{r + 20}": moved}
        writer.save(r, {"images": store})
        assert (tmp_path / f"images-{r - 1:06d}.safetensors").stat().st_size < whole / 20
    toy.assert_equal(loaded(tmp_path)[1]["images"], store)


def test_a_file_that_is_needed_less_and_less_goes(tmp_path: Path) -> None:
    store = {f"t{i}": torch.randn(40, 16) for i in range(8)}
    writer = open_(tmp_path)
    for r in range(1, 40):
        store = {**store, f"t{r % 7}": torch.randn(40, 16)}
        writer.save(r, {"images": store})
        held = json.loads((tmp_path / f"round-{r - 1:06d}.json").read_text())["files"]
        assert sum(file["bytes"] for file in held.values()) <= 2 * 8 * 40 * 16 * 4
    assert "images-000000.safetensors" not in names(tmp_path), "t7 never moved, and lives elsewhere now"
    toy.assert_equal(loaded(tmp_path)[1]["images"], store)


def test_a_change_in_place_is_not_missed(tmp_path: Path) -> None:
    """A change of a tensor is noticed, and NumPy arrays refuse changes."""
    state: dict[str, Any] = {"theta": torch.zeros(3), "bank": {"a": images(0, 2)}}
    writer = open_(tmp_path)
    writer.save(1, state)
    state["theta"] += 1
    writer.save(2, state)
    assert loaded(tmp_path)[1]["theta"].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="read-only"):
        state["bank"]["a"][0] = 0


def test_arrays_that_may_not_be_written_to_are_saved_without_a_warning(tmp_path: Path) -> None:
    """Arrays from the object store are read-only."""
    data = np.arange(6, dtype=np.uint8)
    data.flags.writeable = False
    open_(tmp_path).save(1, {"bank": {"a/b": data}})
    assert loaded(tmp_path)[1]["bank"]["a/b"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_view_and_its_base_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    open_(tmp_path).save(1, {"one": {"all": whole, "column": whole[:, 1]}})
    _, back = loaded(tmp_path)
    back["one"]["column"] += 1
    assert back["one"]["all"].tolist() == whole.tolist()
    assert back["one"]["column"].tolist() == [2.0, 5.0]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    writer = open_(tmp_path)
    for r in range(1, 6):
        writer.save(r, {"r": r, "x": torch.full((2,), float(r)), "same": torch.ones(4)})
    assert names(tmp_path) == [
        "round-000003.json", "round-000004.json", "same-000000.safetensors", "x-000003.safetensors",
        "x-000004.safetensors",
    ]  # fmt: skip
    assert loaded(tmp_path)[0] == 5
    (tmp_path / "round-000004.json").rename(tmp_path / "aside")
    assert loaded(tmp_path)[1]["x"].tolist() == [4.0, 4.0], "the one before is whole"


def test_there_is_none_in_an_empty_folder(tmp_path: Path) -> None:
    assert open_(tmp_path).load() is None


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    """The disk is too full for one of three files, two of arrays and the JSON. The next attempt succeeds."""
    writer = open_(tmp_path)
    states = [{"x": torch.full((3,), float(r)), "y": torch.full((2,), float(r))} for r in range(3)]
    for r in range(2):
        writer.save(r + 1, states[r])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    plain, calls = getattr(os, step.removeprefix("os.")), []

    def fail(*words: Any) -> Any:
        calls.append(step)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return plain(*words)

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="No space left"):
            writer.save(3, states[2])
    assert before.items() <= {p.name: p.read_bytes() for p in tmp_path.iterdir()}.items()
    toy.assert_equal(loaded(tmp_path), [2, states[1]])
    writer.save(3, states[2])
    toy.assert_equal(loaded(tmp_path), [3, states[2]])
    assert names(tmp_path) == [
        "round-000001.json", "round-000002.json", *(f"{x}-00000{r}.safetensors" for x in "xy" for r in (1, 2)),
    ]  # fmt: skip


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    open_(tmp_path).save(1, {"x": torch.ones(3)})
    (tmp_path / ".x-000001.safetensors.ab12.tmp").write_bytes(b"half")
    (tmp_path / "x-000001.safetensors").write_bytes(b"whole, but its round was not saved")
    writer = open_(tmp_path)
    found = writer.load()
    assert found is not None
    writer.save(2, found[1] | {"y": 1})
    assert names(tmp_path) == ["round-000000.json", "round-000001.json", "x-000000.safetensors"]


@pytest.mark.parametrize("file", ["round-000001.json", "x-000001.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_cut_file_is_rejected_in_one_line(tmp_path: Path, file: str, keep: int) -> None:
    writer = open_(tmp_path)
    for r in (1, 2):
        writer.save(r, {"x": torch.full((100,), float(r))})
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:keep])
    message = r"round-000001.json: not a whole checkpoint .*; to go on from round-000000.json, move it elsewhere$"
    with pytest.raises(RejectedError, match=message) as error:
        open_(tmp_path).load()
    assert "\n" not in str(error.value)
    assert "delete" not in str(error.value)
    path.rename(tmp_path / "elsewhere")
    (tmp_path / "round-000001.json").unlink(missing_ok=True)
    assert loaded(tmp_path)[0] == 1


@pytest.mark.parametrize("file", ["round-000000.json", "x-000000.safetensors"])
def test_what_may_not_be_read_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The true reason, and no advice to remove what may be good. The one who runs the tests may read everything."""
    open_(tmp_path).save(1, {"x": torch.ones(3)})
    plain = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == file:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(RejectedError) as error:
        open_(tmp_path).load()
    assert str(error.value) == f"{tmp_path / file}: cannot be read: Permission denied"


def test_a_missing_file_of_arrays_is_named(tmp_path: Path) -> None:
    open_(tmp_path).save(1, {"x": torch.ones(3)})
    (tmp_path / "x-000000.safetensors").unlink()
    message = r"round-000000.json: not a whole checkpoint \(x-000000.safetensors is missing\); to go on from the start"
    with pytest.raises(RejectedError, match=message):
        open_(tmp_path).load()


def test_what_others_put_into_the_folder_stays(tmp_path: Path) -> None:
    """Such as a checkpoint that was moved away, as the message on a damaged one asks for."""
    (tmp_path / "damaged").mkdir()
    for name in ("damaged/round-000007.json", "round-000009.json.bak", "round-9 (copy).json", "notes.txt"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    writer = open_(tmp_path)
    assert writer.load() is None
    for r in (1, 2, 3):
        writer.save(r, {"x": torch.full((3,), float(r))})
    assert set(before) < set(names(tmp_path))
    assert loaded(tmp_path)[0] == 3


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_modes_of_the_user(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        open_(tmp_path).save(1, {"x": torch.ones(3)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_checkpoint_of_the_first_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "round-000004.safetensors").write_bytes(b"theta")
    message = r"round-000004.safetensors: another version of ray_dfml wrote this checkpoint; finish the run with"
    with pytest.raises(RejectedError, match=message) as error:
        open_(tmp_path).load()
    assert error.value.exit_code == 3


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    open_(tmp_path).save(1, {"x": 1})
    path = tmp_path / "round-000000.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(RejectedError, match=r"it has format 3, this version of ray_dfml reads 2"):
        open_(tmp_path).load()


def test_safetensors_and_json_alone_read_a_run(free_run: Path) -> None:
    """Tensors are tensors and the rest is JSON: nothing is executed to read it."""
    files = sorted((free_run / "checkpoints").iterdir())
    assert {f.suffix for f in files} == {".safetensors", ".json"}
    assert [f.name for f in files if f.suffix == ".json"] == ["round-000004.json", "round-000005.json"]
    held: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np") as handle:
                held |= set(handle.keys())
    assert {'["theta"]', '["theta_g"]', '["adam", "m"]', '["adam_g", "v"]'} <= held
    assert any(name.startswith('["bank", ') for name in held)
    assert '["best", "weights", "theta"]' in held
    assert not any(f.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for f in free_run.rglob("*") if f.is_file())
