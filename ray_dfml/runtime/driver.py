"""The driver: starts a session, watches it, logs, checkpoints, and begins again from a checkpoint where the learner
died.

It holds no mathematics and takes under 1 % of a round. Whatever the session is, the sequence of calls is the same, so
the final weights are the same bits.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ray_dfml import learner
from ray_dfml.config import RunConfig
from ray_dfml.core import episodes
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.errors import DfmlError, Interrupted, LearnerLost, RejectedError, UsageError
from ray_dfml.evaluate import EvalConfig
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import State, World
from ray_dfml.pipeline import Labelled, Score
from ray_dfml.runtime import checkpoint
from ray_dfml.runtime.local import LocalSession
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.types import ImageSpec, TeacherCard

Teachers = dict[str, tuple[TeacherCard, np.ndarray, np.ndarray]]

LEARNER_LIVES = 3
"""Deaths of the learner's process in one round before the run fails."""


class Session(Protocol):
    """A trainer somewhere."""

    def start(self, state: State | None) -> None:
        """Make the trainer, from a state or from the seed."""
        ...

    def call(self, name: str, *args: Any) -> Any:
        """A trainer method's result; LearnerLost if its process died."""
        ...

    def close(self) -> None:
        """Stop what the session started."""
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is computed. None of it changes the numbers."""

    backend: str = "ray"
    workers: int = 1
    gpus_per_worker: float = 0.0
    threads: int = 1

    def session(
        self, config: RunConfig, world: World, sets: Sequence[Labelled], teachers: Mapping[str, Any]
    ) -> Session:
        """A session of this kind, not yet started. Ray is imported only if it is asked for."""
        tree = config.model_dump(mode="json")
        if self.backend == "local":
            return LocalSession(tree, world, sets, teachers, threads=self.threads)
        from ray_dfml.runtime.cluster import RaySession

        return RaySession(
            tree, world, sets, teachers,
            workers=self.workers, gpus_per_worker=self.gpus_per_worker, threads=self.threads,
        )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the usable teachers with their weights, the real sets, and what was refused."""

    world: World
    sets: list[Labelled]
    teachers: Teachers
    rejected: dict[str, str]
    pools: list[dict[str, Any]]
    data: list[dict[str, Any]]


def read_inputs(config: RunConfig) -> Inputs:
    """Open pools and data. Raises RejectedError or UsageError where they do not fit the method or each other."""
    teachers: Teachers = {}
    rejected: dict[str, str] = {}
    pools = []
    for number, path in enumerate(config.pool):
        pool = Pool.open(Path(path))
        pools.append({"path": path, "sha256": pool.sha256(), "teachers": len(pool.cards)})
        for card in pool.cards:
            id = card.id if len(config.pool) == 1 else f"{number}:{card.id}"
            try:
                if card.access != "weights":
                    raise RejectedError(f"{config.name} needs weights, this teacher gives {card.access}")
                teachers[id] = (TeacherCard(**{**vars(card), "id": id}), *pool.load(card.id))
            except RejectedError as error:
                rejected[id] = str(error)
    if config.pool and not teachers:
        raise RejectedError(
            f"no usable teacher in {', '.join(config.pool)}: {next(iter(rejected.values()), 'it is empty')}"
        )
    loaded = {spec: datasets.load(spec) for spec in config.data}
    cards = tuple(card for card, _, _ in teachers.values())
    image, way = _shape(config, cards, loaded)
    sets = []
    for spec, one in loaded.items():
        if one.shape != image.shape:
            raise UsageError(f"--data {spec}: images are {_size(one.shape)}, the learner takes {_size(image.shape)}")
        for split in ("val", "test"):
            part = one.subset(split)
            check_episodes(part.labels, f"--data {spec}, split {split}", way, config.eval)
            sets.append(Labelled(spec, split, np.ascontiguousarray(part.images), part.labels))
    real: dict[str, np.ndarray] = {}
    if config.name == "maml-oracle":
        if not loaded:
            raise UsageError("maml-oracle trains on real images: name them with --data")
        for spec, one in loaded.items():
            part = one.subset("train")
            real |= {f"{spec}/{c}": part.images[part.labels == i] for i, c in enumerate(part.class_names)}
    world = World(cards=cards, arch=config.learner.arch, image=image, way=way, seed=config.seed, real=real)
    METHODS[config.name].init(config.method, world)  # refuses here, in the driver, what it cannot start from
    data = [
        {
            "spec": spec,
            "md5": one.source.get("md5") or one.source.get("pixels_md5"),
            "licence": one.source.get("licence"),
        }
        for spec, one in loaded.items()
    ]
    return Inputs(world, sets, teachers, rejected, pools, data)


def check_episodes(labels: np.ndarray, what: str, way: int, cfg: EvalConfig) -> None:
    """Raises UsageError where the labels [n] of a split cannot make the episodes that the configuration asks for."""
    for shot in cfg.shots:
        try:
            episodes.draw(labels, way=way, shot=shot, query=cfg.query, seed=cfg.seed, index=0)
        except ValueError as error:
            raise UsageError(f"{what}: {error}; change eval.shots or eval.query, or the way") from None


def _shape(
    config: RunConfig, cards: Sequence[TeacherCard], loaded: Mapping[str, datasets.ImageSet]
) -> tuple[ImageSpec, int]:
    if cards:
        first = cards[0]
        for card in cards:
            if (card.image, len(card.classes)) != (first.image, len(first.classes)):
                raise UsageError(
                    f"teachers of one run must agree in input, normalisation and number of classes: {first.id} takes "
                    f"{_size(first.image.shape)} and has {len(first.classes)} classes, {card.id} takes "
                    f"{_size(card.image.shape)} and has {len(card.classes)}; split the pool"
                )
        return first.image, len(first.classes)
    if not loaded:
        raise UsageError(f"{config.name}: name a pool with --pool, or data with --data")
    one = next(iter(loaded.values()))
    channels, height, width = one.shape
    return ImageSpec(channels=channels, height=height, width=width, mean=one.mean, std=one.std), 5


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C, so that a cluster's grace period ends in a clean stop."""
    before = signal.getsignal(signal.SIGTERM)
    _arm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _arm() -> None:
    """Take SIGTERM, also after a session was made: Ray installs a handler of its own that ends the process at once."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def run(
    config: RunConfig, inputs: Inputs, folder: RunFolder, machine: Machine, progress: Progress
) -> list[dict[str, Any]]:
    """Train to the end (from the last checkpoint, if there is one), test, export. Returns the rows of `scores.json`.

    Raises Interrupted after Ctrl-C or SIGTERM (resumable), LearnerLost when the learner keeps dying, and whatever a
    method raises; `status.json` says which.
    """
    with folder.locked(), _interruptible():
        try:
            return _run(config, inputs, folder, machine, progress)
        except KeyboardInterrupt:
            folder.status(state="interrupted", last_error="stopped by the user")
            raise Interrupted(
                f"interrupted; continue with: ray-dfml train {config.name} --run-dir {folder.path} --resume"
            ) from None
        except Exception as error:
            folder.status(state="failed", last_error=f"{type(error).__name__}: {error}".splitlines()[0])
            raise


def _run(
    config: RunConfig, inputs: Inputs, folder: RunFolder, machine: Machine, progress: Progress
) -> list[dict[str, Any]]:
    rounds = config.method.rounds
    every = config.eval.every or max(1, math.ceil(rounds / 20))
    folder.status(state="starting", rounds=rounds, rejected=inputs.rejected)
    session = machine.session(config, inputs.world, inputs.sets, inputs.teachers)
    _arm()
    try:
        r, state = _last(folder)
        session.start(state)
        folder.truncate_log(r)
        began, first, lives = time.perf_counter(), r, LEARNER_LIVES
        busy = 0.0
        progress.start(rounds, r)
        while r < rounds:
            try:
                called = time.perf_counter()
                row: dict[str, Any] = {"round": r} | session.call("round", r)
                row["validation"] = session.call("validate", r) if r % every == every - 1 or r == rounds - 1 else None
                busy += time.perf_counter() - called
                snapshot = session.call("snapshot")
            except LearnerLost as error:
                lives -= 1
                if not lives:
                    raise
                folder.status(last_error=f"learner restarted in round {r}: {error}")
                r, state = _last(folder)
                session.start(state)
                folder.truncate_log(r)
                continue
            lives = LEARNER_LIVES
            folder.log(row)
            checkpoint.save(folder.checkpoints, r, snapshot)
            r += 1
            elapsed = time.perf_counter() - began
            eta = elapsed / (r - first) * (rounds - r)
            folder.status(
                state="running", round=r, seconds=round(elapsed, 3), eta_seconds=round(eta, 1),
                driver_share=round(1 - busy / elapsed, 5), rejected=inputs.rejected | snapshot["rejected"],
            )  # fmt: skip
            progress.round(r, eta, row)
        _export(config, inputs.world, folder.path, session.call("snapshot"))
        progress.note("testing")
        try:
            scores = _test(session, config.name)
        except LearnerLost:
            session.start(_last(folder)[1])
            scores = _test(session, config.name)
        rows = folder.write_scores(scores, config.profile)
        folder.status(state="done", last_error=None, rejected=inputs.rejected | session.call("snapshot")["rejected"])
        return rows
    finally:
        progress.stop()
        session.close()


def _last(folder: RunFolder) -> tuple[int, State | None]:
    path = checkpoint.latest(folder.checkpoints)
    if path is None:
        return 0, None
    done, state = checkpoint.load(path)
    return done + 1, state


def _test(session: Session, method: str) -> list[Score]:
    """Scores of the selected weights, of the last ones, on request of the best on test; then `random`. Equal weights
    are scored once."""
    state = session.call("snapshot")
    best = state["best"]
    scores: list[Score] = session.call("test", "val") if best else []
    if best and np.array_equal(best["theta"], state["theta"]):
        scores += [replace(score, selection="last") for score in scores]
    else:
        scores += session.call("test", "last")
    if state["test_best"]:
        scores += session.call("test", "test-best")
    return scores if method == "random" else scores + session.call("baseline")


def _export(config: RunConfig, world: World, folder: Path, state: State) -> None:
    chosen = state["best"] or state
    if not np.isfinite(np.asarray(chosen["theta"])).all():
        raise DfmlError(f"{folder}: the learner's weights are not finite; lower the learning rates")
    learner.export(
        folder,
        theta=chosen["theta"],
        stats=chosen["stats"],
        arch=chosen.get("arch", world.arch),
        image=world.image,
        way=chosen.get("outputs", world.way),
        method=config.name,
        bn=config.eval.bn,
        steps=config.eval.steps,
        lr=config.eval.lr,
        selection="val" if state["best"] else "last",
        profile=config.profile,
        seed=config.seed,
    )
