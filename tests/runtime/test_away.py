"""Services that do not answer any more: what was paid for is kept, and --resume asks them again."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from ray_dfml import Student
from ray_dfml.errors import NobodyLeft, RejectedError, ServiceAway
from ray_dfml.runtime import launch
from ray_dfml.runtime.asking import WrappedModel
from ray_dfml.runtime.driver import Machine
from ray_dfml.services import client
from ray_dfml.services.ledger import Ledger
from tests.runtime import toy
from tests.runtime.test_accounts import ids, pool_with, sums
from tests.runtime.test_keys import services
from tests.services.faulty import FaultyService, served

PLAN, BATCH = 24, 8
"""Images that a whole training asks each teacher about, and how many a round does."""

Leave = Callable[..., None]


@pytest.fixture
def pool(tmp_path: Path, toy_pool: Path) -> Path:
    """Four teachers that are only asked."""
    return pool_with(toy_pool, tmp_path / "pool", *[{"access": "label"}] * 4)


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Leave:
    """Let some teachers, or none, fail to answer from their second batch on."""
    query = WrappedModel.query

    def leave(*away: str) -> None:
        asked: dict[str, int] = {}

        def answer(self: WrappedModel, images: np.ndarray) -> np.ndarray:
            asked[self.card.id] = asked.get(self.card.id, 0) + 1
            if self.card.id in away and asked[self.card.id] > 1:
                raise ServiceAway(f"{self.card.id}: the server is down")
            return query(self, images)

        monkeypatch.setattr(WrappedModel, "query", answer)

    return leave


def test_a_service_that_goes_away_leaves_its_student(tmp_path: Path, pool: Path, leave: Leave) -> None:
    run, first = tmp_path / "run", ids(pool)[0]
    leave(first)
    launch.new_run(toy.config("ideal", pool, None), run, toy.LOCAL, quiet=True)
    found = toy.status(run)
    said = f"{first}: the server is down; its student of {BATCH} images is kept"
    assert (found["state"], found["rejected"]) == ("done", {first: said})
    assert {id: Student.load(run, teacher=id).card.queries for id in ids(pool)} == dict.fromkeys(ids(pool), PLAN) | {
        first: BATCH
    }
    assert said in (run / "report.html").read_text()
    assert toy.last_state(run)["rejected"] == {}


def test_a_run_that_ended_without_a_service_goes_on_with_it_to_the_bits_of_a_quiet_run(
    tmp_path: Path, pool: Path, leave: Leave, command: Callable[..., toy.Done]
) -> None:
    """What it missed is made up, and the others are not asked again. Its pictures are met later than theirs."""
    run, quiet, first = tmp_path / "run", tmp_path / "quiet", ids(pool)[0]
    toy.train(toy.config("ideal", pool, None), quiet)
    leave(first)
    words = ("train", "ideal", "--run-dir", run, "--backend", "local")
    done = command(*words, "--pool", pool, *toy.flags("ideal"))
    said = f"when {first} can be reached again, --resume goes on with what is missing"
    assert (done.code, said in done.err) == (0, True)
    assert toy.status(run)["behind"] == [first]

    leave(*ids(pool))
    again = command(*words, "--resume")
    assert (again.code, sums(run)[first]) == (3, (2 * BATCH, 2 * BATCH)), "it answers once, and is away again"
    leave()
    again = command(*words, "--resume")
    assert again.code == 0, again.err
    assert sums(run) == dict.fromkeys(ids(pool), (PLAN, PLAN))
    late, early = toy.last_state(run), toy.last_state(quiet)
    assert list(late.pop("pictures")["latest"]) != list(early.pop("pictures")["latest"])
    toy.assert_equal(late, early)
    assert [file.read_bytes() for file in sorted((run / "students").rglob("*.safetensors"))] == [
        file.read_bytes() for file in sorted((quiet / "students").rglob("*.safetensors"))
    ]
    found = toy.status(run)
    assert (found["state"], found["rejected"], found["behind"]) == ("done", {}, [])
    assert command(*words, "--resume").err == "", "a run that is done stays as it is"


def test_a_service_that_is_still_away_costs_no_round(tmp_path: Path, pool: Path, leave: Leave) -> None:
    run, first = tmp_path / "run", ids(pool)[0]
    leave(first)
    launch.new_run(toy.config("ideal", pool, None), run, toy.LOCAL, quiet=True)
    before = (run / "metrics.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WrappedModel, "query", lambda self, images: gone(self))
        with pytest.raises(NobodyLeft, match=f"still are .{first}: the server is down.; --resume asks them again"):
            launch.continue_run(run, "ideal", toy.LOCAL, quiet=True)
    assert (run / "metrics.jsonl").read_text() == before
    leave()
    launch.continue_run(run, "ideal", toy.LOCAL, quiet=True)
    assert sums(run) == dict.fromkeys(ids(pool), (PLAN, PLAN))


def gone(one: WrappedModel) -> np.ndarray:
    raise ServiceAway(f"{one.card.id}: the server is down")


def test_a_run_whose_services_are_all_away_keeps_what_is_done_and_goes_on_later(
    tmp_path: Path, pool: Path, leave: Leave, command: Callable[..., toy.Done]
) -> None:
    """Exit code 3 with the students of a round; once all are back, --resume ends with the bits of a quiet run."""
    run, quiet = tmp_path / "run", tmp_path / "quiet"
    toy.train(toy.config("ideal", pool, None), quiet)
    leave(*ids(pool))
    words = ("train", "ideal", "--run-dir", run, "--backend", "local")
    done = command(*words, "--pool", pool, *toy.flags("ideal"), "--json")
    assert done.code == 3, done.err
    assert json.loads(done.out) == {"run": str(run), "scores": []}
    assert "every teacher was rejected" in done.err.splitlines()[-1]
    assert done.err.endswith("then --resume, which asks again those that are away\n")
    assert toy.status(run)["state"] == "failed"
    assert {Student.load(run, teacher=id).card.queries for id in ids(pool)} == {BATCH}
    leave()
    again = command(*words, "--resume")
    assert again.code == 0, again.err
    toy.assert_equal(toy.last_state(run), toy.last_state(quiet))
    assert sums(run) == dict.fromkeys(ids(pool), (PLAN, PLAN))
    assert toy.status(run)["rejected"] == {}


def test_nothing_is_kept_of_a_run_without_a_round(tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: WrappedModel, images: np.ndarray) -> np.ndarray:
        raise ServiceAway(f"{self.card.id}: the server is down")

    monkeypatch.setattr(WrappedModel, "query", answer)
    run = tmp_path / "run"
    with pytest.raises(NobodyLeft, match=f"{ids(pool)[0]}: the server is down"):
        launch.new_run(toy.config("ideal", pool, None), run, toy.LOCAL, quiet=True)
    assert not (run / "students").exists()
    assert toy.status(run)["state"] == "failed"


@pytest.mark.ray
def test_a_service_that_fails_under_ray_leaves_its_student(
    tmp_path: Path, toy_data: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind of the error passes from the gateway's process to the shard's, and from there to the learner's."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    pool = toy.build_pool(tmp_path / "built", toy_data, models=2, way=3)
    server = FaultyService([None, None, *["500"] * 9])
    server.description["inputs"][0]["shape"] = [-1, 1, 16, 16]
    with served(server) as url:
        pool = services(pool, tmp_path / "pool", url, {"batch": BATCH})
        toy.train(toy.config("ideal", pool, None), tmp_path / "run", Machine(workers=1))
    first, second = ids(pool)
    said = toy.status(tmp_path / "run")["rejected"][first]
    assert said.endswith(f"fails with status 500: out of memory; its student of {BATCH} images is kept")
    asked = {id: Student.load(tmp_path / "run", teacher=id).card.queries for id in (first, second)}
    assert asked == {first: BATCH, second: PLAN}
    assert toy.last_state(tmp_path / "run")["rejected"] == {}


def test_a_service_that_refuses_a_key_is_asked_again_by_resume(
    tmp_path: Path, toy_pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that ended in the middle of a run is no reason to give up what was paid for."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    server = FaultyService([None, None, "401"])
    server.description["inputs"][0]["shape"] = [-1, 1, 16, 16]
    with served(server) as url:
        pool = services(toy_pool, tmp_path / "pool", url, {"batch": BATCH})
        content = yaml.safe_load((pool / "pool.yaml").read_text())
        content["teachers"] = content["teachers"][:1]
        content["teachers"][0] |= {"classes": [f"toy/{i}" for i in range(3)]}
        (pool / "pool.yaml").write_text(yaml.safe_dump(content))
        run = tmp_path / "run"
        with pytest.raises(NobodyLeft, match=r"asks for a key \(401\)"):
            launch.new_run(toy.config("ideal", pool, None), run, toy.LOCAL, quiet=True)
        assert sums(run) == {ids(pool)[0]: (2 * BATCH, BATCH)}
        launch.continue_run(run, "ideal", toy.LOCAL, quiet=True)
    assert sums(run) == {ids(pool)[0]: (PLAN + BATCH, PLAN)}
    assert toy.status(run)["rejected"] == {}


@pytest.mark.parametrize("lost", ["deleted", "another"])
def test_a_ledger_that_has_forgotten_queries_is_refused(tmp_path: Path, pool: Path, leave: Leave, lost: str) -> None:
    """Budgets would begin anew."""
    run, first = tmp_path / "run", ids(pool)[0]
    leave(first)
    launch.new_run(toy.config("ideal", pool, None), run, toy.LOCAL, quiet=True)
    for file in run.glob("ledger.sqlite*"):
        file.unlink()
    if lost == "another":
        Ledger(run / "ledger.sqlite", []).close()
    leave()
    with pytest.raises(RejectedError, match=f"ledger.sqlite: holds 0 images sent to {first}, and the run has noted 8"):
        launch.continue_run(run, "ideal", toy.LOCAL, quiet=True)
