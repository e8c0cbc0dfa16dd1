"""The processes of `chaos.py`: how commands are started, and which actors of Ray live."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0
"""Seconds without a finished round after which a run counts as stalled."""
ACTORS = {"shard": "ShardActor", "learner": "LearnerActor", "gateway": "GatewayActor"}
T = TypeVar("T")

NURSERY = """
import os, signal, sys
from ray_dfml.runtime import cluster, launch
from ray_dfml.cli import main
from ray_dfml.cli.serve import serve

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    log, *words = line.split()
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    with open(f"{log}.codes", "a") as codes:
        print(code or 0, file=codes)
    os._exit(0)
"""
"""A process that has imported everything and forks one for each command, so that it starts at once."""


class Nursery:
    """Starts commands."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def start(self, log: Path, *words: object) -> int:
        """The process of a command, whose output goes to `log` and whose exit code to a line of `log`.codes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(log, *words, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it. Its children go on."""
        self._process.kill()
        self._process.communicate()


def alive(number: int) -> bool:
    """Whether a process lives, or one of its threads still does; the nursery leaves no dead ones."""
    return Path(f"/proc/{number}").exists()


def children(parent: int) -> dict[int, str]:
    """Number and command line of each child of a process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


def actors(raylets: Sequence[int], *kinds: str) -> list[int]:
    """The processes of actors of some kinds, which are children of raylets."""
    titles = tuple(f"ray::{ACTORS[kind]}" for kind in kinds)
    found = [children(raylet) for raylet in raylets]
    return [number for one in found for number, title in one.items() if title.startswith(titles)]


def awaited(what: str, find: Callable[[], T], seconds: float = PATIENCE) -> T:
    """What `find` returns once it is true. Raises TimeoutError, which names it, if it never is."""
    until = time.monotonic() + seconds
    while not (found := find()):
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(0.05)
    return found
