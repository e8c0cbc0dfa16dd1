"""Files of weights that somebody else made: bounded, checked before anything is allocated, and never executed.

`read` gives named tensors, `fit` matches them to an architecture, `check_values` looks at the numbers, `write` saves.
The only format written is safetensors. The only pickle read is a plain state dict, through `weights_only=True`.
"""

import functools
import io
import json
import math
import os
import pickle
import re
import stat
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ray_dfml.core.backbones import BACKBONES
from ray_dfml.core.net import layouts
from ray_dfml.core.weights import Layout
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.types import ImageSpec, size_text

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
_PREFIXES = ("module.", "_orig_mod.")
_RESAVE = "re-save it with safetensors.torch.save_file on the machine that made it"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask for."""

    file_bytes: int = 2 << 30
    """Of the file, and of all tensors together."""
    header_bytes: int = 16 << 20
    """Of the part that is parsed: the JSON header of safetensors, the pickle of a `.pt`."""
    tensors: int = 10_000


LIMITS = Limits()


class Parts(NamedTuple):
    """Names and shapes of a classifier's tensors: parameters `[p]`, running batch-norm statistics `[k]`."""

    parameters: Layout
    statistics: Layout


@functools.lru_cache(maxsize=256)
def _parts(arch: str, shape: tuple[int, int, int], ways: int) -> Parts:
    found = Parts(*layouts(BACKBONES[arch](*shape, ways)))
    if 0 in found.parameters.sizes:
        raise RejectedError(f"{arch} cannot take {size_text(shape)} images: they are too small")
    return found


def parts(arch: str, image: ImageSpec, ways: int) -> Parts:
    """Layouts of an architecture for images and a number of classes. Allocates nothing, whatever the sizes.

    Raises KeyError for a name outside BACKBONES, RejectedError where such images leave a layer without weights.
    """
    return _parts(arch, image.shape, ways)


def read(path: Path, *, limits: Limits = LIMITS) -> dict[str, Tensor]:
    """Named CPU tensors of a `.safetensors`, `.pt` or `.pth` file; floating point comes back as float32.

    A `module.` prefix common to all names (DataParallel) and `num_batches_tracked` are dropped; of a checkpoint
    `{"state_dict": ...}` or `{"model": ...}` that part is taken. Values are not looked at (`check_values`).
    Raises UsageError for a missing file or another suffix, RejectedError for everything that is wrong inside.
    """
    parse = {".safetensors": from_safetensors, ".pt": _from_torch, ".pth": _from_torch}.get(path.suffix.lower())
    if parse is None:
        raise UsageError(f"{path}: weights are read from .safetensors, .pt or .pth, not {path.suffix or 'no suffix'!r}")
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    try:
        return parse(read_bytes(path, limits=limits), limits=limits)
    except RejectedError as error:
        raise RejectedError(f"{path}: {error}") from None


def read_bytes(path: Path, *, limits: Limits = LIMITS) -> bytes:
    """The whole of a regular file within `limits.file_bytes`. RejectedError (without the path) for anything else."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise RejectedError("not a regular file")
        if info.st_size > limits.file_bytes:
            raise RejectedError(f"{info.st_size} bytes, more than the limit of {limits.file_bytes}")
        with path.open("rb") as file:
            return file.read(limits.file_bytes)
    except OSError as error:
        raise RejectedError(f"cannot be read: {error.strerror}") from None


def from_safetensors(data: bytes, *, limits: Limits = LIMITS) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, as `read` gives them. Raises RejectedError."""
    _check_header(data, limits)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the decoder's error types are not part of its interface
        raise RejectedError(f"not a safetensors file: {first_line(error)}") from None
    return _tidy(tensors, limits)


def _check_header(data: bytes, limits: Limits) -> None:
    if len(data) < 8:
        raise RejectedError(f"not a safetensors file: {len(data)} bytes, shorter than its header")
    length = int.from_bytes(data[:8], "little")
    if length > limits.header_bytes or length > len(data) - 8:
        raise RejectedError(f"header of {length} bytes in a file of {len(data)} (limit {limits.header_bytes})")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        raise RejectedError("not a safetensors file: the header is not JSON") from None
    if not isinstance(header, dict):
        raise RejectedError("not a safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    if len(header) > limits.tensors:
        raise RejectedError(f"{len(header)} tensors, more than the limit of {limits.tensors}")
    stored = sum(_check_tensor_entry(name, entry) for name, entry in header.items())
    if stored != len(data) - 8 - length:
        raise RejectedError(f"the header promises {stored} bytes of values, the file holds {len(data) - 8 - length}")


def _check_tensor_entry(name: str, entry: Any) -> int:
    """Bytes of one tensor of a safetensors header."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise RejectedError(f"{name!r}: the header lacks dtype, shape or data_offsets") from None
    if dtype not in _ITEM_BYTES:
        raise RejectedError(f"{name!r}: dtype {dtype!r}, expected one of {', '.join(_ITEM_BYTES)}")
    whole = [begin, end, *shape] if isinstance(shape, list) and len(shape) <= 8 else [None]
    if not all(type(number) is int and number >= 0 for number in whole):
        raise RejectedError(f"{name!r}: shape and data_offsets must be lists of whole numbers")
    if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise RejectedError(f"{name!r}: shape {shape} of {dtype} does not take the {end - begin} bytes it is given")
    return end - begin


def _from_torch(data: bytes, *, limits: Limits) -> dict[str, Tensor]:
    """A state dict that `torch.save` wrote. Nothing in it is executed: there is no way round `weights_only=True`."""
    records = _zip_records(data)
    if any(info.compress_type != zipfile.ZIP_STORED for info in records):
        raise RejectedError(f"compressed records, which torch.save does not write; {_RESAVE}")
    if any(info.filename.endswith("data.pkl") and info.file_size > limits.header_bytes for info in records):
        raise RejectedError(f"its pickle is larger than the limit of {limits.header_bytes} bytes")
    try:
        loaded = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|`?([\w.]+)`? (?:is|was) not an? (?:allowed|supported)", str(error))
        culprit = f"needs {found[1] or found[2]}" if found else first_line(error)
        raise RejectedError(f"holds more than tensors ({culprit}) and was not loaded; {_RESAVE}") from None
    except Exception as error:  # a malformed pickle can raise anything
        raise RejectedError(f"not a state dict of torch.save: {first_line(error)}; {_RESAVE}") from None
    return _tidy(_state_dict(loaded), limits)


def _zip_records(data: bytes) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise RejectedError(f"not a zip file as torch.save writes it since version 1.6; {_RESAVE}") from None


def _state_dict(loaded: object) -> dict[str, Tensor]:
    if isinstance(loaded, dict) and (wrappers := [key for key in ("state_dict", "model") if key in loaded]):
        if len(wrappers) > 1:
            raise RejectedError("has both 'state_dict' and 'model': save the one that is meant on its own")
        loaded = loaded[wrappers[0]]
    if not isinstance(loaded, dict):
        raise RejectedError(f"holds a {type(loaded).__name__}, expected a state dict (names to tensors); {_RESAVE}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = "another dict" if isinstance(value, dict) else type(value).__name__
            raise RejectedError(f"{name!r} is {what}, expected a tensor: save the state dict alone")
    return loaded


def _tidy(tensors: Mapping[str, Tensor], limits: Limits) -> dict[str, Tensor]:
    """Plain float32 (or int64) tensors under the names that a bare module gives them."""
    if len(tensors) > limits.tensors:
        raise RejectedError(f"{len(tensors)} tensors, more than the limit of {limits.tensors}")
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise RejectedError(f"{name!r}: expected a name of printable characters")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            raise RejectedError(f"{name!r}: a {tensor.layout} tensor of {tensor.dtype} cannot be used; expected floats")
    # A stored tensor may be a view that repeats one number: its size is what a copy of it would take.
    if sum(t.numel() * t.itemsize for t in tensors.values()) > limits.file_bytes:
        raise RejectedError(f"tensors of more than the limit of {limits.file_bytes} bytes in all")
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {
        name: tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }


def fit(tensors: Mapping[str, Tensor], arch: str, image: ImageSpec, ways: int) -> dict[str, Tensor]:
    """The same tensors in the order of the architecture: parameters, then running statistics.

    Raises RejectedError that names the first missing, unexpected or misshapen tensor with both shapes; KeyError for an
    architecture outside BACKBONES.
    """
    wanted = {name: shape for layout in parts(arch, image, ways) for name, shape in layout.shapes.items()}
    model = f"{arch} for {size_text(image.shape)} images and {ways} classes"
    unexpected = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in wanted]
    for name, shape in wanted.items():
        if name not in tensors:
            instead = f"; it has {unexpected[0]} instead" if unexpected else ""
            raise RejectedError(f"no tensor {name} {list(shape)}, which {model} needs{instead}")
        found = tensors[name]
        if found.shape != shape:
            raise RejectedError(f"{name}: {model} needs shape {list(shape)}, the file has {list(found.shape)}")
        if not found.is_floating_point():
            raise RejectedError(f"{name}: expected floating point, got {found.dtype}")
    if unexpected:
        raise RejectedError(f"unexpected tensor {unexpected[0]}: {model} has none of that name")
    return {name: tensors[name] for name in wanted}


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raises RejectedError at the first tensor with NaN or infinite values, or with a negative running variance."""
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise RejectedError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise RejectedError(f"{name}: a running variance is negative ({tensor.min().item():g})")


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file, the same for the same tensors. Views and shared storage are copied out."""
    return safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save as safetensors. After an interruption the path holds the old file or the new one, never a part."""
    write_bytes(path, to_safetensors(tensors))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step: a temporary file beside it, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """What an exception says, or its type, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
