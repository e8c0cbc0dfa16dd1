"""Optimal-transport fusion: a reordered network is put back in order, and its mean with others is of aligned units."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_dfml.core.backbones import MLP
from ray_dfml.core.net import Net, net
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS, baselines, ota
from ray_dfml.types import Arrays, Job
from tests.support import FakeShard, card, normal, small_world

SHAPE = (3, 32, 32)
"""Conv4 flattens 2x2 positions of each channel."""

Weights = tuple[Tensor, Tensor]
"""Parameters and statistics."""

ARCHS = ["conv4", "conv4-64", "conv4-adaptive", "resnet10", "resnet18"]


def model(arch: str, seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    """A network with random affine, biases and statistics, in float64."""
    network = net(arch, SHAPE, 5)
    theta = network.init(torch.Generator().manual_seed(seed)).double()
    theta = theta + 0.1 * normal(len(theta), seed=seed + 100)
    stats = network.initial_stats().double()
    return network, theta, stats + 0.5 * normal(len(stats), seed=seed + 200).abs()


def shuffled(network: Net, theta: Tensor, stats: Tensor, *, inputs: bool = True, seed: int = 1) -> Weights:
    """The network with every stream in a random order; its function stays if the layers that read a stream follow."""
    rng = torch.Generator().manual_seed(seed)
    tensors = network.layout.unflatten(theta) | network.stats_layout.unflatten(stats)
    graph = ota.layers(network.backbone)
    orders = {one.writes: torch.randperm(len(tensors[f"{one.name}.weight"]), generator=rng) for one in graph}
    for one in graph:
        weight = f"{one.name}.weight"
        if one.reads is not None and inputs:
            order = orders[one.reads]
            positions = tensors[weight].shape[1] // len(order)
            places = (order[:, None] * positions + torch.arange(positions)).flatten()
            tensors[weight] = tensors[weight][:, places]
        if one.writes is not None:
            for name in tensors:
                if name.startswith((f"{one.name}.", f"{one.norm}.")):
                    tensors[name] = tensors[name][orders[one.writes]]
    return network.layout.flatten(tensors), network.stats_layout.flatten(tensors)


def distance(network: Net, a: Weights, b: Weights) -> float:
    """Largest difference of logits over the largest logit, with given statistics and with those of the batch."""
    x = normal(2, *SHAPE, seed=9)
    pairs = [(network(a[0], x, a[1]), network(b[0], x, b[1])), (network(a[0], x), network(b[0], x))]
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_shuffled_copy_is_put_back(arch: str) -> None:
    """The shuffle keeps the function, so the streams are right; the aligned copy has the same weights, bit by bit."""
    network, theta, stats = model(arch)
    copy = shuffled(network, theta, stats)
    assert not copy[0].equal(theta)
    assert distance(network, copy, (theta, stats)) < 1e-9
    aligned = ota.align(network, *copy, theta)
    assert aligned[0].equal(theta)
    assert aligned[1].equal(stats)


def test_a_shuffle_that_inputs_do_not_follow_is_another_function() -> None:
    network, theta, stats = model("conv4")
    copy = shuffled(network, theta, stats, inputs=False)
    assert distance(network, copy, (theta, stats)) > 0.1
    assert not ota.align(network, *copy, theta)[0].equal(theta)


@pytest.mark.parametrize("arch", ["conv4", "resnet10"])
def test_any_network_keeps_its_function_and_comes_nearer(arch: str) -> None:
    network, theta, stats = model(arch)
    _, other, _ = model(arch, seed=1)
    aligned = ota.align(network, theta, stats, other)
    assert distance(network, aligned, (theta, stats)) < 1e-9
    assert (aligned[0] - other).norm() < (theta - other).norm()


@pytest.mark.parametrize("arch", ["conv4", "resnet10"])
def test_a_network_is_in_order_with_itself(arch: str) -> None:
    network, theta, stats = model(arch)
    aligned = ota.align(network, theta, stats, theta)
    assert aligned[0].equal(theta)
    assert aligned[1].equal(stats)


def test_a_noisy_shuffled_copy_is_put_back() -> None:
    network, theta, stats = model("conv4")
    noisy = theta + 1e-3 * normal(len(theta), seed=5)
    aligned = ota.align(network, *shuffled(network, noisy, stats), theta)
    assert aligned[0].equal(noisy)
    assert aligned[1].equal(stats)


def same_units(network: Net, theta: Tensor, *keep: str) -> Tensor:
    """Every unit of the layers in `keep`'s folder alike, but for the tensors in `keep`."""
    tensors = {name: part.clone() for name, part in network.layout.unflatten(theta).items()}
    folder = keep[0].rpartition(".")[0].rpartition(".")[0]
    for name, part in tensors.items():
        if name.startswith(folder + ".") and name not in keep:
            part[:] = part[:1].clone()
    return network.layout.flatten(tensors)


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.weight", "norm.bias"])
def test_weights_biases_and_affine_tell_units_apart(name: str) -> None:
    network, theta, stats = model("conv4")
    theta = same_units(network, theta, f"blocks.0.{name}")
    aligned = ota.align(network, *shuffled(network, theta, stats), theta)
    assert aligned[0].equal(theta)
    assert aligned[1].equal(stats)


@pytest.mark.parametrize("name", ["conv2.weight", "project.weight", "norm2.bias", "project_norm.weight"])
def test_a_residual_stream_is_told_apart_by_all_that_write_it_first(name: str) -> None:
    """The hidden units of the block stay apart too: they are another stream."""
    network, theta, stats = model("resnet10")
    own = [f"blocks.1.{part}" for part in ("conv1.weight", "norm1.weight", "norm1.bias")]
    theta = same_units(network, theta, f"blocks.1.{name}", *own)
    aligned = ota.align(network, *shuffled(network, theta, stats), theta)
    assert aligned[0].equal(theta)
    assert aligned[1].equal(stats)


def test_statistics_are_carried_along_but_not_compared() -> None:
    network, theta, stats = model("conv4")
    far = 100 * stats
    aligned = ota.align(network, *shuffled(network, theta, far), theta)
    assert aligned[0].equal(theta)
    assert aligned[1].equal(far)


def test_the_distance_is_not_squared() -> None:
    """One exact match and one long way beat two of middle length; with squares it is the other way round."""
    reference, units = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.5, 1.0]])
    assert ota.match(reference, units).tolist() == [1, 0]


def test_the_order_of_a_match_is_by_reference() -> None:
    reference = np.array([[0.0], [10.0], [20.0]])
    assert ota.match(reference, reference[[2, 0, 1]] + 1).tolist() == [1, 2, 0]


def test_the_streams_of_a_residual_network() -> None:
    """What adds up has one order; each first convolution of a block has its own."""
    writers: dict[str | None, list[str]] = {}
    for layer in ota.layers(net("resnet18", SHAPE, 5).backbone):
        writers.setdefault(layer.writes, []).append(layer.name)
    assert writers["stem"] == ["stem", "blocks.0.conv2", "blocks.1.conv2"]
    assert writers["blocks.6"] == ["blocks.6.conv2", "blocks.6.project", "blocks.7.conv2"]
    assert writers["blocks.7.hidden"] == ["blocks.7.conv1"]
    assert writers[None] == ["head"]
    assert len(writers) == 1 + 4 + 8


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tensor_belongs_to_one_layer(arch: str) -> None:
    network = net(arch, SHAPE, 5)
    owners = [owner for layer in ota.layers(network.backbone) for owner in (layer.name, layer.norm) if owner]
    names = [*network.layout.shapes, *network.stats_layout.shapes]
    assert len(owners) == len(set(owners))
    assert {name.rpartition(".")[0] for name in names} == set(owners)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="ota: no alignment for MLP; use teachers of conv4 or resnet, or average"):
        ota.layers(MLP(3, 16, 16, 5))


# --------------------------------------------------------------------------------------------------------------- fusion


def fused(device: torch.device, *models: Weights) -> Weights:
    """Weights and statistics of the method's one round on teachers of these weights."""
    world = small_world(cards=0, way=5)
    world = replace(world, cards=tuple(card(i, way=5) for i in range(len(models))))
    shard = FakeShard(world, device=device)
    for one, (theta, stats) in zip(world.cards, models, strict=True):
        teacher = shard.teacher(one.id)
        teacher.theta, teacher.stats = theta.to(device), stats.to(device)

    def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        assert op == "weights"
        return baselines.weights(shard, jobs, shared)

    method = METHODS["ota"]
    state, _ = method.learn(method.Config(), world, method.init(method.Config(), world), 0, [], send)
    return state["theta"], state["stats"]


def small(seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    """A Conv4 of the small world's images."""
    network = net("conv4", (3, 16, 16), 5)
    theta = network.init(torch.Generator().manual_seed(seed)).double()
    return network, theta + 0.1 * normal(len(theta), seed=seed), 1 + normal(network.stats_layout.numel).abs()


def test_a_model_fused_with_its_shuffled_copies_is_the_model(device: torch.device) -> None:
    network, theta, stats = small()
    found = fused(device, (theta, stats), *(shuffled(network, theta, stats, seed=seed) for seed in (1, 2)))
    torch.testing.assert_close(found[0], theta, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], stats, rtol=1e-12, atol=0)


def test_the_first_teacher_gives_the_order(device: torch.device) -> None:
    network, theta, stats = small()
    copy = shuffled(network, theta, stats)
    torch.testing.assert_close(fused(device, copy, (theta, stats))[0], copy[0], rtol=1e-12, atol=0)


def test_the_fused_head_is_the_mean_of_aligned_inputs_and_of_outputs_as_they_are(device: torch.device) -> None:
    """Reversing a copy's outputs reverses its part of the mean: units of a head have no other order than their own."""
    network, theta, stats = small()
    tensors = network.layout.unflatten(shuffled(network, theta, stats)[0])
    tensors |= {name: part.flip(0) for name, part in tensors.items() if name.startswith("head")}
    copy = network.layout.flatten(tensors), shuffled(network, theta, stats)[1]
    found, own = (network.layout.unflatten(one) for one in (fused(device, (theta, stats), copy)[0], theta))
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(found[name], (own[name] + own[name].flip(0)) / 2, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["blocks.3.conv.weight"], own["blocks.3.conv.weight"], rtol=1e-12, atol=0)


def test_one_teacher_is_itself(device: torch.device) -> None:
    _, theta, stats = small()
    found = fused(device, (theta, stats))
    assert found[0].equal(theta)
    assert found[1].equal(stats)
