"""Every failure is one line on stderr with the contract's exit code, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.cli import main
from ray_dfml.errors import DfmlError, ResourceError
from tests.data.pools import raising
from tests.runtime import toy

Command = Callable[..., toy.Done]
HERE = ("--backend", "local")


def one_line(done: toy.Done, code: int, *parts: str) -> None:
    """The command ended with `code`, said why in one line that has `parts`, and printed nothing else."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.startswith("ray-dfml: ")
    assert done.err.count("\n") == 1
    assert [part for part in parts if part not in done.err] == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "fre"], ["'fre'", "free", "--help"]),
        (["trian"], ["trian"]),
        (["train"], ["Missing argument", "best-model"]),
        (["train", "free", "--set", "method.ronds=3"], ["unknown key method.ronds (did you mean 'rounds'?)"]),
        (["train", "free", "--set", "metod.rounds=3"], ["unknown key metod (did you mean 'method'?)"]),
        (["train", "free", "--set", "eval.episode=3"], ["unknown key eval.episode (did you mean 'episodes'?)"]),
        (["train", "free", "--set", "method.replay.shots=3"], ["method.replay.shots (did you mean 'shot'?)"]),
        (["train", "free", "--set", "method.rounds=0"], ["method.rounds", "greater than or equal to 1", "0"]),
        (["train", "free", "--set", "method.rounds=many"], ["method.rounds", "integer", "many"]),
        (["train", "free", "--set", "method.flip=maybe"], ["method.flip", "'auto'"]),
        (["train", "free", "--set", "method.rounds"], ["expected key=value"]),
        (["train", "free", "--set", "profile=paper"], ["profile has an option of its own"]),
        (["train", "free", "--set", "name=random"], ["name has an option of its own"]),
        (["train", "average", "--preset", "free_2"], ["preset 'free_2' is for free, not for average"]),
        (["train", "free", "--preset", "fre_2"], ["fre_2"]),
        (["train", "free", "--profile", "best"], ["best", "fixed"]),
        (["train", "free", "--workers", "0"], ["--workers", "0"]),
        (["train", "free", "--seed", "-1"], ["--seed", "-1"]),
    ],
)
def test_a_command_line_that_cannot_be_meant(
    tmp_path: Path, toy_pool: Path, command: Command, words: list[str], parts: list[str]
) -> None:
    more = ["--pool", str(toy_pool), "--run-dir", str(tmp_path / "run"), *HERE] if words[1:] else []
    one_line(command(*words, *more), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pool(tmp_path: Path, toy_data: str, command: Command) -> None:
    run = ("--run-dir", tmp_path / "run", *HERE)
    one_line(command("train", "free", "--data", toy_data, *run), 2, "name a pool with --pool")
    one_line(command("train", "free", "--pool", tmp_path / "none", *run), 2, "none")
    one_line(command("pool", "check", tmp_path / "none"), 2, "none")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_folder(tmp_path: Path, free_run: Path, toy_pool: Path, command: Command) -> None:
    (tmp_path / "mine").mkdir()
    for run in (tmp_path / "mine", free_run):
        before = sorted(run.rglob("*"))
        one_line(command("train", "free", "--pool", toy_pool, "--run-dir", run, *HERE), 2, "exists already")
        assert sorted(run.rglob("*")) == before


def test_a_resume_that_cannot_be(tmp_path: Path, free_run: Path, command: Command) -> None:
    resume = ("--resume", *HERE)
    for more in (("--set", "method.rounds=9"), ("--seed", 1), ("--profile", "paper"), ("--preset", "free_2")):
        one_line(command("train", "free", "--run-dir", free_run, *resume, *more), 2, "settings from the run folder")
    one_line(command("train", "average", "--run-dir", free_run, *resume), 2, "is a run of free, not of average")
    one_line(command("train", "free", "--run-dir", tmp_path / "none", *resume), 2, "not a run folder")


def test_data_that_are_missing_or_bad(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    one_line(command("data", "check", "glyps"), 2, "did you mean 'glyphs'?")
    one_line(command("data", "check", f"folder:{tmp_path}/none"), 3, "no such file or folder")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    spec = f"parquet:{tmp_path / 'x.parquet'}"
    words = ("--pool", toy_pool, "--data", spec, "--run-dir", tmp_path / "run", *HERE)
    one_line(command("train", "free", *words), 3, "not a readable parquet file")
    assert not (tmp_path / "run").exists()


def test_pools_that_are_bad(tmp_path: Path, toy_data: str, command: Command) -> None:
    pool = tmp_path / "pool"
    toy.build_pool(pool, toy_data, models=1, way=2)
    toy.damage(pool, tmp_path / "bad", 0, float("nan"))
    words = ("--run-dir", tmp_path / "run", *HERE)
    one_line(command("train", "free", "--pool", tmp_path / "bad", *words), 3, "no usable teacher", "NaN")
    (pool / "pool.yaml").write_text("teachers: 3\n")
    one_line(command("train", "free", "--pool", pool, *words), 3, "pool.yaml")
    assert not (tmp_path / "run").exists()


def test_a_changed_pool_is_not_resumed(tmp_path: Path, toy_data: str, command: Command) -> None:
    pool, run = toy.build_pool(tmp_path / "pool", toy_data, models=1, way=2), tmp_path / "run"
    toy.train(toy.config("average", pool, toy_data), run)
    (run / "status.json").write_text('{"state": "interrupted"}')
    other = toy.build_pool(tmp_path / "other", toy_data, models=2, way=2)
    pool.rename(tmp_path / "away")
    other.rename(pool)
    one_line(command("train", "average", "--run-dir", run, "--resume", *HERE), 2, "the pool has changed")


def test_a_damaged_checkpoint_is_named(tmp_path: Path, toy_pool: Path, toy_data: str, command: Command) -> None:
    run = tmp_path / "run"
    toy.train(toy.config("random", None, toy_data), run)
    (run / "status.json").write_text('{"state": "interrupted"}')
    (run / "checkpoints" / "round-000000.json").write_bytes(b"cut")
    words = ("round-000000.json: not a whole checkpoint", "to go on from the start, move it elsewhere")
    one_line(command("train", "random", "--run-dir", run, "--resume", *HERE), 3, *words)
    (run / "checkpoints" / "round-000000.json").rename(tmp_path / "elsewhere")
    assert command("train", "random", "--run-dir", run, "--resume", *HERE).code == 0


def test_a_run_of_an_older_version_is_refused(tmp_path: Path, toy_pool: Path, toy_data: str, command: Command) -> None:
    run = tmp_path / "run"
    toy.train(toy.config("random", None, toy_data), run)
    (run / "status.json").write_text('{"state": "interrupted"}')
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    (run / "checkpoints" / "round-000000.safetensors").write_bytes(b"the first format")
    done = command("train", "random", "--run-dir", run, "--resume", *HERE)
    one_line(done, 3, "another version of ray_dfml wrote this checkpoint", "start a new run")
    assert (run / "checkpoints" / "round-000000.safetensors").exists()


@pytest.mark.parametrize("parent", ["/proc/none", "file"])
def test_a_place_that_cannot_be_written(tmp_path: Path, toy_pool: Path, command: Command, parent: str) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / parent / "run"
    done = command("train", "average", "--pool", toy_pool, "--run-dir", run, *HERE)
    assert done.code in (1, 5)
    one_line(done, done.code)
    assert not run.exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DfmlError("a plain failure"), 1, "ray-dfml: a plain failure\n"),
        (ResourceError("no cluster"), 5, "ray-dfml: no cluster\n"),
        (KeyboardInterrupt(), 130, "\nray-dfml: interrupted\n"),
        (OSError(28, "No space left on device", "/x"), 1, "ray-dfml: /x: No space left on device\n"),
        (ValueError("two\nlines"), 1, "ray-dfml: ValueError: two lines (--debug shows where)\n"),
    ],
)
def test_what_goes_wrong_within(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr("ray_dfml.data.datasets.describe", raising(error))  # type: ignore[arg-type]
    done = command("data", "check", "glyphs")
    assert (done.code, done.out, done.err) == (code, "", line)


@pytest.mark.parametrize("words", [["--debug", "data", "check", "glyphs"], ["data", "check", "glyphs", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("ray_dfml.data.datasets.describe", raising(ValueError("where")))
    with pytest.raises(ValueError, match="where"):
        main(words)
