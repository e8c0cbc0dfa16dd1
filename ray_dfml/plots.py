"""Plots of the metrics of a run, as SVG elements for a page."""

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ray_dfml.methods.base import Panel

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3498b", "#8a6d00", "#56b4e9", "#666666")
_INK, _AXIS, _GRID = "#48525c", "#8a94a0", "#e3e7eb"
_VARIABLES = {_INK: "ink", _AXIS: "axis", _GRID: "grid"} | {one: f"c{i}" for i, one in enumerate(_COLOURS, 1)}
"""Colour of a plot -> the variable of `templates/style.css` that takes its place, since a page may be dark."""
_ROWS = 24  # rows of the table beside a plot
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _AXIS,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.labelcolor": _INK,
}
_SMOOTH_FROM = 120  # rounds: longer series are drawn thin under their moving average
_POINTS = 1000  # rounds: of longer series so many are drawn, evenly spread
_BARS_TO = 60  # rounds: longer time series are drawn as areas
_BINS = 200


VALIDATION = Panel(
    "Validation accuracy", "%", "Accuracy on validation episodes of the largest shot; the best weights are kept.",
    {"validation": "validation"},
)  # fmt: skip
"""The panel of every run whose method has no own one of the validation; methods bring further ones."""


def number(value: object) -> float | None:
    """The value as a float if it is a finite number, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def series(metrics: Sequence[Mapping[str, Any]], key: str, over: str = "round") -> tuple[np.ndarray, np.ndarray]:
    """The values [m] of `over`, and of a metric [m], of the rounds in which both are finite numbers."""
    found = [(number(row.get(over)), number(row.get(key))) for row in metrics]
    pairs = [(x, y) for x, y in found if x is not None and y is not None]
    return np.array([x for x, _ in pairs], dtype=float), np.array([y for _, y in pairs], dtype=float)


Curve = tuple[str, np.ndarray, np.ndarray]
"""A legend, and values [m] of both axes."""


def _curves(panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    found = [(legend, *series(metrics, key, panel.over)) for key, legend in panel.series.items()]
    return [(legend, x, y) for legend, x, y in found if len(x)]


def _lines(found: Sequence[Curve], unit: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for colour, (legend, x, y) in zip(_COLOURS, found, strict=False):
            if len(x) < _SMOOTH_FROM:
                marker = "o" if len(x) <= 30 else None
                axes.plot(x, y, color=colour, lw=1.8, marker=marker, markersize=4, label=legend)
                continue
            window = max(3, len(x) // 40) | 1
            padded = np.pad(y, window // 2, mode="edge")
            mean = np.convolve(padded, np.ones(window) / window, "valid")
            at = np.unique(np.linspace(0, len(x) - 1, min(_POINTS, len(x))).round().astype(int))
            axes.plot(x[at], y[at], color=colour, lw=0.6, alpha=0.3)
            axes.plot(x[at], mean[at], color=colour, lw=1.8, label=legend)
        values = np.concatenate([y for _, _, y in found])
        if values.min() > 0 and values.max() > 100 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif values.min() < 0 < values.max():
            axes.axhline(0, color=_AXIS, lw=0.8)
        axes.set_ylabel(unit)

    return draw


def stages(metrics: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stage -> its seconds in each round. The stage that took longest comes first; their sum is left out."""
    names = {key.removeprefix("seconds/") for row in metrics for key in row if key.startswith("seconds/")} - {"round"}
    spent = {n: np.array([number(row.get(f"seconds/{n}")) or 0.0 for row in metrics]) for n in names}
    return dict(sorted(spent.items(), key=lambda item: (-item[1].sum(), item[0])))


def _bars(rounds: np.ndarray, spent: Mapping[str, np.ndarray]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(spent))]
        if len(rounds) <= _BARS_TO:
            below = np.zeros(len(rounds))
            for colour, (name, values) in zip(colours, spent.items(), strict=True):
                axes.bar(rounds, values, bottom=below, color=colour, width=0.8, label=name)
                below += values
        else:
            cuts = np.linspace(0, len(rounds), min(_BINS, len(rounds)), endpoint=False).astype(int)
            widths = np.diff(np.append(cuts, len(rounds)))
            means = [np.add.reduceat(values, cuts) / widths for values in spent.values()]
            axes.stackplot(rounds[cuts], means, colors=colours, labels=list(spent), lw=0)
        axes.set_ylabel("seconds per round")

    return draw


def svg(
    slug: str, label: str, draw: Callable[[Axes], None], *, size: tuple[float, float] = (5.4, 2.9)
) -> Markup:  # fmt: skip
    """What `draw` draws as an SVG element for a page; `size` is in inches.

    It is without metadata, has ids of its own, and has the same bytes for the same data. Its colours are variables of
    `templates/style.css`.
    """
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": slug}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        names = axes.get_legend_handles_labels()[1]
        if len(names) > 1:
            figure.legend(loc="outside upper left", ncols=min(3, len(names)), frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{slug}-", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1))


def _over(over: str, plot: Callable[[Axes], None]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        plot(axes)
        axes.set_xlabel(over)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.02)

    return draw


def _table(over: str, found: Sequence[Curve]) -> dict[str, Any]:
    """What a plot shows as `heads` and `rows` of text: at most `_ROWS` rows, evenly spread, with the first and last."""
    at = np.unique(np.concatenate([x for _, x, _ in found]))
    at = at[np.unique(np.linspace(0, len(at) - 1, min(_ROWS, len(at))).round().astype(int))]
    columns = [dict(zip(x.tolist(), y.tolist(), strict=True)) for _, x, y in found]
    rows = [[f"{one:,.0f}", *(f"{c[one]:.4g}" if one in c else "" for c in columns)] for one in at.tolist()]
    return {"heads": [over, *(legend for legend, _, _ in found)], "rows": rows}


def _said(title: str, over: str, found: Sequence[Curve]) -> str:
    """A plot in words, for who cannot see it."""
    ends = [f"{legend}: from {y[0]:.4g} to {y[-1]:.4g}" for legend, _, y in found]
    return f"{title} over {over}. {'; '.join(ends)}. The table below has the numbers."


def draw(metrics: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """The plots for which there are metrics: of the validation, of the `panels` and of the time.

    Each is a dict of `title`, `about`, `svg`, and the table of its numbers: `heads` and `rows`.
    """
    own = any("validation" in panel.series for panel in panels)
    drawn = []
    for panel in panels if own else [VALIDATION, *panels]:
        if found := _curves(panel, metrics):
            drawn.append((panel.title, panel.about, panel.over, found, _lines(found, panel.unit)))
    spent = stages(metrics)
    if spent and len(metrics) > 1:
        rounds = np.array([row["round"] for row in metrics], dtype=float)
        about = "Seconds of each round; with many rounds, means of neighbours."
        found = [(name, rounds, values) for name, values in spent.items()]
        drawn.append(("Time per stage", about, "round", found, _bars(rounds, spent)))
    return [
        {"title": title, "about": about, "svg": svg(f"plot{i}", _said(title, over, found), _over(over, plot))}
        | _table(over, found)
        for i, (title, about, over, found, plot) in enumerate(drawn)
    ]
