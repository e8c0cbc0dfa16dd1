"""The pool on disk: `pool.yaml` with one entry per teacher, and the weights in `weights/ID.safetensors`.

Everything in it may come from a stranger. The manifest is checked against a schema when the pool is opened, and a
teacher's file when it is loaded. Architectures come from the allow-list BACKBONES, and no path leaves the folder.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.net import net
from ray_dfml.data import foreign, weights_file
from ray_dfml.data.manifest import (
    CHANGEABLE,
    FREE,
    MANIFEST,
    Entry,
    Manifest,
    append_entry,
    is_id,
    make_entry,
    read_manifest,
    write_manifest,
)
from ray_dfml.data.services import Budget, Terms
from ray_dfml.errors import RejectedError, ResourceError, UsageError, did_you_mean
from ray_dfml.files import Uri, located, resolved, shown
from ray_dfml.types import Access, ImageSpec, TeacherCard

__all__ = ["Entry", "Pool", "add_file"]

EMPTY = Manifest(version=1)
LOCK_SECONDS = 300
"""How long a writer waits for another writer."""
PROBE_MACS = 2e10
"""Work that `check` spends on one teacher's random images, in multiply-accumulates (4 to 256 images)."""


class Pool:
    """A folder of teachers. `open` opens one, and `create` makes one. `cards` lists the teachers in file order."""

    path: Path | Uri
    cards: tuple[TeacherCard, ...]
    budget: Budget | None
    """What a run may spend on the teachers together."""

    def __init__(self, path: Path | Uri, manifest: Manifest = EMPTY, *, new: bool = False) -> None:
        """With `new` the folder need not hold a manifest yet; the first `add` writes it."""
        self.path = path
        self._new = new
        self._set(manifest)

    def _set(self, manifest: Manifest) -> None:
        self._manifest, self._text = manifest, b""
        self._entries = {entry.id: entry for entry in manifest.teachers}
        self.cards = tuple(entry.card for entry in manifest.teachers)
        self.budget = Budget(**manifest.budget.model_dump()) if manifest.budget else None

    @classmethod
    def open(cls, path: str | Path) -> "Pool":
        """Read and check the manifest of a folder on a disk or in an object store. No weights are read.

        Raises UsageError if there is no pool, RejectedError with the place of the first fault in the manifest, and
        ResourceError if the object store does not answer.
        """
        path = located(path)
        return cls(path, read_manifest(path))

    @classmethod
    def at(cls, path: str | Path) -> "Pool":
        """The pool in a folder, or an empty pool, for which the first `add` makes the folder.

        Raises UsageError if `path` is a file, and RejectedError as `open` does.
        """
        path = resolved(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; choose a new folder")
        new = not (path / MANIFEST).exists()
        return cls(path, EMPTY if new else read_manifest(path), new=new)

    @classmethod
    def create(cls, path: str | Path) -> "Pool":
        """Make a new empty pool: a folder with a manifest that names no teacher.

        Raises UsageError unless `path` is absent or a folder that is empty apart from hidden files.
        """
        path = resolved(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; choose a new folder")
        with _locked(path):
            if (path / MANIFEST).exists():
                raise UsageError(f"{path}: already holds a pool; choose another folder")
            _check_empty(path)
            write_manifest(path, EMPTY)
            (path / "weights").mkdir(exist_ok=True)
        return cls(path)

    def entry(self, id: str) -> Entry:
        """Everything that the manifest says of a teacher. Raises UsageError for an unknown id."""
        if id not in self._entries:
            raise UsageError(f"no teacher {id!r} in {self.path}{did_you_mean(id, self._entries)}")
        return self._entries[id]

    def load(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[p]` and running batch-norm statistics `[k]`, float32, laid out as `net(...)` of the teacher's card.

        These are the weights whatever the access; the shard that runs them sees to it. sha256, sizes, dtypes, names and
        shapes are checked first, then NaN, infinity and negative variances. Raises RejectedError, which begins with the
        id, also for a service, which has no weights here.
        """
        entry = self.entry(id)
        try:
            theta, stats = _flat(entry, self._tensors(entry))
        except RejectedError as error:
            raise RejectedError(f"{id}: {error}") from None
        return theta.numpy(), stats.numpy()

    def _tensors(self, entry: Entry) -> dict[str, Tensor]:
        if entry.weights is None:
            raise RejectedError("is a service, which gives no weights")
        file, folder = self.path / entry.weights, self.path
        if isinstance(file, Path) and isinstance(folder, Path) and not file.resolve().is_relative_to(folder.resolve()):
            raise RejectedError(f"{entry.weights} leaves the pool folder")
        data = weights_file.read_bytes(file)
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise RejectedError(
                f"{entry.weights} has sha256 {found[:12]}.., pool.yaml says {(entry.sha256 or '')[:12]}.."
            )
        tensors = _fit(entry, weights_file.from_safetensors(data))
        weights_file.check_values(tensors)
        return tensors

    def add(
        self,
        id: str,
        tensors: Mapping[str, Tensor],
        *,
        arch: str,
        image: ImageSpec,
        classes: Sequence[str],
        accuracy: Mapping[str, float | None] | None,
        source: str,
        authorization: str = "",
        access: Access = "weights",
        terms: Terms = FREE,
    ) -> None:
        """Add a teacher: write `weights/ID.safetensors`, then the manifest. `cards` then shows what is on disk.

        `tensors` are the parameters and buffers of the module, which are stored as float32. `accuracy` has any of
        `reported`, `best` and `last`, in percent. Any number of processes may add at once, and an interrupted one
        leaves the manifest as it was. Comments in a hand-written manifest are lost. Raises UsageError for a value that
        the manifest cannot hold or an id that is taken, and RejectedError for tensors that `load` would refuse.
        """
        entry = make_entry(id, arch, image, classes, accuracy, source, authorization, access, terms)
        self._add(entry, tensors)

    def check_free(self, id: str) -> None:
        """Raise UsageError if a teacher of the pool has this id."""
        if id in self._entries:
            raise UsageError(f"id {id!r} is taken in {self.path}; choose another one")

    def add_entry(self, entry: Entry) -> None:
        """Add a service, which has no weights. `cards` then shows what is on disk. Raises UsageError for a taken id."""
        self._write(entry, None)

    def _add(self, entry: Entry, tensors: Mapping[str, Tensor], *, run: bool = False) -> None:
        id = entry.id
        try:
            fitted = {name: tensor.detach().float() for name, tensor in _fit(entry, tensors).items()}
            weights_file.check_values(fitted)
            if run:
                _probe(entry, fitted)
        except RejectedError as error:
            raise RejectedError(f"{id}: {error}") from None
        data = weights_file.to_safetensors(fitted)
        self._write(entry.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()}), data)

    def _write(self, entry: Entry, weights: bytes | None) -> None:
        """Add an entry to the manifest on the disk, after writing its weights if it has any.

        Raises UsageError for a pool in an object store, which is only read.
        """
        folder = resolved(self.path)
        with _locked(folder):
            self._look(folder)
            for other in self._entries.values():
                if entry.id == other.id or (weights is not None and entry.weights == other.weights):
                    raise UsageError(f"id {entry.id!r} is taken in {self.path}; choose another one")
            (folder / "weights").mkdir(exist_ok=True)
            if weights is not None:
                weights_file.write_bytes(folder / f"weights/{entry.id}.safetensors", weights)
            manifest = self._manifest.model_copy(update={"teachers": [*self._manifest.teachers, entry]})
            self._text = append_entry(folder, self._text, entry) if self._text else write_manifest(folder, manifest)
        self._manifest = manifest
        self._entries[entry.id] = entry
        self.cards = (*self.cards, entry.card)

    def _look(self, folder: Path) -> None:
        """Read the manifest on the disk, unless it is the text that this pool wrote last; it grows with the pool."""
        if self._new and not (folder / MANIFEST).exists():
            _check_empty(folder)
            self._set(EMPTY)
        elif not self._text or weights_file.read_bytes(folder / MANIFEST) != self._text:
            self._set(read_manifest(folder))

    def sha256(self) -> str:
        """The hash of the whole pool, in hex: of all entries of its manifest, sorted by id, with the files' sha256.

        Keys, prices, budgets and limits do not count, so that they may change while a run goes on.
        """
        lines = (self._entries[id].model_dump_json(exclude=CHANGEABLE) for id in sorted(self._entries))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def check(self) -> list[dict[str, Any]]:
        """Load each teacher and run it on noise of random brightness. A service is not asked.

        Returns `{"id", "ok", "reason"}` for each, in file order. `reason` says why a teacher cannot be used, or, if
        `ok` is true, what is odd about it; otherwise it is empty. A bad teacher raises no error.
        """
        first: dict[str, str] = {}
        results = []
        for entry in self._entries.values():
            if entry.api is not None:
                results.append({"id": entry.id, "ok": True, "reason": "a service, which was not asked"})
                continue
            try:
                notes = _probe(entry, self._tensors(entry)) + _odd_accuracy(entry)
                twin = first.setdefault(entry.sha256 or "", entry.id)
                if twin != entry.id:
                    notes.append(f"same weights as {twin}")
                results.append({"id": entry.id, "ok": True, "reason": "; ".join(notes)})
            except Exception as error:  # whatever a stranger's weights provoke is that teacher's fault alone
                results.append({"id": entry.id, "ok": False, "reason": weights_file.first_line(error)})
        return results


def manifest_sha256(folder: Path | Uri) -> str:
    """Hash of the manifest's bytes, in hex; empty where this process does not see the pool."""
    try:
        data = weights_file.read_bytes(folder / MANIFEST)
    except (RejectedError, ResourceError):
        return ""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for one writer, and make it if it is absent. Failures of the disk become ResourceError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            yield
    except filelock.Timeout:
        raise ResourceError(f"{folder}: another process has been writing for {LOCK_SECONDS} s") from None
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _check_empty(path: Path) -> None:
    """Raise UsageError unless a folder is empty. Hidden files, and `weights` of an interrupted `add`, do not count."""
    if not all(child.name.startswith(".") or child.name == "weights" for child in path.iterdir()):
        raise UsageError(f"{path}: is not an empty folder; choose a new one")


def _fit(entry: Entry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    card = entry.inside
    return weights_file.fit(tensors, card.arch, card.image, len(card.classes))


def _flat(entry: Entry, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    card = entry.inside
    parameters, statistics = weights_file.parts(card.arch, card.image, len(card.classes))
    return parameters.flatten(tensors), statistics.flatten(tensors)


def _odd_accuracy(entry: Entry) -> list[str]:
    reported = entry.accuracy.reported
    if reported is None or not 0 < reported <= 1 or reported >= 100 / len(entry.classes):
        return []
    return [f"reports an accuracy of {reported:g} %, below chance; is it a fraction, {100 * reported:g} %?"]


def _probe(entry: Entry, tensors: Mapping[str, Tensor]) -> list[str]:
    """Run a teacher. Returns notes on what is odd about it, and raises RejectedError (without the id) if it is bad."""
    theta, stats = _flat(entry, tensors)
    card = entry.inside
    spec, ways = card.image, len(card.classes)
    model = net(card.arch, spec.shape, ways)
    rng = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    try:
        count = int(min(256, max(4, PROBE_MACS / max(1, model.macs))))
        images = torch.rand(count, *spec.shape, generator=rng) * torch.rand(count, 1, 1, 1, generator=rng)
        with torch.no_grad():
            logits = model(theta, (images - mean) / std, stats)
    except RuntimeError as error:
        raise RejectedError(f"cannot run on images of {spec.shape}: {weights_file.first_line(error)}") from None
    if logits.shape != (count, ways):
        raise RejectedError(f"gives logits of shape {list(logits.shape)}, expected {[count, ways]}")
    if not torch.isfinite(logits).all():
        raise RejectedError("gives NaN or infinite logits on random images")
    if (logits == logits[0]).all():
        raise RejectedError("gives the same logits for different images")
    dead = [entry.classes[i] for i in range(ways) if (logits[:, i] == logits[0, i]).all()]
    return [f"constant output for {', '.join(dead[:5])}{' ..' if len(dead) > 5 else ''}"] if dead else []


def size_of(text: str) -> tuple[int, int, int]:
    """Channels, height and width of a text such as `3x32x32`. Raises UsageError for any other text."""
    size = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,4})", text)
    if not size:
        raise UsageError(f"input {text!r}: expected CHANNELSxHEIGHTxWIDTH, such as 3x32x32")
    channels, height, width = (int(number) for number in size.groups())
    return channels, height, width


def percent(accuracy: float | None) -> dict[str, float | None]:
    """An accuracy in percent as an entry reports it. Raises UsageError for what looks like a fraction."""
    if accuracy is not None and 0 < accuracy <= 1:
        raise UsageError(f"accuracy {accuracy:g}: give percent, {100 * accuracy:g} if this is a fraction")
    return {} if accuracy is None else {"reported": float(accuracy)}


class Added(NamedTuple):
    """The id of a teacher that `add_file` added, and notes on how its weights were found in the file."""

    id: str
    notes: list[str]


def add_file(
    pool: Pool,
    weights: Path,
    *,
    id: str | None = None,
    arch: str,
    input: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str],
    accuracy: float | None = None,
    source: str = "",
    authorization: str = "",
    access: Access = "weights",
    terms: Terms = FREE,
) -> Added:
    """Add a teacher from a file of weights (safetensors, or what `torch.save` wrote), after running it once.

    `id` is by default the file's name without its suffixes. `input` is `CHANNELSxHEIGHTxWIDTH`. `mean` and `std` are
    per channel, for pixels in [0, 1], and by default 0 and 1. `accuracy` is in percent. Raises UsageError for arguments
    that do not fit the file or each other, and RejectedError for a bad file.
    """
    weights = resolved(weights)
    channels, height, width = size_of(input)
    reported = percent(accuracy)
    image = ImageSpec(
        channels=channels,
        height=height,
        width=width,
        mean=tuple(mean) if mean is not None else (0.0,) * channels,
        std=tuple(std) if std is not None else (1.0,) * channels,
    )
    id = _id_of(weights) if id is None else id
    entry = make_entry(id, arch, image, classes, reported, source, authorization, access, terms)
    found = foreign.read(weights, arch, image, len(classes))
    pool._add(entry, found.tensors, run=True)
    return Added(id, found.notes)


def _id_of(file: Path) -> str:
    """A file's name without the suffixes of weights. Raises UsageError if that cannot be an id."""
    name = file.name
    while (end := Path(name).suffix) and end.lower() in foreign.SUFFIXES:
        name = name.removesuffix(end)
    if not is_id(name):
        fit = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._") or "teacher"
        raise UsageError(f"{shown(name)!r} cannot be the id of a teacher; give one, such as --id {fit}")
    return name
