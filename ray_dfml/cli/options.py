"""Options and output that commands share."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ray_dfml.errors import ResourceError, UsageError, did_you_mean
from ray_dfml.files import Uri, located, resolved
from ray_dfml.runtime import host


class _PathType(click.ParamType):
    """A path as a user writes it. The command gets the absolute path (`files.resolved`)."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return resolved(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete it as a path."""
        return [CompletionItem(incomplete, type="file")]


class _PlaceType(_PathType):
    """A path, or the URI of an object store. The command gets the absolute path or the URI (`files.located`)."""

    name = "path|uri"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path | Uri:
        return located(value)


class _ShareType(click.ParamType):
    """A share of a GPU: 0, 1, or 1/k, also as a decimal such as 0.5. The command gets a number that is not above it."""

    name = "1/k"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        over, slash, under = str(value).partition("/")
        try:
            share = float(over) / (float(under) if slash else 1.0)
        except (ValueError, ZeroDivisionError):
            share = -1.0
        parts = round(1 / share) if 0.001 <= share <= 1 else 0
        if share and not (parts and abs(share * parts - 1) < 0.011):
            self.fail(f"{value}: a process gets a whole GPU (1), one of k equal parts of it (1/k), or none (0)")
        return 10_000 // parts / 10_000 if parts else 0.0  # Ray counts in 1/10000: k times 1/k is no more than 1


class Choice(click.Choice):
    """One of several words. The error for another word names the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word itself. Fails for another one."""
        known = [str(one) for one in self.choices]
        if value not in known:
            self.fail(f"{value!r} is not known{did_you_mean(str(value), known)}; known: {', '.join(known)}", param, ctx)
        return super().convert(value, param, ctx)


PATH = _PathType()
"""The type of every option and argument that names a file or a folder of a disk."""
PLACE = _PlaceType()
"""The type of those that may also be in an object store."""
SHARE = _ShareType()
"""The type of those that give a process a part of a GPU."""


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` flag."""
    return click.option("--json", "json_out", is_flag=True, help="Print the result as JSON on stdout.")(function)


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--quiet` flag."""
    return click.option("--quiet", is_flag=True, help="Show no progress; notes, errors and results remain.")(function)


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


def gpus_per_worker(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--gpus-per-worker` option."""
    return click.option(
        "--gpus-per-worker", type=SHARE, default=0.0, show_default=True,
        help="Part of a GPU for each shard, such as 1/4: of its time, and at most so much of its memory.",
    )(function)  # fmt: skip


def check_out(option: str, file: Path | None) -> None:
    """Raise UsageError if a file that is about to be written is a folder, or would be in a folder that is not there."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UsageError(f"{option} {file}: a folder, or in a folder that does not exist; name a file in one that does")


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
