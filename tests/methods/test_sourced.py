"""Tasks of images of sources that a teacher with weights labels: which images stay, and where they come in a run."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_dfml.core import losses
from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import pictures, sourced
from ray_dfml.methods.base import World
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.free import method as free
from ray_dfml.types import Arrays
from tests.support import (
    CPU,
    FakeService,
    FakeShard,
    alike,
    mixed_world,
    play,
    same,
    small_bidf,
    small_config,
    small_world,
)

DIP = {"images": ("dip",)}
BOTH = {"images": ("generator", "dip")}


def task_of(world: World, place: int = 0, *, judge=None, **changes) -> tuple[Arrays, FakeService]:
    service = FakeShard(world).service(world.cards[place].id)
    cfg = small_config(**DIP | changes)
    found = sourced.labelled(cfg, service, world.image.shape, world.way, 3, device=CPU, judge=judge)
    return found, service


def candidates(world: World, cfg: free.Config, service: FakeService) -> tuple[np.ndarray, Tensor]:
    """What `sourced.labelled` asks about, and the logits of the teacher."""
    rng = torch.Generator().manual_seed(sourced.seeds.derive(3, "", "sources"))
    count = sourced.CANDIDATES * cfg.images_per_class * world.way
    images = to_bytes(sourced.drawn(cfg.sources, rng, count, world.image.shape, service.card.image.channels))
    return images, torch.tensor(service.query(to_bytes(fit(to_pixels(images), service.card.image.shape))))


def rows_of(images: np.ndarray, among: np.ndarray) -> list[int]:
    """Where images stand among others."""
    return [int(np.flatnonzero((among == one).all((1, 2, 3)))[0]) for one in images]


def test_the_most_confident_images_of_each_class_stay() -> None:
    """No image that was left out is more confident than one of its class that stayed; labels and logits are those of
    the teacher's answers."""
    world = small_world(way=3)
    task, service = task_of(world, images_per_class=5)
    assert service.asked == sourced.CANDIDATES * 5 * 3
    images, logits = candidates(world, small_config(**DIP, images_per_class=5), service)
    kept = rows_of(task["images"], images)
    best = logits.softmax(1).max(1)
    np.testing.assert_array_equal(task["labels"], best.indices[kept])
    np.testing.assert_array_equal(task["logits"], logits[kept])
    assert task["classes"] == list(service.card.classes)
    found = Counter(task["labels"].tolist())
    assert found == {c: min(5, n) for c, n in Counter(best.indices.tolist()).items()}
    for c in found:
        of_class = {i for i in range(len(images)) if best.indices[i] == c}
        left = of_class - set(kept)
        least = min(float(best.values[i]) for i in set(kept) & of_class)
        assert all(best.values[i] <= least for i in left)
    assert task["confidence"] == pytest.approx(100 * float(best.values[kept].mean()), abs=1e-3)
    assert task["filled"] == pytest.approx(100 * len(kept) / 15)


def test_a_class_that_is_seldom_seen_has_fewer_images() -> None:
    labels = np.array([0, 0, 0, 1, 0, 2])
    rows = sourced.best(np.array([0.3, 0.1, 0.2, 9.0, 0.1, 0.5]), labels, 4, 2)
    assert rows.tolist() == [1, 4, 3, 5]


def test_a_judge_chooses_by_the_loss_of_the_inversion() -> None:
    """The kept images have the lowest losses of `losses.inversion`, taken one image at a time."""
    world = small_world()

    def judge(pixels: Tensor) -> Tensor:
        light = 20 * (pixels.mean((2, 3, 4)) - 0.5)
        return torch.stack([light, -light], -1)

    task, service = task_of(world, judge=judge)
    images, logits = candidates(world, small_config(**DIP), service)
    ours, labels = judge(to_pixels(images)[None])[0], logits.argmax(1)
    loss = torch.stack([
        losses.inversion(logits[i : i + 1], labels[i : i + 1], ours[i : i + 1], adversarial=1.0)
        for i in range(len(images))
    ])  # fmt: skip
    expected = sourced.best(loss.numpy(), labels.numpy(), 2, 4)
    np.testing.assert_array_equal(task["images"], images[expected])
    assert not same(task["images"], task_of(world)[0]["images"])


def test_a_task_has_classes_of_a_teacher_with_more_and_the_colours_of_a_grey_one() -> None:
    """A label is the best unit of the task; the confidence counts all classes of the teacher."""
    world = mixed_world()
    grey, colour = (task_of(world, place)[0] for place in (0, 1))
    assert grey["images"].shape[1:] == colour["images"].shape[1:] == (3, 20, 20)
    assert (grey["images"] == grey["images"][:, :1]).all()
    assert not (colour["images"] == colour["images"][:, :1]).all()
    assert len(colour["classes"]) == colour["logits"].shape[1] == 2
    np.testing.assert_array_equal(colour["labels"], colour["logits"].argmax(1))
    within = 100 * torch.tensor(colour["logits"]).softmax(1).max(1).values.mean()
    assert colour["confidence"] < within


def test_a_teacher_that_answers_nan_is_rejected() -> None:
    world, shard = small_world(), FakeShard(small_world())
    shard.spoil(world.cards[0].id)
    with pytest.raises(RejectedError, match="conv4-0: answers NaN"):
        sourced.labelled(small_config(**DIP), shard.service("conv4-0"), world.image.shape, 2, 0, device=CPU)
    cfg = small_config(**DIP, draws="turns", teachers_per_round=3)
    state = free.init(cfg, world)
    jobs = free.plan(cfg, world, state, 1)
    found = free.recover(shard, jobs, free.shared(cfg, world, state, 1))
    assert ["rejected" in one for one in found] == [job.teacher == "conv4-0" for job in jobs]
    assert len({job.teacher for job in jobs}) == 3


def kinds(cfg: free.Config, world: World, rounds: int) -> list[list[tuple[str, bool]]]:
    """(teacher, whether it is inverted) of each visit of each round."""
    return [
        [(str(job.teacher), not job.values) for job in free.plan(cfg, world, {}, r)] for r in range(rounds)
    ]  # fmt: skip


def test_in_turns_each_teacher_gives_both_kinds_one_after_the_other() -> None:
    """After the warm-up, in which all are inverted, and in each cycle by about half of the teachers."""
    world = small_world(cards=4)
    cfg = small_config(**BOTH, draws="turns", warmup=2)
    plans = kinds(cfg, world, 18)
    assert all(inverts for plan in plans[:2] for _, inverts in plan)
    visits = [visit for plan in plans[2:] for visit in plan]
    for card in world.cards:
        own = [inverts for id, inverts in visits if id == card.id]
        assert len(own) == 8
        assert all(one != other for one, other in itertools.pairwise(own))
    assert all(sum(inverts for _, inverts in visits[i : i + 4]) == 2 for i in range(0, len(visits), 4))


def test_with_replacement_the_kinds_alternate_from_visit_to_visit() -> None:
    for count in (1, 2, 3):
        cfg = small_config(**BOTH, warmup=0, teachers_per_round=count)
        found = [inverts for plan in kinds(cfg, small_world(), 6) for _, inverts in plan]
        assert found == [place % 2 == 0 for place in range(6 * count)]
        of_bidf = small_bidf(**BOTH, teachers_per_round=count)
        jobs = [job for r in range(6) for job in bidf.plan(of_bidf, small_world(), {}, r)]
        assert [not job.values for job in jobs] == found


def test_one_kind_is_planned_as_ever() -> None:
    world = small_world()
    for draws in ("turns", "replacement"):
        plain, other = (small_config(draws=draws, teachers_per_round=4, **changes) for changes in ({}, DIP))
        one, two = (kinds(cfg, world, 6) for cfg in (plain, other))
        assert [[id for id, _ in plan] for plan in one] == [[id for id, _ in plan] for plan in two]
        assert all(inverts for plan in one for _, inverts in plan)
        assert not any(inverts for plan in two for _, inverts in plan)


def test_free_learns_from_images_of_sources_alone(device: torch.device) -> None:
    """From the first round, without a generator, and with as many questions as planned."""
    world, cfg = small_world(), small_config(**DIP, warmup=5, rounds=3)
    shard = FakeShard(world, device=device)
    before, after, metrics = play("free", cfg, world, rounds=3, first=0, shard=shard, device=device)
    assert before["theta_g"].numel() == after["adam_g"]["step"] == 0
    assert after["updates"] >= 3
    assert after["adam_bell"]["step"] == 3
    assert not torch.equal(after["theta"], before["theta"])
    assert {"recover/confidence", "recover/filled", "bell/loss"} <= metrics.keys()
    assert "recover/accuracy" not in metrics
    asked = {id: service.asked for id, service in shard.services.items()}
    assert {id: count for id, count in free.queries(cfg, world).items() if count} == asked
    assert sum(asked.values()) == 6 * sourced.CANDIDATES * 4 * 2
    again = play("free", cfg, world, rounds=3, first=0, device=device)[1]
    assert alike(after, again, device)


def test_a_mixture_moves_the_generator_by_what_was_inverted(device: torch.device) -> None:
    """Its meta-gradient is the mean of those of the inverted teachers of the round; both kinds enter the bank."""
    world, cfg = small_world(), small_config(**BOTH, warmup=0, meta_optimizer="sgd", lr_meta=0.1, teachers_per_round=3)
    shard, state = FakeShard(world, device=device), free.init(cfg, world)
    jobs = free.plan(cfg, world, state, 0)
    tasks = shard.send("free.recover", jobs, free.shared(cfg, world, state, 0))
    assert ["grad" in task for task in tasks] == [not job.values for job in jobs] == [True, False, True]
    after, metrics = free.learn(cfg, world, state, 0, tasks, shard.send)
    mean = torch.tensor(tasks[0]["grad"] + tasks[2]["grad"]) / 2
    torch.testing.assert_close(after["theta_g"], state["theta_g"] - 0.1 * mean)
    assert metrics["bank/images"] == sum(len(task["images"]) for task in tasks)
    assert {"recover/accuracy", "recover/confidence"} <= metrics.keys()


def test_a_sequential_generator_goes_on_past_a_teacher_that_labels(device: torch.device) -> None:
    cfg = small_config(**BOTH, warmup=0, generator_sharing="sequential", teachers_per_round=2)
    before, after, metrics = play("free", cfg, small_world(), first=0, device=device)
    assert not torch.equal(after["theta_g"], before["theta_g"])
    assert metrics["recover/tasks"] == 2


def test_bidf_distils_on_images_of_sources(device: torch.device) -> None:
    """The support has the most confident images, the query set those at the boundary; the questions are planned."""
    world, cfg = small_world(), small_bidf(**DIP, rounds=2)
    shard = FakeShard(world, device=device)
    before, after, metrics = play("bidf-mkd", cfg, world, rounds=2, first=0, shard=shard, device=device)
    assert not torch.equal(after["theta"], before["theta"])
    assert metrics["recover/support_confidence"] >= metrics["recover/query_confidence"]
    asked = {id: service.asked for id, service in shard.services.items()}
    assert {id: count for id, count in bidf.queries(cfg, world).items() if count} == asked
    assert sum(asked.values()) == 2 * 2 * 2 * sourced.CANDIDATES * 4 * 2


def test_sources_take_sizes_that_no_generator_makes_and_refuse_tiny_ones() -> None:
    world = small_world()
    odd, tiny = (replace(world, image=replace(world.image, height=size, width=size)) for size in (18, 4))
    for name, init, config in (("free", free.init, small_config), ("bidf-mkd", bidf.init, small_bidf)):
        init(config(**DIP), odd)  # type: ignore[operator]
        with pytest.raises(UsageError, match=f"{name}: .*divisible by 4"):
            init(config(**BOTH), odd)  # type: ignore[operator]
        with pytest.raises(UsageError, match=f"{name}: image sources need"):
            init(config(**DIP), tiny)  # type: ignore[operator]


def test_the_gallery_says_that_teachers_were_asked_about_images_of_sources() -> None:
    """Under the class that each image got, with the confidence among the classes of the task."""
    world, cfg = small_world(), small_config(**BOTH, warmup=0)
    state, shard = free.init(cfg, world), FakeShard(world)
    results = shard.send("free.recover", free.plan(cfg, world, state, 0), free.shared(cfg, world, state, 0))
    shown = pictures.seen(cfg, world, results)
    assert {(one.kind, one.teacher) for one in shown} == {
        ("recovered", results[0]["teacher"]), ("asked", results[1]["teacher"]),
    }  # fmt: skip
    assert all(one.said == (one.name,) * len(one.images) for one in shown if one.kind == "asked")
    of_bidf = bidf.init(small_bidf(**DIP), world)
    values = bidf.shared(small_bidf(**DIP), world, of_bidf, 0)
    sets = shard.send("bidf-mkd.recover", bidf.plan(small_bidf(**DIP), world, of_bidf, 0), values)
    assert {one.kind for one in pictures.seen(cfg, world, sets)} == {"asked"}


def test_surrogates_are_inverted_and_label_nothing() -> None:
    with pytest.raises(ValueError, match=r"surrogate\.budget the generator inverts surrogates"):
        small_config(**DIP, surrogate={"budget": 600})


def test_notes_say_what_the_images_assume_and_a_cost_counts_both_kinds() -> None:
    world = small_world()
    assert not any("label images" in note for note in free.notes(small_config(), world))
    for module, config in ((free, small_config), (bidf, small_bidf)):
        (said,) = [note for note in module.notes(config(**BOTH), world) if "label images" in note]  # type: ignore
        assert said.startswith("teachers label images of dip, which assumes that neighbouring pixels are alike")
        found = module.cost(config(**BOTH, rounds=4), world, FakeShard(world))  # type: ignore
        alone = module.cost(config(**DIP, rounds=4), world, FakeShard(world))  # type: ignore
        assert found.images == alone.images > 0
        assert found.recovery > 0
        assert alone.recovery > 0
