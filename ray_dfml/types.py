"""The types that parts of the project hand to each other. They know the mathematics and no method.

Only values cross the border of a process: NumPy arrays, numbers, strings, dicts or lists of these, and dataclasses of
them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.inner_loop import Head
from ray_dfml.core.net import Net, net

Arrays = dict[str, Any]
"""Name -> NumPy array, number, string, or nested dicts and lists of these. Such values are cheap to ship."""

Access = Literal["weights", "logits", "probs", "label"]
"""How much a teacher gives away, from most to least: its weights, or what it answers to an image."""

LEVELS: tuple[Access, ...] = get_args(Access)
"""The levels of access, from most to least."""


def size_text(shape: Sequence[int]) -> str:
    """A size as people write it, such as `3x32x32`."""
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
        """The spec as values that can be shipped and stored in a checkpoint."""
        size = {"channels": self.channels, "height": self.height, "width": self.width}
        return size | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The images that `values` describes."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What is known of a teacher without its data. `accuracy` is a claim of its owner, in percent."""

    id: str
    arch: str
    """Empty for a teacher that is only asked; its `image` then has mean 0 and standard deviation 1."""
    image: ImageSpec
    classes: tuple[str, ...]
    """Class names in the order of the logits, `dataset/name` where the data set is known."""
    access: Access = "weights"
    sha256: str = ""
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work for a shard. The result depends on the job and the shared values only."""

    index: int
    """Number of the job, by which its result is found. No two jobs of a call may have the same one."""
    seed: int
    """The only source of randomness of the job. It derives from (run seed, round, op, index)."""
    teacher: str | None = None
    values: Arrays = field(default_factory=dict)
    cost: float = 1.0
    """Work relative to the other jobs of the call (multiply-accumulates of one image). It never changes a result."""
    memory: int = 0
    """Bytes that the job's teacher occupies on a shard."""


class Backend(Protocol):
    """Where work is done: `map` does it, and `keep` stores an array that many calls read."""

    notes: list[str]
    """What a reader must know of how the work went so far, one line each."""

    def keep(self, value: np.ndarray) -> Any:
        """Store an array that many calls read.

        The result is the array itself or a reference to it, and stands at the top level of `shared`. Ops find the array
        there, and it travels once only.
        """
        ...

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """Run `op` on every job with the same `shared` values. Results are in job order, whoever ran or re-ran them.

        If a teacher cannot be used (bad values, or two processes died on it), the result is `{"rejected": reason}`,
        with `"away": True` beside it if it is a service that may be used later.
        """
        ...


class Teacher(Protocol):
    """A teacher as an op sees it: frozen, on the device of the shard."""

    @property
    def card(self) -> TeacherCard:
        """What is known of the teacher."""
        ...

    @property
    def net(self) -> Net:
        """The network, without weights."""
        ...

    @property
    def theta(self) -> Tensor:
        """The weights [p]."""
        ...

    @property
    def stats(self) -> Tensor:
        """The running batch-norm statistics [k]."""
        ...


class Service(Protocol):
    """A teacher that is only asked. No parameter can be reached through it, and every image asked about is counted."""

    @property
    def card(self) -> TeacherCard:
        """What is known of the teacher. `card.access` says what `query` returns."""
        ...

    def query(self, images: np.ndarray) -> np.ndarray:
        """The answers to images [n c h w] of the teacher's input size: uint8, or float32 in [0, 1].

        They are float32 logits or probabilities [n q], or int64 labels [n], by `card.access`; weights give logits. An
        image that was answered before costs nothing. Raises BudgetReached before more is asked than is paid for.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """What the ledger knows of some images, and the leave to ask about the others, which is counted as sent."""

    id: int
    """The batch in the ledger, for `Gateway.settle`; 0 if nothing is missing."""
    missing: np.ndarray
    """int64 [m]. Positions of the images to be asked about, each content once."""
    known: np.ndarray | None
    """Answers [k] or [k q] that were given before; None if there are none."""
    places: np.ndarray
    """int64 [n]. Where the answer of each image stands in `known` followed by the new answers."""

    def join(self, new: np.ndarray | None = None) -> np.ndarray:
        """The answers [n] or [n q] of all images, given the new ones [m] or [m q] of those that were missing."""
        parts = [part for part in (self.known, new) if part is not None]
        return np.concatenate(parts)[self.places]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What was asked of a teacher so far. The law is answered <= received by the teacher <= sent."""

    sent: int = 0
    """Images of every attempt; budgets are charged on them."""
    answered: int = 0
    """Unique images whose answers the ledger holds."""
    cost: float = 0.0
    """Price of all that was sent."""


class Gateway(Protocol):
    """The only one who asks services and counts queries. Any number of threads may call it."""

    def ask(self, teacher: str, images: np.ndarray) -> np.ndarray:
        """The answers of a service behind HTTP, in the order of the images. See `Service.query`.

        Images that were answered before are not sent. Raises BudgetReached before anything is sent if the others
        cost more than is left, and RejectedError if the service refuses, answers nonsense, or cannot be reached.
        Answers that came before an error are kept.
        """
        ...

    def claim(self, teacher: str, hashes: Sequence[bytes]) -> Claim:
        """Count images of a local model as sent, by their hashes (`services.ledger.content_hashes`).

        Those that were answered before do not count. Raises BudgetReached as `ask` does. The caller computes the
        answers of `Claim.missing` and gives them to `settle`.
        """
        ...

    def settle(self, claim: int, answers: np.ndarray) -> None:
        """Keep the answers of a claim: float32 [m q] or int64 [m], in the order of `Claim.missing`."""
        ...

    def totals(self) -> dict[str, Spent]:
        """Teacher -> what was asked of it; a teacher that was never asked is there too."""
        ...


class Shard(Protocol):
    """A shard as an op sees it: the process in which the op runs."""

    device: torch.device
    batched: bool
    """Whether to batch jobs with `vmap` (accelerators) or to loop over them (CPU)."""

    def teacher(self, id: str) -> Teacher:
        """The teacher of an id, whose access must be `weights`. It stays in a cache of the shard."""
        ...

    def service(self, id: str) -> Service:
        """The teacher of an id as one that is only asked, whatever its access."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnerWeights:
    """A network with its weights, and how they adapt to a support.

    A score or a prediction depends on nothing else but the images and the batch norm at test.
    """

    arch: str
    image: ImageSpec
    outputs: int
    """Units of the head, and so the most classes that it can tell apart."""
    theta: Tensor
    """Weights [p], float32 on the CPU."""
    stats: Tensor
    """Running batch-norm statistics [k], float32 on the CPU."""
    head: Head
    """What adapts to a support."""
    steps: int
    """SGD steps on the support."""
    lr: float
    """Step size of the SGD steps."""

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
        """sha256 of everything but `lr`, so that equal weights have one digest, whatever their selection."""
        plain = {key: value for key, value in self.values().items() if key not in ("theta", "stats", "lr")}
        found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        for part in (self.theta, self.stats):
            found.update(part.numpy().tobytes())
        return found.hexdigest()

    def values(self) -> Arrays:
        """The weights as values that can be shipped and stored; `theta` and `stats` are float32 arrays."""
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
    """Real images and their labels, for episodes of validation and test. No method trains on them."""

    data: str
    """Identity of the data set, NAME@HASH."""
    split: str
    images: Any
    """uint8 [n c h w], or what `Backend.keep` made of them."""
    labels: np.ndarray
    """int64 [n]."""
    names: tuple[str, ...] = ()
    """`data/name` of each label."""
    shape: tuple[int, int, int] | None = None
    """(channels, height, width) to which the images were brought; students have their own."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The accuracies in percent of weights in one reading, on each of a set of episodes.

    A top-1 accuracy has no `way` and no `shot`; each of its accuracies is of one image, 0 or 100.
    """

    method: str
    data: str
    """Identity of the data set, NAME@HASH."""
    split: str
    way: int | None
    shot: int | None
    bn: str
    selection: str
    accuracies: np.ndarray
