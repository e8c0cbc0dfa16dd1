"""A round that stalls is noticed while it is at work, and the job, the shard and the time are named."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.ops import OPS
from ray_dfml.runtime import dispatch, driver, stalls, watch
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.runtime.stalls import AtWork, Board, Pace, Stall, Watch
from tests.runtime import toy
from tests.runtime.standin import Ref, Shard, StandIn, backend_of, costing


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Clocks that stand still: the one number in this list."""
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def at_work(seconds: float, longest: float | None, shard: int = 2, *teachers: str) -> AtWork:
    return AtWork(shard, "free.recover", teachers or ("t",), time.time() - seconds, longest)


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(
    ("seconds", "longest", "stalls_now"),
    [(61.0, 1.0, True), (59.0, 1.0, False), (99.0, 10.0, False), (101.0, 10.0, True), (599.0, None, False),
     (601.0, None, True)],
)  # fmt: skip
def test_what_takes_ten_times_as_long_as_before_stalls(seconds: float, longest: float | None, stalls_now: bool) -> None:
    assert at_work(seconds, longest).stalls == stalls_now


@pytest.mark.usefixtures("frozen")
def test_how_long_jobs_take_is_measured_by_their_cost() -> None:
    """A job of 30 may take thirty times as long as one of cost 1."""
    pace = Pace()
    assert pace.at_work(0, "op", costing(1.0), 1.0).longest is None
    pace.ended("op", costing(2.0, 2.0), 12.0)
    pace.ended("op", costing(1.0), 1.0)
    pace.ended("other", costing(1.0), 100.0)
    found = pace.at_work(1, "op", costing(30.0), 50.0)
    assert (found.longest, found.shard, found.teachers) == (90.0, 1, ("t0",))
    assert found.seconds == 50.0


@pytest.mark.usefixtures("frozen")
def test_the_line_names_round_shard_job_and_time() -> None:
    found = [at_work(125.0, 3.0, 1, "a", "b", "c", "d"), at_work(61.0, None, 0, "e")]
    assert Stall(7, 130.0, found).said == (
        "round 7 has been at work for 2:10: shard 1 is at free.recover of a, b, c and 1 more for 2:05, where such work "
        "took 0:03 at most; shard 0 is at free.recover of e for 1:01"
    )
    assert Stall(7, 130.0, []).said.endswith("no shard has a job, so the learner itself is at work")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks a hundred times a second, and little patience."""
    for module in (stalls, dispatch):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    for name in ("LEAST_SECONDS", "FIRST_SECONDS"):
        monkeypatch.setattr(stalls, name, 0.02)
    monkeypatch.setattr(stalls, "TIMES", 1.0)


def test_a_stall_is_told_again_when_its_time_has_doubled(frozen: list[float]) -> None:
    """A job stalls after a minute, and the round, which is the first, after ten."""
    began = frozen[0]

    class Ends(threading.Event):
        """The end of a round of 20 minutes, whose time passes while it is waited for."""

        def wait(self, timeout: float | None = None) -> bool:
            frozen[0] += timeout or 0.0
            return frozen[0] > began + 1200

    told: list[Stall] = []
    watched = Watch(lambda: [AtWork(0, "op", ("slow",), began, 1.0), at_work(0.0, None, 1)], told.append)
    watched._look(4, began, Ends())
    assert [stall.seconds for stall in told] == [65.0, 130.0, 260.0, 520.0, 600.0, 1200.0]
    assert {stall.round for stall in told} == {4}
    assert all([one.teachers for one in stall.at_work] == [("slow",)] for stall in told)


def test_a_round_as_long_as_others_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "LOOK_SECONDS", 0.001)
    looks, told = threading.Semaphore(0), list[Stall]()

    def look() -> Sequence[AtWork]:
        looks.release()
        return [at_work(30.0, 20.0)]

    with Watch(look, told.append).round(1):
        for _ in range(5):
            assert looks.acquire(timeout=60)
    assert told == []


def test_what_is_at_work_goes_through_a_file(tmp_path: Path) -> None:
    board, found = Board(tmp_path / stalls.BOARD), [at_work(5.0, 1.5), at_work(7.0, None, 0)]
    assert board.read() == []
    board.write(found)
    assert board.read() == found
    (tmp_path / stalls.BOARD).write_text('[{"shard": 1}]')
    assert board.read() == []
    board.clear()
    assert list(tmp_path.iterdir()) == []
    Board(tmp_path / "gone" / "board").write(found)  # a disk that takes nothing ends no run


@pytest.mark.usefixtures("quick")
def test_shards_at_work_are_named_while_one_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job of `t1` ends only when the board names it, after the other shard has done all else."""

    class Slow(Shard):
        def _run(self, load: Sequence[Any], op: str, jobs: Sequence[Any], shared: Any) -> Ref:
            found = super()._run(load, op, jobs, shared)
            found.ends = [job.index for job in jobs] != [1]
            return found

    board, seen, plain = Board(tmp_path / "board"), list[AtWork](), StandIn.wait

    def wait(refs: Sequence[Ref], num_returns: int, timeout: float | None) -> Any:
        assert timeout is not None
        if not any(ref.ends for ref in refs):
            seen[:] = board.read()  # which may be older than the end of the other shard's jobs
            refs[0].ends = len(seen) == 1
        return plain(refs, num_returns, timeout)

    monkeypatch.setattr(StandIn, "wait", staticmethod(wait))
    monkeypatch.setattr(dispatch, "ray", StandIn)
    backend = backend_of([Slow(up=True), Slow(up=True)], batched=False, board=board)
    assert backend.map("op", costing(1.0, 9.0, 1.0, 1.0), {}) == [{"index": i} for i in range(4)]
    (named,) = {(one.op, one.teachers) for one in seen}
    assert named == ("op", ("t1",))
    assert seen[0].longest is not None
    assert not (tmp_path / "board").exists()


@pytest.mark.usefixtures("quick")
def test_a_run_says_so_while_it_stalls_and_its_bits_are_the_same(
    tmp_path: Path, toy_pool: Path, toy_data: str, free_run: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One job of the third round waits until `status.json` names it."""
    run, recover, seen, count = tmp_path / "run", OPS["free.recover"], dict[str, Any](), [0]

    def slow(shard: Any, jobs: Sequence[Any], shared: Any) -> Any:
        count[0] += 1
        while count[0] == 5 and not seen:
            status, lines = toy.status(run), watch.summary(RunFolder.open(run))
            stalled = status.get("stalled") or {}
            if stalled.get("round") == 3 and stalled["at_work"] and toy.status(run) == status:
                seen.update(status, teacher=jobs[0].teacher, lines=lines)
            time.sleep(0.01)
        return recover(shard, jobs, shared)

    monkeypatch.setitem(OPS, "free.recover", slow)
    config = toy.config("free", toy_pool, toy_data)
    inputs = driver.read_inputs(config)
    folder = RunFolder.create(run, config, {"pool": inputs.pools, "data": inputs.data})
    driver.run(config, inputs, folder, toy.LOCAL, Progress())
    (job,) = seen["stalled"]["at_work"]
    assert (job["op"], job["teachers"], job["shard"]) == ("free.recover", [seen["teacher"]], 0)
    said = seen["stalled"]["said"]
    assert said.startswith("round 3 has been at work for ")
    assert f"shard 0 is at free.recover of {seen['teacher']} for " in said
    assert said in seen["lines"]
    assert said in capsys.readouterr().err.splitlines()
    assert json.loads((run / "status.json").read_text())["stalled"] is None
    toy.assert_same_run(run, free_run)
