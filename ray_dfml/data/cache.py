"""Decoded images as .npy files under `~/.cache/ray-dfml` (`RAY_DFML_CACHE` overrides), opened by memory map.

A file is written beside its place and then renamed, so a reader finds a whole file or none. If a file does not hold the
array that its key promises, it is made again. If the cache cannot be written, the run goes on without it.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ray_dfml.files import resolved


def folder() -> Path:
    """The folder of the cache. It need not exist yet."""
    given = os.environ.get("RAY_DFML_CACHE")
    return resolved(given) if given else Path.home() / ".cache" / "ray-dfml"


def array(key: str, shape: tuple[int, ...], build: Callable[[], np.ndarray]) -> np.ndarray:
    """The uint8 array of `shape` that is stored under `key`. If there is none, `build` makes it, and it is stored.

    The array is copy-on-write: a change stays in the memory of this process and never reaches the file. Raises what
    `build` raises.
    """
    path = folder() / f"{key}.npy"
    found = _open(path, shape)
    if found is not None:
        return found
    made = build()
    try:
        _write(path, made)
    except OSError:
        return made  # read-only home or full disk: go on from memory
    stored = _open(path, shape)
    return made if stored is None else stored


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The stored array, or None if the file is absent, damaged or of another shape."""
    try:
        # copy-on-write rather than read-only: torch.from_numpy warns about arrays it could not write to
        found = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(found) if found.dtype == np.uint8 and found.shape == shape else None


def _write(path: Path, content: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, content, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # a crash after the rename must not leave a whole-looking file of zeros
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
