"""`ray-dfml train`: what it prints, what it writes, what it only does on request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.data import datasets
from ray_dfml.learner import Learner
from tests.runtime import toy

Command = Callable[..., toy.Done]
HERE = ("--backend", "local")


def test_without_data_the_last_weights_are_kept(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    run = tmp_path / "run"
    done = command("train", "free", "--pool", toy_pool, "--run-dir", run, *HERE, *toy.flags("free"), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["run"] == str(run)
    card = json.loads((run / "learner.json").read_text())
    assert (card["selection"], card["method"], card["way"], card["profile"]) == ("last", "free", 2, "fixed")
    state = toy.last_state(run)
    assert state["best"] == state["test_best"] == {}
    assert Learner.load(run).weights.theta.tolist() == state["theta"].tolist()
    assert all(json.loads(line)["validation"] is None for line in (run / "metrics.jsonl").read_text().splitlines())
    assert json.loads((run / "scores.json").read_text()) == []


def test_json_is_alone_on_stdout_and_carries_the_scores(
    tmp_path: Path, toy_pool: Path, toy_data: str, other_data: str, command: Command
) -> None:
    """Two data specs, both of a `folder`: both are validated and tested, and `random` stands beside them."""
    words = (
        "--pool",
        toy_pool,
        "--data",
        toy_data,
        "--data",
        other_data,
        "--run-dir",
        tmp_path / "run",
        *HERE,
        "--json",
    )
    done = command("train", "best-model", *words, *toy.flags("best-model"))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["scores"] == json.loads((tmp_path / "run" / "scores.json").read_text())
    names = {"best-model-direct", "best-model-finetune", "best-model-assign", "random"}
    data = {datasets.load(spec).identity for spec in (toy_data, other_data)}
    assert len(data) == 2
    assert {row["data"] for row in found["scores"]} == data | {"pooled"}
    for one in data:
        assert {row["method"] for row in found["scores"] if row["data"] == one} == names
    assert {row["selection"] for row in found["scores"]} == {"val", "last"}
    assert "round 1/1" in done.err
    assert (tmp_path / "run" / "report.html").is_file()


def test_selection_on_test_only_on_request(tmp_path: Path, toy_pool: Path, toy_data: str, command: Command) -> None:
    small = toy.flags("free", "method.rounds=2", "eval.test_best=true", "eval.shots=[1,2]")
    words = ("--pool", toy_pool, "--data", toy_data, *HERE, "--json", *small)
    done = command("train", "free", "--run-dir", tmp_path / "run", *words)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["scores"]
    assert [(r["method"], r["selection"], r["shot"]) for r in rows] == [
        (method, selection, shot)
        for method, selection in (("free", "val"), ("free", "last"), ("free", "test-best"), ("random", "last"))
        for shot in (1, 2)
    ]
    assert json.loads((tmp_path / "run" / "learner.json").read_text())["selection"] == "val"


def test_without_the_request_there_is_none(free_run: Path) -> None:
    assert toy.last_state(free_run)["test_best"] == {}
    assert {row["selection"] for row in json.loads((free_run / "scores.json").read_text())} == {"val", "last"}


def test_a_dry_run_creates_nothing(tmp_path: Path, toy_pool: Path, toy_data: str, command: Command) -> None:
    words = ("--pool", toy_pool, "--data", toy_data, "--run-dir", tmp_path / "run", *HERE, *toy.flags("free"))
    done = command("train", "free", *words, "--dry-run", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert (plan["method"], plan["rounds"], plan["teachers"]) == ("free", 6, 4)
    assert plan["recovered images"] == 6 * 2 * 16
    assert plan["meta-updates"] == "10"
    assert list(tmp_path.iterdir()) == []
    plain = command("train", "free", *words, "--dry-run")
    assert plain.code == 0
    assert "rounds" in plain.out
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_teacher_does_not_end_the_run(
    tmp_path: Path, toy_pool: Path, toy_data: str, command: Command
) -> None:
    id = toy.damage(toy_pool, tmp_path / "pool", 2, float("nan"))
    words = ("--pool", tmp_path / "pool", "--data", toy_data, "--run-dir", tmp_path / "run", *HERE)
    done = command("train", "average", *words, *toy.flags("average"))
    assert done.code == 0, done.err
    assert "average" in done.out
    assert list(toy.status(tmp_path / "run")["rejected"]) == [id]
    assert id in (tmp_path / "run" / "report.html").read_text()


def test_a_finished_run_is_not_run_again(free_run: Path, command: Command) -> None:
    before = {p: p.stat().st_mtime_ns for p in free_run.rglob("*")}
    done = command("train", "free", "--run-dir", free_run, "--resume", *HERE, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["scores"] == json.loads((free_run / "scores.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in free_run.rglob("*") if p in before} == before


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_is_the_default(tmp_path: Path, toy_pool: Path, toy_data: str, command: Command) -> None:
    words: tuple[Any, ...] = ("--pool", toy_pool, "--data", toy_data)
    there = command("train", "best-model", *words, "--run-dir", tmp_path / "a", "--workers", 1,
                    *toy.flags("best-model"), "--json")  # fmt: skip
    here = command("train", "best-model", *words, "--run-dir", tmp_path / "b", *HERE,
                   *toy.flags("best-model"), "--json")  # fmt: skip
    assert (there.code, here.code) == (0, 0), there.err + here.err
    assert json.loads(there.out)["scores"] == json.loads(here.out)["scores"]
    toy.assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_is_too_small(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    done = command("train", "average", "--pool", toy_pool, "--run-dir", tmp_path / "run", "--workers", 3)
    assert done.code == 5
    assert done.err.splitlines()[-1] == "ray-dfml: 3 shards need 3 CPU, the cluster has 2; lower --workers"
    assert "Traceback" not in done.err


def test_one_command_starts_a_run_and_goes_on_with_it(
    tmp_path: Path, free_run: Path, toy_pool: Path, toy_data: str, command: Command
) -> None:
    """So a job may be submitted again: at the start, half way, and when the run is done."""
    run = tmp_path / "run"
    words = ("train", "free", "--pool", toy_pool, "--data", toy_data, "--run-dir", run, *HERE, "--resume-or-start")
    first = command(*words, *toy.flags("free"))
    assert (first.code, toy.status(run)["exit_code"]) == (0, 0), first.err
    toy.assert_same_run(run, free_run)
    for name in ("learner.safetensors", "learner.json", "scores.json", "episodes.parquet", "report.html"):
        (run / name).unlink()
    (run / "status.json").write_text('{"state": "running", "round": 1}')  # as after a SIGKILL
    (run / "scores.json").write_text("[]")
    for path in (run / "checkpoints").glob(f"*{toy.status(free_run)['round'] - 1:06d}*"):
        path.unlink()
    again = command(*words, *toy.flags("free"))
    assert again.code == 0, again.err
    toy.assert_same_run(run, free_run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = command(*words, *toy.flags("free"))
    assert (done.code, done.out) == (0, first.out)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--seed", 9), "is a run with another seed"),
        (("--set", "method.replay.lr=0.5"), "is a run with another method.replay.lr"),
        (("--resume",), "give one of --resume, --resume-or-start and --dry-run"),
    ],
)
def test_another_command_does_not_go_on_with_it(
    free_run: Path, toy_pool: Path, toy_data: str, command: Command, more: tuple[object, ...], why: str
) -> None:
    words = ("--pool", toy_pool, "--data", toy_data, "--run-dir", free_run, *HERE, *toy.flags("free"))
    done = command("train", "free", *words, "--resume-or-start", *more)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert why in done.err
    done = command("train", "average", "--pool", toy_pool, "--run-dir", free_run, *HERE, "--resume-or-start")
    assert (done.code, "is a run of free, not of average" in done.err) == (2, True)
