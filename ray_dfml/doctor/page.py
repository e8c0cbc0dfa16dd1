"""The page of a pool: one file without a network, for `pool check --html`."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ray_dfml.doctor.examine import Examination
from ray_dfml.doctor.probes import USED
from ray_dfml.doctor.vitals import Vitals
from ray_dfml.report.pages import pages

LEVELS = 20
"""How many shades a heat map has."""
LOW, HIGH = 0.0, 1.0


def page(seen: Examination) -> str:
    """The text of the page."""
    order, clusters = seen.clusters
    ids = [seen.vitals[n].card.id for n in order]
    entries = [seen.pool.entry(row["id"]) for row in seen.rows]
    several = len(order) > 1
    return pages().get_template("pool.html").render(
        name=str(seen.pool.path).rstrip("/").rpartition("/")[2],
        path=str(seen.pool.path),
        answer=_answer(seen),
        facts=_facts(seen),
        findings=seen.findings,
        out=seen.leave_out(),
        probes=", ".join(USED),
        teachers=[_teacher(seen, row["id"], row["ok"]) for row in seen.rows],
        maps=[
            _map("Alike features (CKA)", "Linear CKA of the features of probe images", seen.cka, order, ids),
            _map("Alike sorting", "Adjusted Rand index of the labels of probe images: 1 where two teachers sort them "
                 "equally, 0 where no more than by chance", seen.sorting, order, ids),
        ] if several else [],
        clusters=_clusters([ids[order.index(n)] for n in range(len(order))], clusters) if several else [],
        uses=seen.uses,
        services=[
            {"id": entry.id, "price": f"{entry.price or 0:g}", "budget": entry.budget, "rate": entry.api.rate}
            for entry in entries if entry.api is not None
        ],
    )  # fmt: skip


def _answer(seen: Examination) -> dict[str, str]:
    """One sentence about the pool, and its tone."""
    rejected, out = sum(not row["ok"] for row in seen.rows), seen.leave_out()
    count = f"{len(seen.rows)} teacher{'s' if len(seen.rows) != 1 else ''}"
    if not seen.rows:
        return {"tone": "bad", "text": "The pool holds no teacher."}
    if rejected:
        return {
            "tone": "bad",
            "text": f"Of {count}, {rejected} cannot be used, and {len(out) - rejected} more are suspect.",
        }
    if out:
        return {"tone": "noise", "text": f"Of {count}, all run, and {len(out)} are suspect: see what was found."}
    return {"tone": "good", "text": f"All of {count} run, and nothing speaks against any of them."}


def _facts(seen: Examination) -> list[tuple[str, str]]:
    entries = [seen.pool.entry(row["id"]) for row in seen.rows]
    inputs = Counter("x".join(map(str, entry.image.shape)) for entry in entries)
    ways = sorted({len(entry.classes) for entry in entries})
    return [
        ("teachers", str(len(entries))),
        ("access", _counted(Counter(entry.access for entry in entries))),
        ("architectures", _counted(Counter(entry.arch or "service" for entry in entries))),
        ("inputs", _counted(inputs)),
        ("classes of a teacher", f"{ways[0]}" if len(ways) == 1 else f"{ways[0]} to {ways[-1]}" if ways else "none"),
        ("classes in all", str(len({name for entry in entries for name in entry.classes}))),
        ("sha256", seen.pool.sha256()[:16]),
    ]


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{number} × {what}" for what, number in found.most_common(6))


def _teacher(seen: Examination, id: str, ok: bool) -> dict[str, Any]:
    """A row of the table of teachers."""
    entry, mine = seen.pool.entry(id), [one for one in seen.vitals if one.card.id == id]
    found = Counter(one.severity for one in seen.of(id))
    row: dict[str, Any] = {
        "id": id, "arch": entry.arch or "service", "ways": len(entry.classes), "bad": bool(not ok or found["warning"]),
        "said": ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in found.items()) or "nothing",
        "accuracy": "–" if entry.accuracy.reported is None else f"{entry.accuracy.reported:.1f}",
        "confidence": "–", "steady": "–", "classes": "–",
    }  # fmt: skip
    return row | (_measured(mine[0]) if mine else {})


def _measured(one: Vitals) -> dict[str, str]:
    return {
        "confidence": f"{100 * one.confidence:.0f}", "steady": f"{100 * one.steady:.0f}",
        "classes": f"{len(one.card.classes) - len(one.dead)} of {len(one.card.classes)}",
    }  # fmt: skip


def _clusters(ids: Sequence[str], clusters: np.ndarray) -> list[list[str]]:
    found: defaultdict[int, list[str]] = defaultdict(list)
    for id, cluster in zip(ids, clusters.tolist(), strict=True):
        found[cluster].append(id)
    return sorted(found.values(), key=len, reverse=True)


def _map(title: str, about: str, values: np.ndarray, order: Sequence[int], ids: Sequence[str]) -> dict[str, Any]:
    """A heat map [k k] in the order of the clusters, and the table of each teacher's nearest one beside it."""
    sorted_ = values[np.ix_(order, order)]
    others = sorted_ - 2 * np.eye(len(sorted_))
    nearest = others.argmax(1)
    means = (sorted_.sum(1) - sorted_.diagonal()) / max(1, len(sorted_) - 1)
    rows = [
        [str(n + 1), id, ids[near], f"{sorted_[n, near]:.2f}", f"{means[n]:.2f}"]
        for n, (id, near) in enumerate(zip(ids, nearest.tolist(), strict=True))
    ]
    low, high = float(others.max(1).min()), float(others.max())
    said = f"{title}: {len(ids)} teachers by {len(ids)}; each has a nearest one at {low:.2f} to {high:.2f}"
    return {"title": title, "about": about, "svg": heat(sorted_, said), "rows": rows}


def heat(values: np.ndarray, label: str) -> Markup:
    """A heat map of a matrix [k k] in [0, 1] as an SVG element: the fuller a cell, the larger; below 0 is empty."""
    levels = np.rint(np.clip(values, LOW, HIGH) * LEVELS).astype(int)
    paths = []
    for level in range(1, LEVELS + 1):
        cells = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(levels == level))
        if cells:
            paths.append(Markup('<path fill-opacity="{}" d="{}"/>').format(f"{level / LEVELS:g}", cells))
    size = len(values)
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}" class="heat">{}</svg>').format(
        label, size, size, Markup("").join(paths)
    )
