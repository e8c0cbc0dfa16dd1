"""`ota`: optimal transport brings the units of all teachers into the order of the first one's; the mean follows.

[Singh2020] Model Fusion via Optimal Transport, arXiv 1910.05653 (alignment of weights, exact transport). The released
code takes two models, without biases and batch norm. To take more models, biases and batch norm, and to let the layers
of a residual stream share a map, is ours.
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

    The outputs of layers that write one stream are added up, so the units of a stream have one order for all of them.
    None stands for images and for logits, whose order is given.
    """

    name: str
    norm: str | None
    reads: str | None
    writes: str | None


def layers(backbone: Backbone) -> list[Layer]:
    """The layers of a backbone in the order of computation. Raises UsageError if it is neither Conv4 nor ResNet."""
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
    """Reorder the units of a network so that they are near those of `reference` [p].

    Returns weights [p] and statistics [k] of the same function. The layers are visited in order. The inputs of a layer
    take the order that was found for the stream that it reads, and when a stream is first read, its order is found: the
    one that minimises the sum of Euclidean distances between its units and those of `reference`. With uniform marginals
    over equally many units the exact transport is such an assignment.

    A unit is compared by its weights, bias, and batch-norm scale and shift, in all layers that write the stream before
    it is first read. The inputs of these layers are in order by then; those of later residual layers are not.
    Statistics are reordered but not compared, since they have the scale of activations. A linear layer on a flattened
    map (channel-major) has its inputs reordered in blocks of one channel. Logits keep their order.
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
    """The index [u] of the row of `units` [u d] that the exact transport sends to each row of `reference` [u d]."""
    return torch.tensor(linear_sum_assignment(cdist(reference, units))[1])


def _check(world: World) -> None:
    check_same_network("ota", world)
    layers(world.net.backbone)


def _fuse(world: World, state: State, send: Send) -> State:
    found = fetch(world.cards, send)
    aligned = [align(world.net, one.theta, one.stats, found[0].theta) for one in found]
    return {**state, "theta": mean([theta for theta, _ in aligned]), "stats": mean([stats for _, stats in aligned])}


METHOD = baseline(_fuse, check=_check)
