"""The runs below a folder: how each stands, and its main score."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_dfml import report
from ray_dfml.errors import DfmlError
from ray_dfml.plots import number
from ray_dfml.runtime import watch
from ray_dfml.scores import headline

DEPTH = 3
"""How far below the folder runs are found: those of a sweep are two further down than the sweep."""


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """One row for each run in `folder`, or below it, as `ray-dfml runs --json` prints them; the latest is last.

    A row holds the name below `folder`, the method, the state, rounds and `updated` of `status.json`, the main score or
    None, and a fault: the error that ended the run, that it is silent, or why its folder cannot be read.
    """
    rows = [_row(path, folder) for path in sorted(_folders(folder, DEPTH))]
    return sorted(rows, key=lambda row: row["updated"] or "")


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "status.json").is_file() and (folder / "config.yaml").is_file():
        yield folder
    elif depth:
        with os.scandir(folder) as entries:
            inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in inner:
            if os.access(path, os.R_OK | os.X_OK):
                yield from _folders(Path(path), depth - 1)


def _row(path: Path, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(path.relative_to(folder)) if path != folder else path.name, "method": "?"}
    row |= {"state": "unreadable", "round": 0, "rounds": 0, "updated": None, "score": None, "fault": None}
    try:
        run = report.read(path)
        row |= {key: str(run.status[key]) for key in ("state", "updated") if run.status.get(key)}
        row |= {key: int(number(run.status.get(key)) or 0) for key in ("round", "rounds")}
        row["method"] = str(run.config.get("name", "?"))
        score = headline(run.scores, row["method"])
        row["score"] = score if score and number(score.get("mean")) is not None else None
        row["fault"] = next(iter(watch.last(run.status)), None)
    except DfmlError as error:
        row["fault"] = str(error)
    except (TypeError, ValueError):
        row["fault"] = f"{path / 'status.json'}: not as a run writes it; restore the file"
    return row
