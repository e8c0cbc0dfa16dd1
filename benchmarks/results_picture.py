"""A picture of validation accuracy against minutes of training, and against queries where teachers were asked."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

Curves = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
"""Row -> for each seed its points."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3498b", "#8a6d00", "#56b4e9", "#444444", "#e69f00", "#cc79a7", "#777777")
STYLES = ("-", "--", ":")


def draw(curves: Curves, file: Path) -> None:
    """Write a PNG. Rows that were validated in one round only are points; a row has one look, and each seed a line."""
    asked = {row: seeds for row, seeds in curves.items() if any(p["queries"] for seed in seeds for p in seed)}
    budgets = {p["queries"] for seeds in asked.values() for seed in seeds for p in seed}
    panels = [("minutes", "minutes of training", curves)]
    if len(budgets) > 1:  # else there is no curve
        panels.append(("queries", "queries a teacher", asked))
    figure = Figure(figsize=(5.2 * len(panels) + 2.2, 4.2), dpi=110, layout="constrained")
    kinds = [(colour, style) for style in STYLES for colour in COLOURS]
    looks = dict(zip(curves, itertools.cycle(kinds), strict=False))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (key, label, rows) in zip(axes, panels, strict=True):
        _panel(ax, key, rows, looks)
        ax.set_xlabel(label)
    axes[0].set_ylabel("validation accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    # few colours need few bytes
    Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True)


def _panel(ax: Axes, key: str, rows: Curves, looks: Mapping[str, tuple[str, str]]) -> None:
    for row, seeds in rows.items():
        colour, style = looks[row]
        for i, points in enumerate(seeds):
            ax.plot(
                [p[key] for p in points], [p["validation"] for p in points], color=colour, ls=style, lw=1.2, marker="o",
                markersize=3, label=row if i == 0 else None,
            )  # fmt: skip
    ax.set_xlim(left=0)
    ax.grid(color="#e3e7eb")
    ax.spines[["top", "right"]].set_visible(False)
