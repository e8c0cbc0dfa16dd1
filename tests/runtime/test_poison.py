"""Poison among the teachers: a run leaves them out, says why on the terminal and in the report, and goes on."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_dfml.runtime import cluster, launch
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.shard import Loaded
from tests.runtime import toy


def poisoned(store: Callable[[str], Loaded], crash: str, stall: str, large: str) -> Callable[[str], Loaded]:
    """A loader by which one teacher kills its process, another never ends, and a third asks for all memory."""

    def load(id: str) -> Loaded:
        if id == crash:
            os._exit(1)
        if id == stall:
            time.sleep(3600)
        if id == large:
            torch.empty(2**55)
        return store(id)

    return load


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_teachers_of_nan_crash_stall_and_no_memory_are_left_out_with_the_reason(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash and a stall count twice, so this takes the start of four processes and twice the limit of time."""
    nan = toy.damage(toy_pool, tmp_path / "bad", 0, float("nan"))
    config = toy.config("average", toy_pool, toy_data)
    config = config.model_copy(update={"pool": (str(tmp_path / "bad"), str(toy_pool))})
    kinds: dict[str, str] = {}
    store = cluster.PoolStore

    def spoiled(teachers: Any, near: Any) -> Any:
        crash, stall, large, *_ = teachers
        kinds.update(crash=crash, stall=stall, large=large)
        return poisoned(store(teachers, near), crash, stall, large)

    monkeypatch.setattr(cluster, "PoolStore", spoiled)
    rows = launch.new_run(config, tmp_path / "run", Machine(workers=2, job_seconds=8.0))
    assert {row["method"] for row in rows} >= {"average", "random"}
    rejected = toy.status(tmp_path / "run")["rejected"]
    (bad,) = rejected.keys() - set(kinds.values())
    assert bad.endswith(nan)
    assert "not finite" in rejected[bad] or "NaN" in rejected[bad]
    assert rejected[kinds["crash"]] == "its process died 2 times"
    assert rejected[kinds["stall"]] == "its process died or took longer than 8 s, 2 times"
    assert rejected[kinds["large"]].startswith("weights needs more memory than a shard has: ")
    assert "DefaultCPUAllocator: can't allocate memory" in rejected[kinds["large"]]
    said, report = capsys.readouterr().err, (tmp_path / "run" / "report.html").read_text()
    for id in kinds.values():
        assert f"left out: {id}: {rejected[id]}\n" in said
    assert "4 of 8 teachers left out: " in said
    for id in rejected:
        assert f"<td>{id}</td>" in report
