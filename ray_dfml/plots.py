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
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "xtick.color": "#48525c",
    "ytick.color": "#48525c",
    "axes.labelcolor": "#48525c",
}
_SMOOTH_FROM = 120  # rounds: longer series are drawn thin under their moving average
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


def _line_panel(panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> Callable[[Axes], None] | None:
    found = [(legend, *series(metrics, key, panel.over)) for key, legend in panel.series.items()]
    found = [(legend, x, y) for legend, x, y in found if len(x)]
    if not found:
        return None

    def draw(axes: Axes) -> None:
        for colour, (legend, x, y) in zip(_COLOURS, found, strict=False):
            if len(x) < _SMOOTH_FROM:
                marker = "o" if len(x) <= 30 else None
                axes.plot(x, y, color=colour, lw=1.8, marker=marker, markersize=4, label=legend)
                continue
            window = max(3, len(x) // 40) | 1
            padded = np.pad(y, window // 2, mode="edge")
            axes.plot(x, y, color=colour, lw=0.6, alpha=0.3)
            axes.plot(x, np.convolve(padded, np.ones(window) / window, "valid"), color=colour, lw=1.8, label=legend)
        values = np.concatenate([y for _, _, y in found])
        if values.min() > 0 and values.max() > 100 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif values.min() < 0 < values.max():
            axes.axhline(0, color="#8a94a0", lw=0.8)
        axes.set_ylabel(panel.unit)

    return draw


def stages(metrics: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stage -> its seconds in each round. The stage that took longest comes first; their sum is left out."""
    names = {key.removeprefix("seconds/") for row in metrics for key in row if key.startswith("seconds/")} - {"round"}
    spent = {n: np.array([number(row.get(f"seconds/{n}")) or 0.0 for row in metrics]) for n in names}
    return dict(sorted(spent.items(), key=lambda item: (-item[1].sum(), item[0])))


def _stage_panel(metrics: Sequence[Mapping[str, Any]]) -> Callable[[Axes], None] | None:
    spent = stages(metrics)
    if not spent or len(metrics) < 2:
        return None
    rounds = np.array([row["round"] for row in metrics], dtype=float)

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

    It is without metadata, has ids of its own, and has the same bytes for the same data.
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


def draw(metrics: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """The plots for which there are metrics: of the validation, of the `panels` and of the time.

    Each is a dict of `title`, `about` and `svg`.
    """
    about = "Seconds of each round; with many rounds, means of neighbours."
    own = any("validation" in panel.series for panel in panels)
    shown = [*panels] if own else [VALIDATION, *panels]
    drawn = [(panel.title, panel.about, _line_panel(panel, metrics), panel.over) for panel in shown]
    drawn.append(("Time per stage", about, _stage_panel(metrics), "round"))
    return [
        {"title": title, "about": about, "svg": svg(f"plot{i}", title, _over(over, plot))}
        for i, (title, about, plot, over) in enumerate(drawn)
        if plot is not None
    ]
