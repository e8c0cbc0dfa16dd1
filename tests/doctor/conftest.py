"""Small teachers of embedded characters, some of them spoiled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.core.net import net
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.runtime.choice import shuffled
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.types import ImageSpec, Job

IMAGE = ImageSpec(channels=1, height=16, width=16, mean=(0.4,), std=(0.3,))
WAY, EACH, EPOCHS = 4, 8, 24
GOOD = 7


def learnt(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and statistics of a teacher of glyphs."""
    whole = datasets.load("glyphs").subset("train")
    rows = np.concatenate([np.flatnonzero(whole.labels == number * WAY + c)[:EACH] for c in range(WAY)])
    values = {
        "arch": "conv4", "shape": IMAGE.shape, "mean": np.array(IMAGE.mean, np.float32),
        "std": np.array(IMAGE.std, np.float32), "way": WAY, "labels": np.repeat(np.arange(WAY), EACH),
        "images": to_bytes(fit(to_pixels(whole.images[rows]), IMAGE.shape)),
        "held_out": np.tile(np.arange(EACH) >= EACH - 2, WAY),
    }  # fmt: skip
    cfg = {"epochs": EPOCHS, "lr": 0.01}
    (made,) = LocalBackend(no_teachers).map("pretrain", [Job(index=0, seed=number, values=values)], {"cfg": cfg})
    return made["theta"], made["stats"]


def put(pool: Pool, id: str, theta: np.ndarray, stats: np.ndarray, classes: tuple[str, ...] | None = None) -> None:
    """Add a teacher to a pool."""
    network = net("conv4", IMAGE.shape, WAY)
    tensors = network.layout.unflatten(torch.tensor(theta)) | network.stats_layout.unflatten(torch.tensor(stats))
    names = classes or tuple(f"{id}/{letter}" for letter in "abcd")
    pool.add(id, tensors, arch="conv4", image=IMAGE, classes=names, accuracy={"reported": 90.0}, source="test")


@pytest.fixture(scope="session")
def glyph_teachers() -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and statistics of GOOD teachers."""
    return [learnt(n) for n in range(GOOD)]


@pytest.fixture(scope="session")
def spoiled_pool(tmp_path_factory: pytest.TempPathFactory, glyph_teachers: list[tuple[np.ndarray, np.ndarray]]) -> Path:
    """The good teachers `good-N`, two that know nothing, and two copies of good ones."""
    pool = Pool.create(tmp_path_factory.mktemp("pools") / "spoiled")
    for n, (theta, stats) in enumerate(glyph_teachers):
        put(pool, f"good-{n}", theta, stats)
    theta, stats = glyph_teachers[0]
    network = net("conv4", IMAGE.shape, WAY)
    rng = torch.Generator().manual_seed(99)
    put(pool, "never", network.init(rng).numpy(), network.initial_stats().numpy())
    _, mixed, same = shuffled((pool.cards[1], *glyph_teachers[1]), 0)
    put(pool, "noise", mixed, same)
    parts = dict(network.layout.unflatten(torch.tensor(theta)))
    turned = {name: part.roll(1, 0) if name.startswith("head.") else part for name, part in parts.items()}
    put(pool, "turned", network.layout.flatten(turned).numpy(), stats)
    theta, stats = glyph_teachers[2]
    jitter = 0.005 * torch.randn(len(theta), generator=rng)
    put(pool, "near", (torch.tensor(theta) + jitter).numpy(), stats)
    return Path(pool.path)
