"""Checkpoints of a run's state that write only what is new, as safetensors and JSON. No pickle.

A checkpoint is a file such as `round-000012.json`. It holds the tree of the state, in which each array is a list of
pieces. A piece is a run of rows in a file beside it: `bank-000012.safetensors` holds the rows that round 12 added below
the key `bank`. An array that has not changed is not written again. If an array lost its oldest rows and got new ones,
as the images of a bank do (first in, first out), only the new rows are written. If less than half of a file is still
needed, its rows are copied to the newest file. So all files together are at most about twice as large as the state. A
file is removed when no kept checkpoint needs it.

The JSON is written last: what a stopped process had written before it belongs to no checkpoint.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from ray_dfml.data.weights_file import first_line
from ray_dfml.errors import RejectedError
from ray_dfml.runtime.storage import Folder

KEEP = 2
"""How many checkpoints are kept. If the disk fills while the last one is written, the one before it is whole."""

FORMAT = 2
"""Version of the JSON. The first format was a single safetensors file."""

SAMPLE = 64
"""How many bytes of a row are compared before whole rows are compared."""

MADE = re.compile(r"round-\d+\.json|[\w-]+-\d+\.safetensors")
"""What a file written here is called. Whatever else lies in the folder is left alone."""

Array = torch.Tensor | np.ndarray
Place = tuple[str, ...]
"""The keys that lead to an array in the state."""


class Piece(NamedTuple):
    """`count` rows from row `first` of a tensor in a file."""

    file: str
    tensor: str
    first: int
    count: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written or read: its file, the file's sha256, and how many rounds are done."""

    name: str
    sha256: str
    rounds: int


@dataclass(frozen=True)
class _File:
    """A file of arrays: its sha256, and the bytes of its arrays."""

    sha256: str
    bytes: int


class _Held(NamedTuple):
    """An array as the last checkpoint holds it, its version if it is a tensor, and the pieces that hold its rows."""

    array: Array
    version: int
    pieces: list[Piece]


class Checkpoints:
    """The checkpoints in one folder, and what the last one holds."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._held: dict[Place, _Held] = {}
        self._files: dict[str, _File] = {}
        self._needed: dict[str, set[str]] = {}

    def load(self) -> tuple[Saved, dict[str, Any], Any] | None:
        """Read the newest checkpoint: what was saved, the state, and the note. None if there is no checkpoint.

        Raises RejectedError if it cannot be read, or if another version wrote it.
        """
        self._folder.sweep()
        names = [name for name in self._names() if name.startswith("round-")]
        made = [name for name in names if name.endswith(".json")]
        if names and not made:
            raise RejectedError(
                f"{self._folder.path / names[-1]}: another version of ray_dfml wrote this checkpoint; finish the run "
                "with that version (manifest.json names it), or start a new run"
            )
        if not made:
            return None
        where = self._folder.path / made[-1]
        try:
            text = self._folder.read(made[-1])
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {content['format']}, this version of ray_dfml reads {FORMAT}")
            self._files = {name: _File(**file) for name, file in content["files"].items()}
            state = self._fill(content["tree"], (), {})
            saved = Saved(made[-1], _sha256(text), int(content["rounds"]))
        except FileNotFoundError as error:
            raise _not_whole(where, made, f"{Path(error.filename).name} is missing") from None
        except OSError as error:
            raise RejectedError(f"{error.filename or where}: cannot be read: {error.strerror or error}") from None
        except Exception as error:
            raise _not_whole(where, made, first_line(error)) from None
        self._needed[saved.name] = set(self._files)
        return saved, state, content["note"]

    def save(self, rounds: int, state: dict[str, Any], note: Any = None) -> Saved:
        """Write the state after `rounds` rounds, and drop the files that no kept checkpoint needs.

        The state is nested dicts of tensors, arrays, numbers and strings. `note` is anything that JSON can hold.

        Arrays in the state may not be changed in place from now on; those of NumPy refuse it. Raises OSError, and the
        checkpoints before are then as they were.
        """
        arrays = dict(_arrays(state, ()))
        runs = self._runs(arrays)
        files = dict(self._files)
        for stem in dict.fromkeys(_stem(place) for place in arrays):
            name = f"{stem}-{rounds - 1:06d}.safetensors"
            fresh = _give(name, {place: array for place, array in arrays.items() if _stem(place) == stem}, runs)
            if fresh:
                data = safetensors.torch.save(fresh)
                self._folder.write(name, data)
                files[name] = _File(_sha256(data), sum(one.nbytes for one in fresh.values()))
        needed = {piece.file for run in runs.values() for piece in run}
        files = {name: file for name, file in files.items() if name in needed}
        content = {
            "format": FORMAT,
            "rounds": rounds,
            "note": note,
            "tree": _tree(state, (), runs),
            "files": {name: asdict(file) for name, file in files.items()},
        }
        saved = Saved(f"round-{rounds - 1:06d}.json", _sha256(text := json.dumps(content).encode()), rounds)
        self._folder.write(saved.name, text)
        self._held = {place: _Held(array, _freeze(array), runs[place]) for place, array in arrays.items()}
        self._files, self._needed[saved.name] = files, needed
        self._drop()
        return saved

    def _runs(self, arrays: Mapping[Place, Array]) -> dict[Place, list[Piece]]:
        """The rows of each array as pieces.

        A piece without a file must be written: its rows are new, or they leave a file that is less than half needed.
        """
        runs: dict[Place, list[Piece]] = {}
        used: Counter[str] = Counter()
        for place, array in arrays.items():
            kept = _kept(self._held.get(place), array)
            done = sum(piece.count for piece in kept)
            rows = _rows(array)
            runs[place] = [*kept, Piece("", "", done, rows - done)] if rows > done else kept
            for piece in kept:
                used[piece.file] += piece.count * array.nbytes // rows
        thin = {name for name, count in used.items() if 2 * count < self._files[name].bytes}
        for run in runs.values():
            row = 0
            for i, piece in enumerate(run):
                if piece.file in thin:
                    run[i] = Piece("", "", row, piece.count)
                row += piece.count
        return runs

    def _fill(self, value: Any, place: Place, read: dict[str, dict[str, torch.Tensor]]) -> Any:
        """Put the arrays into a tree. `read` holds the files that were read so far."""
        if not isinstance(value, dict):
            return value
        if "__array__" not in value:
            return {key: self._fill(item, (*place, key), read) for key, item in value.items()}
        entry = value["__array__"]
        pieces = [Piece(*piece) for piece in entry["pieces"]]
        for name in {piece.file for piece in pieces} - read.keys():
            data = self._folder.read(name)
            if _sha256(data) != self._files[name].sha256:
                raise ValueError(f"{name} is not the file that it was written with")
            read[name] = safetensors.torch.load(data)
        parts = [read[p.file][p.tensor][p.first : p.first + p.count] for p in pieces]
        dtype = getattr(torch, entry["dtype"])
        whole = torch.cat(parts) if parts else torch.empty(entry["shape"], dtype=dtype)
        whole = whole.reshape(entry["shape"])
        if whole.dtype != dtype:
            raise ValueError(f"{'.'.join(place)} is of {whole.dtype}")
        array = whole.numpy() if entry["numpy"] else whole
        self._held[place] = _Held(array, _freeze(array), pieces)
        return array

    def _drop(self) -> None:
        """Remove old checkpoints, and the files that only they needed or that belong to none."""
        names = self._names()
        kept = [name for name in names if name.startswith("round-") and name.endswith(".json")][-KEEP:]
        for name in kept:
            if name not in self._needed:
                self._needed[name] = set(json.loads(self._folder.read(name))["files"])
        self._needed = {name: self._needed[name] for name in kept}
        for name in set(names).difference(kept, *self._needed.values()):
            self._folder.remove(name)

    def _names(self) -> list[str]:
        return [name for name in self._folder.names() if MADE.fullmatch(name)]


def _not_whole(where: Path, made: Sequence[str], reason: str) -> RejectedError:
    before = made[-2] if len(made) > 1 else "the start"
    return RejectedError(f"{where}: not a whole checkpoint ({reason}); to go on from {before}, move it elsewhere")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stem(place: Place) -> str:
    """The beginning of the names of an array's files: its first key, in letters that a file name may have."""
    return re.sub(r"[^A-Za-z0-9_]", "-", place[0])


def _arrays(value: Any, place: Place) -> Iterator[tuple[Place, Array]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _arrays(item, (*place, key))
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield place, value


def _tree(value: Any, place: Place, runs: Mapping[Place, Sequence[Piece]]) -> Any:
    """The state in which each array is replaced by its type, its shape, and its pieces."""
    if isinstance(value, dict):
        return {key: _tree(item, (*place, key), runs) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        numpy = isinstance(value, np.ndarray)
        dtype = str(torch.tensor(value[..., :0] if value.ndim else value).dtype if numpy else value.dtype)
        entry = {"numpy": numpy, "dtype": dtype.removeprefix("torch."), "shape": list(value.shape)}
        return {"__array__": entry | {"pieces": runs[place]}}
    return value


def _rows(array: Array) -> int:
    """How many rows must be stored: the length, but 1 for an array without axes, and 0 for one without values."""
    if 0 in array.shape:
        return 0
    return array.shape[0] if array.ndim else 1


def _give(name: str, arrays: Mapping[Place, Array], runs: dict[Place, list[Piece]]) -> dict[str, torch.Tensor]:
    """Give the pieces that have no file the file `name`. Returns its tensors."""
    fresh: dict[str, torch.Tensor] = {}
    for place, array in arrays.items():
        for i, piece in enumerate(runs[place]):
            if not piece.file:
                tensor = json.dumps([*place, piece.first] if piece.first else place)
                rows = (array if array.ndim else array.reshape(1))[piece.first : piece.first + piece.count]
                fresh[tensor] = torch.tensor(rows) if isinstance(rows, np.ndarray) else rows.detach().clone()
                fresh[tensor] = fresh[tensor].contiguous()
                runs[place][i] = Piece(name, tensor, 0, piece.count)
    return fresh


def _freeze(array: Array) -> int:
    """Make a NumPy array refuse changes. Returns the version of a tensor, which rises with each change in place."""
    if isinstance(array, torch.Tensor):
        return array._version
    array.flags.writeable = False
    return 0


def _kept(held: _Held | None, array: Array) -> list[Piece]:
    """The pieces of the last checkpoint that already hold the first rows of an array."""
    if held is None or type(held.array) is not type(array):
        return []
    old = held.array
    if isinstance(old, torch.Tensor) and old._version != held.version:
        return []  # changed in place: it is no longer what was written
    if old is array:
        return list(held.pieces)
    if old.dtype != array.dtype or old.shape[1:] != array.shape[1:] or not _rows(old) or not _rows(array):
        return []
    return _without(held.pieces, _dropped(_bytes(old), _bytes(array)))


def _bytes(array: Array) -> np.ndarray:
    """The rows as bytes [n b]."""
    if isinstance(array, torch.Tensor):
        return array.detach().contiguous().reshape(_rows(array), -1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(_rows(array), -1).view(np.uint8)


def _dropped(old: np.ndarray, new: np.ndarray) -> int:
    """How many of the first rows of `old` [n b] were dropped, if its other rows are the first rows of `new` [m b].

    Otherwise n.
    """
    starts = np.zeros(1, np.int64)  # of numbers, not images, many are alike, and nothing drops the oldest
    if old.shape[1] >= SAMPLE:
        sample = slice(None, None, old.shape[1] // SAMPLE)
        starts = np.flatnonzero((old[:, sample] == new[0, sample]).all(1))
    for start in starts[starts >= len(old) - len(new)]:
        if np.array_equal(old[start], new[0]) and np.array_equal(old[start:], new[: len(old) - start]):
            return int(start)
    return len(old)


def _without(pieces: Sequence[Piece], rows: int) -> list[Piece]:
    """Pieces without their first rows."""
    found = []
    for piece in pieces:
        gone = min(rows, piece.count)
        rows -= gone
        if gone < piece.count:
            found.append(piece._replace(first=piece.first + gone, count=piece.count - gone))
    return found
