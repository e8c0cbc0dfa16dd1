"""The learner's own work on an accelerator: the same numbers within rounding, and a state that stays on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ray_dfml.methods import dro
from tests.support import FakeWorker, play, small_config, small_world

WORLD = small_world()


def on_the_cpu(value: Any) -> bool:
    """Whether every tensor of a tree is on the CPU."""
    if isinstance(value, dict):
        return all(map(on_the_cpu, value.values()))
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("outer", ["adam", "interpolate"])
@pytest.mark.parametrize("update", ["bell", "erm"])
def test_bell(update: str, outer: str) -> None:
    cfg = small_config(learner_update=update, bell_outer=outer, bell_inner="sgd", replay={"max_updates": 1, "tasks": 1})
    ends = [play("free", cfg, replace(WORLD, device=device)) for device in ("cpu", "cuda")]
    assert on_the_cpu(ends[1][1])
    for name in ("bell/loss", "bell/step_norm", "align/base_cosine"):
        if name in ends[0][2]:
            assert ends[1][2][name] == pytest.approx(ends[0][2][name], rel=1e-2)


@pytest.mark.gpu
def test_dro() -> None:
    cfg = dro.Config(steps_per_round=3, hidden=16, chunk=2048)
    ends = []
    for device in ("cpu", "cuda"):
        world = replace(WORLD, device=device)
        ends.append(play("dro", cfg, world, rounds=2, worker=FakeWorker(world)))
    assert on_the_cpu(ends[1][1])
    torch.testing.assert_close(ends[1][1]["theta"], ends[0][1]["theta"], rtol=1e-2, atol=1e-3)
    assert ends[1][2]["dro/loss"] == pytest.approx(ends[0][2]["dro/loss"], rel=1e-2)
