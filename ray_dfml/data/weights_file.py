"""Files of weights that may come from strangers. They are bounded, checked before allocation, and never executed.

`read` gives named tensors, `fit` matches them to an architecture, `check_values` checks the numbers, and `write` saves.
The only format here is safetensors; `data.foreign` reads the checkpoints of other programs.
"""

import functools
import json
import math
import os
import stat
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ray_dfml import object_store
from ray_dfml.core.net import net
from ray_dfml.core.weights import Layout
from ray_dfml.data import mistaken
from ray_dfml.errors import RejectedError, ResourceError
from ray_dfml.files import Uri, naming
from ray_dfml.types import ImageSpec, size_text

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
WRAPPERS = ("module", "_orig_mod")
"""Parts that DataParallel and `torch.compile` put into names."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what a file may ask for."""

    file_bytes: int = 2 << 30
    """Largest size of the file, and of all tensors together."""
    header_bytes: int = 16 << 20
    """Largest size of the part that is parsed: the JSON header of safetensors, the pickle of a `.pt`."""
    tensors: int = 10_000


LIMITS = Limits()


class Parts(NamedTuple):
    """Names and shapes of a classifier's tensors: parameters `[p]`, running batch-norm statistics `[k]`."""

    parameters: Layout
    statistics: Layout

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of all tensors that are stored."""
        return self.parameters.shapes | self.statistics.shapes


@functools.lru_cache(maxsize=256)
def _parts(arch: str, shape: tuple[int, int, int], ways: int) -> Parts:
    network = net(arch, shape, ways)
    found = Parts(network.layout, network.stats_layout)
    if 0 in found.parameters.sizes:
        raise RejectedError(f"{arch} cannot take {size_text(shape)} images: they are too small")
    return found


def parts(arch: str, image: ImageSpec, ways: int) -> Parts:
    """Layouts of an architecture for images and a number of classes. No weights are allocated, whatever the sizes.

    Raises KeyError for an unknown architecture, and RejectedError if it cannot take such images.
    """
    return _parts(arch, image.shape, ways)


def read(path: Path | Uri, *, limits: Limits = LIMITS) -> dict[str, Tensor]:
    """Named CPU tensors of a safetensors file. Floats come back as float32, and counters of batches are dropped.

    Values are not checked here (`check_values`). Raises RejectedError for everything that is wrong with the file.
    """
    try:
        return from_safetensors(read_bytes(path, limits=limits), limits=limits)
    except RejectedError as error:
        raise RejectedError(f"{path}: {error}") from None


def read_bytes(path: Path | Uri, *, limits: Limits = LIMITS) -> bytes:
    """The content of a regular file of up to `limits.file_bytes`. Raises RejectedError (without the path) otherwise.

    Raises ResourceError if an object store does not answer, since that is no fault of the file.
    """
    if isinstance(path, Uri):
        try:
            return object_store.read(path, most=limits.file_bytes)
        except FileNotFoundError as error:
            raise RejectedError(f"cannot be read: {error.strerror}") from None
        except OSError as error:
            raise ResourceError(f"{path}: cannot be read: {error.strerror}") from None
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
    return tidy(decoded(data, limits), limits)


def decoded(data: bytes, limits: Limits) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, under the names in the file. Raises RejectedError."""
    if said := mistaken.what_it_is(data):
        raise RejectedError(said)
    _check_header(data, limits)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the decoder's error types are not part of its interface
        raise RejectedError(f"not a safetensors file: {first_line(error)}") from None


def _check_header(data: bytes, limits: Limits) -> None:
    if len(data) < 8:
        raise RejectedError(f"not a safetensors file: {len(data)} bytes, shorter than its header")
    length = int.from_bytes(data[:8], "little")
    if length > limits.header_bytes or length > len(data) - 8:
        raise RejectedError(
            f"header of {length} bytes in a file of {len(data)} (limit {limits.header_bytes}): no safetensors file, or "
            "one that was cut short; copy it again"
        )
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
        held = len(data) - 8 - length
        advice = "; it was cut short, copy it again" if held < stored else ""
        raise RejectedError(f"the header promises {stored} bytes of values, the file holds {held}{advice}")


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


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> the name without the parts that DataParallel and `torch.compile` put in, in any order and place.

    Raises RejectedError if two names become one.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    if len(set(plain.values())) < len(plain):
        raise RejectedError(f"without {' and '.join(WRAPPERS)} two tensors have one name; save the bare module's")
    return plain


def is_counter(name: str) -> bool:
    """Whether a tensor counts the batches that a batch norm has seen. No network here needs it."""
    return name.endswith("num_batches_tracked")


def tidy(tensors: Mapping[str, Tensor], limits: Limits = LIMITS) -> dict[str, Tensor]:
    """Plain float32 (or int64) tensors under the names that a bare module gives them. Raises RejectedError."""
    if len(tensors) > limits.tensors:
        raise RejectedError(f"{len(tensors)} tensors, more than the limit of {limits.tensors}")
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise RejectedError(f"{name!r}: expected a name of printable characters")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            raise RejectedError(f"{name!r}: a {tensor.layout} tensor of {tensor.dtype} cannot be used; expected floats")
    # A stored tensor may be a view that repeats one number, so the size of a copy is what counts.
    if sum(t.numel() * t.itemsize for t in tensors.values()) > limits.file_bytes:
        raise RejectedError(f"tensors of more than the limit of {limits.file_bytes} bytes in all")
    plain = plain_names(tensors)
    return {
        plain[name]: tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
        if not is_counter(name)
    }


def fit(tensors: Mapping[str, Tensor], arch: str, image: ImageSpec, ways: int) -> dict[str, Tensor]:
    """The same tensors in the order of the architecture: parameters, then running statistics.

    Raises RejectedError, which names the first missing, unexpected or misshapen tensor with both shapes, and KeyError
    for an unknown architecture.
    """
    wanted = parts(arch, image, ways).shapes
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
    """Raise RejectedError at the first tensor with NaN or infinite values, or with a negative running variance."""
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise RejectedError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise RejectedError(f"{name}: a running variance is negative ({tensor.min().item():g})")


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file. Equal tensors give equal bytes; views and shared storage are copied."""
    return safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors as safetensors. After an interruption the path holds the old file or the new one, never a part."""
    write_bytes(path, to_safetensors(tensors))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step: write a temporary file beside it, flush it to disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """The message of an exception, or its type, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
