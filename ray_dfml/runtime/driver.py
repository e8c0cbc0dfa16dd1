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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ray_dfml import learner
from ray_dfml.config import RunConfig
from ray_dfml.errors import DfmlError, Interrupted, LearnerLost
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import State, World
from ray_dfml.runtime import checkpoint
from ray_dfml.runtime.inputs import Inputs as Inputs
from ray_dfml.runtime.inputs import read_inputs as read_inputs
from ray_dfml.runtime.local import LocalSession
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.runtime.shard import Loaded
from ray_dfml.scorer import Entry, Scorer, Step
from ray_dfml.types import Labelled, Score

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
    scorer = Scorer(
        config.eval, way=inputs.world.way, head=inputs.world.head, ask=lambda part: session.call("score", part),
        val=[(one.data, one.split) for one in inputs.sets if one.split == "val"],
        test=[(one.data, one.split) for one in inputs.sets if one.split == "test"],
    )  # fmt: skip
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
                row["validation"] = _validate(config, session, scorer, r) if config.validates(r) else None
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
            scores, steps = _finish(config, folder.path, session, scorer)
        except LearnerLost:
            session.start(saved.state)
            scores, steps = _finish(config, folder.path, session, scorer)
        rows = folder.write_scores(scores, config.profile)
        folder.status(
            state="done", last_error=None, rejected=inputs.rejected | session.call("snapshot")["rejected"],
            test_step=[asdict(step) for step in steps],
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


def _validate(config: RunConfig, session: Session, scorer: Scorer, r: int) -> float | None:
    """Accuracy of the weights of round `r` on validation episodes; the best so far are kept. None without data, and for
    weights that are no candidate."""
    if not config.data or not session.call("learned"):
        return None
    last, reading = session.call("candidates")["last"], METHODS[config.name].READINGS[-1]
    accuracy = scorer.validate(last, reading)
    session.call("keep", "val", accuracy, r)
    if config.eval.test_best:
        session.call("keep", "test-best", scorer.validate(last, reading, on_test=True), r)
    return accuracy


def _finish(config: RunConfig, folder: Path, session: Session, scorer: Scorer) -> tuple[list[Score], list[Step]]:
    """Export the selected weights with the step size chosen for them, then test. Scores, and the steps they are of."""
    candidates = session.call("candidates")
    selection = "val" if "val" in candidates else "last"
    chosen = session.call("weights", selection)
    if not chosen.finite:
        raise DfmlError(f"{folder}: the learner's weights are not finite; lower the learning rates")
    learner.export(
        folder, replace(chosen, lr=scorer.step(chosen.digest)), method=config.name, bn=config.eval.bn,
        selection=selection, profile=config.profile, seed=config.seed,
    )  # fmt: skip
    entries = _entries(config.name, candidates)
    return scorer.test(entries), scorer.steps(entries)


def _entries(method: str, candidates: Mapping[str, str]) -> list[Entry]:
    """What is tested: the selected weights, the last ones, on request the best on test; then `random`."""
    own = [name for name in ("val", "last", "test-best") if name in candidates]
    entries = [
        Entry(method=method, selection=name, weights=candidates[name], readings=METHODS[method].READINGS)
        for name in own
    ]  # fmt: skip
    if method != "random":
        entries.append(Entry(method="random", selection="last", weights=candidates["random"], readings=("finetune",)))
    return entries
