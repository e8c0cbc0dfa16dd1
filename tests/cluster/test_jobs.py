"""A command as a job of a real cluster: what it prints and its exit code reach whoever submitted it, with a token."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, ray_cluster: Any, script: Any) -> Any:
    """The script as a module, and the session's Ray where it finds one. Jobs find `ray-dfml` where the tests run."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{ray_cluster.webui_url}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return script


@pytest.mark.ray
def test_a_job_runs_on_the_cluster_and_ends_with_its_own_exit_code(
    submit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["submit.py", "--id", "check-1", "--env", "PATH", "--", "check", "--workers", "99", "--storage", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert submit.main() == 5
    printed = capfd.readouterr()
    lines = dict.fromkeys(line.split()[1] for line in printed.out.splitlines() if line.startswith(("ok ", "FAIL ")))
    assert [*lines] == ["resources", "nodes", "versions", "clocks", "transfers", "storage", "token"]
    assert "FAIL resources  99 shards need 99 CPU, the cluster has 2" in printed.out
    assert "refuses who has no token" in printed.out
    assert printed.err.endswith("submit: check-1 failed\n")
    job = submit.find(submit.JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"]), "check-1")
    assert (job.status, job.driver_exit_code) == (submit.JobStatus.FAILED, 5)
