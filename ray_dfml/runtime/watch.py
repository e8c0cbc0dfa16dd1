"""Reads how runs stand from their folders alone, on any machine that sees them, and shows them as local runs do."""

import datetime
import time
from collections.abc import Callable
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from ray_dfml.errors import ResourceError, shown_reason
from ray_dfml.methods import METHODS
from ray_dfml.runtime.progress import Progress, round_line
from ray_dfml.runtime.rundir import RunFolder

PATIENCE = 120.0
"""How many seconds a store may refuse to show a run that is followed."""

EVERY_SECONDS = 1.0
"""How often a folder that is followed is read."""

LONG_SECONDS = 60.0
"""A run that has said nothing for longer than this, and than ten of its rounds, may be dead."""


def summary(folder: RunFolder) -> list[str]:
    """How a run stands, in lines: method and state, its last round, what it said, and whether it is silent."""
    status, method = folder.read_status(), folder.config().name
    over = status.get("exit_code") is not None
    lines = [f"{method}: {status.get('state')}" + (f", exit code {status['exit_code']}" if over else "")]
    for row in folder.rows()[-1:]:
        eta = 0.0 if over else status.get("eta_seconds") or 0.0
        lines.append(
            "  ".join(
                round_line(METHODS[method].shown, status.get("rounds") or 0, row["round"] + 1, eta, row, _sent(status))
            )
        )
    return lines + _remarks(status) + last(status)


def patiently(refresh: Callable[[], object], note: Callable[[str], None]) -> None:
    """Call `refresh`, and again for PATIENCE seconds while a store does not answer; `note` is told of the first time.

    Raises ResourceError if it still does not.
    """

    def say(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            note(f"{state.outcome.exception()}; trying again for {PATIENCE:g} s")

    tries = Retrying(
        retry=retry_if_exception_type(ResourceError), stop=stop_after_delay(PATIENCE),
        wait=wait_exponential(max=15), before_sleep=say, reraise=True,
    )  # fmt: skip
    tries(refresh)


def follow(folder: RunFolder, refresh: Callable[[], object] = lambda: None) -> int:
    """Show each round of a run as it ends, until the run is over. Returns its exit code.

    `refresh` brings a folder that is a copy up to date. If a store does not answer it is called again (`patiently`).
    """
    progress = Progress(METHODS[folder.config().name].shown)
    said: set[str] = set()
    shown: int | None = None
    try:
        while True:
            patiently(refresh, progress.note)
            status = folder.read_status()  # before the rounds, so that none is missed when the run is over
            rows = folder.rows()
            for line in [line for line in _remarks(status) + last(status) if line not in said]:
                said.add(line)
                progress.note(line)
            if shown is None and status.get("rounds"):
                shown = max(len(rows) - 1, 0)  # what was before is the past, but for the last round
                progress.start(status["rounds"], shown)
            if shown is not None:
                for row in rows[min(shown, len(rows)) :]:  # a run that was resumed may have dropped a round
                    progress.round(row["round"] + 1, status.get("eta_seconds") or 0.0, row, _sent(status))
                shown = len(rows)
            if status.get("exit_code") is not None:
                return status["exit_code"]
            time.sleep(EVERY_SECONDS)
    finally:
        progress.stop()


def _sent(status: dict[str, Any]) -> int:
    """The queries of a run so far."""
    return (status.get("queries") or {}).get("sent", 0)


def _remarks(status: dict[str, Any]) -> list[str]:
    """The notes of a run, the teachers that it has left out, what stalls in it, and that it tests."""
    rejected = status.get("rejected") or {}
    reasons = [f"left out: {shown_reason(id, why)}" for id, why in rejected.items()]
    stalled = [status["stalled"]["said"]] if status.get("stalled") and status.get("exit_code") is None else []
    testing = ["testing"] if status.get("state") == "testing" else []
    return [*(status.get("notes") or []), *reasons, *stalled, *testing]


def last(status: dict[str, Any]) -> list[str]:
    """The last error of a run, if there is one; or a line about a run that should be at work and is silent."""
    if status.get("last_error"):
        return [f"last error: {status['last_error']}"]
    if status.get("exit_code") is not None or status.get("state") == "done" or "updated" not in status:
        return []
    now, then = datetime.datetime.now(datetime.UTC), datetime.datetime.fromisoformat(status["updated"])
    each = (status.get("seconds") or 0.0) / max(status.get("round") or 0, 1)
    if (now - then).total_seconds() < max(LONG_SECONDS, 10 * each):
        return []
    return [f"no news since {status['updated']}: if its process is gone, `train` with --resume continues the run"]
