"""What a user sees while a run is validated and tested."""

import io
from typing import Any

import pytest
from rich.console import Console

from ray_dfml.runtime import progress as module
from ray_dfml.runtime.progress import Progress


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def test_a_stage_prints_one_plain_line_per_interval(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Its share of the work, and the time that the rest will take at this pace. 15 parts of 4 s."""
    shown = Progress()
    with shown.stage("test", 60.0):
        for _ in range(15):
            clock.now += 4.0
            shown.advance(4.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["test 20 %  eta 0:48", "test 40 %  eta 0:36", "test 60 %  eta 0:24", "test 80 %  eta 0:12",
                     "test 100 %  eta 0:00"]  # fmt: skip


def test_a_short_stage_prints_nothing_and_hides_no_round(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.start(9, 0)
    for r in range(1, 5):
        clock.now += 6.0
        with shown.stage("validation", 2.0):
            clock.now += 1.0
            shown.advance(2.0)
        shown.round(r, 60.0, {"validation": 50.0})
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == ["round 1/9", "round 3/9"]


def test_work_outside_a_stage_is_not_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    clock.now += 100.0
    shown.advance(1.0)
    assert capsys.readouterr().err == ""


def test_a_quiet_stage_is_not_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(quiet=True)
    with shown.stage("test", 2.0):
        clock.now += 100.0
        shown.advance(1.0)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_the_stage_below_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(module, "Console", lambda **_: terminal)
    shown = Progress()
    shown.start(4, 0)
    shown.round(1, 30.0, {"validation": 51.0})
    live: Any = shown._live
    with shown.stage("validation", 10.0):
        shown.advance(5.0)
        live.refresh()
        tasks = [(task.fields["head"], task.completed, task.total) for task in live.tasks]
        assert tasks == [("round 1/4", 1, 4), ("validation", 5.0, 10.0)]
    assert [task.fields["head"] for task in live.tasks] == ["round 1/4"]
    shown.stop()
    assert "50 %" in screen.getvalue()
    assert "validation 51.0 %" in screen.getvalue()


def test_a_stage_alone_has_a_display_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray-dfml evaluate` has no rounds."""
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    shown = Progress()
    with shown.stage("evaluation", 10.0):
        shown.advance(10.0)
    shown.stop()
    assert shown._live is None
    assert "evaluation" in screen.getvalue()
