"""The other commands: help with an example, and JSON alone on stdout."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ray_dfml.cli import cli
from tests.data import pools
from tests.runtime import toy

Command = Callable[..., toy.Done]


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command that is not a group."""
    if not isinstance(command, click.Group):
        yield path
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from leaves(inner, (*path, name))


@pytest.mark.parametrize("words", list(leaves(cli)), ids=" ".join)
def test_help_has_an_example_and_every_command_has_json(words: tuple[str, ...], command: Command) -> None:
    done = command(*words, "--help")
    assert done.code == 0
    assert f"ray-dfml {' '.join(words)} " in " ".join(done.out.split("Example:")[1].split()) + " "
    leaf: click.Command = cli
    for word in words:
        assert isinstance(leaf, click.Group)
        found = leaf.get_command(click.Context(leaf), word)
        assert found is not None
        leaf = found
    assert leaf.help
    assert "--json" in [name for option in leaf.params for name in option.opts]


def test_the_commands_of_the_contract(command: Command) -> None:
    assert {"quickstart", "data", "pool", "train", "evaluate", "adapt", "report"} <= {words[0] for words in leaves(cli)}
    done = command("--help")
    assert done.code == 0
    assert "quickstart" in done.out
    assert command("--version").out.startswith("ray-dfml, version ")


def test_no_command_prints_the_help(command: Command) -> None:
    done = command()
    assert "Commands:" in done.out + done.err


def test_data_list(command: Command) -> None:
    found = json.loads(command("data", "list", "--json").out)
    assert {"glyphs", "omniglot", "cifar-fs", "mini-imagenet", "cub", "parquet", "folder"} <= set(found)
    assert "omniglot" in command("data", "list").out


def test_data_check(toy_data: str, command: Command) -> None:
    found = json.loads(command("data", "check", toy_data, "--json").out)
    assert (found["classes"], found["size"], found["split_by"]) == (26, [1, 16, 16], "class")
    assert {k: v["classes"] for k, v in found["splits"].items()} == toy.CLASSES


def test_pool_build_check_and_resume(tmp_path: Path, toy_data: str, command: Command) -> None:
    words = ("--data", toy_data, "--way", 3, "--arch", "conv4,resnet10", "--set", "pretrain.epochs=1", "--workers", 1)
    words += ("--out", tmp_path / "pool", "--json")
    done = command("pool", "build", *words, "--models", 2)
    assert done.code == 0, done.err
    assert json.loads(done.out)["teachers"] == 2
    before = {p.name: p.read_bytes() for p in (tmp_path / "pool" / "weights").iterdir()}
    done = command("pool", "build", *words, "--models", 3, "--resume")
    assert json.loads(done.out)["teachers"] == 3
    after = {p.name: p.read_bytes() for p in (tmp_path / "pool" / "weights").iterdir()}
    assert len(after) == 3
    assert before.items() <= after.items()
    rows = json.loads(command("pool", "check", tmp_path / "pool", "--json").out)
    assert [(row["ok"], set(row)) for row in rows] == [(True, {"id", "ok", "reason", "findings"})] * 3
    assert command("pool", "build", *words, "--models", 3).code == 2


def test_pool_check_names_the_damaged_teacher(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    id = toy.damage(toy_pool, tmp_path / "pool", 1, float("nan"))
    done = command("pool", "check", tmp_path / "pool", "--json")
    assert done.code == 3
    rows = {row["id"]: row for row in json.loads(done.out)}
    assert [row["ok"] for row in rows.values()] == [True, False, True, True]
    assert "NaN" in rows[id]["reason"]
    plain = command("pool", "check", tmp_path / "pool")
    assert plain.code == 3
    teachers, findings = plain.out.split("\n\n")
    assert [line.split()[1] for line in teachers.splitlines()] == ["ok", "REJECTED", "ok", "ok"]
    assert findings.startswith(f"error    {id}: ")


def test_pool_add(tmp_path: Path, command: Command) -> None:
    save_file(pools.state(), tmp_path / "birds.safetensors")
    words = ("pool", "add", tmp_path / "pool", "--weights", tmp_path / "birds.safetensors", "--arch", "conv4",
             "--input", "1x16x16", "--classes", "wren,robin,owl", "--json")  # fmt: skip
    done = command(*words)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"pool": str(tmp_path / "pool"), "id": "birds"}
    assert command("pool", "check", tmp_path / "pool").code == 0
    assert command(*words).code == 2, "the id is taken"
    assert command(*words, "--mean", "a").err.startswith("ray-dfml: --mean a: expected numbers")


def test_evaluate_repeats_the_scores_of_the_run(free_run: Path, toy_data: str, command: Command) -> None:
    """The run's own test has 3 queries a class, this one 15; the episodes are the contract's."""
    words = ("evaluate", free_run, "--data", toy_data, "--shot", 1, "--shot", 2, "--episodes", 10, "--json")
    done = command(*words)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [(r["method"], r["shot"], r["episodes"], r["selection"]) for r in rows] == [
        ("free", 1, 10, "val"), ("free", 2, 10, "val"), ("random", 1, 10, "last"), ("random", 2, 10, "last"),
    ]  # fmt: skip
    file = free_run / "learner.safetensors"
    assert json.loads(command("evaluate", file, *words[2:], "--workers", 1).out) == rows
    assert command("evaluate", free_run, "--data", toy_data, "--way", 3).code == 2
    done = command("evaluate", free_run, "--data", "glyphs", "--episodes", 1)
    assert done.code == 0, done.err
    assert "brought to the learner's 1x16x16" in done.err


def test_adapt_names_each_query_image(tmp_path: Path, free_run: Path, toy_data: str, command: Command) -> None:
    source = Path(toy_data.partition(":")[2]) / "test"
    for name in ("test00", "test01"):
        (tmp_path / "support" / name).mkdir(parents=True)
        (tmp_path / "query").mkdir(exist_ok=True)
        for i in range(5):
            shutil.copy(source / name / f"{i:02d}.png", tmp_path / "support" / name)
            shutil.copy(source / name / f"{i + 5:02d}.png", tmp_path / "query" / f"{name}-{i}.png")
    words = ("adapt", free_run, "--support", tmp_path / "support", "--query", tmp_path / "query")
    done = command(*words, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [row["file"] for row in rows] == sorted(p.name for p in (tmp_path / "query").iterdir())
    assert all(set(row) == {"file", "class", "probability"} and 0.5 <= row["probability"] <= 1 for row in rows)
    assert np.mean([row["file"].startswith(row["class"]) for row in rows]) >= 0.8
    assert len(command(*words).out.splitlines()) == 10
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "query" / "broken.png")
    (tmp_path / "query" / "broken.png").write_bytes(b"no image")
    done = command(*words)
    assert done.code == 3
    assert done.err.count("\n") == 1
