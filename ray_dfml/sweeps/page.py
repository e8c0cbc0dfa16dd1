"""The page of a sweep, `report.html`: what was run, the picture that fits the space, and every point in order."""

from collections.abc import Sequence
from pathlib import Path

from ray_dfml import report
from ray_dfml.runtime.rundir import write_text
from ray_dfml.sweeps import plan
from ray_dfml.sweeps.picture import picture
from ray_dfml.sweeps.results import Interval, Row
from ray_dfml.sweeps.space import Axis
from ray_dfml.sweeps.spec import Sweep


def write(folder: Path, sweep: Sweep, rows: Sequence[Row], axes: Sequence[Axis]) -> None:
    """Make `report.html` in the folder of a sweep. It is replaced in one step."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.tests))
    drawn = picture(rows, axes)
    text = report.pages().get_template("sweep.html").render(
        name=f"{sweep.method}: {', '.join(axis.key for axis in axes)}", folder=str(folder), facts=_facts(sweep, rows),
        about=drawn and drawn[0], svg=drawn and drawn[1],
        heads=["rank", "point", "validation %", *[f"test %, {kind}" for kind in kinds], "rounds", "seconds", "runs"],
        lines=[
            [
                rank, plan.label(row.point), _shown(row.validation), *[_shown(row.tests.get(kind)) for kind in kinds],
                _rounds(row), f"{row.seconds:.0f}", " ".join(row.runs),
            ]
            for rank, row in enumerate(rows, 1)
        ],
    )  # fmt: skip
    write_text(folder / "report.html", text)


def _facts(sweep: Sweep, rows: Sequence[Row]) -> list[tuple[str, str]]:
    queries = sum(row.queries for row in rows)
    facts = [
        ("method", sweep.method), ("profile", sweep.profile), ("preset", sweep.preset or "none"),
        ("data", ", ".join(sweep.data) or "none"), ("points", str(len(rows))),
        ("seeds", ", ".join(map(str, sweep.seeds))), ("scheduler", sweep.scheduler.type),
        ("tested", f"{sum(bool(row.tests) for row in rows)} of {len(rows)} points"),
    ]  # fmt: skip
    return facts + ([("images asked about", str(queries))] if queries else [])


def _shown(value: Interval | None) -> str:
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def _rounds(row: Row) -> str:
    ended = [f"{count} {word}" for count, word in ((row.stopped, "stopped"), (row.failed, "failed")) if count]
    return f"{row.rounds:g}" + (f" ({', '.join(ended)})" if ended else "")
