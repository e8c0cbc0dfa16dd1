"""The run folder: made whole, never overwritten, and true to what happened."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from ray_dfml.config import build
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.runtime.rundir import RunFolder, manifest, write_text
from ray_dfml.types import Score
from tests.runtime import toy

KEYS = ["method", "data", "split", "way", "shot", "episodes", "bn", "profile", "selection", "mean", "ci95"]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", toy.config("random", None, "glyphs"), {"pool": [], "data": []})


def test_a_new_folder_is_whole(folder: RunFolder) -> None:
    names = {
        "config.yaml", "manifest.json", "metrics.jsonl", "ledger.jsonl", "scores.json", "status.json", "checkpoints",
    }  # fmt: skip
    assert {p.name for p in folder.path.iterdir()} == names
    assert [p.name for p in folder.path.parent.iterdir()] == ["run"]
    assert toy.status(folder.path) == {"state": "created", "round": None}


def test_an_existing_path_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"exists already; add --resume .* or choose another --run-dir"):
        RunFolder.create(target, toy.config("random", None, "glyphs"), {})
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "mine.txt"]


@pytest.mark.parametrize("text", ["", '{"state": "do', "\xff"])
def test_a_damaged_file_of_the_folder_is_named(folder: RunFolder, text: str) -> None:
    reads = {"status": folder.read_status, "manifest": folder.manifest, "scores": folder.read_scores}
    for name, read in reads.items():
        path = folder.path / f"{name}.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(RejectedError, match=f"^{path}: not whole: .*; put back a copy of it, or start a new run$"):
            read()


@pytest.mark.parametrize("step", ["yaml.safe_dump", "os.rename"])
def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ray_dfml.runtime.rundir.{step}", fail)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.create(tmp_path / "run", toy.config("random", None, "glyphs"), {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    write_text(file, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ray_dfml.runtime.rundir.os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert file.read_text() == "old"


def test_what_a_killed_process_left_half_written_goes_with_the_next_one(folder: RunFolder) -> None:
    half = folder.path / "checkpoints" / ".round-000001.json.0f.tmp", folder.path / ".status.json.0e.tmp"
    for file in half:
        file.write_text("{")
    with folder.locked():
        assert not any(file.exists() for file in half)
    assert (folder.path / "status.json").exists()


def test_status_keeps_what_it_is_not_told(folder: RunFolder) -> None:
    folder.status(state="running", round=3)
    folder.status(eta_seconds=1.5)
    found = toy.status(folder.path)
    assert {k: found[k] for k in ("state", "round", "eta_seconds")} == {
        "state": "running",
        "round": 3,
        "eta_seconds": 1.5,
    }
    assert found["updated"].endswith("+00:00")


@pytest.mark.parametrize("last", [{}, {"round": 1, "loss": 0.5}])
def test_a_log_that_goes_on_drops_later_rounds_and_half_lines(folder: RunFolder, last: dict) -> None:
    for r in range(4):
        folder.log({"round": r, "loss": r / 2})
    with (folder.path / "metrics.jsonl").open("a") as handle:
        handle.write('[1]\n{"loss": 2}\n{"round": 1, "lo')
    folder.resume_log(2, last)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 0, "loss": 0.0}, {"round": 1, "loss": 0.5}]
    folder.log({"round": 2})
    assert json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[-1]) == {"round": 2}


def test_a_log_gets_the_line_that_its_checkpoint_has(folder: RunFolder) -> None:
    folder.log({"round": 0})
    folder.resume_log(2, {"round": 1, "loss": 0.5})
    assert (folder.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1, "loss": 0.5}\n'
    folder.resume_log(0, {})
    assert (folder.path / "metrics.jsonl").read_text() == ""


def test_scores_and_episodes_agree(folder: RunFolder) -> None:
    scores = [
        Score(
            method=m, data="glyphs", split="test", way=5, shot=s, bn="support", selection="last", accuracies=np.array(a)
        )
        for m, s, a in (("free", 1, [20.0, 40.0, 90.0]), ("random", 5, [10.0, 30.0]))
    ]
    rows = folder.write_scores(scores, "code")
    assert rows == json.loads((folder.path / "scores.json").read_text())
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert (rows[0]["mean"], rows[0]["episodes"], rows[0]["profile"], rows[0]["bn"]) == (50.0, 3, "code", "support")
    table = pq.read_table(folder.path / "episodes.parquet").to_pydict()
    for row in rows:
        own = [a for a, m, s in zip(table["accuracy"], table["method"], table["shot"], strict=True)
               if (m, s) == (row["method"], row["shot"])]  # fmt: skip
        assert np.mean(own) == pytest.approx(row["mean"])
    assert table["episode"] == [0, 1, 2, 0, 1]


def test_a_config_that_cannot_be_read_is_rejected(folder: RunFolder) -> None:
    for text in ("{", "name: random\nextra: 1\n", ""):
        (folder.path / "config.yaml").write_text(text)
        with pytest.raises(RejectedError, match=r"config\.yaml") as error:
            folder.config()
        assert text == "{" or "\n" not in str(error.value)


def test_a_config_of_another_version_is_not_filled_up_with_defaults(folder: RunFolder) -> None:
    path = folder.path / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["eval"]["icfil"]["steps"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        RejectedError, match=r"config\.yaml: has no eval\.icfil\.steps, so another version wrote it; start"
    ):
        folder.config()


def test_no_run_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a run folder \(no config\.yaml\); start a run without --resume"):
        RunFolder.open(tmp_path)


def test_the_manifest_says_what_ran() -> None:
    found = manifest(toy.config("random", None, "glyphs", seed=7), pools=[{"path": "p"}], data=[])
    assert (found["seed"], found["pool"], found["data"]) == (7, [{"path": "p"}], [])
    assert set(found["versions"]) == {"python", "ray-dfml", "torch", "torchvision", "numpy", "pyarrow", "ray"}
    assert all(found["versions"].values())
    assert found["hardware"]["cpus"] == os.cpu_count()
    assert found["hardware"]["memory_gib"] > 0
    assert json.loads(json.dumps(found)) == found


def test_a_finished_run_holds_its_record(free_run: Path) -> None:
    rows = json.loads((free_run / "scores.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * 3
    assert [(row["method"], row["selection"]) for row in rows] == [
        ("free", "val"), ("free", "last"), ("random", "last")
    ]  # fmt: skip
    episodes = pq.read_table(free_run / "episodes.parquet").to_pylist()
    for row in rows:
        names = (row["method"], row["selection"])
        own = [episode["accuracy"] for episode in episodes if (episode["method"], episode["selection"]) == names]
        assert len(own) == row["episodes"] == 20
        assert sum(own) / len(own) == pytest.approx(row["mean"], abs=1e-4)
    metrics = [json.loads(line) for line in (free_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in metrics] == list(range(6))
    validations = [row["validation"] for row in metrics]
    assert validations[0] is None, "a round of the warm-up is no candidate"
    assert all(0 <= accuracy <= 100 for accuracy in validations[1:])
    best = toy.last_state(free_run)["best"]
    assert best["accuracy"] == max(validations[1:])
    assert best["round"] == validations.index(best["accuracy"])
    found = toy.status(free_run)
    assert set(found) == {
        "state", "round", "rounds", "seconds", "eta_seconds", "driver_share", "rejected", "notes", "test_step",
        "last_error", "updated", "checkpoint", "exit_code", "stalled",
    }  # fmt: skip
    file = free_run / "checkpoints" / found["checkpoint"]["name"]
    assert found["checkpoint"] == {
        "name": "round-000005.json", "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rounds": 6,
    }  # fmt: skip
    assert (found["state"], found["round"], found["rounds"], found["rejected"]) == ("done", 6, 6, {})
    assert (found["last_error"], found["exit_code"], found["stalled"]) == (None, 0, None)
    assert build(yaml.safe_load((free_run / "config.yaml").read_text())).name == "free"
