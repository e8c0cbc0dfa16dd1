"""Which teachers helped or harmed a learner: what their images in the bank do to the loss on validation episodes.

Two measures, both with the bank of the run as it was kept. *Influence*: the inner product of a teacher's meta-gradient,
on tasks of its own classes in the bank, with the meta-gradient of real validation episodes, at the learner of the run
(`core.influence`). *Left out*: fresh learners, which are meta-trained on the whole bank and on the bank without the
classes that this teacher alone brought, are compared on the same validation episodes.

If a class of the bank has images of several teachers, they cannot be told apart: the class counts for each of them in
the influence, and is left out for none.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_dfml import published
from ray_dfml.config import RunConfig
from ray_dfml.core import episodes
from ray_dfml.core.influence import Influence, influence
from ray_dfml.errors import UsageError
from ray_dfml.files import Uri
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import cost, replay
from ray_dfml.methods.base import MetaConfig, State, World, initial_learner, learner_weights
from ray_dfml.runtime import cost_lines
from ray_dfml.runtime.checkpoint import Checkpoints
from ray_dfml.runtime.inputs import read_inputs
from ray_dfml.runtime.learning import CHECKPOINTS
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.runtime.storage import Folder
from ray_dfml.scorer import Episodes, Part, accuracies
from ray_dfml.types import Arrays, Backend, Job, Labelled, LearnerWeights

TIMED = 5
"""How many validation episodes are timed before."""
REPEATS = 3
"""How often a fresh learner is trained on the whole bank, with other draws, to see how much that alone changes."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a teacher's images in the bank did."""

    teacher: str
    classes: int
    """Its classes in the bank that hold enough images for a task."""
    alone: int
    """How many of these no other teacher knows."""
    influence: Influence | None
    """None if its classes are too few for a task."""
    left_out: float | None
    """Points of validation accuracy that a learner gains without its classes; None if that was not tried."""

    def tree(self) -> dict[str, Any]:
        """The contribution as a JSON object."""
        found = asdict(self)
        found["influence"] = None if self.influence is None else self.influence._asdict()
        return found


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The contributions of all teachers of a run, and what they were measured on."""

    contributions: list[Contribution]
    whole: tuple[float, float] | None
    """Mean and standard deviation of the validation accuracy in percent of REPEATS learners of the whole bank."""
    episodes: int
    updates: int

    def harmful(self) -> dict[str, list[str]]:
        """Id of each teacher that harms -> the evidence.

        Its influence must be negative by its whole interval. Where leaving out was tried, the learner must also do
        better without it by more than twice the standard deviation of equal learners.
        """
        found: dict[str, list[str]] = {}
        for one in self.contributions:
            if one.influence is None or not one.influence.harms:
                continue
            why = [
                f"influence {one.influence.product:.3g} ± {one.influence.half:.2g} on the loss of {self.episodes} "
                f"validation episodes, cosine {one.influence.cosine:.2f}"
            ]
            if one.left_out is not None and self.whole is not None:
                if one.left_out <= 2 * self.whole[1]:
                    continue
                why.append(f"{one.left_out:+.2f} points without it, equal learners differ by {self.whole[1]:.2f}")
            found[one.teacher] = why
        return found

    def lines(self) -> list[str]:
        """A table for a terminal; the teachers that help most come first."""
        harmful = self.harmful()
        rows = [f"{'teacher':<32} {'classes':>7} {'alone':>5} {'influence':>21} {'cosine':>7} {'without':>8}"]
        for one in sorted(self.contributions, key=lambda one: -(one.influence.product if one.influence else -np.inf)):
            of = one.influence
            product, cosine = (f"{of.product:.3g} ± {of.half:.2g}", f"{of.cosine:.2f}") if of else ("too few", "-")
            without = "-" if one.left_out is None else f"{one.left_out:+.2f}"
            said = "  harms" if one.teacher in harmful else "  helps" if of and of.helps else ""
            rows.append(
                f"{one.teacher:<32} {one.classes:>7} {one.alone:>5} {product:>21} {cosine:>7} {without:>8}{said}"
            )
        if self.whole is not None:
            rows.append(
                f"{REPEATS} learners of the whole bank, {self.updates} updates: {self.whole[0]:.2f} % on validation, "
                f"standard deviation {self.whole[1]:.2f}; `without` is the change of it in points"
            )
        return rows


def attribute(
    place: Path | Uri, *, tasks: int, count: int, updates: int, say: Callable[[str], None] = lambda _: None
) -> Attribution:  # fmt: skip
    """Attribute the learner of a run, on a disk or in an object store, to its teachers.

    Each teacher has `tasks` tasks, and the validation `count` episodes of the largest shot of each data set. With
    `updates` above 0, fresh learners take that many meta-updates, with and without each teacher. Raises UsageError for
    a run without a bank or without validation data, and RejectedError for a checkpoint that cannot be read.
    """
    folder = RunFolder.open(published.local(place))
    config = folder.config()
    if not config.data:
        raise UsageError(f"{place}: the run was given no data; attribution needs validation episodes")
    with folder.locked():
        found = Checkpoints(Folder(folder.path / CHECKPOINTS)).load()
    state: State = found[1] if found else {}
    if not state.get("bank"):
        raise UsageError(f"{place}: its checkpoints hold no bank of recovered images, which attribution needs")
    inputs = read_inputs(config)
    world = replace(inputs.world, cards=tuple(card for card in inputs.world.cards if card.id not in state["rejected"]))
    case = _Case(
        config, world, state, [one for one in inputs.sets if one.split == "val"],
        LocalBackend(inputs.teachers.__getitem__),
    )  # fmt: skip
    return case.judged(tasks, count, updates, say)


@dataclass(frozen=True)
class _Case:
    """A run that is judged: its settings, its state, and its validation images."""

    config: RunConfig
    world: World
    state: State
    real: list[Labelled]
    backend: Backend

    @property
    def meta(self) -> MetaConfig:
        """The settings of the tasks of the bank."""
        return self.config.method.replay  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def bank(self) -> Mapping[str, np.ndarray]:
        """The classes of the bank that hold enough images for a task."""
        full = bank_of.ready(self.state["bank"], self.meta.shot + self.meta.query)
        return {key: self.state["bank"][key] for key in full}

    def keys(self) -> dict[str, list[str]]:
        """Id of each teacher -> its classes in the bank."""
        key = self.config.method.bank_key  # pyright: ignore[reportAttributeAccessIssue]
        return {
            card.id: [name for one in card.classes if (name := bank_of.class_key(one, card.id, key)) in self.bank]
            for card in self.world.cards
        }

    def judged(self, tasks: int, count: int, updates: int, say: Callable[[str], None]) -> Attribution:
        """The attribution. `say` is told what is done next."""
        keys = self.keys()
        known = Counter(name for names in keys.values() for name in names)
        theta = torch.tensor(self.state["best"]["weights"]["theta"]) if self.state["best"] else self.state["theta"]
        say(cost_lines.of_attribution(lambda: self._seconds(theta, keys, known, tasks, count, updates)))
        say(f"gradients of {count} validation episodes and of {tasks} tasks of each of {len(keys)} teachers")
        wanted = self._gradients(theta, self._episodes(count)).mean(0)
        whole, alone = None, {id: [name for name in names if known[name] == 1] for id, names in keys.items()}
        gains: dict[str, float] = {}
        if updates:
            say(f"{REPEATS} learners of {updates} updates on the whole bank, and one without each teacher")
            scores = [self._learnt(self.bank, updates, repeat, count) for repeat in range(REPEATS)]
            whole = float(np.mean(scores)), float(np.std(scores, ddof=1))
            for id, names in alone.items():
                rest = {name: images for name, images in self.bank.items() if name not in names}
                if names and len(rest) >= self.world.way:
                    gains[id] = self._learnt(rest, updates, 0, count) - whole[0]
        contributions = [
            Contribution(
                teacher=id, classes=len(names), alone=len(alone[id]), left_out=gains.get(id),
                influence=self._influence(id, names, theta, wanted, tasks),
            )
            for id, names in keys.items()
        ]  # fmt: skip
        return Attribution(
            contributions=contributions, whole=whole, episodes=count * len(self.real), updates=updates
        )  # fmt: skip

    def _seconds(
        self, theta: torch.Tensor, keys: Mapping[str, Sequence[str]], known: Counter[str], tasks: int, count: int,
        updates: int,
    ) -> float:  # fmt: skip
        """How long `judged` takes: a gradient is timed, and a few validation episodes if learners will be trained."""
        some = self._episodes(1)[:1]
        gradients = count * len(self.real) + tasks * sum(len(names) >= self.world.way for names in keys.values())
        each = cost.seconds(lambda: self._gradients(theta, some))
        if not updates:
            return gradients * each
        learners = REPEATS + sum(any(known[name] == 1 for name in names) for names in keys.values())
        state = initial_learner(self.world)
        weights = learner_weights(self.world, state, steps=self.config.eval.steps, lr=self.config.eval.lr)
        few = min(TIMED, count)
        test = cost.seconds(lambda: self._accuracy(weights, weights.lr, few)) / few
        tests = count * len(self.config.eval.lrs or (None,))
        return gradients * each + learners * (updates * self.meta.tasks * each + tests * test)

    def _influence(
        self, id: str, names: Sequence[str], theta: torch.Tensor, wanted: torch.Tensor, tasks: int
    ) -> Influence | None:
        """The influence of a teacher's classes; None if they are fewer than those of a task."""
        if len(names) < self.world.way:
            return None
        mine = {name: self.bank[name] for name in names}
        cfg = self.meta.model_copy(update={"tasks": tasks, "mix_data": True})
        drawn = replay.draw(cfg, self.world, mine, ("attribute", id))
        return influence(self._gradients(theta, drawn), wanted)

    def _episodes(self, count: int) -> list[Arrays]:
        """Validation episodes of every data set as tasks of real images, as many as `count` of each."""
        cfg, found = self.config.eval, []
        for one in self.real:
            for index in range(count):
                drawn = episodes.draw(
                    one.labels, way=self.world.way, shot=max(cfg.shots), query=cfg.query, seed=cfg.seed, index=index
                )
                found.append({"support": one.images[drawn.support], "query": one.images[drawn.query]})
        return found

    def _gradients(self, theta: torch.Tensor, tasks: Sequence[Arrays]) -> torch.Tensor:
        """Meta-gradients [t p] of tasks at theta [p]."""
        jobs = [Job(index=t, seed=0, values=task) for t, task in enumerate(tasks)]
        shared = replay.shared_values(self.meta, self.world, {"theta": theta})
        return torch.stack([torch.tensor(one["grad"]) for one in self.backend.map("maml.grad", jobs, shared)])

    def _learnt(self, bank: Mapping[str, np.ndarray], updates: int, repeat: int, count: int) -> float:
        """Validation accuracy in percent, with the best step of `eval.lrs`, of a fresh learner trained on a bank."""
        state = replay.with_optimiser(initial_learner(self.world))
        for update in range(updates):
            tag = ("attribute", repeat, update)
            state, _ = replay.update(self.meta, self.world, state, bank, tag, self.backend.map)
        cfg = self.config.eval
        weights = learner_weights(self.world, state, steps=cfg.steps, lr=cfg.lr)
        return max(self._accuracy(weights, lr, count) for lr in cfg.lrs or (cfg.lr,))

    def _accuracy(self, weights: LearnerWeights, lr: float, count: int) -> float:
        found = []
        for one in self.real:
            of = Episodes(
                weights=weights.digest, reading="finetune", data=one.data, split="val",
                shot=max(self.config.eval.shots), lr=lr,
            )  # fmt: skip
            part = Part(episodes=of, start=0, stop=count)
            found.append(accuracies(self.backend, self.config.eval, weights, part, one, way=self.world.way))
        return float(np.concatenate(found).mean())
