"""What the reader of strangers' weights accepts, what it refuses, and that refusing costs and executes nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ray_dfml.core.net import net
from ray_dfml.data import weights_file
from ray_dfml.data.weights_file import Limits
from ray_dfml.errors import RejectedError
from ray_dfml.types import ImageSpec
from tests.data.pools import CLASSES, IMAGE, state
from tests.support import PROPERTY

WAYS = len(CLASSES)


def header_file(path: Path, header: Any, values: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header, true or not."""
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)
    return path


def rejection(path: Path, **limits: int) -> str:
    """The one line that `read` gives for a bad file."""
    with pytest.raises(RejectedError) as caught:
        weights_file.read(path, limits=Limits(**limits))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message


@PROPERTY
@given(
    shapes=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8})?", fullmatch=True).filter(lambda name: "module" not in name),
        st.lists(st.integers(0, 4), max_size=4),
    ),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_what_is_saved_is_read_as_float32(tmp_path_factory, shapes, dtype):
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("read") / "w.safetensors"
    weights_file.write(path, tensors)
    found = weights_file.read(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float())


def test_write_copes_with_shared_storage_and_views(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    weights_file.write(tmp_path / "w.safetensors", {"a": base, "b": base, "c": base.t(), "d": base[:, 1]})
    found = weights_file.read(tmp_path / "w.safetensors")
    assert torch.equal(found["c"], base.t())
    assert torch.equal(found["d"], base[:, 1])


def test_same_tensors_give_the_same_bytes():
    tensors = state()
    backwards = dict(reversed(tensors.items()))
    assert weights_file.to_safetensors(tensors) == weights_file.to_safetensors(backwards)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "w.safetensors"
    weights_file.write(path, {"a": torch.ones(2)})

    def fail(*_: Any) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match=r"pulled the plug"):
        weights_file.write(path, {"a": torch.zeros(2)})
    assert torch.equal(weights_file.read(path)["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["w.safetensors"]


# --- safetensors


def test_truncated_file(tmp_path):
    path = tmp_path / "w.safetensors"
    weights_file.write(path, state())
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert "is an empty file; copy or download it again" in rejection(path)
    for size in (7, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "header" in rejection(path)
    assert rejection(path).endswith("; it was cut short, copy it again")
    path.write_bytes(whole + b"\0")
    assert "promises" in rejection(path)


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 1000])
def test_header_bomb_is_refused_before_it_is_parsed(tmp_path, length):
    assert f"header of {length} bytes" in rejection(header_file(tmp_path / "w.safetensors", {}, length=length))


def test_limits(tmp_path):
    path = tmp_path / "w.safetensors"
    weights_file.write(path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    assert "more than the limit of 10" in rejection(path, file_bytes=10)
    assert "limit 16" in rejection(path, header_bytes=16)
    assert "2 tensors, more than the limit of 1" in rejection(path, tensors=1)


@pytest.mark.parametrize(
    ("header", "values", "reason"),
    [
        ({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}, 4, "does not take the 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "lacks"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "lacks"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, 4, "dtype 'U8'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 8, "promises 4 bytes"),
        # two tensors over the same four bytes, and a hole after them
        (
            {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"},
            8,
            "not a safetensors file",
        ),
        ({"a\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4, "printable"),
        ([1, 2], 0, "not an object"),
    ],
)
def test_header_that_lies(tmp_path, header, values, reason):
    assert reason in rejection(header_file(tmp_path / "w.safetensors", header, bytes(values)))


def test_header_that_is_not_json(tmp_path):
    path = tmp_path / "w.safetensors"
    for text in (b"\xff\xfe{}", b"{", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert "not JSON" in rejection(path)


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in rejection(tmp_path / "pipe.safetensors")
    (tmp_path / "folder").mkdir()
    assert "not a regular file" in rejection(tmp_path / "folder")
    assert "cannot be read: No such file" in rejection(tmp_path / "absent.safetensors")


def test_parts_that_wrappers_put_in_names_are_taken_out(tmp_path):
    names = ["_orig_mod.module.a.b", "module._orig_mod.a.c", "d.module.e._orig_mod.f", "module_list.g"]
    weights_file.write(tmp_path / "w.safetensors", {name: torch.ones(1) for name in names})
    assert set(weights_file.read(tmp_path / "w.safetensors")) == {"a.b", "a.c", "d.e.f", "module_list.g"}
    weights_file.write(tmp_path / "w.safetensors", {"a": torch.ones(1), "module.a": torch.ones(1)})
    assert "two tensors have one name" in rejection(tmp_path / "w.safetensors")


# --- fit and values


def test_fit_gives_the_order_of_the_architecture():
    tensors = state()
    fitted = weights_file.fit(dict(sorted(tensors.items(), reverse=True)), "conv4", IMAGE, WAYS)
    model = net("conv4", IMAGE.shape, WAYS)
    assert list(fitted) == [*model.layout.shapes, *model.stats_layout.shapes]


@pytest.mark.parametrize("arch", ["conv4", "conv4-64", "conv4-adaptive", "resnet10", "resnet18"])
def test_parts_are_the_layouts_of_the_network(arch):
    image = ImageSpec(channels=3, height=20, width=33, mean=(0.0,) * 3, std=(1.0,) * 3)
    model, parts = net(arch, image.shape, 4), weights_file.parts(arch, image, 4)
    assert list(parts.parameters.shapes.items()) == list(model.layout.shapes.items())
    assert list(parts.statistics.shapes.items()) == list(model.stats_layout.shapes.items())


def test_parts_of_absurd_sizes_allocate_nothing():
    image = ImageSpec(channels=3, height=4096, width=4096, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert weights_file.parts("conv4", image, 100_000).parameters.numel > 10**11


def without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in state().items() if n != name}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            without("head.bias"),
            "no tensor head.bias [3], which conv4 for 1x16x16 images and 3 classes needs",
        ),
        (
            without("head.bias") | {"fc.bias": torch.zeros(3)},
            "needs; it has fc.bias [3] instead",
        ),
        (
            state() | {"extra": torch.zeros(2, 2)},
            "unexpected tensor extra [2, 2]",
        ),
        (
            state() | {"head.weight": torch.zeros(5, 32)},
            "head.weight: conv4 for 1x16x16 images and 3 classes needs shape [3, 32], the file has [5, 32]",
        ),
        (state() | {"head.bias": torch.zeros(3, dtype=torch.int64)}, "head.bias: expected floating point"),
        ({}, "no tensor blocks.0.conv.weight [32, 1, 3, 3]"),
    ],
)
def test_fit_names_the_tensor_and_both_shapes(tensors, reason):
    with pytest.raises(RejectedError) as caught:
        weights_file.fit(tensors, "conv4", IMAGE, WAYS)
    assert reason in str(caught.value)


def test_images_too_small_for_the_architecture():
    image = ImageSpec(channels=1, height=8, width=8, mean=(0.0,), std=(1.0,))
    with pytest.raises(RejectedError, match=r"conv4 cannot take 1x8x8 images"):
        weights_file.parts("conv4", image, WAYS)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("head.weight", float("nan"), "head.weight: 1 of 96 values are NaN or infinite"),
        ("head.bias", float("-inf"), "head.bias: 1 of 3 values are NaN or infinite"),
        ("blocks.1.norm.running_mean", float("inf"), "running_mean: 1 of 32"),
        ("blocks.1.norm.running_var", -1e-6, "running_var: a running variance is negative (-1e-06)"),
    ],
)
def test_bad_values(name, value, reason):
    tensors = {n: t.clone() for n, t in state().items()}
    weights_file.check_values(tensors)
    tensors[name].view(-1)[0] = value
    with pytest.raises(RejectedError) as caught:
        weights_file.check_values(tensors)
    assert reason in str(caught.value)


def test_double_precision_that_overflows_is_not_finite(tmp_path):
    safetensors.torch.save_file({"a": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "w.safetensors")
    with pytest.raises(RejectedError, match=r"NaN or infinite"):
        weights_file.check_values(weights_file.read(tmp_path / "w.safetensors"))
