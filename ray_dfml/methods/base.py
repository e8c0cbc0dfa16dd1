"""What a method is: a value of functions over values. Nothing is inherited; `METHODS` lists them.

A round is `plan` -> (shards) `recover` -> `learn`, and `learn` may send more work to the shards through the same verb:

    jobs = method.plan(cfg, world, state, r)
    results = send("<method>.recover", jobs, method.shared(cfg, world, state, r))
    state, metrics = method.learn(cfg, world, state, r, results, send)

State is a nested dict of tensors, NumPy arrays, numbers and strings: it is what a checkpoint holds, and all of it.
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
from ray_dfml.types import Arrays, ImageSpec, Job, LearnerWeights, Shard, TeacherCard

State = dict[str, Any]
Metrics = dict[str, float | int | None]
Send = Callable[[str, Sequence[Job], Arrays], list[Arrays]]
"""`Backend.map`: (op, jobs, shared) -> results in job order."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What every method knows: the pool's cards, the learner's shape, the seed; real images only for the ceiling.

    `image` is the learner's input. Teachers may have others: images are brought from one to the other by
    `core.images.fit` in pixel space.
    """

    cards: tuple[TeacherCard, ...]
    arch: str
    image: ImageSpec
    way: int
    seed: int
    head: Head = "maml"
    """How the learner adapts."""
    device: str = "cpu"
    """Where the learner's own work is done, that is what `learn` does not send to the shards. The state stays on the
    CPU."""
    real: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Class name -> uint8 images [n c h w]; empty for every data-free method."""

    @property
    def net(self) -> Net:
        """The learner's network."""
        return net(self.arch, self.image.shape, self.way)


class MethodConfig(BaseModel):
    """Fields every method has. Unknown keys are errors; values cannot change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(default=1, ge=1, description="Outer iterations.")


C = TypeVar("C", bound=MethodConfig)


class MetaConfig(BaseModel):
    """Meta-updates of the learner on tasks of N classes of a store of images ([Finn2017])."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shot: int = Field(default=5, ge=1, description="Support images per class of a task.")
    query: int = Field(default=15, ge=1, description="Query images per class of a task.")
    tasks: int = Field(default=10, ge=1, description="Tasks per meta-update.")
    inner_steps: int = Field(default=5, ge=0, description="SGD steps on the support.")
    inner_lr: float = Field(default=0.01, gt=0, description="Their step size.")
    lr: float = Field(default=1e-3, gt=0, description="Adam step size of the meta-update.")
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="Over the tasks of an update; the released code sums."
    )
    mix_data: bool = Field(
        default=False, description="Whether a task may hold classes of several data sets; else all are of one."
    )


class ReplayConfig(MetaConfig):
    """Meta-updates on interpolated tasks of the bank, in bouts that end at a plateau ([Wei2024] section 4.2)."""

    patience: int = Field(
        default=10, ge=1, description="Stop after this many updates without a new best training accuracy."
    )
    max_updates: int = Field(default=50, ge=1, description="Stop after this many updates in any case.")


Values = Mapping[str, Any]
"""Settings of a run as a nested mapping, `{"method": {...}, "eval": {...}}`."""

Op = Callable[[Shard, Sequence[Job], Arrays], list[Arrays]]
"""Work of a shard: (shard, jobs, shared) -> one result per job, in order. A job whose teacher is bad gives
`{"rejected": reason}`."""


@dataclass(frozen=True)
class Preset:
    """Values of a run's config that belong together, and what they are for."""

    about: str
    values: Values


class Panel(NamedTuple):
    """A plot of a report: title, y label, what it says, and metric keys with their legends."""

    title: str
    unit: str
    about: str
    series: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training is made of, for `--dry-run`."""

    images: int = 0
    """Images recovered in all."""
    recovery: float = 0.0
    """Seconds of recovery in all, on one shard."""
    least: int
    """The fewest meta-updates."""
    most: int
    """The most meta-updates."""
    meta: MetaConfig
    """Settings of their tasks."""


def _no_jobs(cfg: MethodConfig, world: World, state: State, r: int) -> list[Job]:
    return []


def _no_values(cfg: MethodConfig, world: World, state: State, r: int) -> Arrays:
    return {}


def _no_notes(cfg: MethodConfig, world: World) -> list[str]:
    return []


def _no_cost(cfg: MethodConfig, world: World, shard: Shard) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Method(Generic[C]):
    """A method: its settings, its functions, and all that the rest of the package needs to know of it.

    The module of a method ends with `METHOD = Method(...)`. What a method does not need has a default here.
    """

    Config: type[C]
    """Its settings. Their defaults are the profile `fixed`."""
    init: Callable[[C, World], State]
    """State before the first round. Raises UsageError for a world that the method cannot take."""
    learn: Callable[[C, World, State, int, list[Arrays], Send], tuple[State, Metrics]]
    """At the learner: the new state and the numbers of round `r`, from what the shards recovered."""
    plan: Callable[[C, World, State, int], list[Job]] = _no_jobs
    """What round `r` needs of which teachers, one job per teacher."""
    shared: Callable[[C, World, State, int], Arrays] = _no_values
    """Values that all recover jobs of round `r` read."""
    recover: Op | None = None
    """The op that the planned jobs are for: recovered tasks, and whatever else the round needs, of teachers."""
    notes: Callable[[C, World], list[str]] = _no_notes
    """What a reader must know of the method on this pool, such as a term that does not apply; one line each."""
    readings: tuple[str, ...] = ("finetune",)
    """Ways to read predictions from the final weights: `finetune`, `direct`, `assign` (see `ray_dfml.evaluate`)."""
    ops: Mapping[str, Op] = field(default_factory=dict)
    """Name -> further ops that `learn` sends."""
    profiles: Mapping[str, Values] = field(default_factory=dict)
    """`paper` and `code` -> what they change of the defaults, if the method was published."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """Name -> preset. No two methods may have presets of one name."""
    cost: Callable[[C, World, Shard], Cost | None] = _no_cost
    """What a training takes, timed on a shard that hosts the teachers; None where it is soon done."""
    panels: tuple[Panel, ...] = ()
    """Plots of its metrics in a report."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Metrics in percent that the line of progress shows -> the words for them."""
    needs_pool: bool = True
    """Whether there is nothing to do without teachers."""
    needs_real: bool = False
    """Whether it trains on real images, and so is no data-free method."""
    baseline: bool = False
    """Whether reports take differences to it: it neither inverts teachers nor sees real images."""


def stacked(function: Callable[..., Any], *parts: Tensor, batched: bool) -> Any:
    """`function` on every row of stacked tensors, through `vmap` or one after another; results stacked alike."""
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
    """A job on a teacher, with what it costs: shards take work by cost, not by count."""
    network = net(card.arch, card.image.shape, len(card.classes))
    memory = 4 * (network.layout.numel + network.stats_layout.numel)
    return Job(index=index, seed=seed, teacher=card.id, values=values, cost=float(network.macs), memory=memory)


def learner_weights(world: World, state: Mapping[str, Any], *, steps: int, lr: float) -> LearnerWeights:
    """The learner's weights in a method's state. `state["network"]` says which network they are of where it is not the
    world's: `arch`, `outputs`, and `image` as `ImageSpec.values` gives it.
    """
    network = state.get("network") or {"arch": world.arch, "outputs": world.way, "image": world.image.values()}
    return LearnerWeights(
        arch=network["arch"], outputs=network["outputs"], image=ImageSpec.of(network["image"]),
        theta=state["theta"], stats=state["stats"], head=world.head, steps=steps, lr=lr,
    )  # fmt: skip


def image_values(image: ImageSpec) -> Arrays:
    """Shape and normalisation of an image spec as shippable values."""
    return {"shape": image.shape, "mean": np.array(image.mean, np.float32), "std": np.array(image.std, np.float32)}
