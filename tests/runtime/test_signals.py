"""The driver's process stopped from outside: what it leaves, and that --resume ends in the bits of a quiet run."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime import toy

PATIENCE = 120.0


def heed_interrupts() -> None:
    """A shell's background job ignores SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(run: Path, pool: Path, data: str, *, backend: str = "local", **options: object) -> subprocess.Popen[str]:
    """`ray-dfml train free` as a process of its own."""
    words = [sys.executable, "-m", "ray_dfml", "train", "free", "--pool", str(pool), "--data", data]
    words += ["--run-dir", str(run), "--backend", backend, "--workers", "1", *toy.flags("free")]
    options.setdefault("preexec_fn", heed_interrupts)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def first_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the run has one."""
    until = time.monotonic() + PATIENCE
    while not list((run / "checkpoints").glob("round-*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_resumed_in_the_same_bits(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, command: Callable[..., toy.Done], number: int
) -> None:
    run = tmp_path / "run"
    process = start(run, toy_pool, toy_data)
    first_checkpoint(run, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err
    assert out == ""
    found = toy.status(run)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert found["state"] in ("starting", "running")
    else:
        assert process.returncode == 130, err
        line = f"ray-dfml: interrupted; continue with: ray-dfml train free --run-dir {run} --resume"
        assert err.splitlines()[-1] == line
        ended = ("interrupted", "stopped by the user", 130)
        assert (found["state"], found["last_error"], found["exit_code"]) == ended
    assert not (run / "learner.safetensors").exists()

    done = command("train", "free", "--run-dir", run, "--resume", "--backend", "local", "--workers", "1")
    assert done.code == 0, done.err
    assert toy.status(run)["state"] == "done"
    rounds = [line.split(",")[0] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [f'{{"round": {r}' for r in range(6)]
    toy.assert_same_run(run, free_run)


def test_a_disk_that_fills_ends_in_one_line_and_can_be_resumed(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, command: Callable[..., toy.Done]
) -> None:
    """A limit on the size of files stands in for the disk: the checkpoint does not fit."""
    run = tmp_path / "run"
    limit = 100_000

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(run, toy_pool, toy_data, preexec_fn=full, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("ray-dfml: ")
    assert toy.status(run)["state"] == "failed"
    assert list((run / "checkpoints").iterdir()) == []
    assert command("train", "free", "--run-dir", run, "--resume", "--backend", "local").code == 0
    toy.assert_same_run(run, free_run)


@pytest.mark.ray
def test_sigterm_stops_a_run_on_shards_cleanly(tmp_path: Path, toy_pool: Path, toy_data: str) -> None:
    """Ray has a SIGTERM handler of its own, which would end the driver before it wrote anything."""
    run = tmp_path / "run"
    process = start(run, toy_pool, toy_data, backend="ray")
    first_checkpoint(run, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert toy.status(run)["state"] == "interrupted"
