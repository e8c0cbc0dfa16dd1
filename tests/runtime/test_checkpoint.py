"""Checkpoints: whole or absent, the last two, read back in the same bits, and safetensors only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import SafetensorError, safe_open

from ray_dfml.errors import RejectedError
from ray_dfml.runtime import checkpoint
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


@PROPERTY
@given(state=STATES, number=st.integers(0, 10**6 - 1))
def test_nested_states_come_back_in_the_same_bits(tmp_path_factory: Any, state: dict[str, Any], number: int) -> None:
    folder = tmp_path_factory.mktemp("c")
    found, back = checkpoint.load(checkpoint.save(folder, number, state))
    assert found == number
    toy.assert_equal(back, state)


def test_arrays_that_may_not_be_written_to_are_saved_without_a_warning(tmp_path: Path) -> None:
    """What arrives from the object store is read-only."""
    images = np.arange(6, dtype=np.uint8)
    images.flags.writeable = False
    _, back = checkpoint.load(checkpoint.save(tmp_path, 0, {"bank": {"a/b": images}}))
    assert back["bank"]["a/b"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_view_and_its_base_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    _, back = checkpoint.load(checkpoint.save(tmp_path, 0, {"all": whole, "column": whole[:, 1]}))
    back["column"] += 1
    assert back["all"].tolist() == whole.tolist()
    assert back["column"].tolist() == [2.0, 5.0]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for r in range(5):
        checkpoint.save(tmp_path, r, {"r": r})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000003.safetensors", "round-000004.safetensors"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest) == (4, {"r": 4})


def test_there_is_none_in_an_empty_folder(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    for r in range(2):
        checkpoint.save(tmp_path, r, {"x": torch.full((3,), float(r))})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ray_dfml.runtime.checkpoint.{step}", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, {"x": torch.zeros(3)})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_half_written_temporary_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 0, {"x": torch.ones(3)})
    (tmp_path / "round-000001.tmp").write_bytes(path.read_bytes()[:20])
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load(checkpoint.save(tmp_path, 1, {"x": 1})) == (1, {"x": 1})


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_cut_file_is_rejected_in_one_line(tmp_path: Path, keep: int) -> None:
    path = checkpoint.save(tmp_path, 0, {"x": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RejectedError, match=r"not a readable checkpoint .*; delete it") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_safetensors_alone_reads_a_run(free_run: Path) -> None:
    """Tensors are tensors and the rest is JSON in the header: nothing is executed to read it."""
    files = sorted((free_run / "checkpoints").iterdir())
    assert [f.suffix for f in files] == [".safetensors", ".safetensors"]
    with safe_open(files[-1], framework="np") as handle:
        assert set(handle.metadata()) == {"round", "tree"}
        names = set(handle.keys())
    assert {'["theta"]', '["theta_g"]', '["adam", "m"]', '["adam_g", "v"]', '["best", "weights", "theta"]'} <= names
    assert any(name.startswith('["bank", ') for name in names)
    assert not any(f.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for f in free_run.rglob("*") if f.is_file())


def test_a_foreign_safetensors_file_is_rejected(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "round-000000.safetensors")
    with pytest.raises(RejectedError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "round-000000.safetensors")
    with pytest.raises(SafetensorError):
        safe_open(__file__, framework="pt").__enter__()
