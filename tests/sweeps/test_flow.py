"""Sweeps whose trials run one after another in this process, in the place of Ray Tune: what is decided between trials.

Each sweep is interrupted after some trials and resumed, and compared with one that is not.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.errors import Interrupted
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.sweeps import ray_tune, trial
from ray_dfml.sweeps.trial import Task
from tests.runtime import toy
from tests.sweeps.conftest import SweepFile
from tests.sweeps.test_sweep import rows_of


class InTurn:
    """Stands in for Ray Tune: it runs tasks one after another. The one with number `stop_at` is interrupted.

    The task named `fails` fails at once, and the one named `late` is stopped after two rounds. With `killed` the
    process of a trial dies before it can say how it ended.
    """

    def __init__(self) -> None:
        self.count, self.stop_at, self.fails, self.late, self.killed = 0, -1, "", "", False

    @contextlib.contextmanager
    def connected(self, machine: Any) -> Iterator[None]:
        yield

    def run(self, tasks: Sequence[Task], *_: Any, on_end: Callable[[Task, str | None], None], **__: Any) -> None:
        for task in tasks:
            self.count += 1
            stopping, late = self.count == self.stop_at, task.path.name == self.late
            if task.path.name == self.fails:
                on_end(task, "it fails")
                continue

            def tell(row: Any, stopping: bool = stopping, late: bool = late) -> bool:
                if stopping:
                    raise KeyboardInterrupt
                return not late or row["round"] < 2

            with contextlib.suppress(Interrupted, KeyboardInterrupt):
                trial.test(task) if task.test else trial.train(task, tell)
            if stopping:
                raise KeyboardInterrupt
            if self.killed and not task.test:
                RunFolder(task.path).status(state="starting")
            on_end(task, None)


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> InTurn:
    stand_in = InTurn()
    monkeypatch.setattr(ray_tune, "run", stand_in.run)
    monkeypatch.setattr(ray_tune, "connected", stand_in.connected)
    return stand_in


SPACE = {"method": {"lr_meta": {"loguniform": [1e-4, 1e-2]}}}
SWEEPS: dict[str, dict[str, Any]] = {
    "pbt": {"space": SPACE, "samples": 3, "scheduler": {"type": "pbt", "interval": 2, "quantile": 0.34}},
    "optuna": {"space": SPACE, "samples": 4, "search": "optuna", "batch": 2, "defaults": True},
}


def quick(sweep_file: SweepFile, **changes: Any) -> Path:
    """The file of a sweep of five rounds whose validations differ."""
    settings = sweep_file.settings()
    settings["method"] |= {"steps": 1, "rounds": 5}
    settings["eval"] |= {"lrs": [], "lr": 1e-9}
    return sweep_file(set=settings, **changes)


@pytest.mark.parametrize(("kind", "stop_at", "folders"), [("pbt", 5, 5), ("optuna", 4, 5)])
def test_an_interrupted_sweep_that_is_resumed_equals_the_undisturbed_one(
    in_turn: InTurn, tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done], kind: str, stop_at: int,
    folders: int,
) -> None:  # fmt: skip
    """With PBT two members have gone on in new folders; Optuna's second batch is proposed from its first one."""
    words = ("tune", quick(sweep_file, **SWEEPS[kind]), "--backend", "local", "--run-dir")
    done = command(*words, tmp_path / "whole")
    assert done.code == 0, done.err
    in_turn.count, in_turn.stop_at = 0, stop_at
    stopped = command(*words, tmp_path / "stopped")
    assert stopped.code == 130
    assert toy.status(tmp_path / "stopped")["state"] == "interrupted"
    in_turn.stop_at = -1
    resumed = command(*words, tmp_path / "stopped", "--resume")
    assert resumed.code == 0, resumed.err
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole" / "trials").iterdir())
    assert len(names) == folders
    assert sum("-from" in name for name in names) == (2 if kind == "pbt" else 0)
    for name in names:
        toy.assert_equal(
            toy.last_state(tmp_path / "stopped" / "trials" / name), toy.last_state(tmp_path / "whole" / "trials" / name)
        )


def test_a_member_that_failed_is_not_run_again_once_others_went_on(
    in_turn: InTurn, tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done]
) -> None:
    """Its score would change who takes over from whom, and from states that are no more."""
    words = ("tune", quick(sweep_file, **SWEEPS["pbt"]), "--backend", "local", "--run-dir", tmp_path / "sweep")
    in_turn.fails, in_turn.stop_at = "0001-seed0", 4
    assert command(*words).code == 130
    before = sorted(path.name for path in (tmp_path / "sweep" / "trials").iterdir())
    assert before == ["0000-seed0", "0001-seed0-from2", "0002-seed0"]
    in_turn.fails, in_turn.stop_at = "", -1
    assert command(*words, "--resume").code == 0
    assert not (tmp_path / "sweep" / "trials" / "0001-seed0").exists()


def test_a_trial_of_asha_whose_process_is_killed_as_it_ends_has_not_failed(
    in_turn: InTurn, tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done]
) -> None:
    space = {"method": {"lr_meta": {"grid": [1e-4, 1e-3, 1e-2]}}}
    in_turn.killed, in_turn.late = True, "0002-seed0"
    file = quick(sweep_file, space=space, scheduler={"type": "asha"})
    done = command("tune", file, "--backend", "local", "--run-dir", tmp_path / "sweep")
    assert done.code == 0, done.err
    assert [row["failed"] for row in rows_of(tmp_path / "sweep")] == ["0", "0", "0"]
    best, *others = [row["runs"] for row in rows_of(tmp_path / "sweep")]
    states = {name: toy.status(tmp_path / "sweep" / "trials" / name)["state"] for name in others}
    assert states == {name: "stopped" if name == in_turn.late else "trained" for name in others}
    assert toy.status(tmp_path / "sweep" / "trials" / best)["state"] == "done"
