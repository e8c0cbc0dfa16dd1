"""Backbones as functions of flat weights: parameter counts, agreement with plain layers, and batch-norm statistics."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.backbones import BACKBONES
from ray_dfml.core.net import Net, net
from tests.support import normal


def drawn(device: torch.device, network: Net, seed: int = 0) -> Tensor:
    """Float64 weights in general position: no part is exactly 0 or 1."""
    theta = network.init(torch.Generator().manual_seed(seed)).to(device).double()
    return theta + 0.05 * normal(theta.numel(), seed=seed + 1, device=device)


@pytest.mark.parametrize(
    ("arch", "shape", "ways", "parameters"),
    [
        ("conv4", (3, 32, 32), 5, 29_541),
        ("conv4", (3, 32, 32), 10, 29_541 + 128 * 5 + 5),
        ("conv4", (3, 84, 84), 5, 32_901),
        ("conv4", (1, 28, 28), 5, 28_485),
        ("conv4-adaptive", (3, 84, 84), 5, 29_061),
        ("conv4-adaptive", (3, 32, 32), 5, 29_061),
        ("conv4-64", (3, 32, 32), 5, 114_373),
        ("conv4-64", (3, 84, 84), 5, 121_093),
        ("resnet10", (3, 32, 32), 5, 4_900_677),
        ("resnet18", (3, 84, 84), 5, 11_171_397),
        ("resnet34", (3, 32, 32), 10, 21_282_122),
        ("lenet", (1, 28, 28), 10, 29_034),
        ("alexnet", (1, 28, 28), 10, 2_163_210),
        ("vgg16", (3, 32, 32), 10, 14_728_266),
        ("vgg16", (1, 28, 28), 10, 14_727_114),
    ],
)
def test_parameter_counts(arch, shape, ways, parameters):
    assert Net(arch, shape, ways).layout.numel == parameters


def test_multiply_accumulates_are_those_of_the_layers():
    by_hand = 9 * (3 * 32 * 32**2 + 32 * 32 * (16**2 + 8**2 + 4**2)) + 128 * 5
    assert Net("conv4", (3, 32, 32), 5).macs == by_hand


def test_conv4_equals_plain_layers_in_the_published_order(device):
    """Conv with bias, batch norm, ReLU, max-pool: neither the pooling before the ReLU nor the dropped bias shows."""
    network, x = Net("conv4", (3, 18, 18), 5), normal(6, 3, 18, 18, device=device)
    theta = drawn(device, network)
    found, stats = network.with_stats(theta, x)
    parts, y, expected = network.layout.unflatten(theta), x, []
    for i in range(4):
        y = F.conv2d(y, parts[f"blocks.{i}.conv.weight"], parts[f"blocks.{i}.conv.bias"], padding=1)
        expected += [y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)]
        y = F.batch_norm(y, None, None, parts[f"blocks.{i}.norm.weight"], parts[f"blocks.{i}.norm.bias"], training=True)
        y = F.max_pool2d(F.relu(y), 2)
    torch.testing.assert_close(found, F.linear(y.flatten(1), parts["head.weight"], parts["head.bias"]))
    torch.testing.assert_close(stats, torch.cat(expected))


def test_resnet10_equals_plain_layers(device):
    network, x = Net("resnet10", (3, 16, 16), 4), normal(3, 3, 16, 16, device=device)
    theta = drawn(device, network)
    p = network.layout.unflatten(theta)

    def norm(y: Tensor, name: str) -> Tensor:
        return F.batch_norm(y, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)

    y = norm(F.conv2d(x, p["stem.weight"], padding=1), "stem_norm")
    for i in range(4):
        at, stride = f"blocks.{i}.", 2 if i else 1
        short = norm(F.conv2d(y, p[at + "project.weight"], stride=stride), at + "project_norm") if i else y
        y = F.relu(norm(F.conv2d(y, p[at + "conv1.weight"], stride=stride, padding=1), at + "norm1"))
        y = F.relu(norm(F.conv2d(y, p[at + "conv2.weight"], padding=1), at + "norm2") + short)
    expected = F.linear(y.mean((2, 3)), p["head.weight"], p["head.bias"])
    torch.testing.assert_close(network(theta, x), expected)


def plain_norm(p: dict[str, Tensor], y: Tensor, name: str) -> Tensor:
    """Batch norm of a batch by the layer of torch."""
    return F.batch_norm(y, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)


def plain_conv(p: dict[str, Tensor], y: Tensor, name: str) -> Tensor:
    """A convolution that keeps the size, with its bias."""
    weight = p[f"{name}.weight"]
    return F.conv2d(y, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)


def test_resnet34_differs_from_the_few_shot_resnets_by_the_relu_of_its_stem(device):
    network, x = Net("resnet34", (1, 4, 4), 3), normal(3, 1, 4, 4, device=device)
    theta = drawn(device, network)
    p, seen = network.layout.unflatten(theta), []
    block = network.backbone.blocks[0]  # pyright: ignore[reportAttributeAccessIssue]
    network.backbone.blocks = [lambda layers, y: (seen.append(y), block(layers, y))[1]]  # pyright: ignore
    features = network.features(theta, x)
    y = F.relu(plain_norm(p, F.conv2d(x, p["stem.weight"], padding=1), "stem_norm"))
    torch.testing.assert_close(seen, [y])
    z = F.relu(plain_norm(p, F.conv2d(y, p["blocks.0.conv1.weight"], padding=1), "blocks.0.norm1"))
    z = F.relu(plain_norm(p, F.conv2d(z, p["blocks.0.conv2.weight"], padding=1), "blocks.0.norm2") + y)
    torch.testing.assert_close(features, z.mean((2, 3)))


def test_lenet_equals_plain_layers(device):
    network, x = Net("lenet", (1, 14, 10), 4), normal(6, 1, 14, 10, device=device)
    theta = drawn(device, network)
    p, y = network.layout.unflatten(theta), x
    for i in range(2):
        y = F.max_pool2d(F.relu(plain_norm(p, plain_conv(p, y, f"blocks.{i}.conv"), f"blocks.{i}.norm")), 2)
    expected = F.linear(y.flatten(1), p["head.weight"], p["head.bias"])
    torch.testing.assert_close(network(theta, x), expected)


def test_alexnet_equals_plain_layers(device):
    network, x = Net("alexnet", (3, 18, 9), 4), normal(6, 3, 18, 9, device=device)
    theta = drawn(device, network)
    p, y = network.layout.unflatten(theta), x
    for i in range(5):
        y = F.relu(plain_conv(p, y, f"convs.{i}"))
        y = F.max_pool2d(y, 2) if i in (0, 1, 4) else y
    y = F.relu(F.linear(y.flatten(1), p["hidden.weight"], p["hidden.bias"]))
    torch.testing.assert_close(network(theta, x), F.linear(y, p["head.weight"], p["head.bias"]))


@pytest.mark.parametrize(("size", "pools"), [(3, 1), (6, 2), (37, 5)])
def test_vgg16_equals_plain_layers_and_pools_until_one_pixel_is_left(device, size, pools):
    network, x = Net("vgg16", (1, size, size), 3), normal(4, 1, size, size, device=device)
    theta = drawn(device, network)
    p, y = network.layout.unflatten(theta), x
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        for i in range(depth):
            at = f"stages.{stage}.{i}"
            y = F.relu(plain_norm(p, plain_conv(p, y, f"{at}.conv"), f"{at}.norm"))
        y = F.max_pool2d(y, 2) if stage < pools else y
    assert y.shape[-1] == 1
    torch.testing.assert_close(network(theta, x), F.linear(y.mean((2, 3)), p["head.weight"], p["head.bias"]))


def test_initial_weights_without_batch_norm_keep_the_size_of_signals():
    network = Net("alexnet", (3, 32, 32), 10)
    parts = network.layout.unflatten(network.init(torch.Generator().manual_seed(0)))
    assert parts["convs.2.weight"].std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)


@pytest.mark.parametrize(("arch", "size"), [("conv4", 16), ("conv4-adaptive", 20), ("resnet10", 8)])
def test_statistics_of_a_batch_given_back_reproduce_its_logits(device, arch, size):
    network, x = Net(arch, (3, size, size), 3), normal(5, 3, size, size, device=device)
    theta = drawn(device, network)
    logits, stats = network.with_stats(theta, x)
    assert stats.shape == network.initial_stats().shape
    torch.testing.assert_close(network(theta, x), logits)
    torch.testing.assert_close(network(theta, x, stats), logits)


def test_given_statistics_make_images_independent(device):
    network, x = Net("conv4", (3, 16, 16), 3), normal(5, 3, 16, 16, device=device)
    theta = drawn(device, network)
    _, stats = network.with_stats(theta, normal(8, 3, 16, 16, seed=3, device=device))
    together = network(theta, x, stats)
    torch.testing.assert_close(network(theta, x[2:3], stats), together[2:3])
    assert (network(theta, x[:2]) - network(theta, x)[:2]).abs().max() > 1e-3


def test_statistics_found_under_given_statistics_equal_them_on_their_own_batch(device):
    network, x = Net("conv4", (3, 16, 16), 3), normal(5, 3, 16, 16, device=device)
    theta = drawn(device, network)
    logits, stats = network.with_stats(theta, x)
    again, found = network.with_stats(theta, x, stats)
    torch.testing.assert_close(found, stats)
    torch.testing.assert_close(again, logits)


def test_statistics_are_differentiable_with_respect_to_the_images(device):
    network = Net("conv4", (3, 16, 16), 3)
    x = normal(5, 3, 16, 16, device=device).requires_grad_()
    theta = drawn(device, network)
    _, found = network.with_stats(theta, x, network.initial_stats().to(device).double())
    assert torch.autograd.grad(found.square().sum(), x)[0].abs().sum() > 0


def test_a_call_after_a_capture_is_the_call_before_it(device):
    network, x = Net("conv4", (3, 16, 16), 3), normal(5, 3, 16, 16, device=device)
    theta = drawn(device, network)
    before = network(theta, x)
    network.with_stats(theta, x, network.initial_stats().to(device))
    assert torch.equal(network(theta, x), before)


def test_the_adaptive_head_takes_any_image_size(device):
    network = Net("conv4-adaptive", (3, 32, 32), 5)
    theta = network.init(torch.Generator().manual_seed(0)).to(device)
    assert network(theta, torch.rand(3, 3, 48, 40).to(device)).shape == (3, 5)


def test_initial_weights_follow_the_published_distributions():
    network = Net("conv4-64", (3, 84, 84), 5)
    theta = network.init(torch.Generator().manual_seed(0))
    parts = network.layout.unflatten(theta)
    assert parts["blocks.1.conv.weight"].std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert torch.equal(parts["blocks.2.norm.weight"], torch.ones(64))
    assert all(torch.equal(parts[f"blocks.2.{name}"], torch.zeros(64)) for name in ("conv.bias", "norm.bias"))
    bound = 1 / math.sqrt(1600)
    assert 0.95 * bound < parts["head.weight"].abs().max() <= bound
    assert 0 < parts["head.bias"].abs().max() <= bound
    assert torch.equal(theta, network.init(torch.Generator().manual_seed(0)))
    silent = network.layout.unflatten(network.init(torch.Generator().manual_seed(0), zero_head_bias=True))
    assert torch.equal(silent["head.bias"], torch.zeros(5))
    assert torch.equal(silent["head.weight"], parts["head.weight"])


@pytest.mark.parametrize(("arch", "size"), [("conv4", 16), ("conv4-adaptive", 20), ("resnet10", 8)])
@pytest.mark.parametrize("fixed", [False, True])
def test_logits_are_the_linear_head_on_the_features(device, arch, size, fixed):
    network, x = Net(arch, (3, size, size), 3), normal(5, 3, size, size, device=device)
    theta = drawn(device, network)
    stats = network.with_stats(theta, normal(6, 3, size, size, seed=3, device=device))[1] if fixed else None
    before = network(theta, x, stats)
    backbone, head = network.split(theta)
    features = network.features(theta, x, stats)
    torch.testing.assert_close(F.linear(features, head[:-3].view(3, -1), head[-3:]), before)
    assert torch.equal(torch.cat([backbone, head]), theta)
    assert torch.equal(network.features(torch.cat([backbone, 0 * head]), x, stats), features)
    assert torch.equal(network(theta, x, stats), before)


@pytest.mark.parametrize("arch", BACKBONES)
def test_every_backbone_ends_with_a_linear_head(arch):
    *_, weight, bias = Net(arch, (3, 32, 32), 5).layout.shapes.items()
    assert (weight[0], weight[1][0], len(weight[1])) == ("head.weight", 5, 2)
    assert bias == ("head.bias", (5,))


def test_unknown_architectures_are_errors():
    with pytest.raises(KeyError, match="unknown architecture 'vgg'"):
        net("vgg", (3, 32, 32), 5)


def test_calls_from_eight_threads_equal_those_from_one(device):
    """All kinds of calls of one network at the same time: no call sees weights, statistics or settings of another."""
    network, x = net("conv4", (3, 16, 16), 3), normal(5, 3, 16, 16, device=device)
    thetas = [drawn(device, network, seed) for seed in range(8)]
    stats = [network.with_stats(theta, x)[1] for theta in thetas]

    def calls(i: int) -> list[Tensor]:
        theta, given = thetas[i % 8], stats[i % 8]
        found = [network(theta, x), network(theta, x, given), network.features(theta, x), network(theta, 2 * x, given)]
        return [*found, *network.with_stats(theta, x, given), *network.with_stats(theta, x, first_order=True)]

    alone = [calls(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(calls, range(160))):
            assert all(torch.equal(a, b) for a, b in zip(found, alone[i % 8], strict=True))


CASES = [("conv4", 3, 16), ("conv4", 1, 28), ("conv4-64", 3, 16), ("conv4-adaptive", 1, 20), ("resnet10", 3, 8),
         ("resnet18", 1, 8), ("mlp", 3, 8), ("lenet", 1, 12), ("alexnet", 3, 8), ("vgg16", 1, 6)]  # fmt: skip


@pytest.mark.parametrize("kind", ["batch", "given", "batch, captured", "given, captured"])
@pytest.mark.parametrize(("arch", "channels", "size"), CASES)
def test_first_order_changes_no_more_than_rounding(device, arch, channels, size, kind):
    """Logits, statistics, and gradients with respect to weights and images, in float64 and in float32."""
    network, x = net(arch, (channels, size, size), 3), normal(6, channels, size, size, device=device)
    theta, cotangent = drawn(device, network), normal(6, 3, seed=9, device=device)
    given = (
        network.with_stats(theta, normal(8, channels, size, size, seed=3, device=device))[1]
        if "given" in kind
        else None
    )

    def found(dtype: torch.dtype, *, first_order: bool) -> list[Tensor]:
        leaf, images = theta.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()
        fixed = None if given is None else given.to(dtype)
        if "captured" in kind:
            logits, stats = network.with_stats(leaf, images, fixed, first_order=first_order)
            total = (logits * cotangent.to(dtype)).sum()
            assert stats.requires_grad == (len(stats) > 0 and not (first_order and given is None))
            total = total if given is None else total + stats.square().sum()
        else:
            logits = network(leaf, images, fixed, first_order=first_order)
            total, stats = (logits * cotangent.to(dtype)).sum(), torch.zeros(1, device=device)
        grads = torch.autograd.grad(total, (leaf, images))
        return [logits.detach().double(), stats.detach().double(), *(grad.double() for grad in grads)]

    exact = found(torch.float64, first_order=False)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        for a, b in zip(found(dtype, first_order=True), exact, strict=True):
            assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize(("arch", "size"), [("conv4", 16), ("resnet10", 8)])
@pytest.mark.parametrize("fixed", [False, True])
def test_calls_under_vmap_and_grad_equal_the_loop(device, arch, size, fixed):
    network, x = net(arch, (3, size, size), 3), normal(2, 5, 3, size, size, device=device)
    thetas = torch.stack([drawn(device, network), drawn(device, network, 7)])
    stats = [network.with_stats(t, one)[1] if fixed else None for t, one in zip(thetas, x.flip(0), strict=True)]

    def loss(theta: Tensor, images: Tensor, given: Tensor | None) -> Tensor:
        return network(theta, images, given).square().sum()

    parts = (thetas, x, torch.stack(stats)) if fixed else (thetas, x)  # pyright: ignore
    batched = torch.func.vmap(torch.func.grad(lambda t, one, given=None: loss(t, one, given)))(*parts)
    for row, theta, images, given in zip(batched, thetas, x, stats, strict=True):
        leaf = theta.clone().requires_grad_()
        torch.testing.assert_close(row, torch.autograd.grad(loss(leaf, images, given), leaf)[0])
