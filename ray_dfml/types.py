"""What parts of the project hand to each other, above the mathematics and below the methods.

What crosses a process border is a value: NumPy arrays, numbers, strings, and dicts or lists of these, or a dataclass of
them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.inner_loop import Head
from ray_dfml.core.net import Net, net

Arrays = dict[str, Any]
"""Names to NumPy arrays, numbers, strings, or nested dicts and lists of these. Cheap to ship, no pickle of our own."""


def size_text(shape: Sequence[int]) -> str:
    """A size as people write it: `3x32x32`."""
    return "x".join(str(number) for number in shape)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Images as a network takes them: `channels x height x width`, pixels in [0, 1], then `(x - mean) / std`."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)

    def values(self) -> Arrays:
        """The same as values that can be shipped and checkpointed."""
        size = {"channels": self.channels, "height": self.height, "width": self.width}
        return size | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The images that `values` describes."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What is known of a pool member without its data. Accuracies are the owner's claims, in percent."""

    id: str
    arch: str
    image: ImageSpec
    classes: tuple[str, ...]
    """Class names in the order of the logits, `dataset/name` where the data set is known."""
    access: str = "weights"
    sha256: str = ""
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work for a shard. Its result depends on the job and the shared values only."""

    index: int
    """Position in the batch: results come back in this order."""
    seed: int
    """Derived from (run seed, round, op, index); the only source of randomness of the job."""
    teacher: str | None = None
    values: Arrays = field(default_factory=dict)
    cost: float = 1.0
    """Work relative to the other jobs of the batch (multiply-accumulates of one image). Never changes a result."""
    memory: int = 0
    """Bytes that the job's teacher occupies on a shard."""


class Backend(Protocol):
    """Where work is done: `map` does it, and `keep` stores an array that many calls read."""

    def keep(self, value: np.ndarray) -> Any:
        """An array as it is, or a reference to it, for the top level of `shared` in any number of calls. Ops find the
        array there, which travels once."""
        ...

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """Run `op` on every job with the same `shared` values; results in job order, whoever ran or re-ran them.

        A teacher that cannot be used (bad values, or a process that died twice on it) gives `{"rejected": reason}`.
        """
        ...


class Teacher(Protocol):
    """A pool member as an op sees it, frozen, on the shard's device."""

    @property
    def card(self) -> TeacherCard:
        """What is known of it."""
        ...

    @property
    def net(self) -> Net:
        """Its network."""
        ...

    @property
    def theta(self) -> Tensor:
        """Its weights [p]."""
        ...

    @property
    def stats(self) -> Tensor:
        """Its running batch-norm statistics [k]."""
        ...


class Shard(Protocol):
    """A shard as an op sees it: the process it runs in."""

    device: torch.device
    batched: bool
    """Whether to batch jobs with `vmap` (accelerators) or to loop over them (CPU)."""

    def teacher(self, id: str) -> Teacher:
        """The teacher, from a cache keyed by content."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnerWeights:
    """A network with its weights, and how it adapts to a support: all that a score or a prediction depends on, apart
    from the images and the batch norm at test."""

    arch: str
    image: ImageSpec
    outputs: int
    """Units of the head: the most classes it can tell apart."""
    theta: Tensor
    """Weights [p], float32 on the CPU."""
    stats: Tensor
    """Running batch-norm statistics [k], float32 on the CPU."""
    head: Head
    """What adapts."""
    steps: int
    """SGD steps on the support."""
    lr: float
    """Their step size."""

    @property
    def net(self) -> Net:
        """The network, without weights."""
        return net(self.arch, self.image.shape, self.outputs)

    @property
    def finite(self) -> bool:
        """Whether no weight and no statistic is NaN or infinite."""
        return bool(torch.isfinite(self.theta).all() and torch.isfinite(self.stats).all())

    @cached_property
    def digest(self) -> str:
        """sha256 of everything but `lr`: equal weights, of whatever selection, have one digest."""
        plain = {key: value for key, value in self.values().items() if key not in ("theta", "stats", "lr")}
        found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        for part in (self.theta, self.stats):
            found.update(part.numpy().tobytes())
        return found.hexdigest()

    def values(self) -> Arrays:
        """The same as values that can be shipped and checkpointed; `theta` and `stats` are float32 arrays."""
        return {
            "arch": self.arch,
            "image": self.image.values(),
            "outputs": self.outputs,
            "theta": self.theta.numpy(),
            "stats": self.stats.numpy(),
            "head": self.head,
            "steps": self.steps,
            "lr": self.lr,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The weights that `values` holds. The arrays are copied."""
        parts = {key: torch.tensor(values[key]) for key in ("theta", "stats")}
        return cls(**{**values, **parts, "image": ImageSpec.of(values["image"])})


@dataclass(frozen=True)
class Labelled:
    """Real images for episodes, and their labels. They validate and test; no method trains on them."""

    data: str
    """Identity of the data set, NAME@HASH."""
    split: str
    images: Any
    """uint8 [n c h w], or what `Backend.keep` made of them."""
    labels: np.ndarray
    """int64 [n]."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Per-episode accuracies in percent of one set of weights, one reading, on one set of episodes."""

    method: str
    data: str
    """Identity of the data set, NAME@HASH."""
    split: str
    way: int
    shot: int
    bn: str
    selection: str
    accuracies: np.ndarray
