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


def logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return (scale * normal(*shape, seed=seed)).requires_grad_()


def agreeing(t: Tensor, s: Tensor) -> Tensor:
    return t.argmax(-1) == s.argmax(-1)


def test_kl_of_a_known_pair():
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert losses.kl(p.log(), half.log()).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12
    )


@PROPERTY
@given(sizes, seeds)
def test_kl_is_not_negative_and_equals_the_framework(size, seed):
    t, s = normal(*size, seed=seed) * 5, normal(*size, seed=seed + 1) * 5
    found = losses.kl(t, s)
    expected = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert (found >= -1e-12).all()
    torch.testing.assert_close(found, expected)


@PROPERTY
@given(sizes, seeds, st.floats(-50, 50), st.floats(-50, 50))
def test_kl_ignores_a_shift_of_the_logits(size, seed, a, b):
    t, s = normal(*size, seed=seed), normal(*size, seed=seed + 1)
    torch.testing.assert_close(losses.kl(t + a, s + b), losses.kl(t, s), rtol=0, atol=1e-10)


@PROPERTY
@given(sizes, seeds)
def test_kl_of_equal_logits_is_zero(size, seed):
    t = normal(*size, seed=seed) * 5
    torch.testing.assert_close(losses.kl(t, t + 3.0), torch.zeros(size[0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_kl_stays_finite_for_extreme_logits():
    t = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(losses.kl(t, -t)).all()


def test_kl_gradients_equal_finite_differences():
    assert gradcheck(losses.kl, (logits(4, 3, seed=0), logits(4, 3, seed=1)))


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_distillation_gradient_equals_finite_differences(form):
    teacher = logits(4, 3, seed=0)
    assert gradcheck(lambda s: losses.distillation(teacher, s, form=form), (logits(4, 3, seed=1),))


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_distillation_gives_the_teacher_no_gradient(form):
    teacher, student = logits(4, 3, seed=0), logits(4, 3, seed=1)
    losses.distillation(teacher, student, form=form).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@PROPERTY
@given(sizes, seeds)
def test_distillation_kl_gradient_is_the_difference_of_probabilities(size, seed):
    teacher, student = logits(*size, seed=seed), logits(*size, seed=seed + 1)
    (found,) = torch.autograd.grad(losses.distillation(teacher, student), student)
    torch.testing.assert_close(found, (student.softmax(-1) - teacher.softmax(-1)) / size[0])


@PROPERTY
@given(sizes, seeds)
def test_distillation_probdot_is_the_released_call(size, seed):
    teacher, student = logits(*size, seed=seed), logits(*size, seed=seed + 1)
    found = losses.distillation(teacher, student, form="probdot")
    torch.testing.assert_close(
        found, F.kl_div(student.softmax(-1), teacher.softmax(-1).detach(), reduction="none").mean()
    )


@PROPERTY
@given(sizes, seeds)
def test_distillation_probdot_gradient_is_minus_that_of_the_inner_product(size, seed):
    teacher, student = logits(*size, seed=seed), logits(*size, seed=seed + 1)
    (found,) = torch.autograd.grad(losses.distillation(teacher, student, form="probdot"), student)
    product = (teacher.detach().softmax(-1) * student.softmax(-1)).sum() / student.numel()
    torch.testing.assert_close(found, -torch.autograd.grad(product, student)[0])


@PROPERTY
@given(sizes, seeds)
def test_disagreement_kl_is_minus_the_mean_clamped_kl_where_both_agree(size, seed):
    teacher, student = logits(*size, seed=seed), logits(*size, seed=seed + 1)
    expected = -torch.stack(
        [
            min(losses.kl(t, s), torch.tensor(0.7, dtype=t.dtype)) * agreeing(t, s)
            for t, s in zip(teacher, student, strict=True)
        ]
    ).mean()
    torch.testing.assert_close(losses.disagreement(teacher, student, clamp=0.7), expected)


@PROPERTY
@given(sizes, seeds)
def test_disagreement_probdot_pushes_the_teacher_away_from_the_student(size, seed):
    teacher, student = logits(*size, seed=seed), logits(*size, seed=seed + 1).detach()
    (found,) = torch.autograd.grad(losses.disagreement(teacher, student, form="probdot"), teacher)
    product = (agreeing(teacher, student) * (student.softmax(-1) * teacher.softmax(-1)).sum(-1)).sum() / size[0]
    torch.testing.assert_close(found, torch.autograd.grad(product, teacher)[0])


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_disagreement_gradients_equal_finite_differences(form):
    teacher, student = logits(6, 3, seed=0), logits(6, 3, seed=1)
    assert 0 < agreeing(teacher, student).sum() < 6  # both sides of the mask are exercised
    assert gradcheck(lambda t, s: losses.disagreement(t, s, form=form, clamp=100.0), (teacher, student))


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_disagreement_is_zero_where_predictions_differ(form):
    teacher = torch.tensor([[5.0, 0.0], [0.0, 5.0]], requires_grad=True)
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    loss = losses.disagreement(teacher, student, form=form)
    grads = torch.autograd.grad(loss, (teacher, student))
    assert loss.item() == 0.0
    assert all(bool((g == 0).all()) for g in grads)


@PROPERTY
@given(sizes, seeds, st.floats(0.01, 5.0))
def test_disagreement_stays_between_minus_the_clamp_and_zero(size, seed, clamp):
    teacher, student = normal(*size, seed=seed) * 20, normal(*size, seed=seed + 1) * 20
    value = losses.disagreement(teacher, student, clamp=clamp).item()
    assert -clamp - 1e-12 <= value <= 1e-12


def test_clamped_images_give_no_gradient():
    teacher = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    student = torch.tensor([[0.01, 0.0, 0.0]])
    loss = losses.disagreement(teacher, student, clamp=0.5)
    assert loss.item() == pytest.approx(-0.5)
    assert torch.autograd.grad(loss, teacher)[0].abs().max() == 0


def test_inversion_is_cross_entropy_plus_the_weighted_disagreement():
    teacher, student, labels = logits(5, 3, seed=0), logits(5, 3, seed=1), torch.tensor([0, 1, 2, 0, 1])
    ce = F.cross_entropy(teacher, labels)
    found = losses.inversion(teacher, labels, student, adversarial=0.3, form="probdot")
    torch.testing.assert_close(found, ce + 0.3 * losses.disagreement(teacher, student, form="probdot"))
    torch.testing.assert_close(losses.inversion(teacher, labels, None, adversarial=0.3), ce)
    torch.testing.assert_close(losses.inversion(teacher, labels, student, adversarial=0.0), ce)


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_inversion_gradient_equals_finite_differences(form):
    student, labels = normal(5, 3, seed=1), torch.tensor([0, 1, 2, 0, 1])
    teacher = logits(5, 3, seed=0)
    assert gradcheck(lambda t: losses.inversion(t, labels, student, adversarial=0.5, form=form), (teacher,))


def test_total_variation_of_a_ramp_is_its_slopes():
    rows, columns = torch.arange(4.0)[:, None], torch.arange(5.0)
    ramp = (0.5 * rows + 0.25 * columns).expand(2, 3, 4, 5)
    assert losses.total_variation(ramp).item() == pytest.approx(0.75)
    assert losses.total_variation(torch.full((2, 3, 4, 5), 0.3)).item() == 0.0


def test_total_variation_gradient_equals_finite_differences():
    assert gradcheck(losses.total_variation, (normal(2, 2, 3, 4).requires_grad_(),))


def test_batch_norm_distance_is_the_mean_square():
    found, stored = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 4.0])
    assert losses.batch_norm_distance(found, stored).item() == pytest.approx(5 / 3)
    assert gradcheck(lambda x: losses.batch_norm_distance(x, normal(6, seed=1)), (normal(6).requires_grad_(),))


def test_unknown_forms_are_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="known: kl, probdot"):
        losses.distillation(x, x, form="mse")
    with pytest.raises(ValueError, match="known: kl, probdot"):
        losses.disagreement(x, x, form="mse")
