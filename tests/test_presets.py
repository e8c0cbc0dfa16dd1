"""Ablations: each changes the settings it claims to change, no others, and the round follows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.config import resolve
from ray_dfml.core import optim
from ray_dfml.methods.base import State
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.bidf import sets
from ray_dfml.methods.free import method as free
from ray_dfml.methods.free.config import PRESETS
from ray_dfml.methods.inversion import Inversion
from ray_dfml.methods.purer import method as purer
from tests.support import FakeShard, play, same, small_bidf, small_config, small_purer, small_world

WORLD = small_world()
ABLATIONS: dict[str, dict[str, Any]] = {
    "baseline": {"method.generator_sharing": "sequential", "method.learner_update": "none"},
    "erm": {"method.learner_update": "erm"},
    "sequence": {"method.generator_sharing": "sequential"},
    "free_2": {"method.steps": 2},
    "hard-label": {"method.distill": "hard"},
}
"""Preset -> keys of the resolved configuration that differ from FREE's defaults."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changed(name: str, **how: Any) -> dict[str, Any]:
    """What differs from the method's defaults once resolved, but for the preset's name itself."""
    plain, other = flat(resolve(name).model_dump()), flat(resolve(name, **how).model_dump())
    assert plain.keys() == other.keys()
    return {key: other[key] for key in plain if key != "preset" and other[key] != plain[key]}


def small(preset: str, **changes: Any) -> free.Config:
    """FREE in seconds, with the values of a preset."""
    return small_config(**PRESETS[preset].values["method"] | changes)


def recovered(cfg: free.Config) -> tuple[FakeShard, State, list[dict[str, Any]]]:
    """A shard, the first state, and the results of round 1."""
    shard, state = FakeShard(WORLD), free.init(cfg, WORLD)
    return (
        shard,
        state,
        shard.send("free.recover", free.plan(cfg, WORLD, state, 1), free.shared(cfg, WORLD, state, 1)),
    )


def learned(cfg: free.Config) -> tuple[State, State, dict[str, Any]]:
    shard, state, results = recovered(cfg)
    after, metrics = free.learn(cfg, WORLD, state, 1, results, shard.send)
    return state, after, dict(metrics)


@pytest.mark.parametrize("preset", ABLATIONS)
def test_an_ablation_of_free_changes_what_it_claims_and_nothing_else(preset):
    assert changed("free", preset=preset) == ABLATIONS[preset]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("purer", "method.curriculum=0", {"method.curriculum": 0.0}),
        ("bidf-mkd", "method.boundary=off", {"method.boundary": False}),
        ("free", "method.learner_update=none", {"method.learner_update": "none"}),
    ],
)
def test_a_part_is_left_out_by_one_setting(name, text, expected):
    assert changed(name, settings=[text]) == expected


def test_the_baseline_is_one_generator_and_replay():
    cfg = small("baseline")
    before, after, metrics = learned(cfg)
    assert free.plan(cfg, WORLD, before, 1) == []
    assert metrics["recover/tasks"] == cfg.teachers_per_round
    assert same(after["adam_g"], before["adam_g"])
    assert not torch.equal(after["theta_g"], before["theta_g"])
    assert not any(name.startswith(("bell", "align")) for name in metrics)
    assert after["updates"] == metrics["replay/updates"] >= 1


def test_erm_is_one_step_on_the_sum_of_the_gradients_at_theta(monkeypatch):
    """Two steps of BELL's path would end elsewhere; the generator's part is FREE's."""
    monkeypatch.setattr(free.replay, "until_plateau", lambda cfg, world, state, bank, r, send: (state, {}))
    cfg = small("erm")
    shard, state, results = recovered(cfg)
    after, metrics = free.learn(cfg, WORLD, state, 1, results, shard.send)
    tasks = [free._distill_set(cfg, WORLD, task) for task in results]
    leaf = state["theta"].clone().requires_grad_()
    total = sum(free.bell.distill_loss(WORLD.net, task, "kl")(leaf) for task in tasks)
    (grad,) = torch.autograd.grad(torch.as_tensor(total), leaf)
    expected, _ = optim.adam_step(state["theta"], grad, optim.Adam.zeros(grad), lr=cfg.bell_outer_lr)
    torch.testing.assert_close(after["theta"], expected)
    assert "align/path_product" not in metrics
    _, by_bell, plain = learned(small_config())
    assert "align/path_product" in plain
    assert torch.equal(after["theta_g"], by_bell["theta_g"])
    assert not torch.equal(after["theta"], by_bell["theta"])


def test_sequence_is_one_generator_and_bell():
    cfg = small("sequence")
    before, after, metrics = learned(cfg)
    assert free.plan(cfg, WORLD, before, 1) == []
    assert same(after["adam_g"], before["adam_g"])
    assert after["adam_bell"]["step"] == 1
    assert "align/path_product" in metrics


@pytest.mark.parametrize(("steps", "passes"), [(2, 3), (5, 6)])
def test_free_k_takes_k_steps_and_a_pass(steps, passes, monkeypatch):
    count, original = [], Inversion.losses
    monkeypatch.setattr(Inversion, "losses", lambda self, *parts: count.append(1) or original(self, *parts))
    _, _, results = recovered(small_config(steps=steps, teachers_per_round=2))
    assert len(results) == 2
    assert len(count) == 2 * passes


def test_hard_labels_leave_the_teachers_outputs_unread():
    ends = []
    for preset in ("hard-label", "free_2"):
        cfg = small(preset)
        shard, state, results = recovered(cfg)
        for wrong in (False, True):
            for task in results:
                task["logits"] = -task["logits"] if wrong else task["logits"]
            ends.append(free.learn(cfg, WORLD, state, 1, results, shard.send)[0]["theta"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[2], ends[3])


def test_purer_without_curriculum_never_pushes():
    method: Any = resolve("purer", settings=["method.curriculum=0"]).method
    due = {"curriculum_after": 1, "curriculum_patience": 1}
    asked = []
    for curriculum in (method.curriculum, purer.Config().curriculum):
        shard = FakeShard(WORLD)
        play("purer", small_purer(curriculum=curriculum, **due), WORLD, rounds=2, shard=shard)
        pushed = [job.values["push"] is not None for op, jobs in shard.sent for job in jobs if op == "purer.recover"]
        asked.append(("purer.grad" in dict(shard.sent), any(pushed)))
    assert asked == [(False, False), (True, True)]


def test_bidf_without_boundary_never_reads_the_learner_in_recovery():
    method: Any = resolve("bidf-mkd", settings=["method.boundary=off"]).method
    for boundary, equal in ((method.boundary, True), (bidf.Config.model_validate({}).boundary, False)):
        cfg, shard = small_bidf(boundary=boundary, adversarial=5.0), FakeShard(WORLD)
        state = bidf.init(cfg, WORLD)
        found = []
        for factor in (1.0, 5.0):
            moved = {**state, "theta": factor * state["theta"]}
            shared = bidf.shared(cfg, WORLD, moved, 0)
            found.append(sets.recover(shard, bidf.plan(cfg, WORLD, moved, 0), shared)[0])
        one, two = found
        assert same(one["support"], two["support"])
        assert np.array_equal(one["query"]["images"], two["query"]["images"]) == equal


def test_colour_images_are_asked_about_with_shapes_and_learned_for_longer() -> None:
    """The budget is that of the defaults."""
    assert set(changed("ideal", preset="ideal-colour")) == {"method.images", "method.steps", "method.last_steps"}


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("no-information", {"method.lam": 0.0}),
        ("no-ce", {"method.ce": 0.0}),
        ("no-reset", {"method.reset": False}),
    ],
)
def test_an_ablation_of_ideal_leaves_out_one_part_of_its_generator(preset: str, change: dict[str, Any]) -> None:
    assert changed("ideal", preset=preset) == change
