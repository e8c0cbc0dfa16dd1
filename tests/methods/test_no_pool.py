"""The control without teachers: its classes, its refusals, and what it learns."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ray_dfml.config import resolve
from ray_dfml.core import seeds
from ray_dfml.core.images import to_bytes
from ray_dfml.core.sources import SOURCES
from ray_dfml.errors import UsageError
from ray_dfml.methods import CONTROL, METHODS, no_pool
from ray_dfml.methods.no_pool import Config, classes
from tests.methods.test_baselines import driver_scores
from tests.support import FakeShard, alike, image_spec, play, same, small_world

STILL: dict[str, Any] = {
    "rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0, "elastic": 0.0, "flip": "off",
}  # fmt: skip
"""Settings of warps that change nothing."""


def small(**changes: Any) -> Config:
    quick = {"shot": 1, "query": 2, "tasks": 2, "inner_steps": 1}
    given: dict[str, Any] = {"updates_per_round": 2, "classes": 6, "images_per_class": 4, "replay": quick}
    return Config.model_validate(given | changes)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refusal(cfg: Config, **changes: Any) -> str:
    with pytest.raises(UsageError) as error:
        no_pool.init(cfg, replace(small_world(), **changes))
    return str(error.value)


def test_a_round_is_a_function_of_the_seed_and_leaves_everything_else_alone(device: torch.device) -> None:
    before, after, metrics = play("no-pool", small(), small_world(), rounds=2, device=device)
    _, again, _ = play("no-pool", small(), small_world(), rounds=2, device=device)
    assert alike(after, again, device)
    assert before.keys() == after.keys() == {"theta", "stats", "adam", "updates"}
    assert after["updates"] == 4
    assert metrics.keys() == {"replay/loss", "replay/accuracy"}
    _, other, _ = play("no-pool", small(), small_world(seed=1), rounds=2, device=device)
    assert not torch.equal(after["theta"], other["theta"])


def test_teachers_change_nothing() -> None:
    _, with_pool, _ = play("no-pool", small(), small_world())
    _, without, _ = play("no-pool", small(), replace(small_world(), cards=()))
    assert same(with_pool, without)


def test_no_teacher_is_asked_and_each_round_has_new_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(no_pool, "classes", lambda *parts: seen.append(classes(*parts)) or seen[-1])
    shard = FakeShard(small_world())
    play("no-pool", small(), small_world(), rounds=3, shard=shard)
    assert {op for op, _ in shard.sent} == {"maml.grad"}
    assert {job.teacher for _, jobs in shard.sent for job in jobs} == {None}
    assert shard.services == {}
    first = [bank["000000"] for bank in seen]
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[1], first[2])
    again = classes(small(), small_world().image.shape, seeds.rng(0, 1, "images"))
    assert same(seen[0], again)


@pytest.mark.parametrize("images", [("dip",), ("strokes", "shapes"), ("dipw", "dipc", "dip", "shapes")])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 8, 10)])
def test_a_class_is_bytes_of_the_shape(images: Sequence[str], shape: tuple[int, int, int]) -> None:
    bank = classes(small(images=images, classes=30), shape, rng())
    assert len(bank) == 30
    assert list(bank) == sorted(bank)
    assert {(own.dtype, own.shape) for own in bank.values()} == {(np.dtype(np.uint8), (4, *shape))}


def test_without_warps_the_images_of_a_class_are_the_one_of_the_source() -> None:
    bank = classes(small(images=("shapes",), **STILL), (1, 16, 16), rng())
    expected = to_bytes(SOURCES["shapes"].function(rng(), 6, (1, 16, 16)))
    for own, one in zip(bank.values(), expected, strict=True):
        assert np.abs(own.astype(int) - one.astype(int)).max() <= 1


def test_sources_share_the_classes_and_the_first_ones_take_those_left_over() -> None:
    bank = classes(small(images=("shapes", "strokes"), classes=5, **STILL), (1, 16, 16), rng())
    both = rng()
    expected = [SOURCES[name].function(both, n, (1, 16, 16)) for name, n in (("shapes", 3), ("strokes", 2))]
    found = np.stack([own[0] for own in bank.values()])
    assert np.abs(found.astype(int) - to_bytes(torch.cat(expected)).astype(int)).max() <= 1


def test_images_of_a_class_are_alike_and_those_of_two_are_not() -> None:
    bank = classes(small(images=("shapes",), classes=40, images_per_class=8), (1, 28, 28), rng())
    x = torch.tensor(np.stack(list(bank.values()))).float().flatten(2)
    x = x - x.mean(2, keepdim=True)
    x = x / x.norm(dim=2, keepdim=True).clamp(min=1e-6)
    within = (x[:, 0] * x[:, 1]).sum(1).mean()
    between = (x[:-1, 0] * x[1:, 1]).sum(1).mean()
    assert float(within) > float(between) + 0.1
    assert len(np.unique(np.concatenate(list(bank.values())), axis=0)) == 320


def test_zoom_and_polarity_make_large_strokes_dark_on_light() -> None:
    plain, near = ({"images": ("strokes",), "classes": 60, **STILL, **more} for more in ({}, {
        "zoom_low": 1.5, "zoom_high": 2.0, "invert": True,
    }))  # fmt: skip
    small_ink, ink = (
        np.stack([own[0] for own in classes(small(**settings), (1, 28, 28), rng()).values()]).mean() / 255
        for settings in (plain, near)
    )
    assert small_ink < 0.1
    assert 1.6 * small_ink < 1 - ink < 5 * small_ink


def test_colour_images_are_mirrored_and_grey_ones_are_not() -> None:
    settings = {**STILL, "flip": "auto", "images_per_class": 12}
    grey, colour = (classes(small(**settings), shape, rng()) for shape in ((1, 12, 12), (3, 12, 12)))
    assert all(np.abs(own.astype(int) - own[:1].astype(int)).max() <= 1 for own in grey.values())
    versions = [len(np.unique(own.round(-1), axis=0)) for own in colour.values()]
    assert max(versions) >= 2


def test_changed_colours_differ_within_a_class() -> None:
    own = classes(small(recolour=0.3, **STILL), (3, 12, 12), rng())["000000"].astype(float)
    assert own.mean((1, 2, 3)).std() > 5


@pytest.mark.parametrize(("changes", "said"), [
    ({"images_per_class": 2}, "tasks take 1 + 2 images of a class, method.images_per_class is 2; raise it"),
    ({"classes": 3}, "a task takes 4 classes, method.classes is 3; raise it"),
    ({"zoom_low": 2.0, "zoom_high": 1.5}, "method.zoom_low is 2, above method.zoom_high, 1.5"),
])  # fmt: skip
def test_settings_that_make_no_task_are_refused(changes: dict[str, Any], said: str) -> None:
    assert refusal(small(**changes), way=4) == f"no-pool: {said}"


def test_images_too_small_for_a_source_are_refused() -> None:
    assert refusal(small(), image=image_spec(3, 7)) == (
        "no-pool: image sources need a height and a width of at least 8"
    )


@pytest.mark.parametrize(("images", "said"), [
    (("dop",), r"no image source 'dop' \(did you mean 'dip'\?\)"), (("mutants",), "no image source 'mutants'"),
    (("dip", "dip"), "named twice"), ((), "at least 1 item"),
])  # fmt: skip
def test_unknown_sources_are_refused(images: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        small(images=images)


def test_the_assumption_and_the_knowledge_are_said() -> None:
    world = replace(small_world(), cards=())
    assert no_pool.notes(small(images=("strokes",)), world) == [
        "no-pool: tasks of images of strokes, which assumes one to three bright strokes of a pen on black"
    ]
    preset = Config.model_validate(no_pool.CHARACTERS)
    assert no_pool.notes(preset, small_world())[1:] == [
        "no-pool: images zoomed by 1.16 to 2.12, dark and light changed places: this is knowledge of the domain, which "
        "no teacher gave",
        "no-pool: the pool gives the learner's input and number of classes, and nothing else",
    ]
    assert len(no_pool.notes(small(images=("dip", "dipc")), world)) == 2


@pytest.mark.parametrize(("preset", "shape"), [("no-pool-characters", (1, 28, 28)), ("no-pool-colour", (3, 32, 32))])
def test_a_preset_makes_tasks_of_its_domain(preset: str, shape: tuple[int, int, int]) -> None:
    """Dark strokes on a light page, or colours that differ within a class as views of an image do."""
    cfg = resolve("no-pool", preset=preset, settings=["method.classes=40"]).method
    assert isinstance(cfg, Config)
    bank = np.stack(list(classes(cfg, shape, rng()).values())) / 255
    assert bank.shape == (40, 20, *shape)
    if shape[0] == 1:
        assert np.median(bank) > 0.95
        assert 0.7 < bank.mean() < 0.97
    else:
        assert 0.35 < bank.mean() < 0.65
        assert bank.mean((2, 3, 4)).std(1).mean() > 0.03


def test_it_is_the_control_that_reports_look_for() -> None:
    method = METHODS[CONTROL]
    assert method is no_pool.METHOD
    assert method.baseline
    assert not method.needs_pool
    assert not method.needs_real


def test_it_learns_to_tell_new_classes_apart(toy_data: str) -> None:
    """Separable blocks, which no source draws: above the fresh learner on the same episodes."""
    test = ("eval.lr=0.05", "eval.lrs=[]", "learner.head=protonet")
    more = ("method.rounds=4", "method.updates_per_round=10", "method.classes=60", "method.replay.lr=0.003", *test)
    control = driver_scores("no-pool", None, toy_data, *more)["no-pool"]
    random = driver_scores("random", None, toy_data, *test)["random"]
    difference = control - random
    assert difference.mean() > 2 * difference.std(ddof=1) / np.sqrt(len(difference))
