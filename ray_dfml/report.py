"""Makes `report.html`, one self-contained page, and `MODEL_CARD.md` from the files of a run folder.

It works after a run and during one. The part of an absent file is left out, and only `config.yaml` is needed.
Everything that is shown is escaped.
"""

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ray_dfml import plots, published, yaml_text
from ray_dfml.data import weights_file
from ray_dfml.data.pool import Pool
from ray_dfml.errors import DfmlError, RejectedError, UsageError
from ray_dfml.files import Uri
from ray_dfml.methods import METHODS, UNTRAINED
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


# -------------------------------------------------------------------------------------------------------------- scores


def verdict(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[bool | None, float | None]:
    """Whether a score is above `random` by more than the two half-widths together, and by how many points it is above.

    Both are None for `random` itself, and if `random` was not scored on these episodes.
    """
    same = ("data", "split", "way", "shot", "episodes", "bn")
    reference = _reference(row)
    for other in rows:
        if other.get("method") == reference != row.get("method") and all(other.get(k) == row.get(k) for k in same):
            mean, base = number(row.get("mean")), number(other.get("mean"))
            if mean is not None and base is not None:
                margin = (number(row.get("ci95")) or 0.0) + (number(other.get("ci95")) or 0.0)
                return mean - base > margin, mean - base
    return None, None


def _reference(row: Mapping[str, Any]) -> str:
    """The method `random` beside a score; where a run has several students, the one with the same teacher."""
    _, colon, teacher = str(row.get("method")).partition(":")
    return UNTRAINED + colon + teacher


def _own(record: Record, row: Mapping[str, Any]) -> bool:
    """Whether a score is of the run's method (in any reading) and not of a baseline beside it."""
    method = str(row.get("method"))
    return method == record.name or method.startswith((f"{record.name}-", f"{record.name}:"))


def _table(record: Record) -> list[dict[str, Any]]:
    """Rows for display. Among scores of the same episodes the run's own come first, and `random` comes last."""
    selections = ["val", "last", "test-best"]

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        method, selection = str(row.get("method")), row.get("selection")
        where = [str(row.get(k)) for k in ("data", "split")] + [number(row.get(k)) or 0 for k in ("way", "shot")]
        order = selections.index(selection) if selection in selections else len(selections)
        return (*where, method.partition(":")[2], method == _reference(row), not _own(record, row), method, order)

    rows, last = [], None
    for row in sorted(record.scores, key=place):
        above, gain = verdict(row, record.scores)
        task = "top-1" if row.get("shot") is None else f"{row.get('way')}-way {row.get('shot')}-shot"
        episodes = (row.get("data"), row.get("split"), task)
        if row.get("method") == _reference(row):
            against = "the reference"
        elif above is None:
            against = "not compared: no random on these episodes"
        else:
            against = f"{gain:+.2f}" if above else f"not above random ({gain:+.2f})"
        mean, ci95 = number(row.get("mean")), number(row.get("ci95"))
        rows.append(
            {k: row.get(k) for k in ("method", "data", "split", "bn", "selection", "profile", "episodes")}
            | {"task": task, "mean": mean, "ci95": ci95, "against": against, "below": above is False}
            | {"own": _own(record, row), "first": episodes != last}
        )
        last = episodes
    return rows


# --------------------------------------------------------------------------------------------------------------- pages


def _pools(record: Record) -> list[dict[str, Any]]:
    """The pools of the manifest. Pools that are still there unchanged have architectures, sources and rights too."""
    pools = []
    for noted in dicts(record.manifest.get("pool")):
        one: dict[str, Any] = {key: noted.get(key) for key in ("path", "sha256", "teachers")}
        one |= {"archs": [], "sources": [], "authorizations": [], "unstated": 0, "note": ""}
        try:
            pool = Pool.open(str(noted.get("path")))
            if pool.sha256() != noted.get("sha256"):
                raise RejectedError("the pool has changed since this run")
            entries = [pool.entry(card.id) for card in pool.cards]
            for key, of in (("archs", "arch"), ("sources", "source"), ("authorizations", "authorization")):
                one[key] = Counter(text for entry in entries if (text := getattr(entry, of))).most_common(10)
            one["unstated"] = sum(not entry.authorization for entry in entries)
        except (DfmlError, OSError) as error:
            one["note"] = f"Its manifest could not be used for this page: {error}."
        pools.append(one)
    return pools


def dicts(value: object) -> list[dict[str, Any]]:
    """The mappings in a list that was read from a file. There are none if the value is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _queries(record: Record) -> list[tuple[str, int, int, str]]:
    """Each teacher that was asked, then all: images answered, images sent, money."""
    total = {key: sum(one[key] for one in record.queries.values()) for key in SPENT}
    rows = [*sorted(record.queries.items()), ("in all", total)] if record.queries else []
    return [(id, int(one["answered"]), int(one["sent"]), f"{round(one['cost'], 9):g}") for id, one in rows]


def _facts(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, text) pairs."""
    if isinstance(value, dict) and value:
        return [fact for key, inner in value.items() for fact in _facts(inner, f"{prefix}.{key}".removeprefix("."))]
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return [(prefix, "none" if value in (None, "", {}) else str(value))] if prefix else []


def _steps(record: Record) -> list[str]:
    """The step sizes at test that the run chose for its weights and each data set, as text."""
    steps = dicts(record.status.get("test_step"))
    several = len({str(step.get("data")) for step in steps}) > 1
    return [
        f"{step.get('method')}/{step.get('selection')}" + (f" on {step.get('data')}" if several else "") + f" {lr:g}"
        for step in steps if (lr := number(step.get("lr"))) is not None
    ]  # fmt: skip


def _values(record: Record) -> dict[str, Any]:
    """All that the templates show."""
    spent = {name: float(values.sum()) for name, values in plots.stages(record.metrics).items()}
    total = sum(spent.values()) or 1.0
    learner, weights = record.learner, record.path / "learner.safetensors"
    selections = {row.get("selection") for row in record.scores} | ({learner.get("selection")} if learner else set())
    return {
        "run": record.where.rpartition("/")[2],
        "name": record.name,
        "config": record.config,
        "settings": _facts({k: record.config.get(k) for k in ("learner", "method", "eval")}),
        "manifest": record.manifest,
        "versions": _facts(record.manifest.get("versions")) + _facts(record.manifest.get("git"), "git"),
        "hardware": _facts(record.manifest.get("hardware")),
        "status": record.status,
        "state": record.status.get("state", "unknown"),
        "started": str(record.manifest.get("started") or "not recorded").replace("T", " ").replace("+00:00", " UTC"),
        "rejected": record.rejected,
        "notes": [str(note) for note in record.status.get("notes") or []],
        "steps": ", ".join(_steps(record)),
        "rounds": record.rounds,
        "duration": _duration(record.seconds),
        "selection": (learner or {}).get("selection") or ("val" if "val" in selections else "last"),
        "test_best": "test-best" in selections,
        "table": _table(record),
        "stages": [(name, _duration(seconds), 100 * seconds / total) for name, seconds in spent.items()],
        "unread": record.unread,
        "queries": _queries(record),
        "pools": _pools(record),
        "data": dicts(record.manifest.get("data")),
        "learner": learner,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
    }


def markdown(value: object) -> Markup:
    """Escape a text so that Markdown shows it as it is, in one line."""
    if isinstance(value, Markup):
        return value
    text = html.escape(" ".join(str(value).split()), quote=False)
    return Markup(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text))


def _code(value: object) -> Markup:
    """A Markdown code span of any text."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return Markup(f"`{text}`")


def pages() -> jinja2.Environment:
    """The templates of pages. They escape every value that is put into them."""
    loader = jinja2.PackageLoader("ray_dfml", "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def write(run: Path) -> None:
    """Make `report.html` and `MODEL_CARD.md` in a run folder from its files. Each is replaced in one step.

    Raises what `read` raises.
    """
    record = read(run)
    values, page = _values(record), pages()
    card = page.overlay(autoescape=False, finalize=markdown)
    card.filters["code"] = _code
    panels = METHODS[record.name].panels if record.name in METHODS else ()
    text = page.get_template("report.html").render(values, plots=plots.draw(record.metrics, panels))
    weights_file.write_bytes(run / "report.html", text.encode())
    text = card.get_template("MODEL_CARD.md").render(values)
    weights_file.write_bytes(run / "MODEL_CARD.md", text.encode())
