"""The training of teachers: which optimiser an architecture has, and when its step size falls."""

import numpy as np
import pytest
import torch

from ray_dfml.data.pretrain import DEEP, PretrainConfig, pretrain
from ray_dfml.types import Job
from tests.support import FakeShard, small_world


def trained(arch: str, **settings: object) -> np.ndarray:
    """Weights after three epochs on 12 images of noise in two classes."""
    images = torch.randint(256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    values = {
        "arch": arch, "shape": (1, 8, 8), "mean": np.zeros(1, np.float32), "std": np.ones(1, np.float32), "way": 2,
        "images": images, "labels": np.arange(12) % 2, "held_out": np.arange(12) < 2,
    }  # fmt: skip
    cfg = PretrainConfig(epochs=3, batch=5, lr=1e-3).model_copy(update=settings).model_dump()
    return pretrain(FakeShard(small_world()), [Job(index=0, seed=3, values=values)], {"cfg": cfg})[0]["theta"]


@pytest.mark.parametrize("arch", ["lenet", "alexnet"])
def test_the_step_size_falls_at_the_milestones(arch):
    """The best epoch is kept, so that the weights of later epochs need not show; a fall at epoch 0 always does."""
    plain = trained(arch)
    assert np.array_equal(plain, trained(arch, milestones=()))
    assert np.array_equal(trained(arch, milestones=(0,)), trained(arch, lr=2e-4))
    assert not np.array_equal(plain, trained(arch, lr=2e-4))


def test_momentum_and_weight_decay_are_those_of_deep_networks():
    changed = {"momentum": 0.0, "weight_decay": 0.1}
    for arch in ("lenet", "mlp", "alexnet"):
        assert np.array_equal(trained(arch), trained(arch, **changed)) != arch.startswith(DEEP)
