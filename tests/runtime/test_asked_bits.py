"""Teachers that are only asked, on shards: the same bits and the same questions whoever is killed on the way.

What was answered is never asked again, and of what was sent only the question at work is sent twice.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.runtime import cluster
from ray_dfml.runtime.driver import Machine, read_inputs
from ray_dfml.runtime.ray_gateway import RayGateway
from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with, sums
from tests.runtime.test_bits import PATIENCE, Ambush, gone, meanwhile

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PLAN, BATCH = 24, 8
"""Images that a whole training asks each teacher about, and how many a round does."""


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path) -> Path:
    """The toy pool, all of whose teachers are only asked."""
    levels = [{"access": level} for level in ("label", "probs", "logits", "label")]
    return pool_with(toy_pool, tmp_path_factory.mktemp("closed") / "pool", *levels)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, closed: Path) -> Path:
    """A run in one process that nobody disturbed."""
    path = tmp_path_factory.mktemp("quiet") / "run"
    toy.train(toy.config("ideal", closed, None), path)
    assert sums(path) == dict.fromkeys(ids(closed), (PLAN, PLAN))
    return path


def assert_same(run: Path, quiet: Path, twice: dict[str, int] | None = None) -> None:
    """The bits of the quiet run, and its questions but for `twice`: teacher -> images sent a second time."""
    toy.assert_equal(toy.last_state(run), toy.last_state(quiet))
    assert sums(run) == {
        id: (sent + (twice or {}).get(id, 0), answered) for id, (sent, answered) in sums(quiet).items()
    }
    found = toy.status(run)
    assert (found["state"], found["rejected"]) == ("done", {})
    assert found["queries"]["answered"] == PLAN * len(sums(quiet))


def test_shards_ask_as_one_process_does(tmp_path: Path, closed: Path, quiet: Path) -> None:
    toy.train(toy.config("ideal", closed, None), tmp_path / "run", Machine(workers=2))
    assert_same(tmp_path / "run", quiet)


@pytest.fixture
def ambush(tmp_path: Path, closed: Path, monkeypatch: pytest.MonkeyPatch) -> Ambush:
    """The shard that first asks a teacher waits, after the ledger has counted the question."""
    found = Ambush(tmp_path / "ambush", ids(closed)[1])
    monkeypatch.setattr(cluster, "PoolStore", found.store(cluster.PoolStore))
    return found


def struck(run: Path, closed: Path, ambush: Ambush, victim: Callable[[], int]) -> None:
    """A run on one shard in which a process is killed while the shard waits."""
    killed: list[int] = []

    def strike() -> None:
        ambush.held()
        killed.append(victim())
        os.kill(killed[0], signal.SIGKILL)
        ambush.go()

    thread = meanwhile(strike)
    toy.train(toy.config("ideal", closed, None), run, Machine(workers=1))
    thread.join(PATIENCE)
    assert gone(killed[0])


def test_a_shard_killed_with_a_question(tmp_path: Path, closed: Path, quiet: Path, ambush: Ambush) -> None:
    struck(tmp_path / "run", closed, ambush, ambush.held)
    assert_same(tmp_path / "run", quiet, {ambush.teacher: BATCH})


def test_the_gateway_killed_with_a_question(
    tmp_path: Path, closed: Path, quiet: Path, ambush: Ambush, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts it again from the ledger, which knows the question; its answer is kept as if nothing had been."""
    actors: list[Any] = []
    plain = RayGateway.start

    def start(*args: Any) -> RayGateway:
        made = plain(*args)
        actors.append(made._actor)
        return made

    monkeypatch.setattr(cluster.RayGateway, "start", start)

    def victim() -> int:
        return cluster.ray.get(actors[0].__ray_call__.remote(lambda _: os.getpid()))

    struck(tmp_path / "run", closed, ambush, victim)
    assert_same(tmp_path / "run", quiet)


def test_the_learner_killed_with_a_question(
    tmp_path: Path, closed: Path, quiet: Path, ambush: Ambush, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard goes on and settles; the next learner repeats the round, and its questions cost nothing."""
    pids: list[int] = []
    plain = cluster.RaySession.start

    def start(session: cluster.RaySession) -> Any:
        done = plain(session)
        pids.append(cluster.ray.get(session._learner.__ray_call__.remote(lambda _: os.getpid())))
        return done

    monkeypatch.setattr(cluster.RaySession, "start", start)
    struck(tmp_path / "run", closed, ambush, lambda: pids[0])
    assert len(set(pids)) == len(pids) == 2
    assert_same(tmp_path / "run", quiet)


def test_no_gateway_where_nobody_is_asked(toy_pool: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*_: Any) -> RayGateway:
        raise AssertionError("a gateway was started")

    monkeypatch.setattr(cluster.RayGateway, "start", never)
    config = toy.config("average", toy_pool, None)
    session = Machine(workers=1).session(config, read_inputs(config), tmp_path)
    assert session.spent() == {}
    session.close()
