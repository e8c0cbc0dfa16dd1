"""The values that the page of a run and its model card show."""

import hashlib
from collections import Counter
from typing import Any

from ray_dfml import plots
from ray_dfml.data.pool import Pool
from ray_dfml.errors import DfmlError, RejectedError
from ray_dfml.plots import number
from ray_dfml.report.answer import answer
from ray_dfml.report.pictures import galleries, tests, thinned
from ray_dfml.report.record import SPENT, Record, dicts
from ray_dfml.report.scores import table

ROWS = 500
"""How many teachers a table of the page has at most."""


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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _queries(record: Record) -> list[dict[str, str]]:
    """Each teacher that was asked, then all, as texts."""
    total = {key: sum(one[key] for one in record.queries.values()) for key in SPENT}
    rows = [*sorted(record.queries.items()), ("in all", total)] if record.queries else []
    return [
        {
            "teacher": id,
            "answered": f"{one['answered']:,.0f}",
            "sent": f"{one['sent']:,.0f}",
            "cost": f"{round(one['cost'], 9):g}",
        }
        for id, one in rows
    ]


def _facts(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, text) pairs."""
    if isinstance(value, dict) and value:
        return [fact for key, inner in value.items() for fact in _facts(inner, f"{prefix}.{key}".removeprefix("."))]
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return [(prefix, "none" if value in (None, "", {}) else str(value))] if prefix else []


def _texts(value: object) -> list[str]:
    """The entries of a list that was read from a file, as text. There are none if the value is no list."""
    return [str(one) for one in value] if isinstance(value, list) else []


def _steps(record: Record) -> list[str]:
    """The step sizes at test that the run chose for its weights and each data set, as text."""
    steps = dicts(record.status.get("test_step"))
    several = len({str(step.get("data")) for step in steps}) > 1
    return [
        f"{step.get('method')}/{step.get('selection')}" + (f" on {step.get('data')}" if several else "") + f" {lr:g}"
        for step in steps if (lr := number(step.get("lr"))) is not None
    ]  # fmt: skip


def values(record: Record) -> dict[str, Any]:
    """All that the templates show."""
    rows, found, tested = table(record), galleries(record), tests(record)
    spent = {name: float(values.sum()) for name, values in plots.stages(record.metrics).items()}
    total = sum(spent.values()) or 1.0
    learner, weights = record.learner, record.path / "learner.safetensors"
    selections = {str(row.get("selection")) for row in [*record.scores, learner]}
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
        "most_rows": ROWS,
        "behind": _texts(record.status.get("behind")),
        "notes": _texts(record.status.get("notes")),
        "steps": ", ".join(_steps(record)),
        "rounds": record.rounds,
        "duration": _duration(record.seconds),
        "selection": (learner or {}).get("selection") or ("val" if "val" in selections else "last"),
        "test_best": "test-best" in selections,
        "table": rows,
        "answer": answer(record, rows),
        "galleries": found,
        "tests": tested,
        "unseen": thinned(found, tested),
        "stages": [(name, _duration(seconds), 100 * seconds / total) for name, seconds in spent.items()],
        "unread": record.unread,
        "queries": _queries(record),
        "pools": _pools(record),
        "data": dicts(record.manifest.get("data")),
        "learner": learner,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
    }
