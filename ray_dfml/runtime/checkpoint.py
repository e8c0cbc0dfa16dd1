"""A run's whole state in one safetensors file: tensors as tensors, the rest as JSON in the header. No pickle."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ray_dfml.errors import RejectedError

KEEP = 2
"""Checkpoints kept; the one before the last survives a disk that fills while the last is written."""


def save(folder: Path, round: int, state: dict[str, Any]) -> Path:
    """Write `state` (nested dicts of tensors, arrays, numbers, strings) as of `round`, then drop old checkpoints."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _strip(state, (), tensors)
    path = folder / f"round-{round:06d}.safetensors"
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"round": str(round), "tree": json.dumps(tree)})
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEEP]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = sorted(folder.glob("round-*.safetensors"))
    return found[-1] if found else None


def load(path: Path) -> tuple[int, dict[str, Any]]:
    """(round, state) of a checkpoint. Raises RejectedError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as handle:
            meta = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return int(meta["round"]), _fill(json.loads(meta["tree"]), tensors)
    except Exception as error:
        raise RejectedError(
            f"{path}: not a readable checkpoint ({error}); delete it to go on from the one before"
        ) from None


def _strip(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        name = json.dumps(path)
        copy = torch.tensor(value) if isinstance(value, np.ndarray) else value.detach().clone()
        tensors[name] = copy.contiguous()
        return {"__tensor__": name, "numpy": isinstance(value, np.ndarray)}
    return value


def _fill(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            tensor = tensors[value["__tensor__"]]
            return tensor.numpy() if value["numpy"] else tensor
        return {key: _fill(item, tensors) for key, item in value.items()}
    return value
