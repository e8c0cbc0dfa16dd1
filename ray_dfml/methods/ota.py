"""`ota`: the mean of teachers whose units were first brought into the order of the first one, by optimal transport.

[Singh2020] Model Fusion via Optimal Transport, arXiv 1910.05653 (alignment of weights, exact transport). The released
code takes two models without biases and batch norm; many, these, and how residual streams share a map are ours.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from ray_dfml.core.backbones import Backbone, Conv4, ResNet
from ray_dfml.core.net import Net
from ray_dfml.errors import UsageError
from ray_dfml.methods.base import Send, State, World
from ray_dfml.methods.baselines import baseline, check_same_network, fetch, mean


class Layer(NamedTuple):
    """A convolution or linear layer, the batch norm behind it, and the streams of units that it reads and writes.

    Layers that write one stream add up there, so its units have one order. None stands for images and for logits,
    whose order is given.
    """

    name: str
    norm: str | None
    reads: str | None
    writes: str | None


def layers(backbone: Backbone) -> list[Layer]:
    """The layers of a backbone in the order of computation. Raises UsageError for a family that is not described."""
    if isinstance(backbone, Conv4):
        found = [Layer(f"blocks.{i}.conv", f"blocks.{i}.norm", f"{i - 1}" if i else None, f"{i}") for i in range(4)]
        return [*found, Layer("head", None, "3", None)]
    if isinstance(backbone, ResNet):
        found, stream = [Layer("stem", "stem_norm", None, "stem")], "stem"
        for block in backbone.blocks:
            here = block.name
            after = here if block.projects else stream
            found.append(Layer(f"{here}.conv1", f"{here}.norm1", stream, f"{here}.hidden"))
            found.append(Layer(f"{here}.conv2", f"{here}.norm2", f"{here}.hidden", after))
            if block.projects:
                found.append(Layer(f"{here}.project", f"{here}.project_norm", stream, after))
            stream = after
        return [*found, Layer("head", None, stream, None)]
    raise UsageError(f"ota: no alignment for {type(backbone).__name__}; use teachers of conv4 or resnet, or average")


def align(net: Net, theta: Tensor, stats: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [p] and statistics [k] of the same function, its units reordered to be near those of `reference` [p].

    Stream by stream: inputs take the order already found for the stream they read; then the map of the stream minimises
    the sum of Euclidean distances between units. A unit is its weights, bias and batch-norm affine, of all layers that
    write the stream before anything reads it: their inputs are in order by then, those of later residual layers are
    not. With uniform marginals over equally many units the exact transport is an assignment, hence a permutation.
    Statistics are carried along and not compared: their scale is that of activations, not of weights. A linear layer on
    a flattened map (channel-major) has its inputs reordered in blocks of one channel. Logits keep their order.
    """
    mine, kept = net.layout.unflatten(theta), net.stats_layout.unflatten(stats)
    theirs = net.layout.unflatten(reference)
    orders: dict[str, Tensor] = {}
    waiting: dict[str, list[Layer]] = {}
    graph = layers(net.backbone)
    for layer in graph:
        if layer.reads is not None:
            if layer.reads not in orders:
                writers = waiting[layer.reads]
                orders[layer.reads] = match(_units(theirs, writers), _units(mine, writers))
            name, order = f"{layer.name}.weight", orders[layer.reads]
            blocks = mine[name].reshape(len(mine[name]), len(order), -1)
            mine[name] = blocks[:, order].reshape(mine[name].shape)
        if layer.writes is not None:
            waiting.setdefault(layer.writes, []).append(layer)
    for layer in graph:
        if layer.writes is not None:
            for tensors in (mine, kept):
                tensors |= {name: tensors[name][orders[layer.writes]] for name in _names(tensors, layer)}
    return net.layout.flatten(mine), net.stats_layout.flatten(kept)


def _names(tensors: dict[str, Tensor], layer: Layer) -> list[str]:
    return [name for name in tensors if name.rpartition(".")[0] in (layer.name, layer.norm)]


def _units(tensors: dict[str, Tensor], writers: list[Layer]) -> np.ndarray:
    parts = [tensors[name] for layer in writers for name in _names(tensors, layer)]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1).double().numpy()


def match(reference: np.ndarray, units: np.ndarray) -> Tensor:
    """For each row of `reference` [u d], the row of `units` [u d] that the exact transport sends there: [u]."""
    return torch.tensor(linear_sum_assignment(cdist(reference, units))[1])


def _check(world: World) -> None:
    check_same_network("ota", world)
    layers(world.net.backbone)


def _fuse(world: World, state: State, send: Send) -> State:
    found = fetch(world.cards, send)
    aligned = [align(world.net, one.theta, one.stats, found[0].theta) for one in found]
    return {**state, "theta": mean([theta for theta, _ in aligned]), "stats": mean([stats for _, stats in aligned])}


METHOD = baseline(_fuse, check=_check)
