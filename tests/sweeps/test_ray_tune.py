"""What a sweep does around Ray Tune: it looks at the cluster, and hands figures to MLflow and Weights & Biases."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.air.integrations import mlflow, wandb

from ray_dfml.runtime import preflight
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.preflight import Finding
from ray_dfml.sweeps import ray_tune
from tests.runtime import toy
from tests.sweeps.conftest import SweepFile


def test_a_dashboard_without_a_token_is_said_before_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a cluster that was joined by its address, and not on one of this machine's own."""
    open_to_all = "the dashboard at 10.0.0.1:8265 asks for no token and listens beyond its own machine"
    monkeypatch.setattr(preflight, "examine", lambda: [Finding("token", False, open_to_all, fatal=False)])
    monkeypatch.setattr(ray_tune, "connect", lambda *_: True)
    monkeypatch.setattr(ray_tune, "check_room", lambda machine: None)
    monkeypatch.setattr(ray_tune.ray, "shutdown", lambda: None)
    for address, said in (("10.0.0.1:6379", f"warning: {open_to_all}\n"), ("", "")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with ray_tune.connected(Machine()):
            pass
        assert capsys.readouterr().err == said


def test_without_trackers_there_are_tunes_own_loggers_alone(tmp_path: Path) -> None:
    assert ray_tune.tracking((), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("server", [None, "http://127.0.0.1:5000"])
def test_mlflow_gets_the_figures_in_a_file_or_at_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    (found,) = ray_tune.tracking(["mlflow"], tmp_path / "my-sweep" / "tune")
    assert isinstance(found, mlflow.MLflowLoggerCallback)
    assert found.experiment_name == "my-sweep"
    assert found.tracking_uri == server or f"sqlite:///{tmp_path}/my-sweep/tune/mlflow.db" == found.tracking_uri
    assert not found.should_save_artifact


def test_wandb_writes_to_the_disk_and_gets_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would put a key into the description of a process, which its logs show."""
    monkeypatch.setattr(wandb, "wandb", types.ModuleType("wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")
    (found,) = ray_tune.tracking(["wandb"], tmp_path / "my-sweep" / "tune")
    assert isinstance(found, wandb.WandbLoggerCallback)
    assert (found.project, found.api_key) == ("my-sweep", None)
    assert found.kwargs == {"mode": "offline", "dir": f"{tmp_path}/my-sweep/tune/wandb"}
    assert os.environ["WANDB_MODE"] == "offline"
    assert not found.upload_checkpoints


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_without_its_package_is_refused_before_there_is_a_folder(
    name: str, tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else plain(wanted))
    done = command("tune", sweep_file(), "--run-dir", tmp_path / "sweep", "--track", name)
    assert (done.code, done.err.count("\n")) == (5, 1)
    assert f"pip install 'ray-dfml[{name}]'" in done.err
    assert not (tmp_path / "sweep").exists()
