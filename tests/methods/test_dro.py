"""Our DRO: the inner maximisation, the gradient of the loss, the fit, and the same bits however a run is cut."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_dfml.core.weights import Layout
from ray_dfml.methods import METHODS, baselines, dro
from ray_dfml.methods.base import State, World
from ray_dfml.runtime.checkpoint import Checkpoints
from ray_dfml.runtime.storage import Folder
from ray_dfml.types import Arrays, Job
from tests.runtime import toy
from tests.support import FakeShard, at, normal, slope, small_world

WORLD = small_world(channels=1)
SHARD = FakeShard(WORLD)


def config(**changes: Any) -> dro.Config:
    """A hyper-network of 13 weights in chunks of 5, or of a Conv4, in little time."""
    small = {"steps_per_round": 5, "embedding": 4, "hidden": 16, "chunk": 2048}
    return dro.Config.model_validate(small | changes)


def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `weights` op in this process."""
    assert op == "weights"
    return baselines.weights(SHARD, jobs, shared)


def train(cfg: dro.Config, world: World, rounds: int, state: State | None = None, first: int = 0) -> State:
    state = dro.init(cfg, world) if state is None else state
    for r in range(first, first + rounds):
        state, _ = dro.learn(cfg, world, state, r, [], send)
    return state


def puzzle(device: torch.device, **changes: Any) -> tuple[dro.Config, Layout, Tensor, Tensor]:
    """Config, parts, psi and the targets of three teachers of 13 weights, in float64."""
    cfg = config(chunk=5, **changes)
    parts = dro.layout(cfg, 3, 13)
    return cfg, parts, 0.5 * normal(parts.numel, seed=1, device=device), normal(3, 13, seed=2, device=device)


# ---------------------------------------------------------------------------------------------------------- mathematics


def test_the_weights_come_chunk_by_chunk(device: torch.device) -> None:
    """Chunk k is the network's answer to (embedding, chunk embedding k); the last one is cut."""
    _, parts, psi, _ = puzzle(device)
    one = parts.unflatten(psi)
    found = dro.hyper(one, one["teachers"], 13)
    assert found.shape == (3, 13)
    for i in range(3):
        for k in range(3):
            x = torch.cat([one["teachers"][i], one["chunks"][k]])
            x = (one["0.weight"] @ x + one["0.bias"]).clamp_min(0)
            x = (one["1.weight"] @ x + one["1.bias"]).clamp_min(0)
            wanted = (one["2.weight"] @ x + one["2.bias"])[: 3 if k == 2 else 5]
            torch.testing.assert_close(found[i, 5 * k : 5 * k + 5], wanted)


def test_the_objective_is_the_mean_square_less_the_price_of_the_shift(device: torch.device) -> None:
    cfg, parts, psi, target = puzzle(device, gamma=3.0)
    one = parts.unflatten(psi)
    shift = normal(3, 4, seed=3, device=device)
    found = dro.penalised(cfg, one, one["teachers"], shift, target)
    made = dro.hyper(one, one["teachers"] + shift, 13)
    for i in range(3):
        wanted = float((made[i] - target[i]) @ (made[i] - target[i])) / 13 - 3.0 * float(shift[i] @ shift[i])
        assert float(found[i]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 10.0, 1000.0])
def test_each_step_of_the_ascent_raises_the_objective(device: torch.device, gamma: float) -> None:
    _, parts, psi, target = puzzle(device)
    one = parts.unflatten(psi)
    values = []
    for steps in range(4):
        cfg = config(chunk=5, gamma=gamma, ascent_steps=steps)
        shift = dro.worst_shift(cfg, one, one["teachers"], target)
        values.append(dro.penalised(cfg, one, one["teachers"], shift, target))
    assert (values[1] > values[0]).all()
    assert (values[2] >= values[1] - 1e-9).all()
    assert (values[3] >= values[2] - 1e-9).all()
    assert dro.Config().ascent_steps == 3


def test_a_high_price_leaves_no_shift(device: torch.device) -> None:
    """At the maximum the shift is (gradient of the error) / (2 gamma)."""
    _, parts, psi, target = puzzle(device)
    one = parts.unflatten(psi)
    e = one["teachers"].clone().requires_grad_()
    (grad,) = torch.autograd.grad((dro.hyper(one, e, 13) - target).square().mean(1).sum(), e)
    for gamma in (1e3, 1e6):
        shift = dro.worst_shift(config(chunk=5, gamma=gamma), one, one["teachers"], target)
        assert float((2 * gamma * shift - grad).norm() / grad.norm()) < 20 / gamma
        assert 0 < float(shift.norm()) < 10 / gamma


def test_the_gradient_is_that_of_the_loss_at_the_shift(device: torch.device) -> None:
    """The gradient equals differences along random directions, and is zero for teachers that were not drawn."""
    cfg, parts, psi, target = puzzle(device)
    rows = [2, 0]
    start = parts.unflatten(psi)
    shift = dro.worst_shift(cfg, start, start["teachers"][rows], target[rows])

    def loss(at: Tensor) -> Tensor:
        one = parts.unflatten(at)
        return dro.penalised(cfg, one, one["teachers"][rows], shift, target[rows]).mean()

    value, grad = dro.gradient(cfg, parts, psi, rows, target[rows])
    assert float(value) == pytest.approx(float(loss(psi)), rel=1e-12)
    for seed in range(4):
        direction = normal(parts.numel, seed=10 + seed, device=device)
        assert float(grad @ direction) == pytest.approx(slope(loss, psi, direction, eps=1e-6), rel=1e-5)
    embeddings = parts.unflatten(grad)["teachers"]
    assert embeddings[1].abs().sum() == 0
    assert (embeddings[rows].abs().sum(1) > 0).all()


def test_each_tensor_has_its_own_standard() -> None:
    parts = Layout({"a": (2, 3), "b": (4,), "c": (2,)})
    theta = torch.cat([5 + 3 * normal(7, 6), 0.01 * normal(7, 4, seed=1), torch.full((7, 2), 2.0)], 1).double()
    centre, spread = dro.standardisation(parts, theta)
    standard = ((theta - centre) / spread).split(parts.sizes, 1)
    for part in standard[:2]:
        assert float(part.mean()) == pytest.approx(0, abs=1e-9)
        assert float(part.square().mean()) == pytest.approx(1, rel=1e-9)
    assert standard[2].abs().sum() == 0
    assert spread[-2:].tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------------------- training


def test_the_fit_falls_and_the_learner_is_the_network_at_the_mean_embedding(device: torch.device) -> None:
    cfg = config(hidden=64, steps_per_round=20)
    state, fits = dro.init(cfg, WORLD), []
    for r in range(3):
        state, metrics = dro.learn(cfg, at(WORLD, device), state, r, [], send)
        fits.append(metrics["dro/fit"])
    assert fits == sorted(fits, reverse=True)
    assert fits[-1] < 0.8 * fits[0]
    parts = dro.layout(cfg, 3, len(state["theta"])).unflatten(state["psi"])
    made = dro.hyper(parts, parts["teachers"].mean(0, keepdim=True), len(state["theta"]))[0]
    torch.testing.assert_close(state["theta"], state["centre"] + state["spread"] * made, rtol=1e-4, atol=1e-5)
    stats = torch.stack([SHARD.teacher(c.id).stats for c in WORLD.cards]).mean(0)
    torch.testing.assert_close(state["stats"], stats, rtol=1e-5, atol=1e-6)


def test_one_teacher_at_a_high_price_is_that_teacher(device: torch.device) -> None:
    world = replace(WORLD, cards=WORLD.cards[:1])
    cfg = config(hidden=64, gamma=1e9, lr=3e-3, steps_per_round=400)
    state = train(cfg, at(world, device), 1)
    theta = SHARD.teacher(WORLD.cards[0].id).theta
    start = dro.init(cfg, world)["theta"]
    assert float((state["theta"] - theta).norm() / theta.norm()) < 0.05
    assert float((start - theta).norm() / theta.norm()) > 1.0


def test_a_run_cut_anywhere_has_the_same_bits(tmp_path: Path) -> None:
    """Two rounds of five, the second from the checkpoint of the first; one round of ten takes the same steps."""
    cfg = config(sample="convex")
    whole = train(cfg, WORLD, 2)
    Checkpoints(Folder(tmp_path)).save(1, train(cfg, WORLD, 1))
    found = Checkpoints(Folder(tmp_path)).load()
    assert found is not None
    toy.assert_equal(train(cfg, WORLD, 1, found[1], first=1), whole)
    toy.assert_equal(train(config(sample="convex", steps_per_round=10), WORLD, 1), whole)
    assert not whole["theta"].equal(train(cfg, replace(WORLD, seed=1), 2)["theta"])


def test_a_step_sees_the_teachers_it_drew(device: torch.device) -> None:
    """Each step draws one teacher, and the embeddings of the others stay. In twelve steps all three are drawn."""
    cfg = config(teachers_per_step=1, steps_per_round=1)
    before = dro.init(cfg, WORLD)
    count = before["psi"].numel()
    seen = []
    for step in range(12):
        fresh = before | {"adam": {"m": torch.zeros(count), "v": torch.zeros(count), "step": step}}
        after, _ = dro.learn(cfg, at(WORLD, device), fresh, 0, [], send)
        first, second = (
            dro.layout(cfg, 3, WORLD.net.layout.numel).unflatten(s["psi"])["teachers"] for s in (before, after)
        )
        (moved,) = (first != second).any(1).nonzero().flatten().tolist()
        seen.append(moved)
    assert set(seen) == {0, 1, 2}


def test_a_rejected_teacher_leaves_the_others_their_embeddings(device: torch.device) -> None:
    """All of the remaining teachers in each step, also where more are asked for."""
    cfg = config(teachers_per_step=9, steps_per_round=1)
    before = dro.init(cfg, WORLD)
    after, _ = dro.learn(cfg, at(replace(WORLD, cards=WORLD.cards[1:]), device), before, 0, [], send)
    parts = dro.layout(cfg, 3, WORLD.net.layout.numel)
    first, second = (parts.unflatten(s["psi"])["teachers"] for s in (before, after))
    assert (first != second).any(1).tolist() == [False, True, True]
    made = dro.hyper(parts.unflatten(after["psi"]), second[1:].mean(0, keepdim=True), len(after["theta"]))[0]
    torch.testing.assert_close(after["theta"], after["centre"] + after["spread"] * made, rtol=1e-4, atol=1e-5)


def test_the_standard_is_that_of_the_first_round() -> None:
    cfg = config(steps_per_round=1)
    first = train(cfg, WORLD, 1)
    second = train(cfg, replace(WORLD, cards=WORLD.cards[1:]), 1, first, first=1)
    assert second["centre"].equal(first["centre"])
    assert second["spread"].equal(first["spread"])


def test_a_convex_sample_is_between_the_embeddings_and_the_same_in_every_round() -> None:
    cfg = config(sample="convex")
    shares = dro.shares(cfg, 0, 3)
    assert float(shares.sum()) == pytest.approx(1, rel=1e-6)
    assert (shares > 0).all()
    assert shares.equal(dro.shares(cfg, 0, 3))
    assert not shares.equal(dro.shares(cfg, 1, 3))
    many = torch.stack([dro.shares(cfg, seed, 3) for seed in range(400)])
    torch.testing.assert_close(many.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.05)
    assert float(many.var(0).mean()) == pytest.approx(1 / 18, rel=0.2), "uniform on the simplex"
    assert dro.shares(config(), 0, 4).tolist() == [0.25] * 4
    state, other = train(cfg, WORLD, 1), train(config(), WORLD, 1)
    assert state["psi"].equal(other["psi"])
    assert not state["theta"].equal(other["theta"])


def test_a_loss_that_is_not_finite_is_an_error(device: torch.device) -> None:
    with pytest.raises(FloatingPointError, match=r"lower method\.lr or raise method\.gamma"):
        train(config(lr=1e30), at(WORLD, device), 1)


def test_the_published_number_of_steps_and_the_name_of_the_reconstruction() -> None:
    cfg = METHODS["dro"].Config()
    assert cfg.model_dump() == {
        "rounds": 200, "steps_per_round": 100, "teachers_per_step": 2, "embedding": 64, "hidden": 256, "chunk": 4096,
        "ascent_steps": 3, "gamma": 1.0, "lr": 1e-3, "sample": "mean",
    }  # fmt: skip
    assert "our DRO" in METHODS["dro"].notes(cfg, WORLD)[0]
