"""Shows a comparison of runs as text, Markdown, CSV or HTML. No text from a file becomes markup."""

import csv
import io
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_dfml import report
from ray_dfml.compare import BASELINES, KEYS, Comparison
from ray_dfml.methods import CONTROL


class Section(NamedTuple):
    """A table to show: its title, remarks, column heads, and rows of cells, all plain text."""

    title: str
    remarks: list[str]
    heads: list[str]
    rows: list[list[str]]


FOOT = (
    "Accuracy: mean over episodes, ± 1.96 standard deviations / sqrt(episodes). In a row `mean of n seeds` the "
    "interval is over the episodes, the seeds averaged in each, and `sd of seeds` is the sample standard deviation of "
    "their means.",
    "Difference, in points: mean over episodes of the difference in each episode to the best baseline of the table "
    f"({', '.join(BASELINES)}; not chosen on test), ± 1.96 of its standard deviations / sqrt(episodes). Several seeds "
    "are averaged in each episode first.",
    f"Over {CONTROL}: the same difference to the best learner that was trained without a teacher, among those that "
    "adapt alike. What a method gains over it comes from its teachers.",
    "Recover and total: seconds in jobs of recovery and in all rounds. Step: step size of the adaptation at test. "
    "maml-oracle sees real images: it is a ceiling, not a baseline.",
)


def sections(found: Comparison) -> list[Section]:
    """One table per set of episodes, then one of the runs without scores. Columns without values are left out."""
    made = []
    for place in dict.fromkeys(row["set"] for row in found.rows):
        rows = [row for row in found.rows if row["set"] == place]
        cells = [_cells(row) for row in rows]
        heads = [head for head in cells[0] if any(row[head] for row in cells)]
        remarks = [f"Difference to {name}." for name in dict.fromkeys(row["against"] for row in rows) if name]
        remarks += [f"Over {CONTROL}: {name}." for name in dict.fromkeys(row["control"] for row in rows) if name]
        remarks += [f"{note}." for where, note in found.notes if where == place]
        made.append(Section(_title(rows[0]), remarks, heads, [[row[head] for head in heads] for row in cells]))
    return made


def _title(row: Mapping[str, Any]) -> str:
    if row["set"] is None:
        return "Runs without scores"
    if row["shot"] is None:
        return f"{row['data']} {row['split']}, top-1, {row['bn']}"
    task = f"{row['way']}-way {row['shot']}-shot"
    episodes = f"{row['episodes']} episodes of seed {row['eval_seed']}, {row['query']} queries a class"
    return f"{row['data']} {row['split']}, {task}, {row['bn']}: {episodes}"


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    runs = row["runs"][0] + (f" +{len(row['runs']) - 1}" if len(row["runs"]) > 1 else "")

    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def interval(mean: float | None, half: float | None, form: str) -> str:
        return show(mean, form) + ("" if half is None else f" ± {half:.2f}")

    return {
        "method": row["method"],
        "selection": row["selection"] or "",
        "preset": row["preset"] or "",
        "profile": row["profile"] or "",
        "seed": ", ".join(map(str, row["seeds"])),
        "accuracy, %": interval(row["mean"], row["ci95"], ".2f"),
        "sd of seeds": show(row["sd"], ".2f"),
        "difference": interval(row["difference"], row["difference_ci95"], "+.2f"),
        f"over {CONTROL}": interval(row["over_control"], row["over_control_ci95"], "+.2f"),
        "step": ", ".join(f"{step:g}" for step in row["steps"]),
        "rounds": show(row["rounds"], "g"),
        "recover, s": show(row["recover_seconds"], ".1f"),
        "total, s": show(row["seconds"], ".1f"),
        "state": row["state"],
        "run": f"mean of {len(row['seeds'])} seeds" if row["kind"] == "mean" else runs,
        "note": row["note"] or "",
    }  # fmt: skip


def as_text(found: Comparison) -> str:
    """Aligned tables for a terminal."""
    lines = []
    for one in sections(found):
        table = [one.heads, *one.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [one.title, *one.remarks]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        lines.append("")
    return "\n".join([*lines, *(textwrap.fill(note, 110) for note in FOOT)]) + "\n"


def as_markdown(found: Comparison) -> str:
    """The comparison as Markdown."""
    lines = ["# Runs", ""]
    for one in sections(found):
        table = [one.heads, ["---"] * len(one.heads), *([report.markdown(cell) for cell in row] for row in one.rows)]
        lines += [f"## {report.markdown(one.title)}", ""]
        lines += [line for remark in one.remarks for line in (report.markdown(remark), "")]
        lines += [f"| {' | '.join(row)} |" for row in table] + [""]
    return "\n".join([*lines, *(f"- {text}" for text in FOOT)]) + "\n"


def as_csv(found: Comparison) -> str:
    """CSV with the columns KEYS. Lists are joined with `; `, and `'` precedes a text that a spreadsheet would run."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(KEYS)
    for row in found.rows:
        cells = ["; ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row.values()]
        table.writerow([f"'{c}" if isinstance(c, str) and c.startswith(("=", "+", "-", "@")) else c for c in cells])
    return buffer.getvalue()


def as_html(found: Comparison) -> str:
    """The comparison as one self-contained page."""
    return report.pages().get_template("compare.html").render(sections=sections(found), foot=FOOT)


FORMATS = {".md": as_markdown, ".csv": as_csv, ".html": as_html}
"""Suffix of a file -> how its text is made."""
