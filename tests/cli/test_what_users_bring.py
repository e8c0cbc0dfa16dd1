"""The command line with what users bring: other folders and consoles, full disks, two at once, names of all kinds."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_dfml.cli import main
from ray_dfml.data.pool import Pool
from tests.cli.test_exit_codes import HERE, one_line
from tests.data import pools
from tests.runtime import toy

Command = Callable[..., toy.Done]


def test_two_runs_into_one_folder(
    tmp_path: Path, toy_data: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process, which looked before the first made the folder, is refused and changes nothing."""
    run, rename = tmp_path / "run", os.rename

    def late(source: Path, target: Path) -> None:
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "config.yaml").write_text("of the first")
        rename(tmp_path / "first", target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    done = command("train", "random", "--data", toy_data, "--run-dir", run, *HERE)
    one_line(done, 2, "another process has just made it")
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_names_the_place(
    tmp_path: Path, toy_data: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", full)
    done = command("train", "random", "--data", toy_data, "--run-dir", run, *HERE)
    one_line(done, 1, f"ray-dfml: {run}/", ": No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    done = command("train", "random", "--data", toy_data, "--run-dir", tmp_path / "other", *HERE)
    one_line(done, 1, f"ray-dfml: {tmp_path}/other: No space left on device")


def test_a_console_of_few_letters_shows_the_others_escaped(
    tmp_path: Path, free_run: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(toy_data.partition(":")[2]) / "test"
    for n, name in enumerate(("лес", "море")):
        (tmp_path / "support" / name).mkdir(parents=True)
        (tmp_path / "query").mkdir(exist_ok=True)
        shutil.copy(source / f"test{n:02d}" / "00.png", tmp_path / "support" / name)
        shutil.copy(source / f"test{n:02d}" / "01.png", tmp_path / "query" / f"{name} é.png")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", screen)
    with pytest.raises(SystemExit) as stopped:
        main(["adapt", str(free_run), "--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")])
    assert not stopped.value.code
    screen.flush()
    text = screen.buffer.getvalue().decode("cp1252")  # type: ignore[attr-defined]
    assert len(text.splitlines()) == 2
    assert "\\u043b\\u0435\\u0441 é.png" in text


def test_an_empty_pool_is_no_pool_in_order(tmp_path: Path, command: Command) -> None:
    Pool.create(tmp_path / "pool")
    one_line(command("pool", "check", tmp_path / "pool"), 3, "holds no teacher; add one with `ray-dfml pool add`")
    done = command("pool", "check", tmp_path / "pool", "--json")
    assert (done.code, done.out) == (3, "[]\n")


def test_classes_from_a_file(tmp_path: Path, command: Command) -> None:
    save_file(pools.state(), tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_bytes("\ufeffcrane, blue\r\nwren\r\n\r\nred\u3000fox\r\n".encode())
    words = ("pool", "add", tmp_path / "pool", "--weights", tmp_path / "w.safetensors", "--arch", "conv4")
    words += ("--input", "1x16x16")
    assert command(*words, "--classes-file", tmp_path / "names.txt").code == 0
    assert Pool.open(tmp_path / "pool").cards[0].classes == ("crane, blue", "wren", "red\u3000fox")
    one_line(command(*words, "--id", "b"), 2, "--classes, or with --classes-file")
    one_line(command(*words, "--id", "b", "--classes-file", tmp_path / "none"), 2, "none: cannot be read: No such file")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\n")
    one_line(command(*words, "--id", "b", "--classes-file", tmp_path / "bad.txt"), 2, "it is not UTF-8 text")


def test_what_was_taken_from_a_checkpoint_is_said(tmp_path: Path, command: Command) -> None:
    torch.save({"net": {f"module.{k}": v for k, v in pools.state().items()}}, tmp_path / "w.ckpt")
    words = ("--arch", "conv4", "--input", "1x16x16", "--classes", "a,b,c")
    done = command("pool", "add", tmp_path / "pool", "--weights", tmp_path / "w.ckpt", *words)
    assert (done.code, done.out) == (0, f"{tmp_path}/pool: added w\n")
    assert done.err.splitlines() == [
        f"{tmp_path}/w.ckpt: took the tensors in 'net'", f"{tmp_path}/w.ckpt: dropped 'module.' from their names"
    ]  # fmt: skip


def test_a_run_goes_on_from_another_folder(
    tmp_path: Path, toy_pool: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pool was named by a relative path."""
    shutil.copytree(toy_pool, tmp_path / "a" / "pool")
    monkeypatch.chdir(tmp_path / "a")
    assert command("train", "average", "--pool", "pool", "--run-dir", "run", *HERE).code == 0
    (tmp_path / "a" / "run" / "status.json").write_text('{"state": "interrupted"}')
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    done = command("train", "average", "--run-dir", "../a/run", "--resume", *HERE)
    assert done.code == 0, done.err
