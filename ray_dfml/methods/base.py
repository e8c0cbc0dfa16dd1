"""What a method is: a record of functions, which take values and return values. Nothing is inherited.

In a round the learner calls `plan`, the shards `recover`, and the learner calls `learn`. `learn` may send more work to
the shards through the same verb:

    jobs = method.plan(cfg, world, state, r)
    results = send("<method>.recover", jobs, method.shared(cfg, world, state, r))
    state, metrics = method.learn(cfg, world, state, r, results, send)

The state is a nested dict of tensors, NumPy arrays, numbers and strings. A checkpoint holds it and nothing else, so a
method may keep nothing outside of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ray_dfml.core import seeds
from ray_dfml.core.inner_loop import Head
from ray_dfml.core.net import Net, net
from ray_dfml.types import Access, Arrays, ImageSpec, Job, LearnerWeights, Shard, TeacherCard

State = dict[str, Any]
Metrics = dict[str, float | int | None]
Send = Callable[[str, Sequence[Job], Arrays], list[Arrays]]
"""`Backend.map`: (op, jobs, shared) -> results in job order."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What every method knows: the cards of the teachers, the shape of the learner, and the seed.

    `image` is the input of the learner. Teachers may have other inputs; `core.images.fit` brings images from one to the
    other in pixel space.
    """

    cards: tuple[TeacherCard, ...]
    arch: str
    image: ImageSpec
    way: int
    seed: int
    head: Head = "maml"
    """How the learner adapts."""
    device: str = "cpu"
    """Where the learner computes what `learn` does not send to the shards. The state itself stays on the CPU."""
    real: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Class name -> uint8 images [n c h w]. Only `maml-oracle` gets any; it is empty for every data-free method."""

    @property
    def net(self) -> Net:
        """The learner's network."""
        return net(self.arch, self.image.shape, self.way)


class MethodConfig(BaseModel):
    """Settings that every method has. Unknown keys are errors, and values cannot change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(default=1, ge=1, description="Outer iterations.")

    @property
    def total_rounds(self) -> int:
        """Outer iterations of the run. They are `rounds`, unless other settings imply them."""
        return self.rounds


C = TypeVar("C", bound=MethodConfig)


class MetaConfig(BaseModel):
    """Settings of meta-updates of the learner on tasks drawn from a store of images ([Finn2017])."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shot: int = Field(default=5, ge=1, description="Support images per class of a task.")
    query: int = Field(default=15, ge=1, description="Query images per class of a task.")
    tasks: int = Field(default=10, ge=1, description="Tasks per meta-update.")
    inner_steps: int = Field(default=5, ge=0, description="SGD steps on the support.")
    inner_lr: float = Field(default=0.01, gt=0, description="Step size of the SGD steps on the support.")
    lr: float = Field(default=1e-3, gt=0, description="Adam step size of the meta-update.")
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="How gradients of an update's tasks are joined; the released code sums them."
    )
    mix_data: bool = Field(
        default=False, description="Whether a task may hold classes of several data sets, or of one only."
    )
    augment: bool = Field(
        default=False,
        description="Whether the images of a task are cropped, and colour ones mirrored and recoloured, one by one.",
    )


class ReplayConfig(MetaConfig):
    """Settings of replay: meta-updates on tasks of the bank until a plateau ([Wei2024] section 4.2)."""

    patience: int = Field(
        default=10, ge=1, description="Stop after this many updates without a new best training accuracy."
    )
    max_updates: int = Field(default=50, ge=1, description="Stop after this many updates in any case.")


Values = Mapping[str, Any]
"""Settings of a run as a nested mapping, `{"method": {...}, "eval": {...}}`."""

Op = Callable[[Shard, Sequence[Job], Arrays], list[Arrays]]
"""Work of a shard: (shard, jobs, shared) -> one result per job, in order. The result of a job whose teacher is bad is
`{"rejected": reason}`."""


@dataclass(frozen=True)
class Preset:
    """Settings of a run that belong together, and what they are for."""

    about: str
    values: Values


class Student(NamedTuple):
    """The distilled model of one teacher, and how many images the teacher was asked about for it."""

    weights: LearnerWeights
    asked: int


class Panel(NamedTuple):
    """A plot of a report: its title, the label of the y axis, what it shows, and metric keys with their legends."""

    title: str
    unit: str
    about: str
    series: Mapping[str, str]
    over: str = "round"
    """The metric on the x axis."""


class Seen(NamedTuple):
    """Some images of one class that a round has made, for the gallery of the run (`ray_dfml.gallery`)."""

    kind: Literal["recovered", "asked"]
    """Whether the images were recovered from the teacher, or the teacher was asked about them."""
    teacher: str
    name: str
    """The class that was wished for, or that the teacher said."""
    images: np.ndarray
    """uint8 [n c h w]."""
    said: tuple[str, ...]
    """The class that the teacher gave to each image."""
    confidence: tuple[float, ...]
    """How probable that class was to the teacher, in percent; NaN if it does not say."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How much work a training is, for `--dry-run` and for the line before a run."""

    images: int = 0
    """Images recovered in all."""
    recovery: float = 0.0
    """Seconds of recovery in all, on one shard."""
    alone: float = 0.0
    """Seconds of work in all that one process does, whatever the number of shards."""
    least: int = 0
    """The fewest meta-updates."""
    most: int = 0
    """The most meta-updates."""
    meta: MetaConfig | None = None
    """Settings of the tasks of these updates; None for a method without any."""


def _no_jobs(cfg: MethodConfig, world: World, state: State, r: int) -> list[Job]:
    return []


def _no_values(cfg: MethodConfig, world: World, state: State, r: int) -> Arrays:
    return {}


def _no_pictures(cfg: MethodConfig, world: World, results: Sequence[Arrays]) -> list[Seen]:
    return []


def _no_notes(cfg: MethodConfig, world: World) -> list[str]:
    return []


def _no_queries(cfg: MethodConfig, world: World) -> dict[str, int]:
    return {}


def _no_cost(cfg: MethodConfig, world: World, shard: Shard) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Method(Generic[C]):
    """A method: its settings, its functions, and all that the rest of the package needs to know of it.

    The module of a method ends with `METHOD = Method(...)`. A field that a method may do without has a default.
    """

    Config: type[C]
    """The settings of the method. Their defaults are the profile `fixed`."""
    init: Callable[[C, World], State]
    """Make the state before the first round. Raises UsageError for a world that the method cannot take."""
    learn: Callable[[C, World, State, int, list[Arrays], Send], tuple[State, Metrics]]
    """Learn from what the shards recovered in round `r`: the new state, and the numbers of the round."""
    plan: Callable[[C, World, State, int], list[Job]] = _no_jobs
    """Plan round `r`: one recover job for each teacher that the round needs."""
    shared: Callable[[C, World, State, int], Arrays] = _no_values
    """Values that all recover jobs of round `r` read."""
    recover: Op | None = None
    """The op of the planned jobs. It returns recovered tasks, and whatever else the round needs of the teachers."""
    notes: Callable[[C, World], list[str]] = _no_notes
    """Lines that a reader must know about the method on this pool, such as a term that does not apply."""
    readings: tuple[str, ...] = ("finetune",)
    """How predictions are read from the final weights: `finetune`, `direct`, `assign` (see `ray_dfml.evaluate`)."""
    ops: Mapping[str, Op] = field(default_factory=dict)
    """Name -> op, for the ops that `learn` sends."""
    profiles: Mapping[str, Values] = field(default_factory=dict)
    """`paper` and `code` -> the settings that they change, if the method was published."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """Name -> preset. No two methods may have presets of one name."""
    cost: Callable[[C, World, Shard], Cost | None] = _no_cost
    """Measure what a training takes, on a shard that hosts the teachers. None if it takes next to nothing."""
    panels: tuple[Panel, ...] = ()
    """Plots of the method's metrics in a report."""
    pictures: Callable[[C, World, Sequence[Arrays]], list[Seen]] = _no_pictures
    """What the results of a round's recover op show for the gallery of the run; the same for the same results."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Metrics in percent that the line of progress shows -> the words for them."""
    access: tuple[Access, ...] = ("weights",)
    """The levels of access at which the method can use a teacher."""
    queries: Callable[[C, World], Mapping[str, int]] = _no_queries
    """Id of each teacher that is asked -> how many images a whole training asks it about."""
    students: Callable[[C, World, State], Mapping[str, Student]] | None = None
    """Id of a teacher -> its student, if the method distils each teacher instead of training one learner. A student has
    the input and the classes of its teacher, is read without adaptation, and is scored by its top-1 accuracy."""
    settled: tuple[str, ...] = ("rounds",)
    """Settings that what a run holds after some rounds depends on, so that none may change while it goes on."""
    needs_pool: bool = True
    """Whether the method can do nothing without teachers."""
    needs_real: bool = False
    """Whether the method trains on real images, and so is not data-free."""
    baseline: bool = False
    """Whether reports take differences to the method. A baseline neither inverts teachers nor sees real images."""


def stacked(function: Callable[..., Any], *parts: Tensor, batched: bool) -> Any:
    """Apply `function` to every row of stacked tensors, through `vmap` or row by row, and stack the results."""
    if batched:
        return torch.func.vmap(function)(*parts)
    rows = [function(*row) for row in zip(*parts, strict=True)]
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return torch.stack(rows)


def initial_learner(world: World, *, zero_head_bias: bool = False) -> State:
    """Fresh weights and batch-norm statistics of the learner, from the run's seed."""
    theta = world.net.init(seeds.rng(world.seed, "theta"), zero_head_bias=zero_head_bias)
    return {"theta": theta, "stats": world.net.initial_stats()}


def teacher_job(card: TeacherCard, *, index: int, seed: int, values: Arrays) -> Job:
    """A job on a teacher, with its cost and memory, by which the backend balances the shards.

    A teacher that is only asked tells neither, so its job counts as one without a teacher.
    """
    if not card.arch:
        return Job(index=index, seed=seed, teacher=card.id, values=values)
    network = net(card.arch, card.image.shape, len(card.classes))
    memory = 4 * (network.layout.numel + network.stats_layout.numel)
    return Job(index=index, seed=seed, teacher=card.id, values=values, cost=float(network.macs), memory=memory)


def learner_weights(world: World, state: Mapping[str, Any], *, steps: int, lr: float) -> LearnerWeights:
    """The learner's weights in the state of a method.

    If they are not of the world's network, `state["network"]` describes theirs: `arch`, `outputs`, and `image` as
    `ImageSpec.values` gives it.
    """
    network = state.get("network") or {"arch": world.arch, "outputs": world.way, "image": world.image.values()}
    return LearnerWeights(
        arch=network["arch"], outputs=network["outputs"], image=ImageSpec.of(network["image"]),
        theta=state["theta"], stats=state["stats"], head=world.head, steps=steps, lr=lr,
    )  # fmt: skip


def image_values(image: ImageSpec) -> Arrays:
    """Shape and normalisation of an image spec as shippable values."""
    return {"shape": image.shape, "mean": np.array(image.mean, np.float32), "std": np.array(image.std, np.float32)}
