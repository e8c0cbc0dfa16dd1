"""`cluster/submit.py`: what it refuses before it connects, what it submits, and its exit codes. No cluster."""

import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
aiohttp = pytest.importorskip("aiohttp")
requests = pytest.importorskip("requests")

ADDRESS = ("--address", "http://127.0.0.1:8265")


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, script: Any) -> Any:
    """The script as a module."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return script


class Jobs:
    """Stands in for Ray's client. `job` is what the cluster knows under the id."""

    def __init__(self, submit: Any, status: str | None = None, code: int | None = None) -> None:
        self.did: list[Any] = []
        known = status and submit.JobStatus(status)
        self.job = known and SimpleNamespace(submission_id="run-1", status=known, driver_exit_code=code)

    def list_jobs(self) -> list[Any]:
        return [self.job] if self.job else []

    def delete_job(self, id: str) -> None:
        self.did.append(("delete", id))

    def submit_job(self, **values: Any) -> None:
        self.did.append(("submit", values["submission_id"], values["entrypoint"], values["runtime_env"]))

    def get_job_info(self, id: str) -> Any:
        return self.job

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        yield f"{id}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--id", "../../nodes", "--stop", *ADDRESS], "other characters than letters"),
        (["--id", "a b", *ADDRESS, "--", "check"], "other characters than letters"),
        (["--id", "a", "--address", "os://x", "--", "check"], "name the dashboard"),
        (["--id", "a", "--address", "10.0.0.1:6379", "--", "check"], "name the dashboard"),
        (["--id", "a", *ADDRESS, "--working-dir", "none", "--", "check"], "none: is no folder"),
        (["--id", "a", *ADDRESS, "--env", "NOT_SET_ANYWHERE", "--", "check"], "not set here: NOT_SET_ANYWHERE"),
        (["--id", "a", *ADDRESS], "give the command after --"),
    ],
)
def test_a_line_that_is_refused(submit: Any, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        submit.parse(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("status", "deleted"), [(None, False), ("FAILED", True), ("SUCCEEDED", True)])
def test_a_job_that_does_not_run_is_submitted(submit: Any, status: str | None, deleted: bool) -> None:
    """Each word stays one word of the shell of the job, and a run goes on where it was."""
    jobs = Jobs(submit, status)
    submit.start(jobs, submit.parse(["--id", "run-1", *ADDRESS, "--", "train", "free", "--run-dir", "/a b; reboot"]))
    line = "exec ray-dfml train free --run-dir '/a b; reboot' --resume-or-start"
    submitted = ("submit", "run-1", line, {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    assert jobs.did == [("delete", "run-1")] * deleted + [submitted]


def test_a_job_that_runs_is_not_submitted_again(submit: Any) -> None:
    jobs = Jobs(submit, "RUNNING")
    submit.start(jobs, submit.parse(["--id", "run-1", *ADDRESS, "--", "check"]))
    assert jobs.did == []


@pytest.mark.parametrize(
    ("status", "code", "ends"),
    [("SUCCEEDED", 0, 0), ("FAILED", 4, 4), ("STOPPED", -15, 130), ("FAILED", None, 5), ("FAILED", -9, 5)],
)
def test_exit_codes(submit: Any, status: str, code: int | None, ends: int) -> None:
    """A job that a signal ended, as where memory was short, was lost."""
    assert submit.follow(Jobs(submit, status, code), "run-1") == ends


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Failed to connect.\nand more"), requests.ConnectionError("Failed to connect."),
        aiohttp.ServerDisconnectedError("Failed to connect."), RuntimeError("Failed to connect."),
    ],
    ids=lambda error: type(error).__module__,
)  # fmt: skip
def test_it_ends_with_5_where_nobody_answers_or_the_head_goes(
    submit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    class Lost(Jobs):
        def get_job_info(self, id: str) -> Any:
            raise error

    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: Lost(submit))
    monkeypatch.setattr(sys, "argv", ["submit.py", "--id", "a", *ADDRESS, "--", "check"])
    assert submit.main() == 5
    assert capsys.readouterr().err == "submit: http://127.0.0.1:8265: Failed to connect.\n"
