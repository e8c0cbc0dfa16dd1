"""Pools for the tests: sound teachers of a small network, and ways to damage them."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ray_dfml.core.net import net
from ray_dfml.data import weights_file
from ray_dfml.data.pool import Pool
from ray_dfml.types import ImageSpec

IMAGE = ImageSpec(channels=1, height=16, width=16, mean=(0.4,), std=(0.3,))
CLASSES = ("glyphs/a", "glyphs/b", "3")


def state(seed: int = 0, *, arch: str = "conv4", image: ImageSpec = IMAGE, ways: int = 3) -> dict[str, Tensor]:
    """A sound state dict: random weights, and the batch-norm statistics that they give to noise."""
    model, generator = net(arch, image.shape, ways), torch.Generator().manual_seed(seed)
    theta = model.init(generator)
    stats = model.with_stats(theta, torch.randn(8, *image.shape, generator=generator))[1]
    return model.layout.unflatten(theta) | model.stats_layout.unflatten(stats)


def add(pool: Pool, id: str, tensors: dict[str, Tensor] | None = None, **fields: Any) -> None:
    """`pool.add` with defaults for everything but the id."""
    fields = {"arch": "conv4", "image": IMAGE, "classes": CLASSES, "accuracy": None, "source": "test"} | fields
    pool.add(id, state() if tensors is None else tensors, **fields)


def two_teachers(path: Path) -> Pool:
    """A new pool of two sound teachers, `a` and `b`."""
    pool = Pool.create(path)
    for number, id in enumerate("ab"):
        add(pool, id, state(number))
    return pool


def edit(pool: Pool, place: int = 0, **changes: Any) -> None:
    """Change an entry of the manifest by hand; a value of None removes the key."""
    file = pool.path / "pool.yaml"
    content = yaml.safe_load(file.read_text())
    entry = content["teachers"][place]
    for key, value in changes.items():
        entry.pop(key, None)
        if value is not None:
            entry[key] = value
    file.write_text(yaml.safe_dump(content))


def swap(pool: Pool, id: str, tensors: dict[str, Tensor]) -> Pool:
    """Put other weights in the place of a teacher's, with their true sha256."""
    file = pool.path / f"weights/{id}.safetensors"
    weights_file.write(file, tensors)
    edit(pool, list("ab").index(id), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    return Pool.open(pool.path)


def raising(error: Exception) -> Any:
    """A function that raises, whatever it is called with."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail
