"""Runs whose folder is in an object store: the bits of a run on a disk, whoever is killed, readable from anywhere."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml import Learner, object_store, published
from ray_dfml.config import RunConfig
from ray_dfml.errors import Interrupted, ResourceError, UsageError
from ray_dfml.files import Uri
from ray_dfml.pipeline import Trainer
from ray_dfml.published import Publisher
from ray_dfml.runtime import locks, owner, remote_run
from ray_dfml.runtime.checkpoint import Checkpoints
from ray_dfml.runtime.launch import continue_run, new_run, start_or_continue
from ray_dfml.runtime.storage import Folder
from tests import stores
from tests.runtime import toy

Command = Callable[..., toy.Done]
ROUNDS = 3


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of its own: its cache is empty, a process that owned a run is gone, and nobody beats meanwhile."""
    monkeypatch.setenv("RAY_DFML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(owner, "_is_gone", lambda found: True)
    monkeypatch.setattr(owner, "BEAT_SECONDS", 1e6)


@pytest.fixture(scope="module")
def config(toy_pool: Path, toy_data: str) -> RunConfig:
    return toy.config("free", toy_pool, toy_data, f"method.rounds={ROUNDS}", "eval.every=3")


@pytest.fixture(scope="module")
def on_disk(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a disk."""
    path = tmp_path_factory.mktemp("disk") / "run"
    new_run(config, path, toy.LOCAL, quiet=True)
    return path


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that were begun, in order."""
    found: list[int] = []
    plain = Trainer.round

    def noted(trainer: Trainer, r: int) -> Any:
        found.append(r)
        return plain(trainer, r)

    monkeypatch.setattr(Trainer, "round", noted)
    return found


def copy_of(uri: Uri, path: Path) -> Path:
    """All that is published, with the checkpoints."""
    published.fetch(uri, path)
    return path


def assert_whole(uri: Uri, path: Path) -> None:
    """What a reader sees is of one moment: status, log and checkpoint agree."""
    if not published.exists(uri):
        return
    run = copy_of(uri, path)
    found = Checkpoints(Folder(run / "checkpoints")).load() if (run / "checkpoints").exists() else None
    rounds = found[0].rounds if found else 0
    assert [json.loads(line)["round"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [*range(rounds)]
    assert (toy.status(run).get("round") or 0) == rounds


def test_a_run_in_s3_has_the_bits_of_one_on_a_disk(
    config: RunConfig, on_disk: Path, tmp_path: Path, s3_folder: Uri
) -> None:
    uri = s3_folder / "my-run"
    rows = new_run(config, uri, toy.LOCAL, quiet=True)
    assert rows == json.loads((on_disk / "scores.json").read_text())
    run = copy_of(uri, tmp_path / "copy")
    toy.assert_same_run(run, on_disk)
    assert {p.name for p in run.iterdir()} == {p.name for p in on_disk.iterdir() if not p.name.startswith(".")}
    assert toy.status(run)["state"] == "done"
    assert not remote_run.scratch(uri).exists()
    assert not [name for name in object_store.names(uri) if name.startswith("owner")], "the right is given back"


def test_a_run_is_read_by_its_uri(
    config: RunConfig, on_disk: Path, memory_folder: Uri, command: Command, toy_data: str
) -> None:
    uri = memory_folder / "my-run"
    Publisher(uri, on_disk, None, lambda: None).publish()
    assert Learner.load(uri).selection == Learner.load(on_disk).selection
    shown = json.loads(command("report", uri, "--json").out)
    assert {run for row in shown["runs"] for run in row["runs"]} == {uri}
    tested = command("evaluate", uri, "--data", toy_data, "--shot", 1, "--episodes", 2, "--json")
    assert [row["method"] for row in json.loads(tested.out)] == ["free", "random"]
    done = command("status", uri, "--json")
    assert json.loads(done.out)["status"] == toy.status(on_disk)
    followed = command("status", uri, "--follow")
    assert (followed.code, f"run: {uri}" in followed.out, "3/3" in followed.err) == (0, True, True)
    done = command("train", "free", "--run-dir", uri, "--resume", "--backend", "local", "--json")
    assert json.loads(done.out) == {"run": uri, "scores": json.loads((on_disk / "scores.json").read_text())}
    again = command("train", "free", "--pool", "x", "--run-dir", uri, "--backend", "local")
    assert (again.code, again.err.splitlines()[-1]) == (
        2, f"ray-dfml: {uri}: exists already; add --resume to continue that run, or choose another --run-dir"
    )  # fmt: skip
    missing = command("report", uri / "x")
    assert (missing.code, missing.err.splitlines()[-1]) == (
        2, f"ray-dfml: {uri}/x: not a run folder (no latest.json); name the --run-dir of a run"
    )  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_the_bits_stay_whenever_the_writer_dies(
    late: bool, config: RunConfig, on_disk: Path, memory_folder: Uri, tmp_path: Path, begun: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It dies at calls of the store that are spread over the run, each time on a new machine."""
    mortal, uri, deaths = stores.Mortal(monkeypatch, late=late), memory_folder / "run", 0
    copies = len(published._COPIES)
    for moment in (3, 12, 17, 25, 9):
        monkeypatch.setenv("RAY_DFML_CACHE", str(tmp_path / f"machine-{deaths}"))
        before = len(begun)
        with mortal.dying(moment) as died:
            start_or_continue(config, uri, toy.LOCAL)
        deaths += bool(died)
        assert_whole(uri, tmp_path / f"seen-{moment}")
        if before and len(begun) > before:
            assert begun[before] >= begun[before - 1], "at most one round is done again"
    assert deaths >= 4
    assert len(published._COPIES) == copies, "a process that is killed leaves no copy behind"
    start_or_continue(config, uri, toy.LOCAL)
    toy.assert_same_run(copy_of(uri, tmp_path / "copy"), on_disk)
    assert len(begun) <= ROUNDS + deaths


def test_a_run_that_is_stopped_goes_on_elsewhere(
    config: RunConfig, on_disk: Path, memory_folder: Uri, tmp_path: Path, begun: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    uri, plain = memory_folder / "run", Trainer.round

    def stop(trainer: Trainer, r: int) -> Any:
        if r == 1:
            raise KeyboardInterrupt
        return plain(trainer, r)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "round", stop)
        with pytest.raises(Interrupted, match=f"--run-dir {uri} --resume"):
            new_run(config, uri, toy.LOCAL, quiet=True)
    status = toy.status(published.local(uri))
    assert (status["state"], status["round"], status["exit_code"]) == ("interrupted", 1, 130)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UsageError, match=f"^{uri}: is a run of free, not of purer"):
        continue_run(uri, "purer", toy.LOCAL)
    continue_run(uri, "free", toy.LOCAL, quiet=True)
    assert begun == [0, 1, 2]
    toy.assert_same_run(copy_of(uri, tmp_path / "copy"), on_disk)


def test_a_process_that_is_only_stopped_keeps_its_folder(
    memory_folder: Uri, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Another one on its machine takes it for dead, and would work in the same folder."""
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    with remote_run.working(memory_folder, new=True) as (folder, remote):
        assert remote is not None
        folder.mkdir()
        (folder / "status.json").write_text("{}")
        with pytest.raises(UsageError, match=f"^{memory_folder}: another process is at work on this run in {folder}"):
            continue_run(memory_folder, "free", toy.LOCAL)
        remote.publish()
    assert published.exists(memory_folder)
    assert object_store.names(memory_folder)[-1] == "latest.json", "the right is given back"


def test_a_store_that_refuses_for_a_while_is_waited_for(
    config: RunConfig, on_disk: Path, memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    uri, write, calls = memory_folder / "run", object_store.write, []

    def refusing(target: Uri, data: bytes) -> None:
        calls.append(target)
        if 14 <= len(calls) < 17:
            raise OSError(5, "slow down", target)
        write(target, data)

    monkeypatch.setattr(object_store, "write", refusing)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    new_run(config, uri, toy.LOCAL, quiet=True)
    toy.assert_same_run(copy_of(uri, tmp_path / "copy"), on_disk)
    assert capsys.readouterr().err.count("slow down") == 1


def test_a_store_that_keeps_refusing_ends_the_run(
    config: RunConfig, memory_folder: Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, write, broken = memory_folder / "run", object_store.write, []

    def refusing(target: Uri, data: bytes) -> None:
        if b'"round": 1' in data:
            broken.append(target)
        if broken:
            raise OSError(5, "no space", target)
        write(target, data)

    monkeypatch.setattr(remote_run, "PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write", refusing)
        with pytest.raises(ResourceError, match=f"^{uri}: cannot be written: no space; the rounds before are there"):
            new_run(config, uri, toy.LOCAL, quiet=True)
    assert toy.status(published.local(uri))["state"] == "starting"


def test_a_run_that_asks_stays_where_its_ledger_is(
    toy_pool: Path, memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    pool = Path(shutil.copytree(toy_pool, tmp_path / "pool"))
    text = (pool / "pool.yaml").read_text()
    (pool / "pool.yaml").write_text(text.replace("access: weights", "access: label"))
    uri, config = memory_folder / "run", toy.config("ideal", pool, None)
    save, saved = remote_run.Remote.publish, []

    def stop_later(remote: remote_run.Remote) -> None:
        save(remote)
        saved.append(1)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote_run.Remote, "publish", stop_later)
        with pytest.raises(Interrupted):
            new_run(config, uri, toy.LOCAL, quiet=True)
    ledger = remote_run.scratch(uri) / "ledger.sqlite"
    assert ledger.exists()
    assert (published.local(uri) / "ledger.jsonl").read_text()
    assert not (published.local(uri) / "ledger.sqlite").exists()
    with pytest.raises(UsageError, match="exists already"):
        new_run(config, uri, toy.LOCAL, quiet=True)
    moved = shutil.move(ledger, tmp_path / "elsewhere.sqlite")
    with pytest.raises(UsageError, match=r"asks services, and its ledger\.sqlite is where it began"):
        continue_run(uri, "ideal", toy.LOCAL, quiet=True)
    shutil.move(moved, ledger)
    continue_run(uri, "ideal", toy.LOCAL, quiet=True)
    new_run(config, tmp_path / "disk", toy.LOCAL, quiet=True)
    here, there = tmp_path / "disk", published.local(uri)
    spent = [json.loads((run / "status.json").read_text())["queries"] for run in (here, there)]
    assert spent[0] == spent[1], "what was paid for before the stop was not asked again"
    for student in sorted((here / "students").glob("*.safetensors")):
        assert student.read_bytes() == (there / "students" / student.name).read_bytes()


@pytest.mark.compat
@pytest.mark.timeout(1200)
def test_a_writer_of_s3_is_killed_at_random(
    config: RunConfig, on_disk: Path, toy_pool: Path, toy_data: str, s3_folder: Uri, tmp_path: Path
) -> None:
    """Processes of `ray-dfml` that die of SIGKILL around a PUT, while a reader reads without pause."""
    uri, log, rng = s3_folder / "run", tmp_path / "rounds", random.Random(0)
    words = ["train", "free", "--pool", str(toy_pool), "--data", toy_data, "--run-dir", str(uri)]
    words += ["--backend", "local", "--resume-or-start", *toy.flags("free", f"method.rounds={ROUNDS}", "eval.every=3")]
    over, faults, seen = threading.Event(), [], []

    def look() -> None:
        while not over.is_set():
            try:
                if published.exists(uri):
                    assert_whole(uri, tmp_path / "seen" / str(len(seen)))
                    seen.append(1)
            except BaseException as fault:
                faults.append(fault)
                return

    reader = threading.Thread(target=look)
    reader.start()
    begun: list[int] = []
    log.touch()
    deaths = 0
    try:
        for attempt, phase in enumerate(["after", "half", "before", "half", "after", "half"]):
            command = [sys.executable, "-m", "tests.runtime.killed_writer", str(rng.randrange(5, 25)), phase, str(log)]
            environment = os.environ | {"RAY_DFML_CACHE": str(tmp_path / f"machine-{attempt}")}
            child = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
            assert child.returncode in (-signal.SIGKILL, 0), child.stderr
            deaths += child.returncode != 0
            now = [int(line) for line in log.read_text().split()]
            if begun and len(now) > len(begun):
                assert now[len(begun)] >= begun[-1], "at most one round is done again"
            begun = now
        start_or_continue(config, uri, toy.LOCAL)
    finally:
        over.set()
        reader.join()
    assert faults == []
    assert deaths >= 3
    assert len(seen) >= deaths
    toy.assert_same_run(copy_of(uri, tmp_path / "copy"), on_disk)


def scratch_files(tmp_path: Path) -> list[str]:
    """What runs have left on this machine, without locks."""
    found = (path for path in (tmp_path / "cache" / "runs").rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(path.name for path in found)


def test_a_run_that_fails_leaves_nothing_here_but_its_ledger_and_what_the_store_refused(
    memory_folder: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*, new: bool) -> None:
        with contextlib.suppress(ZeroDivisionError), remote_run.working(memory_folder, new=new) as (folder, _):
            folder.mkdir(exist_ok=True)
            (folder / "status.json").write_text("{}")
            (folder / "ledger.sqlite").write_text("counts")
            raise ZeroDivisionError

    fail(new=True)
    assert scratch_files(tmp_path) == ["ledger.sqlite"]

    def refuse(*_: Any) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", refuse)
        fail(new=False)
    assert scratch_files(tmp_path) == ["ledger.sqlite", "status.json"]
    assert f"{remote_run.scratch(memory_folder)} could not be published" in capsys.readouterr().err

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fail(new=False)
    assert scratch_files(tmp_path) == ["ledger.sqlite", "status.json"], "an impatient user loses nothing"
    with (
        pytest.raises(UsageError, match="not a run folder"),
        remote_run.working(memory_folder / "other", new=False),
    ):
        pass
    assert len(scratch_files(tmp_path)) == 2, "too young"
    monkeypatch.setattr(remote_run, "KEEP_DAYS", -1)
    with remote_run.working(memory_folder / "third", new=True):
        pass
    assert scratch_files(tmp_path) == ["ledger.sqlite"]
