"""Runs the commands of a number. What is done is not done again, so that an interrupted one goes on."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray_dfml import reproduce
from ray_dfml.errors import BudgetReached, DfmlError, Interrupted, RejectedError, ResourceError, UsageError
from ray_dfml.reproduce.measure import placeholders
from ray_dfml.reproduce.registry import Number, Step, Table, filled
from ray_dfml.runtime.driver import interruptible
from ray_dfml.runtime.rundir import write_text

Say = Callable[[str], None]

DATA = "RAY_DFML_DATA"
"""The variable that names the folder of the real data."""

DONE = "done"
"""The folder, below that of the user, with a file for each command that has ended well. It holds the command."""


@dataclass(frozen=True)
class Command:
    """A command that is ready to run: its name, its words, how they are shown, what it makes, and whether it is a
    script's."""

    name: str
    words: list[str]
    shown: str
    makes: Path
    script: bool


def commands(table: Table, number: Number, out: Path) -> list[Command]:
    """The commands of a number, in order.

    Raises RejectedError if data that they read is not there, and UsageError if they need a checkout and there is none.
    """
    return [
        _command(name, step, seed, out, _folder_of_data(table))
        for name, step in table.needed(number)
        for seed in (number.seeds if step.every_seed else number.seeds[:1])
    ]


def _folder_of_data(table: Table) -> str:
    folder = os.environ.get(DATA, "")
    if table.data and not folder:
        raise RejectedError(f"{DATA} is not set; set it to the folder that holds {', '.join(table.data)}")
    lacking = [name for name in table.data if not (Path(folder) / name).exists()]
    if lacking:
        raise RejectedError(f"{folder}: no {', '.join(lacking)} there; put it there, or set {DATA} to its folder")
    return folder


def _command(name: str, step: Step, seed: int, out: Path, data: str) -> Command:
    *words, makes = filled([*(step.run or step.script), step.makes], placeholders(step, seed, out) | {"data": data})
    name = f"{name}-{seed}" if step.every_seed else name
    made = out / makes
    if step.run:
        return Command(name, [sys.executable, "-m", "ray_dfml", *words], shlex.join(["ray-dfml", *words]), made, False)
    root = checkout()
    if root is None:
        raise UsageError("this number needs the scripts of benchmarks/; run it from a checkout of the repository")
    return Command(name, [sys.executable, str(root / words[0]), *words[1:]], shlex.join(["python", *words]), made, True)


def checkout() -> Path | None:
    """The repository that this package is run from, or None if it is installed without one."""
    root = Path(reproduce.__file__).parents[2]
    return root if (root / "benchmarks").is_dir() else None


def run(table: Table, number: Number, out: Path, say: Say) -> None:
    """Run the commands of a number that are not done in the folder `out`.

    Raises the error of a command's exit code.
    """
    wanted = commands(table, number, out)
    (out / DONE).mkdir(parents=True, exist_ok=True)
    for i, command in enumerate(wanted, 1):
        mark = out / DONE / command.name
        if command.makes.exists() and mark.is_file() and mark.read_text("utf-8") == command.shown:
            say(f"[{i}/{len(wanted)}] done before: {command.shown}")
            continue
        say(f"[{i}/{len(wanted)}] {command.shown}")
        _run(command)
        write_text(mark, command.shown)


_ERRORS: dict[int, type[DfmlError]] = {
    cls.exit_code: cls for cls in (UsageError, RejectedError, BudgetReached, ResourceError)
}


def _run(command: Command) -> None:
    """Run one command. What it prints goes to stderr, since stdout is for the result.

    It has a session of its own, so that Ctrl-C comes to it once, from here.
    """
    try:
        child = subprocess.Popen(command.words, stdout=2, start_new_session=True, env=_environment())
    except OSError as error:
        raise DfmlError(f"{command.words[0]}: cannot be started: {error.strerror}") from None
    with interruptible():
        try:
            code = child.wait()
        except KeyboardInterrupt:
            # a script's own children are stopped too; `ray-dfml` stops those it has
            os.killpg(child.pid, signal.SIGTERM) if command.script else child.terminate()
            child.wait()
            raise Interrupted("interrupted; the same command goes on where it was") from None
    if code in (Interrupted.exit_code, -signal.SIGINT, -signal.SIGTERM):
        raise Interrupted(f"interrupted; the same command goes on where it was: {command.shown}")
    if code:
        how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        raise _ERRORS.get(code, DfmlError)(f"{how}: {command.shown}")


def _environment() -> dict[str, str]:
    """The environment of a command: it finds this package, and computes with one thread as all processes do."""
    path = [str(Path(reproduce.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
