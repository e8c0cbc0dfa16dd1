"""The learner's own work on an accelerator gives the numbers of the CPU, within rounding."""

from typing import Any

import pytest
import torch

from ray_dfml.methods import dro
from tests.support import GPU, FakeShard, play, small_config, small_world

WORLD = small_world()
pytestmark = GPU


def ends(name: str, cfg: Any, *, rounds: int = 1) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The last state and metrics of a method whose learner works on the CPU, and on the accelerator."""
    return [
        play(name, cfg, WORLD, rounds=rounds, shard=FakeShard(WORLD), device=torch.device(device))[1:]
        for device in ("cpu", "cuda")
    ]


@pytest.mark.parametrize("changes", [{}, {"learner_update": "erm"}, {"bell_outer": "interpolate"}])
def test_bell(changes: dict[str, Any]) -> None:
    small = {"shot": 1, "query": 2, "tasks": 1, "inner_steps": 0, "max_updates": 1}
    (_, here), (_, there) = ends("free", small_config(bell_inner="sgd", alignment_every=1, replay=small, **changes))
    for name in ("bell/loss", "bell/step_norm", "align/base_product"):
        assert there[name] == pytest.approx(here[name], rel=1e-2), name


def test_dro() -> None:
    (here, _), (there, metrics) = ends("dro", dro.Config(steps_per_round=3, hidden=16, chunk=2048), rounds=2)
    torch.testing.assert_close(there["theta"], here["theta"], rtol=1e-2, atol=1e-3)
    assert metrics["dro/fit"] > 0
