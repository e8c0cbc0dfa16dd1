"""Checkpoints of other programs: known by content, the part that fits is taken and said, and nothing is executed."""

import io
import os
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from ray_dfml.core.net import net
from ray_dfml.data import foreign, weights_file
from ray_dfml.data.weights_file import LIMITS, Limits
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.types import ImageSpec
from tests.data.pools import CLASSES, IMAGE, state

WAYS = len(CLASSES)
LARGE = ImageSpec(channels=3, height=64, width=64, mean=(0.5,) * 3, std=(0.25,) * 3)


def read(path: Path, limits: Limits = LIMITS) -> foreign.Found:
    return foreign.read(path, "conv4", IMAGE, WAYS, limits=limits)


def rejection(path: Path, **limits: int) -> str:
    """The one line that `read` gives for a bad file, without its name."""
    with pytest.raises(RejectedError) as caught:
        read(path, Limits(**limits))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def same(found: foreign.Found, wanted: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == wanted.keys()
    assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)


# -------------------------------------------------------------------------------------------------------- what is taken


def test_a_plain_state_dict_needs_no_word(tmp_path):
    counters = {"blocks.0.norm.num_batches_tracked": torch.tensor(7)}
    found = read(saved(tmp_path / "w.pt", OrderedDict(state() | counters)))
    same(found, state())
    assert found.notes == []
    weights_file.write(tmp_path / "w.safetensors", state())
    assert read(tmp_path / "w.safetensors").notes == []


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module._orig_mod.module."]
)
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_wrappers_in_any_order_and_depth(tmp_path, prefix, form):
    path, tensors = tmp_path / "w", prefixed(state(), prefix)
    torch.save(tensors, path) if form == "torch" else weights_file.write(path, tensors)
    found = read(path)
    same(found, state())
    used = [w for w in ("module", "_orig_mod") if f"{w}." in prefix]
    assert found.notes == [f"dropped {' and '.join(repr(f'{w}.') for w in used)} from their names"]


def test_a_wrapper_of_an_inner_module(tmp_path):
    tensors = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state().items()}
    same(read(saved(tmp_path / "w.pt", tensors)), state())


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "model_state_dict", "net", "params", "state", "model_sd", "network", "weights", "backbone"],
)
def test_a_wrapper_of_any_name(tmp_path, key):
    content = {"epoch": 9, key: prefixed(state(), "module."), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    found = read(saved(tmp_path / "w.pt", content))
    same(found, state())
    assert found.notes == [f"took the tensors in {key!r}", "dropped 'module.' from their names"]


def test_the_name_of_the_model_beside_its_weights(tmp_path):
    found = read(saved(tmp_path / "w.pt", {"model": "conv4", "model_args": {}, "state_dict": state()}))
    same(found, state())
    assert found.notes == ["took the tensors in 'state_dict'"]


def test_weights_deep_inside(tmp_path):
    found = read(saved(tmp_path / "w.pt", {"run": [{"best": {"net": state()}}], "name": torch.ones(2)}))
    same(found, state())
    assert found.notes == ["took the tensors in 'run[0].best.net'"]
    assert "no tensor" in rejection(
        saved(tmp_path / "d.pt", {"a": {"b": {"c": {"d": {"e": state()}}}}, "x": torch.ones(1)})
    )


def test_a_prefix_of_a_larger_module(tmp_path):
    content = {"state_dict": prefixed(state(), "model.") | {"loss.weight": torch.ones(4)}}
    found = read(saved(tmp_path / "w.ckpt", content))
    same(found, state())
    assert found.notes == ["took the tensors in 'state_dict'", "dropped the prefix 'model.' of their names"]


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": state(), "state_dict_ema": state(1)},
        {"model_ema": {"shadow": state(1)}, "model": state()},
        prefixed(state(), "model.") | prefixed(state(1), "ema_model."),
    ],
)
def test_averaged_weights_beside_plain_ones_are_mentioned(tmp_path, content):
    found = read(saved(tmp_path / "w.pt", content))
    same(found, state())
    assert found.notes[-1].startswith("left the averaged weights (EMA) in '")
    assert found.notes[-1].endswith("to use them, save that part on its own")


def test_averaged_weights_alone_are_taken_and_said(tmp_path):
    found = read(saved(tmp_path / "w.pt", {"ema": state(1), "other": {"a": torch.ones(2)}}))
    same(found, state(1))
    assert found.notes == [
        "took the tensors in 'ema'", "these are averaged weights (EMA); the file has no others that fit"
    ]  # fmt: skip


def test_two_parts_that_fit_are_refused_unless_they_are_equal(tmp_path):
    text = rejection(saved(tmp_path / "w.pt", {"student": state(), "teacher": state(1)}))
    assert text == "several parts fit ('student', 'teacher'): save the one that is meant on its own"
    same(read(saved(tmp_path / "e.pt", {"best": state(), "last": state()})), state())


def test_the_nearest_part_says_what_is_wrong(tmp_path):
    lacking = {name: tensor for name, tensor in state().items() if name != "head.bias"}
    text = rejection(saved(tmp_path / "w.pt", {"optimizer": {"lr": torch.ones(1)}, "net": lacking}))
    assert text.startswith("in 'net': no tensor head.bias [3], which conv4 for 1x16x16 images and 3 classes needs")
    with pytest.raises(UsageError, match="weights have 5 outputs, --classes names 3"):
        read(saved(tmp_path / "h.pt", {"net": state(ways=5)}))


def test_parameters_lose_their_gradient(tmp_path):
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in state().items()}
    assert not any(t.requires_grad for t in read(saved(tmp_path / "w.pt", tensors)).tensors.values())


@pytest.mark.parametrize("name", ["w.ckpt", "w.pth.tar", "pytorch_model.bin", "w", "w.safetensors"])
def test_the_content_decides_not_the_suffix(tmp_path, name):
    same(read(saved(tmp_path / name, state())), state())


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer, not the file"),
        (b"<!DOCTYPE html><html></html>", "is a web page, not the file itself; download it again"),
        (b"\n  <HTML>", "is a web page"),
        (b'{"error": "not found"}', "is an error message of a server"),
        (b"", "is an empty file; copy or download it again"),
        (b"nothing like it", "is neither safetensors nor what torch.save writes"),
        (b"\x1f\x8bxx", "is a gzip archive; unpack it first"),
        (b"\x80\x02}q\x00.", "is a bare pickle, which is never loaded"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_something_else(tmp_path, content, reason, suffix):
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert rejection(tmp_path / f"w{suffix}").startswith(reason)


def test_a_file_that_was_cut(tmp_path):
    path = saved(tmp_path / "w.pt", state())
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        assert "cut short; copy it again" in rejection(path)
    weights_file.write(path, state())
    path.write_bytes(path.read_bytes()[:-4])
    assert "cut short, copy it again" in rejection(path)


def test_old_formats_are_named(tmp_path):
    torch.save(state(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert "format that torch.save wrote before version 1.6; re-save it" in rejection(tmp_path / "w.pt")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "w.pt", "w.pt")
    assert "is a tar archive; unpack it" in rejection(tmp_path / "w.tar")


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "absent.pt")


class Malicious:
    """Unpickled by a trusting reader, this runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_not_executed(tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "w.pt"
    torch.save(state() | {"x": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
    message = rejection(path)
    assert not marker.exists()
    assert "safetensors.torch.save_file on the machine that made it" in message
    if zipped:
        assert "posix.system" in message
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file would have done harm"


def test_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "w.pt")
    assert "torch.nn.modules.linear.Linear" in rejection(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list without named tensors"),
        (torch.zeros(1), "holds a Tensor without named tensors"),
        ({}, "holds an empty dict without named tensors"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds a dict without named tensors"),
        ({1: torch.zeros(1)}, "holds a dict without named tensors"),
        (state() | {"extra": torch.zeros(2)}, "unexpected tensor extra [2]"),
        (state() | {"head.bias": torch.zeros(3, dtype=torch.complex64)}, "torch.complex64"),
        (state() | {"head.bias": torch.zeros(3, device="meta")}, "cannot be used"),
        (state() | {"head.bias": torch.ones(3).to_sparse()}, "sparse"),
        (state() | {"extra": torch.zeros(1).expand(10**12)}, "more than the limit"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, reason):
    assert reason in rejection(saved(tmp_path / "w.pt", content))


def test_what_refers_to_itself_is_read_once(tmp_path):
    knot: dict[str, Any] = {"a": torch.zeros(1)}
    knot |= {str(n): knot for n in range(50)}
    assert "no tensor blocks.0.conv.weight" in rejection(saved(tmp_path / "w.pt", knot))


def rezip(path: Path, *, pickle: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the records of a `.pt` again, with another pickle or compressed."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as source, zipfile.ZipFile(path, "w", compression) as target:
        for info in source.infolist():
            record = source.read(info)
            target.writestr(info.filename, pickle if pickle and info.filename.endswith("data.pkl") else record)


def test_doctored_archives(tmp_path):
    path = saved(tmp_path / "w.pt", {"a": torch.arange(4.0)})
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        pickle = archive.read(name)
    rezip(path, pickle=pickle.replace(b"K\x04", b"K\xc8"))  # 200 numbers promised, 4 stored
    assert "not a state dict" in rejection(path)
    rezip(path, pickle=pickle, compression=zipfile.ZIP_DEFLATED)
    assert "compressed records" in rejection(path)
    rezip(path, pickle=pickle)
    assert "pickle is larger" in rejection(path, header_bytes=10)
    assert torch.equal(foreign.parse(path.read_bytes())["a"], torch.arange(4.0))
    rezip(path, pickle=pickle[:20])
    assert "was not loaded" in rejection(path) or "not a state dict" in rejection(path)


def test_limits(tmp_path):
    path = saved(tmp_path / "w.pt", {"net": state()})
    assert "more than the limit of 10" in rejection(path, file_bytes=10)
    assert "tensors, more than the limit of 1" in rejection(path, tensors=1)
    assert net("conv4", IMAGE.shape, WAYS).layout.numel == sum(
        t.numel() for name, t in read(path).tensors.items() if "running" not in name
    )


# -------------------------------------------------------------------------------------- networks of other libraries


def torchvision_state(name: str, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=3, **options).state_dict()


def test_a_checkpoint_of_torchvision_under_a_wrapper_beside_averaged_weights(tmp_path):
    plain = torchvision_state("resnet18")
    averaged = {name: 2 * value for name, value in plain.items()}
    content = {"state_dict": prefixed(plain, "model.module."), "model_ema": averaged, "epoch": 3}
    found = foreign.read(saved(tmp_path / "w.pt", content), "torchvision:resnet18", LARGE, 3)
    same(found, {name: value for name, value in plain.items() if not name.endswith("num_batches_tracked")})
    assert found.notes == [
        "took the tensors in 'state_dict'",
        "dropped the prefix 'model.' of their names",
        "dropped 'module.' from their names",
        "left the averaged weights (EMA) in 'model_ema'; to use them, save that part on its own",
    ]


def test_heads_that_only_training_uses_are_left_out(tmp_path):
    state = torchvision_state("googlenet", aux_logits=True, init_weights=False)
    found = foreign.read(saved(tmp_path / "w.pt", state), "torchvision:googlenet", LARGE, 3)
    assert found.notes == ["left out aux1 and aux2, which only training uses"]
    assert found.tensors.keys() == {n for n in state if not n.startswith("aux") and not n.endswith("_tracked")}


def test_tables_that_a_network_computes_are_checked_and_left_out(tmp_path):
    state = torchvision_state("swin_t")
    tables = {name for name in state if name.endswith("relative_position_index")}
    found = foreign.read(saved(tmp_path / "w.pt", state), "torchvision:swin_t", LARGE, 3)
    assert tables
    assert found.tensors.keys() == state.keys() - tables
    state[min(tables)] = state[min(tables)] + 1
    with pytest.raises(RejectedError, match=r"unexpected tensor features\.1\.0\.attn\.relative_position_index"):
        foreign.read(saved(tmp_path / "w.pt", state), "torchvision:swin_t", LARGE, 3)


def test_the_number_of_outputs_is_said_for_any_network(tmp_path):
    path = saved(tmp_path / "w.pt", torchvision_state("squeezenet1_1"))
    with pytest.raises(UsageError, match=r"^weights have 3 outputs, --classes names 5$"):
        foreign.read(path, "torchvision:squeezenet1_1", LARGE, 5)
