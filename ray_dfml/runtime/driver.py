"""The driver: starts a session, watches it, logs, checkpoints, and begins again from a checkpoint where the learner
died.

It holds no mathematics and takes under 1 % of a round. Whatever the session is, the sequence of calls is the same, so
the final weights are the same bits.
"""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ray_dfml import learner
from ray_dfml.config import RunConfig
from ray_dfml.errors import DfmlError, Interrupted, LearnerLost
from ray_dfml.methods.base import State, World, learner_image
from ray_dfml.pipeline import Labelled, Score
from ray_dfml.runtime import checkpoint
from ray_dfml.runtime.inputs import Inputs as Inputs
from ray_dfml.runtime.inputs import read_inputs as read_inputs
from ray_dfml.runtime.local import LocalSession
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.runtime.shard import Loaded

LEARNER_LIVES = 3
"""Deaths of the learner's process in one round before the run fails."""

CHEAP = 0.1
"""A checkpoint that takes so many seconds or less is written after every round."""

CHECKPOINT_SHARE = 0.05
"""Of the time that a run may spend on larger ones: they wait until the rounds since the last took long enough."""


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
    """Where a run is computed. None of it changes the numbers, unless a limit of time rejects a teacher."""

    backend: str = "ray"
    workers: int = 1
    gpus_per_worker: float = 0.0
    threads: int = 1
    job_seconds: float | None = None
    """Longest time that one job, or one batch of them on a GPU, may take under Ray; None for any."""

    def notes(self) -> list[str]:
        """What of this can change which teachers are used, and so the numbers."""
        limit = self.job_seconds
        return [] if limit is None else [f"a job that takes over {limit:g} s counts as one that killed its process"]

    def session(
        self, config: RunConfig, world: World, sets: Sequence[Labelled], teachers: Mapping[str, Loaded]
    ) -> Session:
        """A session of this kind, not yet started. Ray is imported only if it is asked for."""
        tree = config.model_dump(mode="json")
        if self.backend == "local":
            return LocalSession(tree, world, sets, teachers, threads=self.threads)
        from ray_dfml.runtime.cluster import Cluster, RaySession

        cluster = Cluster(workers=self.workers, gpus_per_worker=self.gpus_per_worker, threads=self.threads)
        return RaySession(tree, world, sets, teachers, cluster, threads=self.threads, job_seconds=self.job_seconds)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C, so that a cluster's grace period ends in a clean stop."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


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
    notes = [*inputs.notes, *machine.notes()]
    folder.status(state="starting", rounds=rounds, rejected=inputs.rejected, notes=notes)
    for line in notes:
        progress.note(line)
    saved = _Saved(folder)
    session = machine.session(config, inputs.world, inputs.sets, inputs.teachers)
    try:
        session.start(saved.state)
        r = saved.rounds
        folder.truncate_log(r)
        began, first, lives = time.perf_counter(), r, LEARNER_LIVES
        busy = 0.0
        progress.start(rounds, r)
        while r < rounds:
            try:
                called = time.perf_counter()
                row: dict[str, Any] = {"round": r} | session.call("round", r)
                row["validation"] = session.call("validate", r) if config.validates(r) else None
                busy += time.perf_counter() - called
                snapshot = session.call("snapshot")
            except LearnerLost as error:
                lives -= 1
                if not lives:
                    raise
                folder.status(last_error=f"learner restarted in round {r}: {error}")
                session.start(saved.state)
                continue
            lives = LEARNER_LIVES
            folder.log(row)
            r += 1
            saved.keep(r, snapshot, last=r == rounds)
            elapsed = time.perf_counter() - began
            eta = elapsed / (r - first) * (rounds - r)
            folder.status(
                state="running", round=r, seconds=round(elapsed, 3), eta_seconds=round(eta, 1),
                driver_share=round(1 - busy / elapsed, 5), rejected=inputs.rejected | snapshot["rejected"],
            )  # fmt: skip
            progress.round(r, eta, row)
        progress.note("testing")
        try:
            scores = _finish(config, inputs.world, folder.path, session)
        except LearnerLost:
            session.start(saved.state)
            scores = _finish(config, inputs.world, folder.path, session)
        rows = folder.write_scores(scores, config.profile)
        folder.status(
            state="done", last_error=None, rejected=inputs.rejected | session.call("snapshot")["rejected"],
            test_step=session.call("step_sizes"),
        )  # fmt: skip
        return rows
    except (KeyboardInterrupt, DfmlError, FloatingPointError):
        with suppress(OSError):  # a full disk costs these rounds; what ended the run is the news
            saved.write()
        raise
    finally:
        progress.stop()
        session.close()


class _Saved:
    """The state after the last round, in memory, and on disk as often as CHEAP and CHECKPOINT_SHARE allow."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder.checkpoints
        self.rounds, self.state = _last(folder)
        self._written, self._at, self._took = self.rounds, time.perf_counter(), 0.0

    def keep(self, rounds: int, state: State, *, last: bool) -> None:
        """The state after so many rounds; the last one is always written."""
        self.rounds, self.state = rounds, state
        if last or self._took <= CHEAP or time.perf_counter() - self._at >= self._took / CHECKPOINT_SHARE:
            self.write()

    def write(self) -> None:
        """Write the state unless it is on disk already."""
        if self.state is None or self._written == self.rounds:
            return
        began = time.perf_counter()
        checkpoint.save(self._folder, self.rounds - 1, self.state)
        self._written, self._at = self.rounds, time.perf_counter()
        self._took = self._at - began


def _last(folder: RunFolder) -> tuple[int, State | None]:
    path = checkpoint.latest(folder.checkpoints)
    if path is None:
        return 0, None
    done, state = checkpoint.load(path)
    return done + 1, state


def _finish(config: RunConfig, world: World, folder: Path, session: Session) -> list[Score]:
    """Export the selected weights with the step size chosen for them, then test."""
    state = session.call("snapshot")
    _export(config, world, folder, state, session.call("step_size", "val" if state["best"] else "last"))
    return _test(session, config.name)


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


def _export(config: RunConfig, world: World, folder: Path, state: State, lr: float) -> None:
    chosen = state["best"] or state
    if not np.isfinite(np.asarray(chosen["theta"])).all():
        raise DfmlError(f"{folder}: the learner's weights are not finite; lower the learning rates")
    learner.export(
        folder,
        theta=chosen["theta"],
        stats=chosen["stats"],
        arch=chosen.get("arch", world.arch),
        image=learner_image(world, chosen),
        way=chosen.get("outputs", world.way),
        method=config.name,
        bn=config.eval.bn,
        steps=config.eval.steps,
        lr=lr,
        head=world.head,
        selection="val" if state["best"] else "last",
        profile=config.profile,
        seed=config.seed,
    )
