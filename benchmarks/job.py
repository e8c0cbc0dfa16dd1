"""A run as a job, end to end and timed: head with a token, submit, stop, submit again, result, all processes gone.

    python benchmarks/job.py [--workers 2] [--rounds 12]

It starts a head of its own on this machine, on free ports and with a folder of its own, and follows
`cluster/README.md`: a pool and a run are made by jobs, the run is stopped half way, and the same line is given again.
It prints one line for each step, and exits with 1 unless the learner has the bits of an undisturbed run of one process.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE = 600.0


class Head:
    """A Ray head of our own: where it listens, and the environment that its clients need."""

    def __init__(self, folder: Path, cpus: int) -> None:
        self.folder = folder
        names = (
            "port",
            "dashboard-port",
            "dashboard-agent-listen-port",
            "metrics-export-port",
            "ray-client-server-port",
        )
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.ports['dashboard-port']}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        words = [f"--{name}={port}" for name, port in self.ports.items()]
        words += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", f"--num-cpus={cpus}", "--disable-usage-stats"]
        words += [f"--object-store-memory={200 * 2**20}", "--block"]
        self._output = (folder / "head.log").open("wb")
        self._process = subprocess.Popen(
            [RAY, "start", "--head", *words], env=self.environment, stdout=self._output, stderr=self._output
        )

    @property
    def address(self) -> str:
        """Where a driver joins."""
        return f"127.0.0.1:{self.ports['port']}"

    def wait(self) -> None:
        """Return when jobs are taken. Raises RuntimeError if the head ends, or after `PATIENCE` seconds."""
        until = time.monotonic() + PATIENCE
        while self.call(RAY, "job", "list").returncode:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the head did not start:\n{(self.folder / 'head.log').read_text()}")

    def call(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the environment of the head's clients."""
        return subprocess.run(
            [str(word) for word in words], env=self.environment | more, cwd=ROOT, text=True, capture_output=True,
            check=False,
        )  # fmt: skip

    def submit(self, id: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Call `cluster/submit.py` for a job."""
        return self.call(sys.executable, ROOT / "cluster" / "submit.py", "--id", id, *words, **more)

    def pids(self) -> list[int]:
        """The processes that were started with this head's folder in their command line or environment."""
        found = []
        for path in Path("/proc").iterdir():
            try:
                said = (path / "cmdline").read_bytes() + (path / "environ").read_bytes() if path.name.isdigit() else b""
            except OSError:
                continue
            if str(self.folder).encode() in said or self.environment["RAY_AUTH_TOKEN"].encode() in said:
                found.append(int(path.name))
        return found

    def stop(self) -> list[int]:
        """Stop what belongs to this head, by its process ids. Returns those that did not end when asked to."""
        self._process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 20
        while self.pids() and time.monotonic() < until:
            time.sleep(0.2)
        left = self.pids()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        return left


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def head(cpus: int) -> Iterator[Head]:
    """A head that takes jobs; it is stopped, and its folder removed, at the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="rd-"))  # short, since the path of a socket has 107 letters at most
    one = Head(folder, cpus)
    try:
        one.wait()
        yield one
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


def status(run: Path) -> dict[str, Any]:
    """What `status.json` of a run says; nothing where there is none yet."""
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_for_rounds(run: Path, rounds: int) -> None:
    """Return when a run has done so many rounds."""
    until = time.monotonic() + PATIENCE
    while (status(run).get("round") or 0) < rounds:
        if time.monotonic() > until or status(run).get("exit_code") is not None:
            raise RuntimeError(f"{run}: {status(run)}")
        time.sleep(0.05)


class Steps:
    """Prints each step with its time."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def done(self, what: str) -> None:
        """Print the time since the last step."""
        now = time.monotonic()
        print(f"{what:<64} {now - self.began:6.1f} s", flush=True)
        self.began = now


def main() -> int:
    """Do all steps. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    steps, folder = Steps(), Path(tempfile.mkdtemp(prefix="ray-dfml-job-"))
    run, pool = folder / "runs" / "glyphs-1", folder / "pools" / "glyphs"
    words = ["train", "free", "--pool", pool, "--data", "glyphs", "--set", f"method.rounds={options.rounds}"]
    words += ["--preset", "quickstart", "--set", "eval.episodes=100", "--seed", 1]
    job = [*words, "--run-dir", run, "--workers", options.workers]
    with head(options.workers) as one:
        steps.done("head with a token is up")
        build = ("pool", "build", "--data", "glyphs", "--models", 4, "--way", 5, "--out", pool)
        made = one.submit("pool-1", "--", *build, "--set", "pretrain.epochs=2", "--workers", options.workers)
        check(made.returncode == 0, made)
        steps.done("submit.py: job pool-1 makes a pool of 4 teachers, exit 0")
        refused = one.submit("glyphs-1", "--", *job, RAY_AUTH_TOKEN="wrong" * 13)
        check(refused.returncode == 5, refused)
        steps.done("submit.py with a wrong token: refused, exit 5")
        grace = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
        submit = (RAY, "job", "submit", "--no-wait", "--submission-id", "glyphs-1", "--runtime-env-json", grace)
        submit += ("--", "ray-dfml")
        check((started := one.call(*submit, *job, "--resume-or-start")).returncode == 0, started)
        wait_for_rounds(run, options.rounds // 2)
        steps.done(f"ray job submit --submission-id glyphs-1: round {options.rounds // 2} is done")
        stopped = one.submit("glyphs-1", "--stop")
        check(stopped.returncode == 130 and status(run)["exit_code"] == 130, stopped)
        steps.done(f"submit.py --stop: exit 130, status {status(run)['state']} in round {status(run)['round']}")
        again = one.submit("glyphs-1", "--", *job)
        check(again.returncode == 0 and status(run)["state"] == "done", again)
        steps.done("submit.py, the same id and folder: goes on, tests, exit 0")
        before = (run / "status.json").read_bytes()
        third = one.submit("glyphs-1", "--", *job)
        check(third.returncode == 0 and (run / "status.json").read_bytes() == before, third)
        steps.done("submit.py once more: the run is done and stays as it is, exit 0")
        one.stop()
        check(not one.pids(), one.pids())
        steps.done("head stopped by process id, nothing left")
    quiet = folder / "runs" / "quiet"
    subprocess.run(
        [sys.executable, "-m", "ray_dfml", *map(str, words), "--run-dir", quiet, "--backend", "local"], check=True,
        capture_output=True,
    )  # fmt: skip
    steps.done("the same run, undisturbed, in one process")
    same = all((run / n).read_bytes() == (quiet / n).read_bytes() for n in ("learner.safetensors", "scores.json"))
    print(f"the learner and its scores have the same bits: {same}")
    shutil.rmtree(folder)
    return 0 if same else 1


def check(right: bool, found: object) -> None:
    """Raise RuntimeError with what was found, unless it is right."""
    if not right:
        raise RuntimeError(f"unexpected: {found}")


if __name__ == "__main__":
    sys.exit(main())
