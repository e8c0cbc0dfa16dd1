"""Options and output that commands share."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from ray_dfml.errors import ResourceError


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` flag."""
    return click.option("--json", "json_out", is_flag=True, help="Print the result as JSON on stdout.")(function)


def sets(function: Callable[..., Any]) -> Callable[..., Any]:
    """The repeated `--set key=value`."""
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable.")(function)


def workers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--workers`, by default one per processor."""
    return click.option(
        "--workers", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, show_default="processors",
        help="Shards. Any number gives the same bits on a CPU.",
    )(function)  # fmt: skip


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def need_ray() -> None:
    """Raises ResourceError if Ray cannot be imported."""
    try:
        import ray  # noqa: F401, PLC0415
    except ImportError:
        raise ResourceError("this needs Ray: pip install 'ray[default]', or use --backend local") from None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores as a plain table."""
    lines = [f"{'method':<22} {'data':<26} {'way':>3} {'shot':>4} {'episodes':>8} {'bn':<12} {'selection':<9} {'accuracy %':>16}"]
    for row in rows:
        accuracy = f"{row['mean']:.2f} ± {row['ci95']:.2f}"
        lines.append(
            f"{row['method']:<22} {row['data'].split(':')[0] + ' ' + row['split']:<26} {row['way']:>3} {row['shot']:>4} "
            f"{row['episodes']:>8} {row['bn']:<12} {row['selection']:<9} {accuracy:>16}"
        )
    return "\n".join(lines)
