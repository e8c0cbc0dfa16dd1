"""The picture of a sweep: a line with its interval for one axis, a heat map for two, parallel coordinates for more."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, NullFormatter

from ray_dfml import plots
from ray_dfml.sweeps.plan import shown
from ray_dfml.sweeps.results import Row
from ray_dfml.sweeps.space import LISTS, Axis

UNIT = "validation accuracy, %"
COLOURS = "viridis"


def picture(rows: Sequence[Row], axes: Sequence[Axis]) -> tuple[str, Markup] | None:
    """What the picture shows, in a sentence, and the picture as SVG; None if no point with settings was validated."""
    found = [row for row in rows if row.point and row.validation]
    if not found:
        return None
    if len(axes) == 1:
        said, draw = _line(found, axes[0])
    elif len(axes) == 2 and all(axis.kind in LISTS for axis in axes):
        said, draw = _map(found, axes[0], axes[1])
    elif len(axes) == 2:
        said, draw = _cloud(found, axes[0], axes[1])
    else:
        said, draw = _parallel(found, axes)
    return said, plots.svg("sweep", said, draw, size=(7.4, 3.8))


def _mean(row: Row) -> float:
    assert row.validation is not None
    return row.validation[0]


def _values(rows: Sequence[Row], axis: Axis) -> list[Any]:
    """The values of an axis in the order to show them: of a list as it is written, of a range from low to high."""
    met = [row.point[axis.key] for row in rows]
    return [v for v in axis.values if v in met] if axis.kind in LISTS else sorted(set(met))


def _places(rows: Sequence[Row], axis: Axis) -> tuple[dict[Any, float], bool]:
    """Value -> its place on the axis, and whether places are the numbers themselves."""
    values = _values(rows, axis)
    if axis.ordered:
        return {v: float(v) for v in values}, True
    return {v: float(i) for i, v in enumerate(values)}, False


def _label(axes: Axes, side: str, axis: Axis, places: dict[Any, float], numbers: bool) -> None:
    getattr(axes, f"set_{side}label")(axis.key)
    if axis.kind == "loguniform":
        getattr(axes, f"set_{side}scale")("log")
        ticks = axes.xaxis if side == "x" else axes.yaxis
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
    elif not numbers or len(places) <= 12:
        getattr(axes, f"set_{side}ticks")(list(places.values()), [shown(v) for v in places])


def _line(rows: Sequence[Row], axis: Axis) -> tuple[str, Callable[[Axes], None]]:
    places, numbers = _places(rows, axis)

    def draw(axes: Axes) -> None:
        order = sorted(rows, key=lambda row: places[row.point[axis.key]])
        x = np.array([places[row.point[axis.key]] for row in order])
        y = np.array([_mean(row) for row in order])
        half = np.array([(row.validation or (0.0, None))[1] or 0.0 for row in order])
        axes.errorbar(x, y, yerr=half, color="#0072b2", marker="o", capsize=3, elinewidth=1.2, lw=1.8 if numbers else 0)
        if numbers:
            axes.fill_between(x, y - half, y + half, color="#0072b2", alpha=0.15, lw=0)
        _label(axes, "x", axis, places, numbers)
        axes.set_ylabel(UNIT)

    return f"{UNIT} over {axis.key}, with the 95 % interval of the mean over seeds", draw


def _map(rows: Sequence[Row], across: Axis, up: Axis) -> tuple[str, Callable[[Axes], None]]:
    columns, lines = _values(rows, across), _values(rows, up)
    grid = np.full((len(lines), len(columns)), np.nan)
    for i, line in enumerate(lines):
        for j, column in enumerate(columns):
            of = [_mean(row) for row in rows if (row.point[across.key], row.point[up.key]) == (column, line)]
            grid[i, j] = np.mean(of) if of else np.nan

    def draw(axes: Axes) -> None:
        image = axes.imshow(grid, cmap=COLOURS, aspect="auto", origin="lower")
        dark = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < dark else "black")
        axes.set_xticks(range(len(columns)), [shown(v) for v in columns])
        axes.set_yticks(range(len(lines)), [shown(v) for v in lines])
        axes.set_xlabel(across.key)
        axes.set_ylabel(up.key)
        axes.grid(False)
        axes.figure.colorbar(image, ax=axes, label=UNIT)

    return f"{UNIT}, mean over seeds, over {across.key} and {up.key}", draw


def _cloud(rows: Sequence[Row], across: Axis, up: Axis) -> tuple[str, Callable[[Axes], None]]:
    sides = [(side, axis, *_places(rows, axis)) for side, axis in (("x", across), ("y", up))]

    def draw(axes: Axes) -> None:
        x, y = ([places[row.point[axis.key]] for row in rows] for _, axis, places, _ in sides)
        dots = axes.scatter(x, y, c=[_mean(row) for row in rows], cmap=COLOURS, s=70, edgecolors="#48525c")
        for side, axis, places, numbers in sides:
            _label(axes, side, axis, places, numbers)
        axes.figure.colorbar(dots, ax=axes, label=UNIT)

    return f"{UNIT}, mean over seeds, of each point of {across.key} and {up.key}", draw


def _parallel(rows: Sequence[Row], axes_of: Sequence[Axis]) -> tuple[str, Callable[[Axes], None]]:
    norm = Normalize(min(map(_mean, rows)), max(map(_mean, rows)))
    heights = [_heights(rows, axis) for axis in axes_of]

    def draw(axes: Axes) -> None:
        for row in sorted(rows, key=_mean):  # the best on top
            y = [height[row.point[axis.key]] for axis, height in zip(axes_of, heights, strict=True)]
            axes.plot(range(len(y)), y, color=colormaps[COLOURS](norm(_mean(row))), lw=1.8, marker="o", markersize=4)
        for i, (axis, height) in enumerate(zip(axes_of, heights, strict=True)):
            values = _values(rows, axis)
            for value in values if len(values) <= 6 else (values[0], values[-1]):
                axes.annotate(shown(value), (i, height[value]), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set_xticks(range(len(axes_of)), [axis.key.rpartition(".")[2] for axis in axes_of])
        axes.set_yticks([])
        axes.margins(x=0.12)
        axes.figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, label=UNIT)

    return f"{UNIT}, mean over seeds: one line for each point, across {', '.join(a.key for a in axes_of)}", draw


def _heights(rows: Sequence[Row], axis: Axis) -> dict[Any, float]:
    """Value -> its height in 0..1: by logarithm, by value, or by place in a list."""
    places, _ = _places(rows, axis)
    at = {v: float(np.log(x)) if axis.kind == "loguniform" else x for v, x in places.items()}
    low, high = min(at.values()), max(at.values())
    return {v: (x - low) / (high - low) if high > low else 0.5 for v, x in at.items()}
