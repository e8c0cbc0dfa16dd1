"""The round loop's body, written once for all methods and backends, and the object that holds a run's state.

pool -> [shards] recover -> recovered tasks -> [learner] learn -> theta -> [shards] evaluate -> scores
                                                 ^  |
                                 [shards] grad --+  replay jobs
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_dfml import evaluate
from ray_dfml.config import RunConfig, build
from ray_dfml.errors import DfmlError, RejectedError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import Metrics, State, World, learner_image
from ray_dfml.types import Arrays, Backend, Job

KEPT = ("rejected", "best", "test_best")
"""Parts of the state that belong to the loop, not to the method: teachers found bad, weights selected so far."""

POOLED = "pooled"
"""The `data` of a score over the episodes of all data sets of a run."""


@dataclass(frozen=True)
class Labelled:
    """Real images for episodes: uint8 [n c h w] and labels [n]. Used to validate and test, never to train."""

    data: str
    split: str
    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Score:
    """Per-episode accuracies in percent of one set of weights, one reading, on one set of episodes."""

    method: str
    data: str
    split: str
    way: int
    shot: int
    bn: str
    selection: str
    accuracies: np.ndarray


class Trainer:
    """A run in progress: configuration, state, and the backend that does its work. In a cluster it is the learner
    actor.

    `round`, `validate` and `test` advance it; `snapshot` is all of it, and a Trainer made from a snapshot goes on
    with the same bits.
    """

    def __init__(
        self, config: dict[str, Any], world: World, sets: Sequence["Labelled"], backend: Backend, state: State | None
    ) -> None:
        self.config: RunConfig = build(config)
        self.method = METHODS[self.config.name]
        self._world = world
        self._sets = sets
        self._backend = backend
        self.state: State = state or self.method.init(self.config.method, world) | {name: {} for name in KEPT}
        self._steps: dict[str, dict[str, float]] = {}

    @property
    def world(self) -> World:
        """The world without the teachers found bad so far."""
        rejected = self.state["rejected"]
        return replace(self._world, cards=tuple(c for c in self._world.cards if c.id not in rejected))

    def round(self, r: int) -> Metrics:
        """One outer iteration. Returns its numbers; teachers that failed are in `snapshot()["rejected"]` from now
        on.
        """
        seconds: dict[str, float] = {}
        started = time.perf_counter()

        def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
            begun = time.perf_counter()
            results = self._backend.map(op, jobs, shared)
            seconds[op] = seconds.get(op, 0.0) + time.perf_counter() - begun
            self._quarantine(jobs, results)
            return [result for result in results if "rejected" not in result]

        cfg, world = self.config.method, self.world
        jobs = self.method.plan(cfg, world, self.state, r)
        results = (
            send(f"{self.config.name}.recover", jobs, self.method.shared(cfg, world, self.state, r)) if jobs else []
        )
        try:
            state, metrics = self.method.learn(cfg, self.world, self.state, r, results, send)
        except RejectedError as error:
            if not self.world.cards or not self.state["rejected"]:
                raise
            raise RejectedError(f"{error} (rejected: {self._reasons()})") from None
        self.state = state | {name: self.state[name] for name in KEPT}
        total = time.perf_counter() - started
        metrics |= {f"seconds/{op}": spent for op, spent in seconds.items()}
        return metrics | {"seconds/learner": total - sum(seconds.values()), "seconds/round": total}

    def _quarantine(self, jobs: Sequence[Job], results: Sequence[Arrays]) -> None:
        for job, result in zip(jobs, results, strict=True):
            if "rejected" in result:
                if job.teacher is None:
                    raise DfmlError(f"a job without a teacher failed: {result['rejected']}")
                known = self.state["rejected"] | {job.teacher: str(result["rejected"])}
                self.state = {**self.state, "rejected": known}
        if self._world.cards and not self.world.cards:
            raise RejectedError(f"every teacher was rejected ({self._reasons()}); run `ray-dfml pool check`")

    def _reasons(self) -> str:
        """Why each rejected teacher is."""
        return "; ".join(f"{id}: {why}" for id, why in self.state["rejected"].items())

    def snapshot(self) -> State:
        """The state after the last round: what a checkpoint holds."""
        return self.state

    def validate(self, r: int) -> float | None:
        """Mean accuracy in percent on the validation episodes of every set, at the largest shot; the best weights are
        kept.

        None without data. A run that asks for `eval.test_best` also keeps the weights that selection on test would
        claim.
        """
        if self.config.eval.test_best:
            self._select(r, "test", "test_best")
        return self._select(r, "val", "best")

    def _select(self, r: int, split: str, key: str) -> float | None:
        cfg = self.config.eval
        sets = [one for one in self._sets if one.split == split]
        if not sets:
            return None
        reading = self.method.READINGS[-1]
        scores = [self._score(one, max(cfg.shots), cfg.val_episodes, self.state, reading) for one in sets]
        accuracy = float(np.concatenate(scores).mean())
        best = self.state[key]
        if not best or accuracy > best["accuracy"]:
            self.state = {**self.state, key: {**self._weights(self.state), "accuracy": accuracy, "round": r}}
        return accuracy

    @staticmethod
    def _weights(state: Mapping[str, Any]) -> State:
        return {name: state[name] for name in ("theta", "stats", "arch", "outputs", "mean", "std") if name in state}

    def test(self, selection: str) -> list[Score]:
        """Scores of the weights that `selection` names (`val`, `last` or `test-best`) on the test episodes, every
        shot and reading; those of several data sets also pooled."""
        scores = []
        for reading in self.method.READINGS:
            name = self.config.name + (f"-{reading}" if len(self.method.READINGS) > 1 else "")
            scores += self._tested(name, selection, selection, reading)
        return scores

    def _selected(self, selection: str) -> Mapping[str, Any]:
        """The weights that a selection names as for `step_size`."""
        if selection == "random":
            method = METHODS["random"]
            return method.init(method.Config(), self._world)
        return {"val": self.state["best"], "test-best": self.state["test_best"]}.get(selection) or self.state

    def _tested(self, name: str, selection: str, weights: str, reading: str) -> list[Score]:
        """Scores on every shot and data set, under a name and a selection, of what `weights` names as for
        `step_size`."""
        cfg, state, scores = self.config.eval, self._selected(weights), []
        steps = [self.step_size(weights, one.data) if reading == "finetune" else None for one in self._tests]
        for shot in cfg.shots:
            found = [
                self._score(one, shot, cfg.episodes, state, reading, lr)
                for one, lr in zip(self._tests, steps, strict=True)
            ]
            scores += [
                self._named(name, one.data, one.split, shot, selection, accuracies)
                for one, accuracies in zip(self._tests, found, strict=True)
            ]
            if len(found) > 1:
                scores.append(self._named(name, POOLED, self._tests[0].split, shot, selection, np.concatenate(found)))
        return scores

    def step_size(self, selection: str, data: str = POOLED) -> float:
        """The step of `eval.lrs` whose mean accuracy on the validation episodes of `data`, over all shots, is best; the
        first of equals. `eval.lr` without candidates, without validation data, and for a head that takes no steps.

        `selection` as in `test`, or `random` for the fresh learner; `POOLED`, and data that have no validation
        episodes, stand for the episodes of all sets.
        """
        cfg = self.config.eval
        sets = [one for one in self._sets if one.split == "val"]
        if not sets or not cfg.lrs or self._world.head == "protonet":
            return cfg.lr
        if selection not in self._steps:
            self._steps[selection] = self._best_steps(sets, self._selected(selection))
        return self._steps[selection].get(data, self._steps[selection][POOLED])

    def _best_steps(self, sets: Sequence[Labelled], state: Mapping[str, Any]) -> dict[str, float]:
        """Data set, and `POOLED` -> the best of `eval.lrs`."""
        cfg = self.config.eval
        if len(cfg.lrs) == 1:
            return dict.fromkeys([*(one.data for one in sets), POOLED], cfg.lrs[0])
        found = {
            one.data: [
                np.concatenate([self._score(one, s, cfg.val_episodes, state, "finetune", lr) for s in cfg.shots])
                for lr in cfg.lrs
            ]
            for one in sets
        }
        found[POOLED] = [np.concatenate(of_a_step) for of_a_step in zip(*found.values(), strict=True)]
        return {data: cfg.lrs[int(np.argmax([each.mean() for each in rows]))] for data, rows in found.items()}

    def step_sizes(self) -> dict[str, float]:
        """The steps chosen so far, "METHOD/SELECTION" -> step size; with several data sets "METHOD/SELECTION/DATA" for
        each of them."""
        found = {}
        for selection, steps in self._steps.items():
            name = "random/last" if selection == "random" else f"{self.config.name}/{selection}"
            each = {f"{name}/{data}": lr for data, lr in steps.items() if data != POOLED}
            found |= each if len(each) > 1 else {name: steps[POOLED]}
        return found

    @property
    def _tests(self) -> list[Labelled]:
        return [one for one in self._sets if one.split not in ("val", "train")]

    def baseline(self) -> list[Score]:
        """`random` on the same episodes: no number stands alone."""
        return self._tested("random", "last", "random", "finetune")

    def _named(self, name: str, data: str, split: str, shot: int, selection: str, accuracies: np.ndarray) -> Score:
        return Score(
            method=name, data=data, split=split, way=self._world.way, shot=shot, bn=self.config.eval.bn,
            selection=selection, accuracies=accuracies,
        )  # fmt: skip

    def _score(
        self, one: Labelled, shot: int, count: int, state: Mapping[str, Any], reading: str, lr: float | None = None
    ) -> np.ndarray:
        world, cfg = self._world, self.config.eval
        shared = evaluate.shared(
            cfg,
            arch=state.get("arch", world.arch),
            image=learner_image(world, state),
            outputs=state.get("outputs", world.way),
            theta=state["theta"].numpy(),
            stats=state["stats"].numpy(),
            reading=reading,
            lr=lr,
            head=world.head,
            images=one.images,
            labels=one.labels,
        )
        results = self._backend.map("evaluate", evaluate.jobs(cfg, way=world.way, shot=shot, count=count), shared)
        for result in results:
            if "rejected" in result:
                raise DfmlError(f"evaluation failed: {result['rejected']}")
        return np.concatenate([result["accuracies"] for result in results])
