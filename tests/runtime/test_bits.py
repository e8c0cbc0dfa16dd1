"""The same bits on one process, one shard, two shards, and with a shard or the learner killed within a job."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.methods.free import method as free
from ray_dfml.runtime import cluster, driver
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.rundir import RunFolder
from tests.runtime import toy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PATIENCE = 120.0
"""Seconds after which a test gives up on something that never comes."""


def test_shards_agree_with_one_process(tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str) -> None:
    for workers in (1, 2):
        path = tmp_path / str(workers)
        toy.train(toy.config("free", toy_pool, toy_data), path, Machine(workers=workers))
        toy.assert_same_run(path, free_run)


class Ambush:
    """Makes the first shard that loads a given teacher wait in the middle of its job, and lets a test strike then."""

    def __init__(self, folder: Path, teacher: str) -> None:
        self.folder, self.teacher = folder, teacher
        folder.mkdir()

    def store(self, plain: Callable[..., Callable[[str], tuple]]) -> Callable[..., Callable[[str], tuple]]:
        """`PoolStore` whose loads are noted; the first one of the teacher waits."""
        folder, teacher, patience = self.folder, self.teacher, PATIENCE

        def make(*given: Any) -> Callable[[str], tuple]:
            stored = plain(*given)

            def load(id: str) -> tuple:
                with (folder / "loads").open("a") as log:
                    log.write(f"{id} {os.getpid()}\n")
                if id == teacher and not os.path.lexists(folder / "held"):
                    os.symlink(str(os.getpid()), folder / "held")
                    until = time.monotonic() + patience
                    while not (folder / "go").exists() and time.monotonic() < until:
                        time.sleep(0.01)
                return stored(id)

            return load

        return make

    def held(self) -> int:
        """The pid of the shard that waits, once there is one."""
        until = time.monotonic() + PATIENCE
        while not os.path.lexists(self.folder / "held"):
            assert time.monotonic() < until, "no shard ever loaded the teacher"
            time.sleep(0.01)
        return int(os.readlink(self.folder / "held"))

    def loads(self) -> list[int]:
        """The pids of the processes that loaded the teacher, in order."""
        lines = (self.folder / "loads").read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.split()[0] == self.teacher]

    def go(self) -> None:
        """End the wait."""
        (self.folder / "go").touch()


def late_teacher(pool: Path, data: str) -> tuple[str, int]:
    """A teacher that is first inverted after round 0, and that round: a checkpoint exists when it is loaded."""
    config = toy.config("free", pool, data)
    assert isinstance(config.method, free.Config)
    world = driver.read_inputs(config).world
    first: dict[str, int] = {}
    for r in range(config.method.rounds):
        for job in free.plan(config.method, world, {}, r):
            first.setdefault(str(job.teacher), r)
    id, r = max(first.items(), key=lambda item: item[1])
    assert r > 0, "every teacher is inverted in round 0; change the toy settings"
    return id, r


def gone(pid: int) -> bool:
    """Whether the process ends within a while."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    """Run `act` beside the test."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_a_shard_killed_within_a_job(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ambush = Ambush(tmp_path / "ambush", late_teacher(toy_pool, toy_data)[0])
    monkeypatch.setattr(cluster, "PoolStore", ambush.store(cluster.PoolStore))
    killed: list[int] = []

    def strike() -> None:
        killed.append(ambush.held())
        os.kill(killed[0], signal.SIGKILL)

    thread = meanwhile(strike)
    toy.train(toy.config("free", toy_pool, toy_data), tmp_path / "run", Machine(workers=2))
    thread.join(PATIENCE)
    assert gone(killed[0])
    assert ambush.loads()[0] == killed[0], "the job was in the process that was killed"
    assert set(ambush.loads()) - set(killed), "the job ran again elsewhere"
    assert toy.status(tmp_path / "run")["rejected"] == {}
    assert toy.status(tmp_path / "run")["last_error"] is None
    toy.assert_same_run(tmp_path / "run", free_run)


def test_the_learner_killed_within_a_round(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, r = late_teacher(toy_pool, toy_data)
    ambush = Ambush(tmp_path / "ambush", teacher)
    monkeypatch.setattr(cluster, "PoolStore", ambush.store(cluster.PoolStore))
    pids: list[int] = []
    plain = cluster.RaySession.start

    def start(session: cluster.RaySession) -> Any:
        done = plain(session)
        pids.append(cluster.ray.get(session._learner.__ray_call__.remote(lambda _: os.getpid())))
        return done

    monkeypatch.setattr(cluster.RaySession, "start", start)
    said: list[str] = []
    note = RunFolder.status

    def status(folder: RunFolder, **fields: Any) -> None:
        said.append(str(fields.get("last_error")))
        note(folder, **fields)

    monkeypatch.setattr(RunFolder, "status", status)

    def strike() -> None:
        ambush.held()
        os.kill(pids[0], signal.SIGKILL)
        ambush.go()

    thread = meanwhile(strike)
    toy.train(toy.config("free", toy_pool, toy_data), tmp_path / "run", Machine(workers=1))
    thread.join(PATIENCE)
    assert gone(pids[0])
    assert len(set(pids)) == len(pids) == 2
    assert [text.split(":")[0] for text in said if text != "None"] == [f"learner restarted in round {r}"]
    toy.assert_same_run(tmp_path / "run", free_run)
