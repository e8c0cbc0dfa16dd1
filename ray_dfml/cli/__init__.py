"""The command line. Results go to stdout, progress to stderr; a failure is one line and a documented exit code."""

import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from ray_dfml.errors import DfmlError, did_you_mean
from ray_dfml.files import shown

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# NumPy's OpenBLAS reads this at its import. With threads of its own it never returns from a product during which
# another thread forks, and Ray forks where a cluster starts beside other work.

COMMANDS = {
    "quickstart": ("ray_dfml.cli.quickstart", "quickstart"),
    "data": ("ray_dfml.cli.data", "data"),
    "pool": ("ray_dfml.cli.pool", "pool"),
    "train": ("ray_dfml.cli.train", "train"),
    "evaluate": ("ray_dfml.cli.evaluate", "evaluate"),
    "attribute": ("ray_dfml.cli.attribute", "attribute"),
    "adapt": ("ray_dfml.cli.adapt", "adapt"),
    "export": ("ray_dfml.cli.export", "export"),
    "tune": ("ray_dfml.cli.tune", "tune"),
    "serve": ("ray_dfml.cli.serve", "serve"),
    "check": ("ray_dfml.cli.check", "check"),
    "runs": ("ray_dfml.cli.runs", "runs"),
    "status": ("ray_dfml.cli.status", "status"),
    "report": ("ray_dfml.cli.report", "report_runs"),
    "reproduce": ("ray_dfml.cli.reproduce", "reproduce"),
}
"""Command -> (module, function). Modules are loaded on use, so that `--help` is quick."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:  # a shell that completes
                return None
            ctx.fail(f"No such command {cmd_name!r}{did_you_mean(cmd_name, COMMANDS)}; known: {', '.join(COMMANDS)}")
        module, name = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("ray-dfml"), prog_name="ray-dfml")
@click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback when something fails.")
def cli() -> None:
    """Make one few-shot learner from a pool of classifiers, without their training data.

    Start with: ray-dfml quickstart
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exits with 0, or with the exit code of `ray_dfml.errors`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # wherever it stands; the option of the group is there for --help
    words = [word for word in words if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console of few letters shows the others as \uXXXX
            stream.reconfigure(errors="backslashreplace")
    try:
        result: Any = cli.main(words, prog_name="ray-dfml", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.ClickException as error:
        _show(error)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        print("ray-dfml: interrupted", file=sys.stderr)
        code = 130
    except DfmlError as error:
        if debug:
            raise
        print(f"ray-dfml: {shown(str(error))}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except OSError as error:
        if debug:
            raise
        print(f"ray-dfml: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        code = 1
    except Exception as error:
        if debug:
            raise
        print(f"ray-dfml: {type(error).__name__}: {error} (--debug shows where)".replace("\n", " "), file=sys.stderr)
        code = 1
    sys.exit(code)


def _show(error: click.ClickException) -> None:
    """Show why a command line was refused, in one line; or the help, if no arguments were given."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "ray-dfml"
    print(f"ray-dfml: {' '.join(error.format_message().split())} (see {command} --help)", file=sys.stderr)
