"""Decides what is scored: which weights, with which step size, on which episodes, and under which name.

A `Scorer` asks for the accuracies of one `Part` after another. It names weights by their digest and holds none itself.
So the driver can own it, show progress between two parts and stop there, while the weights stay with the learner. It
remembers the answers: equal weights are scored once, however many selections they have.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_dfml import evaluate
from ray_dfml.core.inner_loop import Head
from ray_dfml.errors import DfmlError
from ray_dfml.evaluate import EPISODES_PER_JOB, EvalConfig
from ray_dfml.types import Backend, Labelled, LearnerWeights, Score

POOLED = "pooled"
"""The `data` of a score over the episodes of all data sets of a run."""

TRIAL_SHARE = 4
"""A validation tries each step size on this fraction (a quarter) of its episodes, and scores all with the best one."""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Which weights meet which episodes, and how. Equal values have equal accuracies, episode by episode."""

    weights: str
    """`LearnerWeights.digest`."""
    reading: str
    data: str
    split: str
    shot: int
    lr: float
    """Step size of the adaptation."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Episodes start..stop-1, whose accuracies are asked for at once."""

    episodes: Episodes
    start: int
    stop: int


PART_SECONDS = 2.0
"""How long a part should take: short enough to show progress, and long enough to be worth a call."""

Set = tuple[str, str]
"""A data set of a run, as (data, split)."""

Ask = Callable[[Part], np.ndarray]
"""Accuracies in percent of the episodes of a part."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The step size with which weights are tested on a data set, or on all of them (`POOLED`)."""

    method: str
    selection: str
    data: str
    lr: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Weights to test, with the name and selection of their scores, and the readings in which they are tested."""

    method: str
    selection: str
    weights: str
    """`LearnerWeights.digest`."""
    readings: tuple[str, ...]


def accuracies(
    backend: Backend, cfg: EvalConfig, weights: LearnerWeights, part: Part, images: Labelled, *, way: int
) -> np.ndarray:
    """The answer to a part: accuracies in percent [stop - start]. Raises DfmlError if one of its jobs fails."""
    return _answers("accuracies", backend, cfg, weights, part, images, way)


def predictions(
    backend: Backend, cfg: EvalConfig, weights: LearnerWeights, part: Part, images: Labelled, *, way: int
) -> np.ndarray:
    """The ways int64 [stop - start, queries] that a part predicts. Raises DfmlError if one of its jobs fails."""
    return _answers("predicted", backend, cfg, weights, part, images, way)


def _answers(
    name: str, backend: Backend, cfg: EvalConfig, weights: LearnerWeights, part: Part, images: Labelled, way: int
) -> np.ndarray:
    of = part.episodes
    shared = evaluate.shared(
        cfg, replace(weights, lr=of.lr), reading=of.reading, images=images.images, labels=images.labels
    )
    jobs = evaluate.jobs(cfg, way=way, shot=of.shot, start=part.start, stop=part.stop)
    results = backend.map("evaluate", jobs, shared)
    for result in results:
        if "rejected" in result:
            raise DfmlError(f"evaluation failed: {result['rejected']}")
    return np.concatenate([result[name] for result in results])


class Scorer:
    """Chooses step sizes and scores weights. `ask` answers one part at a time.

    Steps are chosen on the data sets `val`, and weights are tested on the data sets `test`; both hold (data, split)
    pairs. A part has a multiple of `shards` jobs, as many as take about PART_SECONDS. `on_work` is told the `work` of
    each part that is answered.
    """

    def __init__(
        self, cfg: EvalConfig, *, way: int, head: Head, val: Sequence[Set], test: Sequence[Set], ask: Ask,
        shards: int = 1, on_work: Callable[[float], object] = lambda work: None,
    ) -> None:  # fmt: skip
        self._on_work = on_work
        self._cfg, self._way, self._ask, self._shards = cfg, way, ask, shards
        self._head: Head = head
        self._val, self._test = list(val), list(test)
        self._choices = cfg.lrs if val and head != "protonet" else ()
        self._known: dict[Episodes, np.ndarray] = {}
        self._at_once = EPISODES_PER_JOB * shards

    def validate(self, weights: str, reading: str, *, on_test: bool = False) -> float | None:
        """Mean accuracy in percent of weights on episodes of all validation sets, or with `on_test` of all test sets.

        Each set has `eval.val_episodes` episodes of the largest shot. The step is the one of `eval.lrs` that is best on
        the first quarter of the validation episodes, rounded up to whole jobs. Returns None if there are no sets.
        """
        sets = self._test if on_test else self._val
        if not sets:
            return None
        cfg, shot = self._cfg, max(self._cfg.shots)
        trials = min(_whole_jobs(cfg.val_episodes / TRIAL_SHARE), cfg.val_episodes)
        lr = self._best(weights, self._val, (shot,), trials) if reading == "finetune" else cfg.lr
        return self._mean(weights, reading, sets, (shot,), lr, cfg.val_episodes)

    def step(self, weights: str, data: str = POOLED) -> float:
        """The step of `eval.lrs` with the best mean accuracy on the validation episodes of `data`, over all shots.

        Of equals the first one is taken. For `POOLED`, and for data without validation episodes, those of all data sets
        decide. The step is `eval.lr` if there are no candidates or no validation data, or if the head takes no steps.
        """
        own = [one for one in self._val if one[0] == data]
        return self._best(weights, own or self._val, self._cfg.shots, self._cfg.val_episodes)

    def test(self, entries: Sequence[Entry]) -> list[Score]:
        """Scores of each entry in each of its readings, on the test episodes of every data set and shot.

        If there are several data sets, a pooled score follows for each shot. A reading that adapts takes, for each data
        set, the step that `step` chooses.
        """
        return [score for entry in entries for reading in entry.readings for score in self._tested(entry, reading)]

    def steps(self, entries: Sequence[Entry]) -> list[Step]:
        """The steps that `test` chooses for the entries, one for each data set."""
        if not self._choices:
            return []
        return [
            Step(method=entry.method, selection=entry.selection, data=data, lr=self.step(entry.weights, data))
            for entry in entries if "finetune" in entry.readings
            for data, _ in self._test
        ]  # fmt: skip

    def total(self, plan: Callable[["Scorer"], object]) -> float:
        """The work that `plan` would make for this scorer.

        `plan` runs on a copy whose answers are zeros. It asks for as much, since the chosen step does not change that.
        """
        spent: list[float] = []
        other = Scorer(
            self._cfg, way=self._way, head=self._head, val=self._val, test=self._test, on_work=spent.append,
            ask=lambda part: np.zeros(part.stop - part.start),
        )  # fmt: skip
        other._known = dict(self._known)
        plan(other)
        return sum(spent)

    def work(self, part: Part) -> float:
        """How long a part takes relative to others, in passes of an image through the network.

        A step of the adaptation counts as three: the pass itself, and its gradient for two.
        """
        of, cfg = part.episodes, self._cfg
        passes = 3 * cfg.steps if of.reading == "finetune" and self._head != "protonet" else 1
        return (part.stop - part.start) * self._way * (passes * of.shot + cfg.query)

    def _best(self, weights: str, sets: Sequence[Set], shots: Sequence[int], count: int) -> float:
        """The best step on the first `count` episodes of each shot of each set. A step with accuracy NaN is worst."""
        if len(self._choices) < 2:
            return (*self._choices, self._cfg.lr)[0]
        means = {lr: self._mean(weights, "finetune", sets, shots, lr, count) for lr in self._choices}
        return max(means, key=lambda lr: -math.inf if math.isnan(means[lr]) else means[lr])

    def _mean(
        self, weights: str, reading: str, sets: Sequence[Set], shots: Sequence[int], lr: float, count: int
    ) -> float:
        found = [self._accuracies(weights, reading, one, shot, lr, count) for one in sets for shot in shots]
        return float(np.concatenate(found).mean())

    def _tested(self, entry: Entry, reading: str) -> list[Score]:
        cfg, sets, scores = self._cfg, self._test, []
        name = entry.method + (f"-{reading}" if len(entry.readings) > 1 else "")
        steps = [self.step(entry.weights, data) if reading == "finetune" else cfg.lr for data, _ in sets]

        def named(data: str, split: str, shot: int, found: np.ndarray) -> Score:
            return Score(
                method=name, data=data, split=split, way=self._way, shot=shot, bn=cfg.bn, selection=entry.selection,
                accuracies=found,
            )  # fmt: skip

        for shot in cfg.shots:
            found = [
                self._accuracies(entry.weights, reading, one, shot, lr, cfg.episodes)
                for one, lr in zip(sets, steps, strict=True)
            ]
            scores += [named(*one, shot, of_one) for one, of_one in zip(sets, found, strict=True)]
            if len(sets) > 1:
                scores.append(named(POOLED, sets[0][1], shot, np.concatenate(found)))
        return scores

    def _accuracies(self, weights: str, reading: str, one: Set, shot: int, lr: float, count: int) -> np.ndarray:
        """Accuracies of episodes 0..count-1. Those that are known already are not asked for again."""
        data, split = one
        of = Episodes(weights=weights, reading=reading, data=data, split=split, shot=shot, lr=lr)
        known = self._known.get(of, np.zeros(0))
        while len(known) < count:
            start = len(known) // EPISODES_PER_JOB * EPISODES_PER_JOB
            part, began = Part(episodes=of, start=start, stop=min(start + self._at_once, count)), time.monotonic()
            known = np.concatenate([known[:start], self._ask(part)])
            self._known[of] = known
            self._adjust(part, time.monotonic() - began)
            self._on_work(self.work(part))
        return known[:count]

    def _adjust(self, part: Part, took: float) -> None:
        """Ask for more at once after a quick part, and for less after a slow one. No accuracy depends on it."""
        if took < PART_SECONDS / 2 and part.stop - part.start == self._at_once:
            self._at_once *= 2
        elif took > 2 * PART_SECONDS:
            self._at_once = max(self._at_once // 2, EPISODES_PER_JOB * self._shards)


def _whole_jobs(episodes: float) -> int:
    """The number of episodes, rounded up to whole jobs."""
    return math.ceil(episodes / EPISODES_PER_JOB) * EPISODES_PER_JOB
