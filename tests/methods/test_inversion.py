"""What inversions by a generator share: how teachers of any size see its images, and the loss they are drawn by."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.generators import Generator, generator
from ray_dfml.core.images import fit, normalise, to_pixels, view
from ray_dfml.core.losses import batch_norm_distance, total_variation
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS, inversion
from ray_dfml.methods.base import World
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.free import method as free
from ray_dfml.methods.inversion import Inversion, InversionConfig
from ray_dfml.types import ImageSpec, TeacherCard
from tests.support import (
    card,
    double_by_default,
    image_spec,
    mixed_world,
    normal,
    random_teacher,
    small_world,
)

CONFIG: dict[str, Any] = {"images_per_class": 4, "latent": 8, "width": 4, "crop_pad": 0, "flip": "off"}
GREY, COLOUR = mixed_world().cards
OTHER = replace(COLOUR, id="other", image=replace(COLOUR.image, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.6)))
LEARNER = (3, 20, 20)


def inverse(
    device: torch.device,
    *cards: TeacherCard,
    seed: int = 3,
    batched: bool = False,
    classes: int = 0,
    stream: str = "",
    **changes: Any,
) -> Inversion:
    """An inversion of random teachers in float64, with the learner's 20x20 colour images; seeds count from `seed`."""
    cfg = InversionConfig.model_validate(CONFIG | changes)
    teachers = [random_teacher(c, device=device).double() for c in cards]
    numbers = list(range(seed, seed + len(cards)))
    with double_by_default():
        return Inversion(
            cfg, Generator(LEARNER, 8, 4, classes), teachers, 2, numbers, device=device, batched=batched, stream=stream
        )


def weights(device: torch.device, one: Inversion) -> Tensor:
    rows = [one.net_g.init(torch.Generator().manual_seed(j)).to(device).double() for j in range(len(one.teachers))]
    return torch.stack(rows) + 0.05 * normal(len(rows), one.net_g.layout.numel, device=device)


def codes(device: torch.device, one: Inversion) -> Tensor:
    return normal(len(one.teachers), len(one.labels), 8, seed=9, device=device)


def judge(pixels: Tensor) -> Tensor:
    """A learner that looks at two patches of the learner's images."""
    assert pixels.shape[2:] == LEARNER
    return 9 * torch.stack([pixels[..., :9].mean((2, 3, 4)), pixels[..., 9:].mean((2, 3, 4))], -1)


def kinds(device: torch.device, image: ImageSpec) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float64, device=device) for values in (image.mean, image.std)]


@pytest.mark.parametrize("form", ["kl", "probdot"])
@pytest.mark.parametrize("given", [GREY, COLOUR], ids=lambda c: c.id)
def test_the_loss_is_the_sum_of_its_terms_on_what_the_teacher_sees(device, given, form):
    """Grey 16x16 and colour 20x20 with three classes, of which two are asked for, under one learner."""
    changes = {"adversarial": 0.7, "kl_clamp": 0.05, "bn_weight": 0.3, "tv_weight": 0.2, "crop_pad": 2}
    one, again = (inverse(device, given, adversarial_form=form, **changes) for _ in range(2))
    theta_g, z = weights(device, one), codes(device, one)
    with double_by_default():
        (loss,), images, logits = one.losses(theta_g, z, judge)
    made = one.net_g(theta_g[0], z[0])
    pixels = made if given is COLOUR else made.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(images[0], pixels)
    teacher: Any = one.teachers[0]
    viewed = again.look(images)
    seen = normalise(fit(viewed[0], given.image.shape), *kinds(device, given.image))
    t, found = teacher.net.with_stats(teacher.theta, seen, teacher.stats)
    torch.testing.assert_close(logits[0], t)
    units = one.units[0]
    s, mine = judge(viewed)[0], t[:, units]
    agree = (mine.argmax(1) == s.argmax(1)).double()
    assert 0 < agree.sum() < len(agree)
    p, q = mine.softmax(1), s.softmax(1)
    if form == "kl":
        term = -(agree * (p * (p / q).log()).sum(1).clamp(max=0.05)).mean()
    else:
        term = (agree * (p * q - q * q.log()).sum(1)).mean()
    expected = F.cross_entropy(t, units[torch.arange(8, device=device) % 2]) + 0.7 * term
    expected = expected + 0.3 * batch_norm_distance(found, teacher.stats) + 0.2 * total_variation(pixels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("given", [GREY, COLOUR], ids=lambda c: c.id)
def test_gradients_flow_through_the_change_of_size(device, given):
    one = inverse(device, given)
    theta_g, z = weights(device, one).requires_grad_(), codes(device, one)
    with double_by_default():
        (grad,) = torch.autograd.grad(one.losses(theta_g, z, None)[0].sum(), theta_g)
        direction = normal(*theta_g.shape, seed=2, device=device)
        with torch.no_grad():
            up, down = (one.losses(theta_g + eps * direction, z, None)[0].sum() for eps in (1e-7, -1e-7))
    assert float((grad * direction).sum()) == pytest.approx(float(up - down) / 2e-7, rel=1e-5)


def test_the_judge_gets_no_gradient_and_sees_the_view_that_the_teacher_sees(device):
    one, again = (inverse(device, COLOUR, crop_pad=3, flip="on") for _ in range(2))
    theta_g, z, seen = weights(device, one).requires_grad_(), codes(device, one), []

    def spy(pixels: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(pixels.detach())
        return judge(pixels)

    with double_by_default():
        _, images, logits = one.losses(theta_g, z, spy)
        torch.testing.assert_close(seen[0], again.look(images))
        assert not torch.allclose(seen[0], images)
        teacher: Any = one.teachers[0]
        torch.testing.assert_close(
            logits[0],
            teacher.net(teacher.theta, normalise(seen[0][0], *kinds(device, COLOUR.image)), teacher.stats),
        )


@pytest.mark.parametrize("bn_weight", [0.0, 0.5])
def test_teachers_of_other_normalisations_go_together_and_do_not_touch(device, bn_weight):
    changes = {"bn_weight": bn_weight, "crop_pad": 2, "flip": "on"}
    both, looped = (inverse(device, COLOUR, OTHER, batched=batched, **changes) for batched in (True, False))
    alone = [inverse(device, c, seed=3 + j, **changes) for j, c in enumerate((COLOUR, OTHER))]
    theta_g, z = weights(device, both), codes(device, both)
    with double_by_default():
        found, expected = both.losses(theta_g, z, judge), looped.losses(theta_g, z, judge)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        for j, one in enumerate(alone):
            for a, b in zip(one.losses(theta_g[j, None], z[j, None], judge), expected, strict=True):
                torch.testing.assert_close(a[0], b[j])
            tasks = both.task(j, found[1][j], found[2][j]), one.task(0, found[1][j], found[2][j])
            assert tasks[0]["teacher"] == tasks[1]["teacher"]
            assert tasks[0]["view"] == tasks[1]["view"]
            np.testing.assert_allclose(tasks[0]["logits"], tasks[1]["logits"])


def test_a_generator_that_is_told_the_label_gets_that_of_each_image(device):
    one = inverse(device, GREY, classes=2)
    theta_g, z = weights(device, one), codes(device, one)
    told = torch.cat([z[0], F.one_hot(torch.arange(8, device=device) % 2, 2)], 1)
    made = one.net_g(theta_g[0], told).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(one.generate(theta_g, z)[0], made)


def test_codes_are_standard_normal_of_each_teacher_s_own_stream(device):
    found = inverse(device, COLOUR, OTHER).codes()
    assert found.shape == (2, 8, 8)
    assert torch.equal(found, torch.cat([inverse(device, COLOUR).codes(), inverse(device, OTHER, seed=4).codes()]))
    assert not torch.allclose(found[0], found[1])
    many = inverse(device, COLOUR, images_per_class=400).codes()
    assert many.mean().item() == pytest.approx(0, abs=0.05)
    assert many.std().item() == pytest.approx(1, abs=0.05)


def test_sets_of_one_seed_are_of_the_same_units_and_of_other_draws(device):
    large = replace(COLOUR, classes=tuple("abcdefg"))
    for seed in range(2):
        plain, one, other = (inverse(device, large, seed=seed, stream=stream) for stream in ("", "support", "query"))
        assert plain.units[0].tolist() == one.units[0].tolist() == other.units[0].tolist()
        drawn = [x.codes() for x in (plain, one, other)]
        assert not any(torch.allclose(a, b) for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2])))


@pytest.mark.parametrize("given", [GREY, COLOUR], ids=lambda c: c.id)
def test_a_task_holds_what_teacher_and_learner_need(device, given):
    one = inverse(device, given, crop_pad=2)
    with double_by_default():
        _, images, logits = one.losses(weights(device, one), codes(device, one), None)
        task = one.task(0, images[0], logits[0])
    teacher: Any = one.teachers[0]
    units = one.units[0].tolist()
    assert task["teacher"] == given.id
    assert task["classes"] == [given.classes[u] for u in units]
    assert task["images"].dtype == np.uint8
    assert task["images"].shape == (8, *LEARNER)
    assert task["labels"].tolist() == [0, 1] * 4
    seen = view(to_pixels(task["images"], device=device).double(), task["view"], pad=2, fill="edge")
    whole = teacher.net(
        teacher.theta, normalise(fit(seen, given.image.shape), *kinds(device, given.image)), teacher.stats
    )
    np.testing.assert_allclose(task["logits"], whole[:, units].cpu().numpy(), rtol=1e-5)
    wished = torch.tensor(units, device=device)[torch.arange(8, device=device) % 2]
    assert task["ce"] == pytest.approx(float(F.cross_entropy(logits[0], wished)))
    assert task["accuracy"] == 100 * float((logits[0].argmax(1) == wished).double().mean())


def test_images_of_a_grey_teacher_are_grey_and_those_of_a_colour_teacher_are_not(device):
    for given, equal in ((GREY, True), (COLOUR, False)):
        one = inverse(device, given)
        images = one.generate(weights(device, one), codes(device, one))
        assert images.shape == (1, 8, *LEARNER)
        assert bool((images == images[:, :, :1]).all()) == equal


def test_a_colour_teacher_may_see_a_grey_learner_s_images(device):
    cfg = InversionConfig.model_validate(CONFIG)
    with double_by_default():
        one = Inversion(
            cfg,
            Generator((1, 8, 8), 8, 4),
            [random_teacher(COLOUR, device=device).double()],
            2,
            [0],
            device=device,
            batched=False,
        )
        _, images, _ = one.losses(weights(device, one), codes(device, one), None)
    assert images.shape == (1, 8, 1, 8, 8)


@pytest.mark.parametrize(("flip", "mirrors"), [("auto", {False, True}), ("off", {False})])
def test_auto_mirrors_where_the_teacher_sees_colour(device, flip, mirrors):
    def drawn(given: TeacherCard) -> set[bool]:
        one = inverse(device, given, flip=flip)
        blank = torch.zeros(8, *LEARNER, device=device)
        with double_by_default():
            return {
                one.task(0, blank.double(), torch.zeros(8, len(given.classes), device=device))["view"][2]
                for _ in range(12)
            }

    assert drawn(COLOUR) == mirrors
    assert drawn(GREY) == {False}


def test_units_of_a_larger_teacher_are_distinct_and_drawn_from_the_seed():
    large = card(0, way=5)
    drawn = [inversion.chosen_units(large, 3, seed) for seed in range(60)]
    assert all(len(set(units)) == 3 for units in drawn)
    assert drawn == [inversion.chosen_units(large, 3, seed) for seed in range(60)]
    assert {u for units in drawn for u in units} == set(range(5))
    assert len({tuple(units) for units in drawn}) > 30
    assert {tuple(inversion.chosen_units(large, 5, seed)) for seed in range(9)} == {(0, 1, 2, 3, 4)}


def test_units_and_codes_are_of_streams_of_their_own():
    """Otherwise the codes would tell which classes a task has."""
    large = card(0, way=5)
    codes = [torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3].tolist() for seed in range(60)]
    same = sum(inversion.chosen_units(large, 3, seed) == first for seed, first in enumerate(codes))
    assert same <= 6  # of 60 independent draws one agrees on average


def test_a_teacher_sees_pixels_of_its_size_normalised(device):
    pixels = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)).to(device)
    found = inversion.as_teacher_sees(pixels, GREY.image)
    small = F.interpolate(pixels.mean(1, keepdim=True), (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, (small - 0.3) / 0.5)
    channels = [(pixels[:, c] - COLOUR.image.mean[c]) / COLOUR.image.std[c] for c in range(3)]
    torch.testing.assert_close(inversion.as_teacher_sees(pixels, COLOUR.image), torch.stack(channels, 1))


@pytest.mark.parametrize(("method", "name"), [(free, "free"), (bidf, "bidf-mkd")])
def test_a_pool_that_cannot_be_inverted_is_an_error_before_the_run(method, name):
    few = replace(small_world(), way=3)
    with pytest.raises(UsageError, match=rf"^{name}: conv4-0 has 2 classes, the learner 3; lower learner.way$"):
        method.init(method.Config(), few)
    odd = World(cards=(card(0, size=18),), arch="conv4", image=image_spec(3, 18), way=2, seed=0)
    with pytest.raises(UsageError, match=rf"^{name}: .*divisible by 4, got 18x18; use teachers of another input size$"):
        method.init(method.Config(), odd)


def test_notes_name_the_teachers_without_batch_norm():
    plain = tuple(card(i, arch="mlp") for i in range(5))
    assert [inversion.has_statistics(c) for c in (card(0), plain[0])] == [True, False]
    for cards, names in (
        (plain[:1], "mlp-0"),
        ((card(0), *plain[:3]), "mlp-0, mlp-1, mlp-2"),
        (plain, "mlp-0, mlp-1, mlp-2 and 2 more"),
    ):
        line = f"the batch-norm statistics term is dropped for {names}: no batch norm in the network"
        assert inversion.dropped_statistics(cards, 1.0) == [line]
        assert inversion.dropped_statistics(cards, 0.0) == []
        for method in (METHODS["free"], METHODS["bidf-mkd"]):
            world = replace(small_world(), cards=cards)
            assert method.notes(method.Config.model_validate({"bn_weight": 1.0}), world) == [line]
            assert method.notes(method.Config.model_validate({}), world) == []
    assert inversion.dropped_statistics(small_world().cards, 1.0) == []


def test_the_term_is_left_out_for_a_teacher_without_batch_norm(device):
    one, plain = (inverse(device, card(0, arch="mlp", size=20), bn_weight=w) for w in (5.0, 0.0))
    with double_by_default():
        found = one.losses(weights(device, one), codes(device, one), None)[0]
        torch.testing.assert_close(found, plain.losses(weights(device, one), codes(device, one), None)[0])


def test_generators_of_the_cache_are_those_of_the_settings():
    made = inversion.checked_generator("free", InversionConfig.model_validate(CONFIG), mixed_world(), classes=2)
    assert made is generator(LEARNER, 8, 4, 2)
