"""What a run folder says: the files that a report is made from, read and checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_dfml import plots, published, yaml_text
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.files import Uri
from ray_dfml.plots import number

SPENT = ("answered", "sent", "cost")
"""Keys of a line of `ledger.jsonl` that are added up."""


@dataclass(frozen=True)
class Record:
    """What a run folder says."""

    place: Path | Uri
    path: Path
    """The files to read: the folder itself, or a copy of one in an object store."""
    config: dict[str, Any]
    manifest: dict[str, Any]
    status: dict[str, Any]
    scores: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    """One per round, in order of rounds."""
    unread: int
    """How many lines of `metrics.jsonl` are no JSON objects."""
    queries: dict[str, dict[str, float]]
    """Teacher -> images `answered` and `sent`, and their `cost`, from `ledger.jsonl`; empty if nobody was asked."""
    learner: dict[str, Any]
    """`learner.json`, which describes the exported weights; empty if there are none yet."""
    students: dict[str, dict[str, Any]]
    """Teacher -> the card of its student, in a run that distilled."""

    @property
    def where(self) -> str:
        """The place, without links."""
        return self.place if isinstance(self.place, Uri) else str(self.place.resolve())

    @property
    def name(self) -> str:
        """Name of the method."""
        return str(self.config.get("name", "unknown"))

    @property
    def rounds(self) -> int:
        """How many rounds are done."""
        done = self.status.get("round")
        return done if isinstance(done, int) else len(self.metrics)

    @property
    def rejected(self) -> dict[str, Any]:
        """Teacher -> why it was not used."""
        found = self.status.get("rejected")
        return found if isinstance(found, dict) else {}

    @property
    def seconds(self) -> float | None:
        """Seconds of all rounds, also of those before a resume. Without metrics it is what the status says."""
        spent = plots.series(self.metrics, "seconds/round")[1]
        return float(spent.sum()) if len(spent) else number(self.status.get("seconds"))


def read(place: Path | Uri) -> Record:
    """Read the files of a run folder, on a disk or in an object store.

    Raises UsageError if there is no run, RejectedError for a file that cannot be read, and ResourceError if an object
    store does not answer.
    """
    run = published.local(place)
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run}: not a run folder (no config.yaml); name the --run-dir of a run")
    try:
        config = yaml_text.load((run / "config.yaml").read_bytes())
    except (OSError, yaml.YAMLError, ValueError):
        raise RejectedError(f"{run / 'config.yaml'}: not YAML; restore the file") from None
    if not isinstance(config, dict):
        raise RejectedError(f"{run / 'config.yaml'}: expected a mapping; restore the file")
    lines, unread = _lines(run / "metrics.jsonl")
    by_round = {line["round"]: line for line in lines if isinstance(line.get("round"), int)}
    queries: dict[str, dict[str, float]] = {}
    for line in _lines(run / "ledger.jsonl")[0]:
        one = queries.setdefault(str(line.get("teacher")), dict.fromkeys(SPENT, 0))
        for key in SPENT:
            one[key] += number(line.get(key)) or 0
    learner = _json(run / "learner.json", dict) or {}
    cards = [learner, *(_json(file, dict) for file in sorted((run / "students").glob("*.json")))]
    return Record(
        place=place,
        path=run,
        config=config,
        manifest=_json(run / "manifest.json", dict) or {},
        status=_json(run / "status.json", dict) or {},
        scores=[row for row in _json(run / "scores.json", list) or [] if isinstance(row, dict)],
        metrics=[by_round[r] for r in sorted(by_round)],
        unread=unread,
        queries=queries,
        learner=learner,
        students={str(card.get("teacher")): card for card in cards if card.get("kind") == "student"},
    )


def _json(path: Path, kind: type) -> Any:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise RejectedError(f"{path}: not JSON; restore the file, or remove it to report without it") from None
    if not isinstance(value, kind):
        raise RejectedError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}; restore the file")
    return value


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many lines hold none, since a killed run may leave half a line."""
    found, bad = [], 0
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif line.strip():
            bad += 1
    return found, bad


def dicts(value: object) -> list[dict[str, Any]]:
    """The mappings in a list that was read from a file. There are none if the value is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
