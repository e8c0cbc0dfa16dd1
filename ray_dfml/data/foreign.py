"""Checkpoints as training scripts save them. The content says what a file is, and the part that fits is taken.

Nothing in a file is executed. The formats are safetensors, and what `torch.save` writes, read with `weights_only=True`.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from ray_dfml.core.hub import HubNet
from ray_dfml.core.net import net
from ray_dfml.data import mistaken, weights_file
from ray_dfml.data.weights_file import LIMITS, Limits, first_line
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.types import ImageSpec

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".th")
"""Suffixes that are taken off a file's name to get a teacher's id. Files are read whatever their suffix is."""

_RESAVE = "re-save it with safetensors.torch.save_file on the machine that made it"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DEPTH = 4
_AVERAGED = {"ema", "swa", "averaged"}


@dataclass(frozen=True)
class Found:
    """Tensors under the names of the network, and notes on how they were found."""

    tensors: dict[str, Tensor]
    notes: list[str]


def read(path: Path, arch: str, image: ImageSpec, ways: int, *, limits: Limits = LIMITS) -> Found:
    """Find the tensors of a network in a checkpoint. Floating point comes back as float32.

    The tensors may lie in nested dicts of any names, under prefixes such as `module.`, `_orig_mod.` or `model.`.
    Averaged weights (EMA) are taken only if there are no others. Values are not checked here
    (`weights_file.check_values`). Raises UsageError for a missing file or another number of outputs, and RejectedError
    for everything that is wrong inside.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    try:
        content = parse(weights_file.read_bytes(path, limits=limits), limits=limits)
        return _fitting(content, arch, image, ways, limits)
    except RejectedError as error:
        raise RejectedError(f"{path}: {error}") from None


def parse(data: bytes, *, limits: Limits = LIMITS) -> Any:
    """The content of a file: name -> tensor, or the nested values that `torch.save` was given. Raises RejectedError."""
    if said := mistaken.what_it_is(data):
        raise RejectedError(said)
    if data.startswith(b"PK"):
        return _from_torch(data, limits)
    if data[8:9] == b"{":
        return weights_file.decoded(data, limits)
    if data.startswith(_LEGACY):
        raise RejectedError(f"is in the format that torch.save wrote before version 1.6; {_RESAVE}")
    if data.startswith(b"\x80"):
        raise RejectedError(f"is a bare pickle, which is never loaded; {_RESAVE}")
    if data[257:262] == b"ustar":
        raise RejectedError("is a tar archive; unpack it and name the file in it that holds the weights")
    raise RejectedError("is neither safetensors nor what torch.save writes; name a file of weights, or copy it again")


def _from_torch(data: bytes, limits: Limits) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise RejectedError("is a zip file, as torch.save writes it, that was cut short; copy it again") from None
    if any(info.compress_type != zipfile.ZIP_STORED for info in records):
        raise RejectedError(f"compressed records, which torch.save does not write; {_RESAVE}")
    if any(info.filename.endswith("data.pkl") and info.file_size > limits.header_bytes for info in records):
        raise RejectedError(f"its pickle is larger than the limit of {limits.header_bytes} bytes")
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|`?([\w.]+)`? (?:is|was) not an? (?:allowed|supported)", str(error))
        culprit = f"needs {found[1] or found[2]}" if found else first_line(error)
        raise RejectedError(f"holds more than tensors ({culprit}) and was not loaded; {_RESAVE}") from None
    except Exception as error:  # a malformed pickle can raise anything
        raise RejectedError(f"not a state dict of torch.save: {first_line(error)}; {_RESAVE}") from None


# ----------------------------------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class _Part:
    """A mapping of tensors inside a checkpoint. Names are without wrappers and relative to `prefix`."""

    place: str
    prefix: str
    tensors: dict[str, Tensor]
    wrappers: tuple[str, ...]
    """The wrappers, `module` or `_orig_mod`, that were taken out of the names."""
    left: tuple[str, ...] = ()
    """Heads for training only that were left out."""

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED & set(re.split(r"[^a-z]+", f"{self.place}.{self.prefix}".lower())))

    def notes(self) -> list[str]:
        """Notes on how the part was found."""
        said = [f"took the tensors in {self.place!r}"] if self.place else []
        if self.prefix:
            said.append(f"dropped the prefix {self.prefix!r} of their names")
        if self.wrappers:
            said.append(f"dropped {' and '.join(repr(f'{wrapper}.') for wrapper in self.wrappers)} from their names")
        if self.left:
            said.append(f"left out {' and '.join(self.left)}, which only training uses")
        return said


def _fitting(content: Any, arch: str, image: ImageSpec, ways: int, limits: Limits) -> Found:
    wanted, network = weights_file.parts(arch, image, ways).shapes, net(arch, image.shape, ways).network
    parts = [
        _without_surplus(part, network) if isinstance(network, HubNet) else part
        for place, tensors in _mappings(content)
        for part in _parts(place, tensors, wanted, limits)
    ]
    if not parts:
        raise RejectedError(f"holds {_kind(content)} without named tensors; {_RESAVE}")
    fitting = [
        replace(part, tensors=weights_file.tidy(part.tensors, limits)) for part in parts if _fits(part.tensors, wanted)
    ]
    if not fitting:
        nearest = max(parts, key=lambda part: len(wanted.keys() & part.tensors.keys()))
        raise _misfit(nearest, arch, image, ways, limits)
    plain = _different([part for part in fitting if not part.averaged])
    averaged = [part for part in fitting if part.averaged]
    if len(plain) > 1 or (not plain and len(_different(averaged)) > 1):
        places = ", ".join(repr(f"{part.place}.{part.prefix}".strip(".")) for part in plain or averaged)
        raise RejectedError(f"several parts fit ({places}): save the one that is meant on its own")
    chosen = (plain or averaged)[0]
    notes = chosen.notes()
    for part in averaged:
        where = repr(f"{part.place}.{part.prefix}".strip("."))
        if part is chosen:
            notes.append("these are averaged weights (EMA); the file has no others that fit")
        else:
            notes.append(f"left the averaged weights (EMA) in {where}; to use them, save that part on its own")
    return Found(chosen.tensors, notes)


def _mappings(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict with named tensors, at most _DEPTH levels deep, and the keys that lead to it. Each comes once."""
    level, seen = [("", content)], set()
    for _ in range(_DEPTH + 1):
        deeper = []
        for place, value in level:
            if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, Mapping):
                deeper += [(f"{place}[{n}]", inner) for n, inner in enumerate(value)]
                continue
            tensors = {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, Tensor)}
            if tensors:
                yield place, tensors
            deeper += [(f"{place}.{key}" if place else str(key), inner) for key, inner in value.items()]
        level = deeper


def _parts(place: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Size], limits: Limits) -> Iterator[_Part]:
    """A mapping as a whole, and its parts under each prefix with which it has the network's first tensor."""
    if len(tensors) > limits.tensors:
        raise RejectedError(f"{len(tensors)} tensors, more than the limit of {limits.tensors}")
    plain = weights_file.plain_names(tensors)
    wrappers = tuple(w for w in weights_file.WRAPPERS if any(w in name.split(".") for name in tensors))
    named = {plain[name]: tensor for name, tensor in tensors.items()}
    first = next(iter(wanted))
    for prefix in [name.removesuffix(first) for name in named if name.endswith(f".{first}")] + [""]:
        inside = {name[len(prefix) :]: tensor for name, tensor in named.items() if name.startswith(prefix)}
        yield _Part(place, prefix, inside, wrappers)


def _without_surplus(part: _Part, network: HubNet) -> _Part:
    """The part without tables that the network computes itself, and without heads that only training uses."""
    left = sorted({name.partition(".")[0] for name in part.tensors if name.startswith(network.auxiliary)})
    kept = {
        name: tensor
        for name, tensor in part.tensors.items()
        if not name.startswith(network.auxiliary) and not _repeats(name, tensor, network.constants)
    }
    return replace(part, tensors=kept, left=tuple(left))


def _repeats(name: str, tensor: Tensor, constants: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a table of the network, with its values."""
    own = constants.get(name)
    return own is not None and tensor.shape == own.shape and bool(torch.allclose(tensor.double(), own.double()))


def _fits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Size]) -> bool:
    shapes = {name: t.shape for name, t in tensors.items() if not weights_file.is_counter(name)}
    return shapes == dict(wanted)


def _different(parts: Sequence[_Part]) -> list[_Part]:
    """The parts, without those whose tensors equal the tensors of an earlier part."""
    found: list[_Part] = []
    for part in parts:
        if not any(all(torch.equal(t, one.tensors[name]) for name, t in part.tensors.items()) for one in found):
            found.append(part)
    return found


def _misfit(best: _Part, arch: str, image: ImageSpec, ways: int, limits: Limits) -> Exception:
    """The error that says why the part that is nearest does not fit."""
    wanted, other = (weights_file.parts(arch, image, n).shapes for n in (ways, ways + 1))
    heads = [name for name, shape in wanted.items() if shape != other[name]]
    found = {best.tensors[name].shape[:1] for name in heads if name in best.tensors}
    if len(found) == 1 and len(outputs := found.pop()) == 1 and outputs[0] != ways:
        return UsageError(f"weights have {outputs[0]} outputs, --classes names {ways}")
    try:
        weights_file.fit(weights_file.tidy(best.tensors, limits), arch, image, ways)
    except RejectedError as error:
        return RejectedError(f"in {best.place!r}: {error}" if best.place else str(error))
    raise AssertionError("a part that fits was taken for one that does not")


def _kind(content: Any) -> str:
    return "an empty dict" if content == {} else f"a {type(content).__name__}"
