"""The driver starts a session, runs its rounds, writes the logs, and starts the learner again if it died.

It has no mathematics and no state, and takes less than 1 % of a round. The sequence of calls is the same for every kind
of session, so the final weights have the same bits.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray_dfml.config import RunConfig
from ray_dfml.errors import BudgetReached, DfmlError, Interrupted, LearnerLost, NobodyLeft, shown_reason
from ray_dfml.methods import METHODS
from ray_dfml.runtime.assess import Assessment
from ray_dfml.runtime.assess_students import StudentAssessment
from ray_dfml.runtime.inputs import Inputs as Inputs
from ray_dfml.runtime.inputs import read_inputs as read_inputs
from ray_dfml.runtime.learning import Done
from ray_dfml.runtime.local import LocalSession
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.runtime.stalls import AtWork, Stall, Watch
from ray_dfml.scorer import Step
from ray_dfml.types import Score, Spent

if TYPE_CHECKING:
    from ray_dfml.runtime.cluster import Cluster

BUDGET = "budget"
"""The state of a run that a budget ended, in `status.json`."""

TRAINED = "trained"
"""The state of a run that has trained to its end and was not to be tested, in `status.json`."""

STOPPED = "stopped"
"""The state of a run that `on_round` ended before its last round, in `status.json`."""

OnRound = Callable[[Mapping[str, Any]], bool]
"""Gets the metrics of a round when its state is on disk. Returns whether the run goes on."""

LEARNER_LIVES = 3
"""How many times the learner's process may die in one round: the last of these deaths ends the run."""


class Session(Protocol):
    """A learner, in this process or another one. It keeps the state and the checkpoints, and returns figures."""

    notes: Sequence[str]
    """What a reader must know of how the work is done, one line each."""

    def start(self) -> Done:
        """Make the learner from its last checkpoint, or from the seed. Returns how far the run is."""
        ...

    def call(self, name: str, *args: Any) -> Any:
        """Call a method of the trainer. Raises LearnerLost if its process died."""
        ...

    def save(self, rounds: int, row: dict[str, Any]) -> Done:
        """Write a checkpoint after `rounds` rounds, with the metrics `row` of the last one. Raises LearnerLost."""
        ...

    def spent(self) -> dict[str, Spent]:
        """What was asked of each teacher so far, after writing it to `ledger.jsonl`. Empty if the run asks nobody."""
        ...

    def at_work(self) -> Sequence[AtWork]:
        """What the shards are at, as it is known here. Any thread may ask."""
        ...

    def close(self) -> None:
        """Stop what the session started."""
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is computed. This changes no number, unless `job_seconds` rejects a teacher."""

    backend: str = "ray"
    workers: int = 1
    gpus_per_worker: float = 0.0
    gpus_per_learner: float = 0.0
    """Share of a GPU for the learner's own work."""
    job_seconds: float | None = None
    """Longest time that one job, or one batch of jobs on a GPU, may take under Ray; None means no limit."""

    def notes(self) -> list[str]:
        """Lines about what can change which teachers are used, and so the numbers."""
        limit = self.job_seconds
        return [] if limit is None else [f"a job that takes over {limit:g} s counts as one that killed its process"]

    def cluster(self, store_bytes: int) -> "Cluster":
        """The cluster that this machine asks for. It is not started yet, and Ray is imported here only."""
        from ray_dfml.runtime.cluster import Cluster

        return Cluster(
            workers=self.workers, gpus_per_worker=self.gpus_per_worker, gpus_per_learner=self.gpus_per_learner,
            store_bytes=store_bytes,
        )  # fmt: skip

    def session(self, config: RunConfig, inputs: Inputs, folder: Path, cluster: "Cluster | None" = None) -> Session:
        """A session of the run in `folder`, on this machine, that is not started yet; in `cluster`, if it is given."""
        values = config.model_dump(mode="json")
        arguments = (values, inputs.world, inputs.sets, inputs.teachers, folder, inputs.accounts)
        if self.backend == "local":
            return LocalSession(*arguments, on_device=self.gpus_per_learner > 0)
        from ray_dfml.runtime.cluster import STORE_BYTES, RaySession

        cluster = cluster or self.cluster(STORE_BYTES + inputs.held_bytes())
        return RaySession(*arguments, cluster, job_seconds=self.job_seconds)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM act as Ctrl-C, so that a run stops cleanly within the grace period of a cluster."""

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
    config: RunConfig, inputs: Inputs, folder: RunFolder, machine: Machine, progress: Progress,
    cluster: "Cluster | None" = None, on_round: OnRound | None = None, test: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train to the end, from the last checkpoint if there is one; export and test. Returns the rows of `scores.json`.

    With Ray the run uses `cluster`, or starts one. Without `test` the run ends after its last round, or after the round
    at which `on_round` ends it; it is then validated only, and a later run in this folder goes on from there.

    If a budget is reached, or no teacher is left, the rounds that are done are exported and tested before BudgetReached
    or NobodyLeft is raised. Raises Interrupted after Ctrl-C or SIGTERM (the run can be resumed), LearnerLost if the
    learner keeps dying, and whatever a method raises; `status.json` records it.
    """
    with folder.locked(), interruptible():
        try:
            return _run(config, inputs, folder, machine, progress, cluster, on_round, test)
        except BudgetReached:
            raise
        except KeyboardInterrupt:
            _note_interrupt(folder)
            raise Interrupted(
                f"interrupted; continue with: ray-dfml train {config.name} --run-dir {folder.place} --resume"
            ) from None
        except Exception as error:
            code = error.exit_code if isinstance(error, DfmlError) else DfmlError.exit_code
            folder.status(
                state="failed", last_error=f"{type(error).__name__}: {error}".splitlines()[0], exit_code=code
            )  # fmt: skip
            raise


def _note_interrupt(folder: RunFolder) -> None:
    folder.status(state="interrupted", last_error="stopped by the user", exit_code=Interrupted.exit_code)


def _run(
    config: RunConfig, inputs: Inputs, folder: RunFolder, machine: Machine, progress: Progress,
    cluster: "Cluster | None", on_round: OnRound | None, test: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    notes = [*inputs.notes, *machine.notes()]
    folder.status(
        state="starting", rounds=config.total_rounds, rejected=inputs.rejected, notes=notes, exit_code=None
    )  # fmt: skip
    for line in notes:
        progress.note(line)
    folder.publish()
    if inputs.accounts.asked:
        inputs.accounts.check_ledger(folder.path, folder.read_status().get("queries", {}))
    session = machine.session(config, inputs, folder.path, cluster)
    if session.notes:
        folder.status(notes=[*notes, *session.notes])
        for line in session.notes:
            progress.note(line)
    shards = machine.workers if machine.backend == "ray" else 1
    kind = StudentAssessment if METHODS[config.name].students else Assessment
    assessment = kind(config, inputs, session.call, progress, shards=shards)
    try:
        done, stopped = _train(config, inputs, folder, session, assessment, progress, on_round)
        if not test:
            if isinstance(stopped, NobodyLeft):
                raise stopped
            whole = stopped is not None or done.rounds >= config.total_rounds
            folder.status(
                state=TRAINED if whole else STOPPED, last_error=stopped and str(stopped),
                exit_code=stopped.exit_code if stopped else 0,
            )  # fmt: skip
            return []
        if stopped is not None:
            _note_end(folder, done, stopped, progress)
        folder.status(state="testing")
        folder.publish()
        progress.note("testing")
        try:
            left_out = session.call("rejected")
            scores, steps = _assess(config, folder, assessment, done)
        except LearnerLost:
            done = session.start()
            left_out = done.rejected
            scores, steps = _assess(config, folder, assessment, done)
        rows = folder.write_scores(scores, config.profile)
        behind = {"behind": session.call("behind")} if METHODS[config.name].students else {}
        ended = "done" if stopped is None else BUDGET if isinstance(stopped, BudgetReached) else "failed"
        folder.status(
            state=ended, last_error=stopped and str(stopped), exit_code=stopped.exit_code if stopped else 0,
            rejected=inputs.rejected | left_out,
            test_step=[asdict(step) for step in steps], **behind,
        )  # fmt: skip
        if stopped is not None:
            raise stopped
        return rows
    except KeyboardInterrupt:
        _note_interrupt(folder)  # before what takes time: whoever stops a job gives it some seconds
        if folder.remote:
            folder.remote.publish_once()
        raise
    finally:
        progress.stop()
        session.close()
        if inputs.accounts.asked:
            folder.spent(inputs.accounts.settled(folder.path))


def _assess(
    config: RunConfig, folder: RunFolder, assessment: Assessment | StudentAssessment, done: Done
) -> tuple[list[Score], list[Step]]:
    """Export and test. The last round is validated first if the run ended early, after a round that was not."""
    last = done.rounds - 1
    if not config.validates(last):
        assessment.validate(last)
    return assessment.finish(folder.path)


def _note_end(folder: RunFolder, done: Done, stopped: DfmlError, progress: Progress) -> None:
    """Say what ended the run early. Raises it if no round is done, since nothing is learned yet."""
    if not done.rounds:
        if isinstance(stopped, NobodyLeft):
            raise stopped
        folder.status(state=BUDGET, last_error=str(stopped), exit_code=stopped.exit_code)
        raise BudgetReached(f"{stopped}; no round is done, so there is no learner yet: raise it and --resume")
    progress.note(f"{stopped}; the learner of {done.rounds} rounds is kept")


def _train(
    config: RunConfig,
    inputs: Inputs,
    folder: RunFolder,
    session: Session,
    assessment: Assessment | StudentAssessment,
    progress: Progress,
    on_round: OnRound | None,
) -> tuple[Done, BudgetReached | NobodyLeft | None]:
    """Run the rounds that are not done, up to the last one, or to the end of a budget or of the teachers.

    `on_round` may end them before.

    Returns how far the run is, and what ended it early.

    The state is on disk after each round, so at most one round is repeated, whatever ends the run.
    """
    rounds, lives, busy = config.total_rounds, LEARNER_LIVES, 0.0
    done, news = _begin(folder, session)
    first = done.rounds
    progress.start(rounds + done.missed, first)
    began = time.perf_counter()
    watch = Watch(session.at_work, partial(_tell_stall, folder, progress))
    while done.rounds < rounds + done.missed:
        if news and on_round is not None and not on_round(done.row):
            break
        r, called = done.rounds, time.perf_counter()
        try:
            with watch.round(r + 1):
                row: dict[str, Any] = {"round": r} | session.call("round", r)
                row["validation"] = assessment.validate(r) if config.validates(r) else None
            done = session.save(r + 1, row)
        except (BudgetReached, NobodyLeft) as error:
            return done, error
        except LearnerLost as error:
            lives -= 1
            if not lives:
                raise
            folder.status(last_error=f"learner restarted in round {r}: {error}")
            done, news = _begin(folder, session)
            continue
        lives, news = LEARNER_LIVES, False
        busy += time.perf_counter() - called
        folder.log(row)
        _tell(folder, done, progress)
        elapsed = time.perf_counter() - began
        eta = elapsed / (done.rounds - first) * (rounds + done.missed - done.rounds)
        folder.status(
            state="running", round=done.rounds, rounds=rounds + done.missed, seconds=round(elapsed, 3),
            eta_seconds=round(eta, 1), driver_share=round(1 - busy / elapsed, 5),
            rejected=inputs.rejected | done.rejected, stalled=None,
            checkpoint=asdict(done.saved) if done.saved else None,
        )  # fmt: skip
        spent = session.spent() if inputs.accounts.asked else {}
        if inputs.accounts.asked:
            folder.spent(spent)
        folder.publish()
        progress.round(done.rounds, eta, row, sum(one.sent for one in spent.values()))
        if on_round is not None and not on_round(row):
            break
    return done, None


def _tell_stall(folder: RunFolder, progress: Progress, stall: Stall) -> None:
    """Say that a round stalls, and write it to `status.json`."""
    progress.note(stall.said)
    at_work = [asdict(one) | {"seconds": round(one.seconds, 1)} for one in stall.at_work]
    with suppress(OSError):  # the end of the round meets the same disk, and says so
        folder.status(
            stalled={"round": stall.round, "seconds": round(stall.seconds, 1), "at_work": at_work, "said": stall.said}
        )  # fmt: skip
    if folder.remote:
        folder.remote.publish_once()


def _tell(folder: RunFolder, done: Done, progress: Progress) -> None:
    """Say which teachers the last round left out, and what is new in how the work goes, and note the latter."""
    status = folder.read_status()
    left_out, notes = status.get("rejected") or {}, status.get("notes") or []
    for id, why in done.rejected.items():
        if id not in left_out:
            progress.note(f"left out: {shown_reason(id, why)}")
    new = [line for line in done.notes if line not in notes]
    for line in new:
        progress.note(line)
    if new:
        folder.status(notes=[*notes, *new])


def _begin(folder: RunFolder, session: Session) -> tuple[Done, bool]:
    """Start the session, and let the log and the status say how far it is.

    Returns how far it is, and whether its last round is news, since a process died between checkpoint and status.
    """
    done = session.start()
    folder.resume_log(done.rounds, done.row)
    status = folder.read_status()
    said = status.get("round") or 0
    if said != done.rounds or status.get("stalled"):
        folder.status(round=done.rounds, stalled=None)
    return done, done.rounds > said
