"""Sweeps whose trials run one after another in this process, in the place of Ray Tune: what is decided between trials.

Each sweep is interrupted after some trials and resumed, and compared with one that is not.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.errors import Interrupted
from ray_dfml.sweeps import ray_tune, trial
from ray_dfml.sweeps.trial import Task
from tests.runtime import toy
from tests.sweeps.conftest import SweepFile
from tests.sweeps.test_sweep import rows_of


class InTurn:
    """Stands in for Ray Tune: it runs tasks one after another. The one with number `stop_at` is interrupted."""

    def __init__(self) -> None:
        self.count, self.stop_at = 0, -1

    @contextlib.contextmanager
    def connected(self, machine: Any) -> Iterator[None]:
        yield

    def run(self, tasks: Sequence[Task], *_: Any, on_end: Callable[[Task, str | None], None], **__: Any) -> None:
        for task in tasks:
            self.count += 1
            stopping = self.count == self.stop_at

            def tell(row: Any, stopping: bool = stopping) -> bool:
                if stopping:
                    raise KeyboardInterrupt
                return True

            with contextlib.suppress(Interrupted, KeyboardInterrupt):
                trial.test(task) if task.test else trial.train(task, tell)
            if stopping:
                raise KeyboardInterrupt
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


@pytest.mark.parametrize(("kind", "stop_at", "folders"), [("pbt", 5, 5), ("optuna", 4, 5)])
def test_an_interrupted_sweep_that_is_resumed_equals_the_undisturbed_one(
    in_turn: InTurn, tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done], kind: str, stop_at: int,
    folders: int,
) -> None:  # fmt: skip
    """With PBT two members have gone on in new folders; Optuna's second batch is proposed from its first one."""
    settings = sweep_file.settings()
    settings["method"] |= {"steps": 1, "rounds": 5}
    settings["eval"] |= {"lrs": [], "lr": 1e-9}  # so that validations differ
    words = ("tune", sweep_file(set=settings, **SWEEPS[kind]), "--backend", "local", "--run-dir")
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
