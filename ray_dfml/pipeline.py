"""One round of a run, written once for all methods and backends, and the object that holds the state of a run.

pool -> [shards] recover -> recovered tasks -> [learner] learn -> theta -> [shards] evaluate -> scores
                                                 ^  |
                                 [shards] grad --+  replay jobs
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ray_dfml import gallery, top1
from ray_dfml.config import RunConfig, build
from ray_dfml.errors import DfmlError, NobodyLeft, RejectedError, shown_reason
from ray_dfml.methods import METHODS, UNTRAINED, start
from ray_dfml.methods.base import Metrics, Send, State, Student, World, learner_weights
from ray_dfml.methods.baselines import untrained
from ray_dfml.scorer import Part, accuracies, predictions
from ray_dfml.types import Arrays, Backend, Job, Labelled, LearnerWeights

KEYS = {"val": "best", "test-best": "test_best"}
"""Selection -> the key in the state of the weights that it has kept."""

KEPT = ("rejected", "pictures", "began", *KEYS.values())
"""Keys in the state that belong to the loop and not to the method: the teachers found bad, the gallery of images, the
digest of the weights that the method began with, and the weights kept so far."""


class Trainer:
    """A run in progress: its configuration, its state, and the backend that does its work.

    `round` and `keep` change the state, and `score` answers what a `Scorer` asks about the weights. A checkpoint holds
    `state` and nothing else, and a Trainer made from a checkpoint goes on with the same bits. Services that are away
    are not in the state, so that the next Trainer asks them again.
    """

    def __init__(
        self, config: dict[str, Any], world: World, sets: Sequence[Labelled], backend: Backend, state: State | None
    ) -> None:
        self.config: RunConfig = build(config)
        self.method = METHODS[self.config.name]
        self._world = world
        self._sets = sets
        self._backend = backend
        self._known: dict[str, LearnerWeights] = {}
        self._away: dict[str, str] = {}
        self.state: State = state or self._begin()

    def _begin(self) -> State:
        state = self.method.init(self.config.method, self._world)
        began = "" if self.method.students else self._weights(state).digest
        return state | {name: {} for name in KEPT} | {"began": began}

    @property
    def world(self) -> World:
        """The world of the run, without the teachers found bad or away so far."""
        out = self._reasons
        return replace(self._world, cards=tuple(c for c in self._world.cards if c.id not in out))

    def round(self, r: int) -> Metrics:
        """Run round `r`, and return its numbers. Teachers that failed are in `state["rejected"]` from then on.

        The first rounds make the learner's start, if it has one, and the round of the method is counted from there.
        Services that are away are left out by this Trainer only. Raises NobodyLeft if no teacher is left.
        """
        seconds: dict[str, float] = {}
        recovered: list[Arrays] = []
        started = time.perf_counter()

        def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
            begun = time.perf_counter()
            results = self._backend.map(op, jobs, shared)
            seconds[op] = seconds.get(op, 0.0) + time.perf_counter() - begun
            self._quarantine(jobs, results)
            results = [result for result in results if "rejected" not in result]
            if op == f"{self.config.name}.recover":
                recovered.extend(results)
            return results

        first = self.config.start_rounds
        try:
            if r < first:
                state, metrics = start.learn(self.config.start, self.world, self.state, r, send)
                began = self._weights(state).digest
            else:
                (state, metrics), began = self._learned(r - first, send), self.state["began"]
        except RejectedError as error:
            if isinstance(error, NobodyLeft) or not self._reasons:
                raise
            raise RejectedError(f"{error} (rejected: {self._said()})") from None
        seen = self.method.pictures(self.config.method, self._world, recovered)
        pictures = gallery.taken(self.state["pictures"], seen, r) if seen else self.state["pictures"]
        self.state = state | {name: self.state[name] for name in KEPT} | {"began": began, "pictures": pictures}
        total = time.perf_counter() - started
        metrics |= {f"seconds/{op}": spent for op, spent in seconds.items()}
        return metrics | {"seconds/learner": total - sum(seconds.values()), "seconds/round": total}

    def _learned(self, r: int, send: Send) -> tuple[State, Metrics]:
        """Round `r` of the method."""
        cfg, name = self.config.method, f"{self.config.name}.recover"
        jobs = self.method.plan(cfg, self.world, self.state, r)
        results = send(name, jobs, self.method.shared(cfg, self.world, self.state, r)) if jobs else []
        if r >= cfg.total_rounds and not results:
            raise NobodyLeft(f"those that were away still are ({self._said()}); --resume asks them again")
        return self.method.learn(cfg, self.world, self.state, r, results, send)

    def missed(self, done: int) -> int:
        """How many rounds the run has beyond those of its method, if `done` rounds are done.

        They are those that a teacher with a student has missed, and does later. Teachers that are away now do not
        count.
        """
        if self.method.students is None:
            return 0
        jobs = self.method.plan(self.config.method, self.world, self.state, done)
        return max([0, *(done - job.values["r"] for job in jobs)])

    def behind(self) -> list[str]:
        """Ids of the teachers whose students have rounds to come, also of those that are away now."""
        if self.method.students is None:
            return []
        cards = tuple(card for card in self._world.cards if card.id not in self.state["rejected"])
        jobs = self.method.plan(self.config.method, replace(self._world, cards=cards), self.state, 0)
        return [str(job.teacher) for job in jobs]

    def _quarantine(self, jobs: Sequence[Job], results: Sequence[Arrays]) -> None:
        for job, result in zip(jobs, results, strict=True):
            if "rejected" in result:
                if job.teacher is None:
                    raise DfmlError(f"a job without a teacher failed: {result['rejected']}")
                found = {job.teacher: str(result["rejected"])}
                if result.get("away"):
                    self._away |= found
                else:
                    self.state = {**self.state, "rejected": self.state["rejected"] | found}
        if self._world.cards and not self.world.cards:
            later = ", then --resume, which asks again those that are away" if self._away else ""
            raise NobodyLeft(f"every teacher was rejected ({self._said()}); run `ray-dfml pool check`{later}")

    @property
    def _reasons(self) -> dict[str, str]:
        return self.state["rejected"] | self._away

    def _said(self) -> str:
        return "; ".join(shown_reason(id, why) for id, why in self._reasons.items())

    def rejected(self) -> dict[str, str]:
        """Id of each teacher that is left out -> why, and what is kept of it."""
        kept = self.students() if self._reasons else {}
        return {
            id: f"{why}; its student of {kept[id]} images is kept" if id in kept else why
            for id, why in self._reasons.items()
        }

    def weights(self, selection: str) -> LearnerWeights:
        """The weights of a selection: `last`, `val`, `test-best`, or `random` for a fresh learner.

        Raises KeyError if the selection has kept no weights yet.
        """
        if selection == "last":
            return self._weights(self.state)
        if selection == UNTRAINED:
            return self._fresh
        return LearnerWeights.of(self.state[KEYS[selection]]["weights"])

    def candidates(self) -> dict[str, str]:
        """Selection -> digest of its weights, for every selection that has weights. `score` knows these digests."""
        names = ["last", UNTRAINED, *(name for name, key in KEYS.items() if self.state[key])]
        found = {name: self.weights(name) for name in names}
        self._known = {weights.digest: weights for weights in found.values()}
        return {name: weights.digest for name, weights in found.items()}

    def learned(self) -> bool:
        """Whether the weights are finite and differ from those that the method began with. Others are not kept."""
        last = self.weights("last")
        return last.finite and last.digest != self.state["began"]

    def score(self, part: Part) -> np.ndarray:
        """Accuracies in percent of a part, whose weights must be among `candidates`."""
        weights, images = self._of(part)
        return accuracies(self._backend, self.config.eval, weights, part, images, way=self._world.way)

    def predicted(self, part: Part) -> np.ndarray:
        """The ways int64 [episodes, queries] that the weights of a part predict. They must be among `candidates`."""
        weights, images = self._of(part)
        return predictions(self._backend, self.config.eval, weights, part, images, way=self._world.way)

    def _of(self, part: Part) -> tuple[LearnerWeights, Labelled]:
        of = part.episodes
        if of.weights not in self._known:
            self.candidates()
        (images,) = [one for one in self._sets if (one.data, one.split) == (of.data, of.split)]
        return self._known[of.weights], images

    def keep(self, selection: str, accuracy: float, r: int) -> None:
        """Keep the last weights, those of round `r`, for a selection if their accuracy is higher than the kept one.

        Equal accuracy and NaN are not higher.
        """
        best = self.state[KEYS[selection]]
        if accuracy > (best["accuracy"] if best else -math.inf):
            kept = {"weights": self.weights("last").values(), "accuracy": accuracy, "round": r}
            self.state = {**self.state, KEYS[selection]: kept}

    def students(self) -> dict[str, int]:
        """Id of each teacher that has a student -> how many images it was asked about.

        A teacher that is left out has one if it was asked before.
        """
        found = {} if self.method.students is None else self._students(self.state)
        return {id: one.asked for id, one in found.items() if one.asked or id not in self._reasons}

    def student(self, id: str, *, fresh: bool = False) -> LearnerWeights:
        """The weights of a teacher's student: the last ones, or those that the run began with."""
        if not fresh:
            return self._students(self.state)[id].weights
        return self._untrained[id].weights

    def top1(self, id: str, fresh: bool, data: str, split: str, start: int, stop: int) -> np.ndarray:
        """Whether a student is right about images start..stop-1 of those in a data set whose class it knows: bool."""
        return self._asked("right", id, fresh, data, split, slice(start, stop))

    def said(self, id: str, data: str, split: str, places: np.ndarray) -> np.ndarray:
        """The outputs int64 that a student gives to some of the images in a data set whose class it knows."""
        return self._asked("said", id, False, data, split, places)

    def _asked(self, name: str, id: str, fresh: bool, data: str, split: str, places: slice | np.ndarray) -> np.ndarray:
        (card,) = [card for card in self._world.cards if card.id == id]
        wanted = (data, split, card.image.shape)
        (of,) = [one for one in self._sets if (one.data, one.split, one.shape) == wanted]
        rows, wanted = top1.rows_known(of, card.classes)
        shared = top1.shared(self.student(id, fresh=fresh), of.images)
        found = self._backend.map("top1", top1.jobs(rows[places], wanted[places]), shared)
        return np.concatenate([result[name] for result in found])

    def _students(self, state: State) -> Mapping[str, Student]:
        assert self.method.students is not None
        return self.method.students(self.config.method, self._world, state)

    @cached_property
    def _untrained(self) -> Mapping[str, Student]:
        return self._students(self.method.init(self.config.method, self._world))

    def _weights(self, state: State) -> LearnerWeights:
        cfg = self.config.eval
        return learner_weights(self._world, state, steps=cfg.steps, lr=cfg.lr)

    @cached_property
    def _fresh(self) -> LearnerWeights:
        cfg = self.config.eval
        return untrained(self._world, steps=cfg.steps, lr=cfg.lr)
