"""A picture of validation accuracy against minutes of training, and against queries where teachers were asked."""

import io
import itertools
import re
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
    """Write a PNG. Against minutes each seed is a line; runs that were validated in one round only are points.

    Against queries a run is the point of its last round. Rows NAME and NAME-QUERIES have one look, that of NAME, and
    there they are one line.
    """
    asked = {row: seeds for row, seeds in curves.items() if any(p["queries"] for seed in seeds for p in seed)}
    budgets = {p["queries"] for seeds in asked.values() for seed in seeds for p in seed}
    panels = 1 + (len(budgets) > 1)  # else there is no curve
    figure = Figure(figsize=(5.2 * panels + 2.2, 4.6), dpi=110, layout="constrained")
    kinds = [{"color": colour, "ls": style} for style in STYLES for colour in COLOURS]
    looks = dict(zip(dict.fromkeys(map(_name, curves)), itertools.cycle(kinds), strict=False))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for row, seeds in curves.items():
        for points in seeds:
            _line(axes[0], [(p["minutes"], p["validation"]) for p in points], looks[_name(row)], _name(row))
    axes[0].set(xlabel="minutes of training", ylabel="validation accuracy, %")
    for name in dict.fromkeys(map(_name, asked)) if panels > 1 else ():
        ends = [seed[-1] for row, seeds in asked.items() if _name(row) == name for seed in seeds]
        _line(axes[1], sorted((end["queries"], end["validation"]) for end in ends), looks[name], name)
        axes[1].set_xlabel("queries a teacher")
    for ax in axes:
        ax.set_xlim(left=0)
        ax.grid(color="#e3e7eb")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside right upper", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    # few colours need few bytes
    Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True)


def _name(row: str) -> str:
    return re.sub(r"-\d+$", "", row)


def _line(ax: Axes, points: Sequence[tuple[float, float]], look: Mapping[str, str], label: str) -> None:
    ax.plot(*zip(*points, strict=True), lw=1.2, marker="o", markersize=3, label=label, **look)
