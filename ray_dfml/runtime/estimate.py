"""What a run would do and how long it would take. A piece of each kind of work is timed here, on this machine."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ray_dfml import evaluate, top1
from ray_dfml.config import RunConfig
from ray_dfml.core import episodes
from ray_dfml.core.images import to_bytes
from ray_dfml.core.inner_loop import Task, meta_gradient
from ray_dfml.methods import METHODS, UNTRAINED, cost, start
from ray_dfml.methods.base import Cost, MetaConfig, World, initial_learner, learner_weights
from ray_dfml.runtime.driver import Inputs, Machine
from ray_dfml.runtime.local import no_teachers
from ray_dfml.runtime.shard import Shard
from ray_dfml.scorer import Entry, Part, Scorer
from ray_dfml.services.budgets import exact
from ray_dfml.types import LearnerWeights

PROCESS_BYTES = 600e6
"""Memory of a process with torch that has trained a Conv4; pages that processes share are counted once in all."""

DAEMON_BYTES = 250e6
"""Memory of Ray's own processes on one node, counted in the same way."""


def estimate(config: RunConfig, inputs: Inputs, machine: Machine) -> dict[str, Any]:
    """The plan of a run as it is printed: rounds, teachers, minutes of validation and test, and memory.

    For a method with a `cost` it also has images, meta-updates and minutes of training. They are ranges if a plateau
    decides on the number of updates. If teachers are asked, it has the number of queries to each, and their price, and
    the minutes that the lowest `rate` of a service takes in any case.
    """
    world = inputs.world
    times = forecast(config, inputs, machine)
    plan: dict[str, Any] = {
        "method": config.name,
        "profile": config.profile,
        "rounds": config.total_rounds,
        "teachers": len(world.cards),
        "rejected teachers": len(inputs.rejected),
    } | _size(config, world)
    if times.images:
        plan["recovered images"] = times.images
    if times.updates[1]:
        plan["meta-updates"] = " to ".join(str(n) for n in dict.fromkeys(times.updates))
    if times.training is not None:
        plan["training minutes"] = " to ".join(dict.fromkeys(f"{seconds / 60:.1f}" for seconds in times.training))
    elif METHODS[config.name].students is not None:
        plan["training minutes"] = "no estimate: they depend on the services too"
    if inputs.accounts.asked:
        plan["queries"] = queries(config, inputs)
        if times.asking:
            plan["minutes of asking, at least"] = f"{times.asking / 60:.1f}"
    processes = machine.workers + 2 if machine.backend == "ray" else 1
    memory_bytes = processes * PROCESS_BYTES + (DAEMON_BYTES if machine.backend == "ray" else 0.0)
    return plan | {
        "validation minutes": f"{times.validation / 60:.1f}",
        "test minutes": f"{times.test / 60:.1f}",
        "memory GiB, all processes": round(memory_bytes / 2**30, 1),
    }


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would take, in seconds on the shards of its machine, if they are as fast as this one."""

    training: tuple[float, float] | None
    """The fewest and the most. None for a method that tells no cost."""
    validation: float
    test: float
    asking: float
    """What the slowest service with a bound on images a second takes in any case."""
    images: int
    """Images recovered in all."""
    updates: tuple[int, int]
    """The fewest and the most meta-updates."""

    @property
    def span(self) -> tuple[float, float]:
        """The fewest and the most seconds of all that is known."""
        least, most = self.training or (0.0, 0.0)
        rest = self.validation + self.test
        return max(least, self.asking) + rest, max(most, self.asking) + rest

    def after(self, share: float) -> "Forecast":
        """What is left when this share of the rounds is done."""
        left = max(0.0, 1 - share)
        training = self.training and (left * self.training[0], left * self.training[1])
        return replace(self, training=training, validation=left * self.validation, asking=left * self.asking)


def forecast(config: RunConfig, inputs: Inputs, machine: Machine) -> Forecast:
    """Time a piece of each kind of work of a run, here and now. Nobody is asked.

    Raises what the method raises for a teacher that cannot be read.
    """
    world, shard = inputs.world, Shard(inputs.teachers.__getitem__)
    share = machine.workers if machine.backend == "ray" else 1
    found = METHODS[config.name].cost(config.method, world, shard)
    parts = [one for one in (found, start.cost(config.start, world, shard)) if one is not None]
    spans = [_seconds(one, world, share) for one in parts]
    validation, test = (seconds / share for seconds in _evaluation(config, inputs))
    return Forecast(
        training=(sum(least for least, _ in spans), sum(most for _, most in spans)) if parts else None,
        validation=validation, test=test, asking=max(_waits(inputs), default=0.0), images=found.images if found else 0,
        updates=(sum(one.least for one in parts), sum(one.most for one in parts)),
    )  # fmt: skip


def _seconds(found: Cost, world: World, share: int) -> tuple[float, float]:
    """The fewest and the most seconds of a training, on so many shards."""
    update = found.meta.tasks * _task(found.meta, world) / share if found.meta else 0.0
    fixed = found.alone + found.recovery / share
    return fixed + found.least * update, fixed + found.most * update


def queries(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """How many images each teacher is asked about, and their price, if no attempt fails and no budget ends the run."""
    planned = METHODS[config.name].queries(config.method, inputs.world)
    each = {
        id: {"images": planned.get(id, 0), "money": float(exact(one.terms.price) * planned.get(id, 0))}
        for id, one in inputs.accounts.by_id.items()
    }
    return {
        "images": sum(one["images"] for one in each.values()),
        "money": float(sum(exact(one["money"]) for one in each.values())),
        "teachers": each,
    }


def _waits(inputs: Inputs) -> list[float]:
    """Seconds that a service with a bound on images a second takes for those of the plan."""
    return [
        inputs.accounts.planned.get(one.card.id, 0) / one.api.rate
        for one in inputs.accounts.asked if one.api and one.api.rate
    ]  # fmt: skip


def _evaluation(config: RunConfig, inputs: Inputs) -> tuple[float, float]:
    """Seconds of all validations, and of the test.

    The test has the validated, the last and fresh weights, and chooses a step size for each on validation episodes. It
    is shorter if some of these weights are equal.
    """
    if METHODS[config.name].students is not None:
        return _of_students(config, inputs)
    world, readings = inputs.world, METHODS[config.name].readings
    sets = {split: [(one.data, split) for one in inputs.sets if one.split == split] for split in ("val", "test")}
    seconds = {shot: _episode(config, world, shot) for shot in config.eval.shots} if any(sets.values()) else {}
    spent: list[float] = []

    def ask(part: Part) -> np.ndarray:
        spent.append((part.stop - part.start) * seconds[part.episodes.shot])
        return np.zeros(part.stop - part.start)

    scorer = Scorer(config.eval, way=world.way, head=world.head, val=sets["val"], test=sets["test"], ask=ask)
    validations = [r for r in range(config.total_rounds) if config.validates(r)] if config.name != UNTRAINED else []
    for r in validations:
        for on_test in (False, True)[: 1 + config.eval.test_best]:
            scorer.validate(str(r), readings[-1], on_test=on_test)
    validated = sum(spent)
    spent.clear()
    own = [] if config.name == UNTRAINED else ["val", "last", "test-best"][: 2 + config.eval.test_best]
    entries = [Entry(method=config.name, selection=one, weights=one, readings=readings) for one in own]
    scorer.test([*entries, Entry(method=UNTRAINED, selection="last", weights=UNTRAINED, readings=("finetune",))])
    return validated, sum(spent)


def _first_student(config: RunConfig, world: World) -> LearnerWeights:
    method = METHODS[config.name]
    assert method.students is not None
    return next(iter(method.students(config.method, world, method.init(config.method, world)).values())).weights


def _size(config: RunConfig, world: World) -> dict[str, int]:
    """How many weights the learner has, or the student of the first teacher."""
    if METHODS[config.name].students is None:
        return {"learner parameters": world.net.layout.numel}
    return {"student parameters": _first_student(config, world).net.layout.numel}


def _of_students(config: RunConfig, inputs: Inputs) -> tuple[float, float]:
    """Seconds of all validations and of the test, if all students are as fast as the first one."""
    world, split = inputs.world, {"val": 0, "test": 0}
    for of in inputs.sets:
        split[of.split] += sum(
            len(top1.rows_known(of, card.classes)[0]) for card in world.cards if card.image.shape == of.shape
        )
    weights, rows = _first_student(config, world), np.arange(top1.IMAGES_PER_JOB)
    jobs = top1.jobs(rows, np.zeros(len(rows), np.int64))
    shared = top1.shared(weights, np.zeros((len(rows), *weights.image.shape), np.uint8))
    each = cost.seconds(lambda: Shard(no_teachers).run("top1", jobs, shared)) / len(rows) if inputs.sets else 0.0
    validations = sum(config.validates(r) for r in range(config.total_rounds))
    return validations * split["val"] * each, 2 * split["test"] * each


def _images(world: World, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(per_class)
    return torch.rand(per_class * world.way, *world.image.shape, generator=rng), episodes.interleaved(
        world.way, per_class
    )


def _task(cfg: MetaConfig, world: World) -> float:
    theta = world.net.init(torch.Generator().manual_seed(0))
    parts = [part[None] for part in (*_images(world, cfg.shot), *_images(world, cfg.query))]
    return cost.seconds(
        lambda: meta_gradient(
            world.net, theta, Task(*parts), lr=cfg.inner_lr, steps=cfg.inner_steps, batched=False, head=world.head
        )
    )


def _episode(config: RunConfig, world: World, shot: int) -> float:
    """Seconds of one test episode: a job of the `evaluate` op on random images, divided by its episodes."""
    cfg, per_class, count = config.eval, shot + config.eval.query, evaluate.EPISODES_PER_JOB
    images, labels = _images(world, per_class)
    state = initial_learner(world)
    weights = learner_weights(world, state, steps=cfg.steps, lr=cfg.lr)
    shared = evaluate.shared(cfg, weights, reading="finetune", images=to_bytes(images), labels=labels.numpy())
    jobs = evaluate.jobs(cfg, way=world.way, shot=shot, stop=count)
    shard = Shard(no_teachers)
    return cost.seconds(lambda: shard.run("evaluate", jobs, shared)) / count
