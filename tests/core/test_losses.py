"""Losses against closed forms, finite differences, and the identities their docstrings state."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from ray_dfml.core import losses
from tests.support import PROPERTY, normal

seeds = st.integers(0, 10**6)
sizes = st.tuples(st.integers(1, 5), st.integers(2, 6))


def logits(device: torch.device, *shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return (scale * normal(*shape, seed=seed, device=device)).requires_grad_()


def agreeing(t: Tensor, s: Tensor) -> Tensor:
    return t.argmax(-1) == s.argmax(-1)


def test_kl_of_a_known_pair(device):
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64, device=device)
    half = torch.full((1, 2), 0.5, dtype=torch.float64, device=device)
    assert losses.kl(p.log(), half.log()).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12
    )


@PROPERTY
@given(sizes, seeds)
def test_kl_is_not_negative_and_equals_the_framework(device, size, seed):
    t, s = normal(*size, seed=seed, device=device) * 5, normal(*size, seed=seed + 1, device=device) * 5
    found = losses.kl(t, s)
    expected = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert (found >= -1e-12).all()
    torch.testing.assert_close(found, expected)


@PROPERTY
@given(sizes, seeds, st.floats(-50, 50), st.floats(-50, 50))
def test_kl_ignores_a_shift_of_the_logits(device, size, seed, a, b):
    t, s = normal(*size, seed=seed, device=device), normal(*size, seed=seed + 1, device=device)
    torch.testing.assert_close(losses.kl(t + a, s + b), losses.kl(t, s), rtol=0, atol=1e-10)


@PROPERTY
@given(sizes, seeds)
def test_kl_of_equal_logits_is_zero(device, size, seed):
    t = normal(*size, seed=seed, device=device) * 5
    torch.testing.assert_close(
        losses.kl(t, t + 3.0), torch.zeros(size[0], dtype=torch.float64, device=device), rtol=0, atol=1e-12
    )


def test_kl_stays_finite_for_extreme_logits(device):
    t = torch.tensor([[1e4, -1e4, 0.0]], device=device)
    assert torch.isfinite(losses.kl(t, -t)).all()


def test_kl_gradients_equal_finite_differences(device):
    assert gradcheck(losses.kl, (logits(device, 4, 3, seed=0), logits(device, 4, 3, seed=1)))


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_distillation_gradient_equals_finite_differences(device, form):
    teacher = logits(device, 4, 3, seed=0)
    assert gradcheck(lambda s: losses.distillation(teacher, s, form=form), (logits(device, 4, 3, seed=1),))


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_distillation_gives_the_teacher_no_gradient(device, form):
    teacher, student = logits(device, 4, 3, seed=0), logits(device, 4, 3, seed=1)
    losses.distillation(teacher, student, form=form).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@PROPERTY
@given(sizes, seeds)
def test_distillation_kl_gradient_is_the_difference_of_probabilities(device, size, seed):
    teacher, student = logits(device, *size, seed=seed), logits(device, *size, seed=seed + 1)
    (found,) = torch.autograd.grad(losses.distillation(teacher, student), student)
    torch.testing.assert_close(found, (student.softmax(-1) - teacher.softmax(-1)) / size[0])


@PROPERTY
@given(sizes, seeds)
def test_distillation_probdot_is_the_released_call(device, size, seed):
    teacher, student = logits(device, *size, seed=seed), logits(device, *size, seed=seed + 1)
    found = losses.distillation(teacher, student, form="probdot")
    torch.testing.assert_close(
        found, F.kl_div(student.softmax(-1), teacher.softmax(-1).detach(), reduction="none").mean()
    )


@PROPERTY
@given(sizes, seeds)
def test_distillation_probdot_gradient_is_minus_that_of_the_inner_product(device, size, seed):
    teacher, student = logits(device, *size, seed=seed), logits(device, *size, seed=seed + 1)
    (found,) = torch.autograd.grad(losses.distillation(teacher, student, form="probdot"), student)
    product = (teacher.detach().softmax(-1) * student.softmax(-1)).sum() / student.numel()
    torch.testing.assert_close(found, -torch.autograd.grad(product, student)[0])


@PROPERTY
@given(sizes, seeds)
def test_disagreement_kl_is_minus_the_mean_clamped_kl_where_both_agree(device, size, seed):
    teacher, student = logits(device, *size, seed=seed), logits(device, *size, seed=seed + 1)
    expected = -torch.stack(
        [
            min(losses.kl(t, s), torch.tensor(0.7, dtype=t.dtype, device=device)) * agreeing(t, s)
            for t, s in zip(teacher, student, strict=True)
        ]
    ).mean()
    torch.testing.assert_close(losses.disagreement(teacher, student, clamp=0.7), expected)


@PROPERTY
@given(sizes, seeds)
def test_disagreement_probdot_pushes_the_teacher_away_from_the_student(device, size, seed):
    teacher, student = logits(device, *size, seed=seed), logits(device, *size, seed=seed + 1).detach()
    (found,) = torch.autograd.grad(losses.disagreement(teacher, student, form="probdot"), teacher)
    product = (agreeing(teacher, student) * (student.softmax(-1) * teacher.softmax(-1)).sum(-1)).sum() / size[0]
    torch.testing.assert_close(found, torch.autograd.grad(product, teacher)[0])


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_disagreement_gradients_equal_finite_differences(device, form):
    teacher, student = logits(device, 6, 3, seed=0), logits(device, 6, 3, seed=1)
    assert 0 < agreeing(teacher, student).sum() < 6  # both sides of the mask are exercised
    assert gradcheck(lambda t, s: losses.disagreement(t, s, form=form, clamp=100.0), (teacher, student))


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_disagreement_is_zero_where_predictions_differ(device, form):
    teacher = torch.tensor([[5.0, 0.0], [0.0, 5.0]], requires_grad=True, device=device)
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True, device=device)
    loss = losses.disagreement(teacher, student, form=form)
    grads = torch.autograd.grad(loss, (teacher, student))
    assert loss.item() == 0.0
    assert all(bool((g == 0).all()) for g in grads)


@PROPERTY
@given(sizes, seeds, st.floats(0.01, 5.0))
def test_disagreement_stays_between_minus_the_clamp_and_zero(device, size, seed, clamp):
    teacher, student = normal(*size, seed=seed, device=device) * 20, normal(*size, seed=seed + 1, device=device) * 20
    value = losses.disagreement(teacher, student, clamp=clamp).item()
    assert -clamp - 1e-12 <= value <= 1e-12


def test_clamped_images_give_no_gradient(device):
    teacher = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True, device=device)
    student = torch.tensor([[0.01, 0.0, 0.0]], device=device)
    loss = losses.disagreement(teacher, student, clamp=0.5)
    assert loss.item() == pytest.approx(-0.5)
    assert torch.autograd.grad(loss, teacher)[0].abs().max() == 0


def test_inversion_is_cross_entropy_plus_the_weighted_disagreement(device):
    teacher, student, labels = (
        logits(device, 5, 3, seed=0),
        logits(device, 5, 3, seed=1),
        torch.tensor([0, 1, 2, 0, 1], device=device),
    )
    ce = F.cross_entropy(teacher, labels)
    found = losses.inversion(teacher, labels, student, adversarial=0.3, form="probdot")
    torch.testing.assert_close(found, ce + 0.3 * losses.disagreement(teacher, student, form="probdot"))
    torch.testing.assert_close(losses.inversion(teacher, labels, None, adversarial=0.3), ce)
    torch.testing.assert_close(losses.inversion(teacher, labels, student, adversarial=0.0), ce)


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_inversion_gradient_equals_finite_differences(device, form):
    student, labels = normal(5, 3, seed=1, device=device), torch.tensor([0, 1, 2, 0, 1], device=device)
    teacher = logits(device, 5, 3, seed=0)
    assert gradcheck(lambda t: losses.inversion(t, labels, student, adversarial=0.5, form=form), (teacher,))


def test_total_variation_of_a_ramp_is_its_slopes(device):
    rows, columns = torch.arange(4.0, device=device)[:, None], torch.arange(5.0, device=device)
    ramp = (0.5 * rows + 0.25 * columns).expand(2, 3, 4, 5)
    assert losses.total_variation(ramp).item() == pytest.approx(0.75)
    assert losses.total_variation(torch.full((2, 3, 4, 5), 0.3, device=device)).item() == 0.0


def test_total_variation_gradient_equals_finite_differences(device):
    assert gradcheck(losses.total_variation, (normal(2, 2, 3, 4, device=device).requires_grad_(),))


def test_batch_norm_distance_is_the_mean_square(device):
    found, stored = torch.tensor([1.0, 2.0, 5.0], device=device), torch.tensor([1.0, 0.0, 4.0], device=device)
    assert losses.batch_norm_distance(found, stored).item() == pytest.approx(5 / 3)
    assert gradcheck(
        lambda x: losses.batch_norm_distance(x, normal(6, seed=1, device=device)),
        (normal(6, device=device).requires_grad_(),),
    )


def test_the_student_stands_for_chosen_units_of_the_teacher(device):
    teacher, student, labels = (
        logits(device, 4, 5, seed=0),
        logits(device, 4, 2, seed=1),
        torch.tensor([3, 1, 3, 1], device=device),
    )
    units = torch.tensor([3, 1], device=device)
    found = losses.inversion(teacher, labels, student, adversarial=0.3, units=units)
    expected = F.cross_entropy(teacher, labels) + 0.3 * losses.disagreement(teacher[:, units], student)
    torch.testing.assert_close(found, expected)


def test_variation_norms_of_one_bright_pixel(device):
    """One pixel inside is in two differences of each of the four directions: four norms of sqrt(2) times its value."""
    images = torch.zeros(2, 2, 5, 6, dtype=torch.float64, device=device)
    images[1, 0, 2, 3] = 3.0
    assert losses.variation_norms(images).item() == pytest.approx(4 * 3 * math.sqrt(2))
    images[1, 0, 2, 3], images[1, 0, 0, 5] = 0.0, 3.0  # the upper right corner: no neighbour on the falling diagonal
    assert losses.variation_norms(images).item() == pytest.approx(3 * 3)


def test_variation_norms_are_of_the_whole_batch_along_rows_columns_and_both_diagonals(device):
    x = normal(2, 2, 4, 5, device=device)
    offsets = ((0, 1), (1, 0), (1, 1), (1, -1))
    total = 0.0
    for dy, dx in offsets:
        squares = [
            float(x[n, c, i + dy, j + dx] - x[n, c, i, j]) ** 2
            for n in range(2) for c in range(2) for i in range(4 - dy) for j in range(5)
            if 0 <= j + dx < 5
        ]  # fmt: skip
        total += math.sqrt(sum(squares))
    assert losses.variation_norms(x).item() == pytest.approx(total)
    assert gradcheck(losses.variation_norms, (x.requires_grad_(),))


def test_statistics_norms_are_one_norm_per_part(device):
    found, stored = (
        torch.tensor([3.0, 4.0, 1.0, 0.0, 2.0], device=device),
        torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], device=device),
    )
    assert losses.statistics_norms(found, stored, [2, 1, 2]).item() == pytest.approx(5 + 0 + 2)
    assert losses.statistics_norms(found, stored, [5]).item() == pytest.approx(math.sqrt(29))
    x = normal(5, device=device).requires_grad_()
    assert gradcheck(lambda y: losses.statistics_norms(y, normal(5, seed=1, device=device), [2, 1, 2]), (x,))
    same = torch.ones(3, requires_grad=True, device=device)
    losses.statistics_norms(same, torch.ones(3, device=device), [1, 2]).backward()
    assert torch.equal(same.grad, torch.zeros(3, device=device))


def test_contrast_of_four_images_by_hand(device):
    """Unit vectors at 0 and 90 degrees (real, classes 0 and 1), 60 and 150 degrees (recovered, the same classes)."""
    angles = torch.tensor([0.0, 90.0, 60.0, 150.0], dtype=torch.float64, device=device).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [5.0], [0.5]], device=device)
    labels, domain = torch.tensor([0, 1, 0, 1], device=device), torch.tensor([0, 0, 1, 1], device=device)
    t, partner = 0.7, (2, 3, 0, 1)
    expected = 0.0
    for i in range(4):
        scores = [math.cos(float(angles[i] - angles[j])) / t for j in range(4)]
        others = sum(math.exp(scores[j]) for j in range(4) if j != i)
        expected -= math.log(math.exp(scores[partner[i]]) / others) / 4
    found = losses.supervised_contrastive(features, labels, domain, temperature=t)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_contrast_averages_over_the_positives_of_the_other_domain_only(device):
    features, t = normal(7, 3, device=device), 0.4
    labels, domain = (
        torch.tensor([0, 1, 0, 0, 1, 1, 1], device=device),
        torch.tensor([0, 0, 0, 1, 1, 1, 1], device=device),
    )
    f = F.normalize(features, dim=1)
    total = 0.0
    for i in range(7):
        others = torch.logsumexp(torch.stack([f[i] @ f[j] / t for j in range(7) if j != i]), 0)
        positives = [j for j in range(7) if labels[j] == labels[i] and domain[j] != domain[i]]
        total += float(sum(others - f[i] @ f[j] / t for j in positives) / len(positives)) / 7
    found = losses.supervised_contrastive(features, labels, domain, temperature=t)
    assert found.item() == pytest.approx(total, rel=1e-10)


def test_contrast_gradient_equals_finite_differences(device):
    labels, domain = torch.tensor([0, 1, 0, 1], device=device), torch.tensor([0, 0, 1, 1], device=device)
    x = normal(4, 3, device=device).requires_grad_()
    assert gradcheck(lambda f: losses.supervised_contrastive(f, labels, domain, temperature=0.5), (x,))


def test_unknown_forms_are_errors(device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="known: kl, probdot"):
        losses.distillation(x, x, form="mse")
    with pytest.raises(ValueError, match="known: kl, probdot"):
        losses.disagreement(x, x, form="mse")
