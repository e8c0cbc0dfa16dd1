"""Gradients from answers alone, against closed forms for linear losses and against autograd."""

import math

import pytest
import torch
from torch import Tensor

from ray_dfml.core import zero_order
from ray_dfml.core.net import net
from tests.support import normal

SHAPE = (3, 4, 5)
D = math.prod(SHAPE)


def linear(slope: Tensor) -> zero_order.Ask:
    """A loss whose gradient is `slope` [c h w] everywhere."""
    return lambda x: (x.double() * slope).sum((2, 3, 4))


def grey(n: int) -> Tensor:
    return torch.full((n, *SHAPE), 0.5)


def estimates(n: int, q: int, *, central: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient [d] of a linear loss, and n estimates [n d] of it from q directions each."""
    slope = normal(*SHAPE, seed=1)
    rng = torch.Generator().manual_seed(0)
    found = zero_order.gradient(linear(slope), grey(n), rng=rng, directions=q, mu=0.01, central=central)[1]
    return slope.flatten(), found.flatten(1).double()


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("q", [1, 7])
def test_a_linear_loss_is_estimated_without_bias_and_with_the_variance_of_the_closed_form(q: int, central: bool):
    """E|g' - g|^2 = ((d - 1) / q) |g|^2 and E|g'|^2 = ((d + q - 1) / q) |g|^2, within three standard errors."""
    slope, found = estimates(10_000, q, central=central)
    error = (found.mean(0) - slope).abs() / (found.std(0) / 100)
    assert (error < 4).all()
    assert float(error.square().mean()) == pytest.approx(1, abs=3 * math.sqrt(2 / D))
    for values, factor in (((found - slope).square().sum(1), (D - 1) / q), (found.square().sum(1), (D + q - 1) / q)):
        assert float(values.mean()) == pytest.approx(
            factor * float(slope.square().sum()), abs=3 * float(values.std()) / 100
        )


@pytest.mark.parametrize("q", [1, 5, 20, 100])
def test_the_cosine_to_the_gradient_of_a_network(q: int):
    """The cross-entropy of a random network, whose gradient autograd knows, at 1x28x28 and q of the benchmark."""
    network = net("lenet", (1, 28, 28), 5)
    theta = network.init(torch.Generator().manual_seed(0))
    x = 0.2 + 0.6 * torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    stats = network.with_stats(theta, x)[1]
    labels = torch.arange(12) % 5

    def loss(pixels: Tensor) -> Tensor:
        return -network(theta, pixels, stats).log_softmax(1)[
            torch.arange(len(pixels)), labels.repeat(len(pixels) // 12)
        ]

    def ask(probes: Tensor) -> Tensor:
        with torch.no_grad():
            return loss(probes.flatten(0, 1)).view(probes.shape[:2])

    leaf = x.clone().requires_grad_()
    (true,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    value, found = zero_order.gradient(
        ask, x, rng=torch.Generator().manual_seed(2), directions=q, mu=0.05, central=True
    )
    torch.testing.assert_close(value, loss(x).detach())
    cosines = torch.cosine_similarity(found.flatten(1), true.flatten(1))
    expected = zero_order.cosine(784, q)
    if q == 1:  # the sign of one direction is right, so the mean of |cos| is that of one coordinate of a direction
        expected *= math.sqrt(2 / math.pi)
    assert float(cosines.mean()) == pytest.approx(expected, abs=4 * float(cosines.std()) / math.sqrt(12))


def test_central_differences_have_no_error_of_first_order():
    """A quadratic loss: forward differences add a bias of the order of mu, central ones are exact in each direction."""

    def ask(x: Tensor) -> Tensor:
        return x.double().square().sum((2, 3, 4)) * 50

    x = grey(2) + 0.2
    forward, central = (
        zero_order.gradient(ask, x, rng=torch.Generator().manual_seed(3), directions=40, mu=0.05, central=c)[1]
        for c in (False, True)
    )
    u = zero_order.on_sphere(torch.Generator().manual_seed(3), 40, x.shape).double()
    slopes = (u * 100 * x.double()).sum((2, 3, 4))
    exact = (u * slopes[..., None, None, None]).sum(0) * D / 40
    torch.testing.assert_close(central.double(), exact, rtol=1e-3, atol=1e-3)
    assert (forward - exact).norm() > 10 * (central - exact).norm()


def test_directions_have_length_one_and_no_preferred_axis():
    u = zero_order.on_sphere(torch.Generator().manual_seed(0), 4000, torch.Size((2, *SHAPE))).flatten(0, 1).flatten(1)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(8000))
    torch.testing.assert_close(D * u.T @ u / 8000, torch.eye(D), atol=0.08, rtol=0)


@pytest.mark.parametrize("central", [False, True])
def test_what_is_asked_about_stays_in_the_range_and_the_realised_displacement_counts(central: bool):
    """Half of the pixels are 0 or 1. They move inwards only, and the slope along what moved is exact."""
    x = torch.tensor([0.0, 1.0, 0.5, 0.5]).repeat(D // 4).view(1, *SHAPE)
    slope, seen = normal(*SHAPE, seed=1), []

    def ask(probes: Tensor) -> Tensor:
        seen.append(probes)
        return linear(slope)(probes)

    rng = torch.Generator().manual_seed(0)
    _, found = zero_order.gradient(ask, x, rng=rng, directions=1, mu=0.3, central=central)
    assert all(float(part.min()) >= 0 and float(part.max()) <= 1 for part in seen)
    step = (seen[1][0] - (seen[1][1] if central else x))[0].double()
    expected = D * step * (step * slope).sum() / step.square().sum()
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)
    edge = step[x[0] == 0]
    assert central or (edge >= 0).all()


def test_a_displacement_below_a_level_says_nothing_to_a_service_of_bytes():
    x = zero_order.to_levels(torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    least = zero_order.least_mu(784)
    assert least == pytest.approx(0.1098, abs=1e-4)
    seen: list[Tensor] = []

    def ask(probes: Tensor) -> Tensor:
        seen.append(probes)
        return probes.sum((2, 3, 4))

    def found(mu: float) -> Tensor:
        rng = torch.Generator().manual_seed(1)
        return zero_order.gradient(ask, x, rng=rng, directions=50, mu=mu, eight_bit=True)[1]

    assert not found(0.005).any()
    assert all(torch.equal(part, x.expand_as(part)) for part in seen)
    seen.clear()
    slopes = found(least)
    assert all(torch.equal(part, zero_order.to_levels(part)) for part in seen)
    changed = (seen[1] != x).float().mean()
    assert changed == pytest.approx(0.61, abs=0.02)  # |normal| > 1/2, less what the range cuts
    assert torch.cosine_similarity(slopes.flatten(1), torch.ones(3, 784)).min() > 0.1


def test_the_queries_are_those_that_are_made():
    for central in (False, True):
        asked = 0

        def ask(probes: Tensor) -> Tensor:
            nonlocal asked
            asked += probes.shape[0] * probes.shape[1]
            return probes.sum((2, 3, 4))

        rng = torch.Generator().manual_seed(0)
        zero_order.gradient(ask, torch.rand(300, 1, 4, 4), rng=rng, directions=11, mu=0.1, central=central)
        assert asked == zero_order.queries(300, 11, central=central) == 300 * (1 + 11 * (1 + central))


def test_the_parts_in_which_it_asks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    slope, results = normal(*SHAPE, seed=1), []
    for size in (6, 10_000):
        monkeypatch.setattr(zero_order, "AT_ONCE", size)
        rng = torch.Generator().manual_seed(0)
        results.append(zero_order.gradient(linear(slope), grey(3), rng=rng, directions=9, mu=0.1)[1])
    torch.testing.assert_close(results[0], results[1])
