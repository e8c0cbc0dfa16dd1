"""Options and output that commands share."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ray_dfml.errors import ResourceError
from ray_dfml.files import Uri, located, resolved
from ray_dfml.runtime import host


class _PathType(click.ParamType):
    """A path as a user writes it. The command gets the absolute path (`files.resolved`)."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return resolved(value)


class _PlaceType(click.ParamType):
    """A path, or the URI of an object store. The command gets the absolute path or the URI (`files.located`)."""

    name = "path|uri"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path | Uri:
        return located(value)


PATH = _PathType()
"""The type of every option and argument that names a file or a folder of a disk."""
PLACE = _PlaceType()
"""The type of those that may also be in an object store."""


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` flag."""
    return click.option("--json", "json_out", is_flag=True, help="Print the result as JSON on stdout.")(function)


def settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The repeated `--set key=value`."""
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable."
    )(function)


def workers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--workers` option. By default there is one shard per processor."""
    return click.option(
        "--workers", type=click.IntRange(min=1), default=host.processors, show_default="processors",
        help="Shards. Any number gives the same bits on a CPU.",
    )(function)  # fmt: skip


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def say(text: str) -> None:
    """Print one line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def need_ray() -> None:
    """Raise ResourceError if Ray cannot be imported."""
    try:
        import ray_dfml.runtime.cluster  # noqa: F401
    except ImportError:
        raise ResourceError("this needs Ray: pip install 'ray[default]', or use --backend local") from None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores as a plain table. A top-1 accuracy has no way, shot and episodes."""
    form = "{:<22} {:<30} {:>3} {:>4} {:>8} {:<12} {:<9} {:>16}"
    lines = [form.format("method", "data", "way", "shot", "episodes", "bn", "selection", "accuracy %")]
    for row in rows:
        data = f"{row['data']} {row['split']}"
        accuracy = f"{row['mean']:.2f} ± {row['ci95']:.2f}"
        task = ("-" if row[key] is None else row[key] for key in ("way", "shot", "episodes"))
        values = (row["method"], data, *task, row["bn"], row["selection"], accuracy)
        lines.append(form.format(*values))
    return "\n".join(lines)
