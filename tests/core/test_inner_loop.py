"""Meta-gradients against a hand derivation, finite differences, and one another (looped and batched)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.inner_loop import Task, adapt, adapted, graph_grad, meta_gradient, plain_grad
from ray_dfml.core.layers import Layers, conv_shapes, linear_shapes, norm_shapes
from ray_dfml.core.net import Net
from tests.support import normal, slope

BOTH = pytest.mark.parametrize("batched", [False, True], ids=["loop", "batched"])
STEPS = pytest.mark.parametrize("steps", [0, 1, 5])
HEADS = pytest.mark.parametrize("head", ["maml", "anil", "protonet"])


class Smooth:
    """Conv, batch norm, tanh, average pool, twice; no kinks, so that finite differences are exact."""

    def __init__(self, channels_in: int, ways: int) -> None:
        self.parameters = conv_shapes("conv1", channels_in, 4, 3, bias=True) | norm_shapes("norm1", 4)
        self.parameters |= conv_shapes("conv2", 4, 4, 3, bias=True) | norm_shapes("norm2", 4)
        self.parameters |= linear_shapes("head", 4, ways)
        self.norms = {"norm1": 4, "norm2": 4}

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(layers.conv_norm("conv1", "norm1", x)), 2)
        return torch.tanh(layers.conv_norm("conv2", "norm2", x)).mean((2, 3))


class TwoParameters:
    """Logits (0, a x + b) of images of one pixel: logistic regression, whose derivatives fit on a line."""

    backbone = None

    def __call__(self, theta: Tensor, x: Tensor, stats: Tensor | None = None, *, first_order: bool) -> Tensor:
        margin = theta[0] * x.flatten() + theta[1]
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    def with_stats(self, theta: Tensor, x: Tensor, *, first_order: bool) -> tuple[Tensor, Tensor]:
        return self(theta, x, first_order=first_order), theta.new_zeros(1)


@pytest.fixture
def smooth(monkeypatch) -> Net:
    monkeypatch.setattr("ray_dfml.core.net.BACKBONES", {"smooth": lambda c, h, w, ways: Smooth(c, ways)})
    return Net("smooth", (2, 6, 6), 3)


def draw_tasks(device: torch.device, shape: tuple[int, int, int], *, tasks: int = 3, way: int = 3) -> Task:
    support_y, query_y = torch.arange(way, device=device).repeat(2), torch.arange(way, device=device).repeat(3)
    images = normal(tasks, 5 * way, *shape, seed=5, device=device)
    return Task(images[:, : 2 * way], support_y.expand(tasks, -1), images[:, 2 * way :], query_y.expand(tasks, -1))


def weights(device: torch.device, network: Net) -> Tensor:
    theta = network.init(torch.Generator().manual_seed(0)).to(device).double()
    return theta + 0.1 * normal(theta.numel(), seed=1, device=device)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@BOTH
def test_one_step_maml_of_two_parameters_equals_the_hand_derivation(device: torch.device, batched):
    """phi = theta + lr s v, s = sigmoid(-theta.v); dL/dtheta = -sigmoid(-phi.u) (u - lr s (1 - s) (v.u) v)."""
    theta, lr, xs, xq = torch.tensor([0.4, -0.3], dtype=torch.float64, device=device), 0.7, 1.5, -0.8
    v, u = (
        torch.tensor([xs, 1.0], dtype=torch.float64, device=device),
        torch.tensor([xq, 1.0], dtype=torch.float64, device=device),
    )
    s = torch.sigmoid(-(theta @ v))
    phi = theta + lr * s * v
    expected = -torch.sigmoid(-(phi @ u)) * (u - lr * s * (1 - s) * (v @ u) * v)
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    task = Task(v[:1].view(1, 1, 1, 1, 1), one, u[:1].view(1, 1, 1, 1, 1), one)
    found = meta_gradient(TwoParameters(), theta, task, lr=lr, steps=1, batched=batched)
    torch.testing.assert_close(found.grad[0], expected, rtol=1e-12, atol=0)
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-float(phi @ u))), rel=1e-12)
    assert found.accuracy.item() == float(phi @ u > 0)


def slopes(loss, x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


def query_loss(network: Net, w: Tensor, task: Task, head: str, lr: float, steps: int) -> Tensor:
    """The outer loss of `Smooth`, with each head written out by its definition. The head has 3 x 4 + 3 weights."""
    support, support_y, query, query_y = task
    if head == "protonet":
        known, asked = network.features(w, support), network.features(w, query)
        means = torch.stack([known[support_y == c].mean(0) for c in range(3)])
        return F.cross_entropy(-(asked[:, None] - means).square().sum(-1), query_y)
    for _ in range(steps):
        gradient = slopes(lambda v: F.cross_entropy(network(v, support), support_y), w)
        if head == "anil":
            gradient[:-15] = 0
        w = w - lr * gradient
    return F.cross_entropy(network(w, query), query_y)


@BOTH
@STEPS
@HEADS
def test_meta_gradient_equals_finite_differences_of_the_query_loss(device: torch.device, smooth, head, batched, steps):
    theta, tasks, lr = weights(device, smooth), draw_tasks(device, smooth.shape), 0.5
    found = meta_gradient(smooth, theta, tasks, lr=lr, steps=steps, batched=batched, head=head)
    direction = normal(theta.numel(), seed=2, device=device) / math.sqrt(theta.numel())
    for t in range(3):
        one = Task(*(part[t] for part in tasks))

        def loss(w: Tensor, task=one) -> Tensor:
            return query_loss(smooth, w, task, head, lr, steps)

        assert found.loss[t].item() == pytest.approx(loss(theta).item(), rel=1e-10)
        assert float(found.grad[t] @ direction) == pytest.approx(slope(loss, theta, direction), rel=1e-7, abs=1e-8)


@STEPS
@HEADS
def test_batched_equals_looped_on_a_smooth_network(device: torch.device, smooth, head, steps):
    theta, tasks = weights(device, smooth), draw_tasks(device, smooth.shape)
    looped, batched = (
        meta_gradient(smooth, theta, tasks, lr=0.5, steps=steps, batched=b, head=head) for b in (False, True)
    )
    for a, b in zip(looped, batched, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


@BOTH
def test_a_protonet_learns_no_head_and_predicts_the_nearest_mean(device: torch.device, batched):
    network = Net("conv4", (3, 16, 16), 3)
    theta, tasks = weights(device, network), draw_tasks(device, network.shape)
    found = meta_gradient(network, theta, tasks, lr=0.1, steps=2, batched=batched, head="protonet")
    assert bool((network.split(found.grad[0])[1] == 0).all())
    for t in range(3):
        known, asked = (network.features(theta, x[t]) for x in (tasks.support, tasks.query))
        means = torch.stack([known[tasks.support_y[t] == c].mean(0) for c in range(3)])
        right = torch.cdist(asked, means).argmin(1) == tasks.query_y[t]
        assert found.accuracy[t].item() == pytest.approx(right.double().mean().item())
        torch.testing.assert_close(found.stats[t], network.with_stats(theta, tasks.query[t])[1])


@HEADS
@pytest.mark.parametrize("fixed", [False, True])
def test_outputs_beyond_the_classes_of_a_support_have_no_part(device: torch.device, head, fixed):
    network = Net("conv4", (3, 16, 16), 4)
    theta, tasks = weights(device, network), draw_tasks(device, network.shape, way=2)
    stats = network.with_stats(theta, normal(9, 3, 16, 16, device=device))[1] if fixed else None
    rest = theta.clone()
    network.layout.unflatten(rest)["head.weight"][2:] += 1.0
    given = {"head": head, "lr": 0.1, "steps": 3, "grad_of": plain_grad, "stats": stats, "way": 2}
    phi, moved = (adapted(network, w, tasks.support[0], tasks.support_y[0], **given) for w in (theta, rest))
    query = tasks.query[0]
    torch.testing.assert_close(network(phi, query)[:, :2], network(moved, query)[:, :2], rtol=0, atol=0)
    before, after = (network.layout.unflatten(w) for w in (theta, phi))
    for part in ("head.weight", "head.bias"):
        kept = torch.zeros_like(before[part][2:]) if head == "protonet" else before[part][2:]
        assert torch.equal(after[part][2:], kept)
        assert not torch.equal(after[part][:2], before[part][:2])
    assert torch.equal(network.split(phi)[0], network.split(theta)[0]) == (head != "maml")


@pytest.mark.parametrize("fixed", [False, True])
def test_a_head_that_is_adapted_alone_takes_the_steps_of_logistic_regression(device: torch.device, fixed):
    network = Net("conv4", (3, 16, 16), 3)
    theta, tasks = weights(device, network), draw_tasks(device, network.shape)
    support, labels = tasks.support[0, :5], tasks.support_y[0, :5]  # of the last class one image
    stats = network.with_stats(theta, normal(9, 3, 16, 16, device=device))[1] if fixed else None
    given = {"lr": 0.1, "steps": 3, "grad_of": plain_grad, "stats": stats}
    f, parts = network.features(theta, support, stats), network.layout.unflatten(theta)
    w, b = parts["head.weight"], parts["head.bias"]
    for _ in range(3):
        error = (F.linear(f, w, b).softmax(1) - F.one_hot(labels, 3)) / len(labels)
        w, b = w - 0.1 * error.T @ f, b - 0.1 * error.sum(0)
    found = network.split(adapted(network, theta, support, labels, head="anil", **given))[1]
    torch.testing.assert_close(found, torch.cat([w.flatten(), b]))
    means = torch.stack([f[labels == c].mean(0) for c in range(3)])
    phi = adapted(network, theta, support, labels, head="protonet", **given)
    distances = torch.cdist(network.features(phi, tasks.query[0]), means).square()
    torch.testing.assert_close(network(phi, tasks.query[0]).softmax(1), (-distances).softmax(1))


@STEPS
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_batched_equals_looped_on_conv4(device: torch.device, steps, dtype, bound):
    network = Net("conv4", (3, 16, 16), 3)
    theta, tasks = weights(device, network).to(dtype), draw_tasks(device, network.shape)
    tasks = tasks._replace(support=tasks.support.to(dtype), query=tasks.query.to(dtype))
    looped, batched = (meta_gradient(network, theta, tasks, lr=0.01, steps=steps, batched=b) for b in (False, True))
    named = [network.layout.unflatten(row) for row in (looped.grad[0], batched.grad[0])]
    for name in network.layout.shapes:
        if name.endswith("conv.bias"):
            assert all(bool((grads[name] == 0).all()) for grads in named)  # batch norm removes them: dead parameters
        else:
            assert relative(named[1][name], named[0][name]) < bound, name
    assert relative(batched.grad, looped.grad) < bound
    for a, b in zip(looped[1:], batched[1:], strict=True):
        torch.testing.assert_close(b, a, rtol=bound, atol=bound)


@BOTH
@pytest.mark.parametrize(("lr", "steps"), [(0.0, 3), (0.5, 0)])
def test_without_adaptation_the_meta_gradient_is_that_of_the_query_loss(
    device: torch.device, smooth, batched, lr, steps
):
    theta, tasks = weights(device, smooth), draw_tasks(device, smooth.shape)
    found = meta_gradient(smooth, theta, tasks, lr=lr, steps=steps, batched=batched)
    for t in range(3):
        expected = plain_grad(lambda w, t=t: F.cross_entropy(smooth(w, tasks.query[t]), tasks.query_y[t]))(theta)
        torch.testing.assert_close(found.grad[t], expected, rtol=1e-9, atol=1e-11)


@BOTH
@pytest.mark.parametrize("head", ["maml", "anil"])
def test_the_second_order_term_is_there(device: torch.device, smooth, head, batched):
    theta, tasks = weights(device, smooth), draw_tasks(device, smooth.shape, tasks=1)
    found = meta_gradient(smooth, theta, tasks, lr=0.5, steps=3, batched=batched, head=head).grad[0]
    support, support_y, query, query_y = (part[0] for part in tasks)
    phi = adapted(smooth, theta, support, support_y, head=head, lr=0.5, steps=3, grad_of=plain_grad)
    first_order = plain_grad(lambda w: F.cross_entropy(smooth(w, query), query_y))(phi)
    assert relative(first_order, found) > 1e-2


@BOTH
def test_statistics_and_accuracy_are_those_of_the_query_under_adapted_weights(device: torch.device, batched):
    network = Net("conv4", (3, 16, 16), 3)
    theta, tasks = weights(device, network), draw_tasks(device, network.shape)
    found = meta_gradient(network, theta, tasks, lr=0.1, steps=2, batched=batched)
    for t in range(3):
        support, support_y, query, query_y = (part[t] for part in tasks)
        phi = adapt(
            lambda w, s=support, y=support_y: F.cross_entropy(network(w, s), y),
            theta, lr=0.1, steps=2, grad_of=plain_grad,
        )  # fmt: skip
        logits, stats = network.with_stats(phi, query)
        torch.testing.assert_close(found.stats[t], stats, rtol=1e-8, atol=1e-10)
        assert found.accuracy[t].item() == pytest.approx((logits.argmax(1) == query_y).double().mean().item())


@BOTH
@HEADS
def test_tasks_do_not_influence_each_other_and_theta_is_untouched(device: torch.device, smooth, head, batched):
    theta, tasks = weights(device, smooth), draw_tasks(device, smooth.shape)
    before = theta.clone()
    given = {"lr": 0.5, "steps": 2, "batched": batched, "head": head}
    together = meta_gradient(smooth, theta, tasks, **given)
    alone = meta_gradient(smooth, theta, Task(*(part[1:2] for part in tasks)), **given)
    torch.testing.assert_close(together.grad[1:2], alone.grad, rtol=1e-9, atol=1e-11)
    assert torch.equal(theta, before)
    assert not theta.requires_grad


def test_adaptation_to_a_quadratic_contracts_by_a_known_factor(device: torch.device):
    target, theta = normal(4, seed=1, device=device), normal(4, device=device)
    found = adapt(lambda w: 0.5 * (w - target).square().sum(), theta, lr=0.1, steps=7, grad_of=plain_grad)
    torch.testing.assert_close(found, target + 0.9**7 * (theta - target))


def test_all_three_gradients_agree(device: torch.device):
    theta = normal(4, device=device)
    expected = 3 * theta**2
    leaf = theta.clone().requires_grad_()
    for grad in (graph_grad(lambda w: w.pow(3).sum())(leaf), plain_grad(lambda w: w.pow(3).sum())(theta)):
        torch.testing.assert_close(grad.detach(), expected)
    assert graph_grad(lambda w: w.pow(3).sum())(leaf).requires_grad
    assert not plain_grad(lambda w: w.pow(3).sum())(theta).requires_grad
