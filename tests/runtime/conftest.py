"""A second toy domain beside the grey one: larger images, in colour, and pools of several architectures."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime import toy

OF_RAY = ("backends", "bits", "cluster", "dispatch", "method_bits", "place", "poison", "preflight", "stalls")
"""Test modules that import Ray."""

collect_ignore = [] if importlib.util.find_spec("ray") else [f"test_{name}.py" for name in OF_RAY]


@pytest.fixture(scope="session")
def colour_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Spec of 6 + 4 + 5 classes of 20 separable 20x20 colour images, split by class."""
    root, rng = tmp_path_factory.mktemp("colour"), np.random.default_rng(1)
    for split, count in {"train": 6, "val": 4, "test": 5}.items():
        for c in range(count):
            pattern = np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((4, 4, 1)))
            folder = root / split / f"{split}{c:02d}"
            folder.mkdir(parents=True)
            for i in range(20):
                pixels = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return f"folder:{root}"


@pytest.fixture(scope="session")
def mixed_pools(tmp_path_factory: pytest.TempPathFactory, toy_data: str, colour_data: str) -> tuple[Path, Path]:
    """Two-way teachers of grey 16x16 images, Conv4 and ResNet-10, and three-way ones of 20x20 colour images."""
    root = tmp_path_factory.mktemp("mixed")
    grey = toy.build_pool(root / "grey", toy_data, models=2, way=2, archs=("conv4", "resnet10"))
    colour = toy.build_pool(root / "colour", colour_data, models=2, way=3, archs=("conv4-64", "resnet10"))
    return grey, colour
