"""The numbers of the pages: each has an id and commands that parse, and the pages are what the numbers make."""

import argparse
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import ValidationError

from ray_dfml import report
from ray_dfml.cli import cli
from ray_dfml.core.scoring import mean_of_seeds
from ray_dfml.errors import DfmlError, Interrupted, RejectedError
from ray_dfml.files import resolved
from ray_dfml.reproduce import measure, registry, remake
from ray_dfml.reproduce.registry import Number, Table
from tests.run_folders import FREE, RANDOM, edit, make
from tests.runtime import toy

Command = Callable[..., toy.Done]

ROOT = Path(__file__).parent.parent
NUMBERS = list(registry.numbers())
CHEAPEST = "glyphs-random-5shot"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that makes the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results_pages")


@pytest.fixture
def results(pages: Any) -> Any:
    """The script."""
    return importlib.import_module("results")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_a_page_is_what_its_template_and_the_numbers_make(page: str, pages: Any) -> None:
    assert (ROOT / page).read_text("utf-8") == pages.rendered(page)


def test_every_interval_in_the_pages_comes_from_a_number(pages: Any) -> None:
    """No template has an interval of its own; with the test above, none stands in a page by hand."""
    for template in pages.PAGES.values():
        assert "±" not in (pages.TEMPLATES / template).read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    begin, end = (readme.index(marker) for marker in pages.MARKERS)
    assert "±" not in readme[:begin] + readme[end:]


@pytest.mark.parametrize("table", registry.tables().values(), ids=lambda table: table.name)
def test_the_commands_of_a_table_parse(table: Table) -> None:
    for step in table.steps.values():
        words = [*step.run, *step.script]
        named = {name for word in words for name in re.findall(r"\{data\}/([\w.]+)", word)}
        assert named <= set(table.data)
        if step.script:
            assert (ROOT / step.script[0]).is_file()
            continue
        leaf, rest = cli, registry.filled(step.run, {"seed": "1", "out": "out", "data": "data"})
        while isinstance(leaf, click.Group):
            found = leaf.get_command(click.Context(leaf), rest.pop(0))
            assert found is not None
            leaf = found
        leaf.make_context(leaf.name, rest)
        assert "{" not in " ".join(rest)


@pytest.mark.parametrize("table", registry.tables().values(), ids=lambda table: table.name)
def test_the_numbers_of_the_seeds_have_the_mean(table: Table) -> None:
    for one in table.numbers:
        mean = sum(one.each) / len(one.each)
        assert one.value == pytest.approx(mean, abs=0.06), one.id  # some pages give one decimal of each seed
        if one.covers == "seeds":
            assert one.half == pytest.approx(mean_of_seeds(one.each)[1], abs=0.05), one.id
        assert table.evidence == "run folders" or (ROOT / table.evidence).is_file()


def test_the_list_names_every_number(command: Command) -> None:
    done = command("reproduce", "--list")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == [one.id for _, one in NUMBERS]
    rows = json.loads(command("reproduce", "--list", "--json").out)
    assert [row["id"] for row in rows] == [one.id for _, one in NUMBERS]


def test_the_cheapest_number_is_made_again_and_a_false_one_is_found(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, number = registry.find(CHEAPEST)
    assert not table.data
    done = command("reproduce", CHEAPEST, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["inside"]
    assert found["got"] == pytest.approx(number.value, abs=number.half)
    assert "cost: less than a minute" in done.err

    false = number.model_copy(update={"value": number.value + 3 * number.half})
    monkeypatch.setattr(registry, "find", lambda id: (table, false))
    again = command("reproduce", CHEAPEST, "--out", tmp_path)
    assert again.code == 1
    assert "done before" in again.err  # nothing is computed twice
    assert "inside    no" in again.out
    assert f"outside the interval of {false.value:.2f}" in again.err


@pytest.mark.parametrize(("table", "number"), NUMBERS, ids=lambda one: getattr(one, "id", ""))
def test_the_commands_of_a_number_have_all_their_words(
    table: Table, number: Number, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in table.data:
        (tmp_path / name).touch()
    monkeypatch.setenv(remake.DATA, str(tmp_path))
    for command in remake.commands(table, number, tmp_path / "out"):
        assert "{" not in command.shown + str(command.makes)


def of_runs(seeds: list[int], **changes: Any) -> Table:
    """A table of one number, which is of FREE in the run `free`; there may be another run, `other`."""
    steps = {name: {"run": ["train", name], "makes": name, "minutes": 0} for name in ("free", "other")}
    number = {
        "id": "a", "what": "", "value": 1, "half": 1, "covers": "episodes", "unit": "%", "seeds": seeds,
        "each": [1] * len(seeds), "of": {"step": "free", "method": "free", "shot": 1, "selection": "last"},
    }  # fmt: skip
    return Table.model_validate({
        "name": "t", "title": "", "hardware": "", "commit": "c", "evidence": "", "steps": steps,
        "numbers": [number | changes],
    })  # fmt: skip


def test_a_difference_is_of_the_same_episodes(tmp_path: Path) -> None:
    make(tmp_path / "free", {"free/last": FREE})
    make(tmp_path / "other", {"random/last": RANDOM}, name="random")
    table = of_runs([0], minus={"step": "other", "method": "random", "shot": 1, "selection": "last"})
    assert measure.measure(table, table.numbers[0], tmp_path).value == 35.0
    shutil.rmtree(tmp_path / "other")
    make(tmp_path / "other", {"random/last": RANDOM}, name="random", settings=["eval.seed=7"])
    with pytest.raises(RejectedError, match=r"eval\.seed \d+ and 7 cannot be paired"):
        measure.measure(table, table.numbers[0], tmp_path)


def test_a_score_of_one_of_several_data_sets_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "free", {"free/last": FREE})
    rows = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps([*rows, rows[0] | {"data": "omniglot@abababab"}]))
    table = of_runs([0])
    with pytest.raises(RejectedError, match="2 scores of free 1 last; name one of its data sets"):
        measure.measure(table, table.numbers[0], tmp_path)
    table = of_runs([0], of={"step": "free", "method": "free", "shot": 1, "selection": "last", "data": "glyphs"})
    assert measure.measure(table, table.numbers[0], tmp_path).value == 65.0


def test_a_metric_has_no_interval_over_episodes() -> None:
    with pytest.raises(ValidationError, match="its interval covers seeds"):
        of_runs([0, 1], of={"step": "free", "metric": "validation"})


def test_an_unknown_id_is_answered_with_the_nearest(command: Command) -> None:
    done = command("reproduce", "omniglot-fre-5shot")
    assert done.code == 2
    assert "did you mean 'omniglot-free-5shot'?" in done.err
    assert command("reproduce").code == 2


@pytest.mark.parametrize("folder", [None, "empty"])
def test_missing_data_are_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    monkeypatch.delenv(remake.DATA, raising=False)
    if folder:
        monkeypatch.setenv(remake.DATA, str(tmp_path))
    done = command("reproduce", "omniglot-free-5shot")
    assert done.code == 3
    assert "omniglot28.parquet" in done.err


def test_a_script_needs_a_checkout(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "omniglot28.parquet").touch()
    monkeypatch.setenv(remake.DATA, str(tmp_path))
    shown = command("reproduce", "omniglot-free-5shot", "--dry-run", "--out", tmp_path / "o").out.splitlines()
    assert [line.split("--rounds ")[1] for line in shown] == ["free=15", "free=13", "free=14"]
    monkeypatch.setattr(remake, "checkout", lambda: None)
    done = command("reproduce", "omniglot-free-5shot")
    assert done.code == 2
    assert "checkout" in done.err


def scripted() -> Table:
    """A table whose only step runs the script `code.py`."""
    one = {"script": ["code.py", "{out}/made"], "makes": "made", "minutes": 1}
    number = {
        "id": "a", "what": "", "value": 1, "half": 1, "covers": "episodes", "unit": "%", "seeds": [0], "each": [1],
        "of": {"step": "one", "file": "", "key": []},
    }  # fmt: skip
    return Table.model_validate({
        "name": "t", "title": "", "hardware": "", "commit": "c", "evidence": "", "steps": {"one": one},
        "numbers": [number],
    })  # fmt: skip


@pytest.mark.parametrize(("code", "exit_code"), [(3, 3), (2, 2), (7, 1), (130, 130), (-9, 1), (-15, 130)])
def test_a_command_that_fails_gives_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int
) -> None:
    end = f"sys.exit({code})" if code > 0 else f"os.kill(os.getpid(), {-code})"
    (tmp_path / "code.py").write_text(f"import os, sys\n{end}")
    monkeypatch.setattr(remake, "checkout", lambda: tmp_path)
    table = scripted()
    with pytest.raises(DfmlError) as error:
        remake.run(table, table.numbers[0], tmp_path / "out", lambda text: None)
    assert error.value.exit_code == exit_code
    assert not list((tmp_path / "out" / remake.DONE).iterdir())


def test_a_number_that_is_stopped_ends_its_command_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command asks for the stop itself, by the signal that a cluster sends, and would not end by itself."""
    (tmp_path / "code.py").write_text("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()")
    monkeypatch.setattr(remake, "checkout", lambda: tmp_path)
    table = scripted()
    with pytest.raises(Interrupted, match="goes on"):
        remake.run(table, table.numbers[0], tmp_path / "out", lambda text: None)
    (tmp_path / "code.py").write_text("import os, sys\nos.mkdir(sys.argv[1])")
    said: list[str] = []
    remake.run(table, table.numbers[0], tmp_path / "out", said.append)
    remake.run(table, table.numbers[0], tmp_path / "out", said.append)
    (tmp_path / "out" / "made").rmdir()
    remake.run(table, table.numbers[0], tmp_path / "out", said.append)
    assert ["done before" in line for line in said] == [False, True, False], "what is gone is made again"


@pytest.mark.parametrize(
    ("new", "half", "inside"), [(50.9, 0.6, True), (51.0, 0.75, True), (51.1, 0.6, False), (48.9, 0.6, False)]
)
def test_two_measurements_agree_within_the_root_of_their_squares(new: float, half: float, inside: bool) -> None:
    assert measure.agree(new, half, 50.0, 0.8) is inside


def test_a_table_is_made_of_runs(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of two seeds with their commands, accuracies, and differences to the control that are paired by episode."""
    for row, scores in (("free", FREE), ("no-pool", RANDOM)):
        for seed in (0, 1):
            run = make(tmp_path / "runs" / f"{row}-{seed}", {f"{row}/last": scores}, name=row, seed=seed)
            manifest = json.loads((run / "manifest.json").read_text())
            manifest["command"] = f"ray-dfml train {row} --pool pools/p --data glyphs --seed {seed} --run-dir x/{seed}"
            manifest["git"] = {"commit": results._git("rev-parse", "HEAD"), "dirty": row == "free" and seed == 1}
            (run / "manifest.json").write_text(json.dumps(manifest))
    make(tmp_path / "runs" / "stopped-0", {}, state="interrupted")
    monkeypatch.setattr(results, "NUMBERS", tmp_path)
    monkeypatch.setattr(results, "draw", lambda curves, file: drawn.update(curves))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(sys, "argv", [
        "results.py", "add", "t", str(tmp_path / "runs"), "--title", "T", "--hardware", "h",
        "--pool", "pools/p", "0.5", "pool build --data glyphs --models 2",
    ])  # fmt: skip
    assert results.main() == 0
    said = capsys.readouterr().err
    assert "stopped-0" in said
    assert "free-1: there were files that its commit does not hold" in said
    assert "free-0" not in said
    table = registry.read(tmp_path / "t.yaml")
    by_id: dict[str, Number] = {one.id: one for one in table.numbers}
    assert list(by_id) == ["t-free-1shot", "t-free-over-no-pool-1shot", "t-no-pool-1shot"]
    assert by_id["t-free-1shot"].value == 65.0
    assert by_id["t-free-over-no-pool-1shot"].value == 35.0
    assert by_id["t-free-over-no-pool-1shot"].seeds == (0, 1)
    assert table.steps["free"].run == (
        "train", "free", "--pool", "{out}/p", "--data", "glyphs", "--seed", "{seed}", "--run-dir",
        "{out}/free-{seed}", "--resume-or-start",
    )  # fmt: skip
    (name, pool), _ = table.needed(by_id["t-free-1shot"])
    assert name == "p"
    assert pool.run[-3:] == ("--out", "{out}/p", "--resume")
    assert table.minutes(by_id["t-free-1shot"]) == pytest.approx(0.5 + 2 * 0.1)
    assert drawn["free"][0][-1] == {"minutes": pytest.approx(8 / 60), "queries": 0.0, "validation": 30.0}


@pytest.mark.parametrize("word", ["--data=omniglot:/disk/o.parquet", "learner.path=~/p", "../settings.yaml"])
def test_a_command_that_names_a_path_is_no_command_of_a_table(results: Any, tmp_path: Path, word: str) -> None:
    run = make(tmp_path / "free-0", {"free/last": FREE})
    command = ["train", "free", "--pool", "pools/p", "--set", "eval.shots=[1,5]"]
    edit(run / "manifest.json", command=shlex.join(["ray-dfml", *command]))
    pools = {str(resolved("pools/p")): "p"}
    assert results._command(report.read(run), pools, "free", 0)[:4] == ["train", "free", "--pool", "{out}/p"]
    edit(run / "manifest.json", command=shlex.join(["ray-dfml", *command, word]))
    with pytest.raises(DfmlError, match="names a path of this machine"):
        results._command(report.read(run), pools, "free", 0)


def test_a_folder_without_finished_runs_makes_no_table(results: Any, tmp_path: Path) -> None:
    given = argparse.Namespace(table="t", title="", hardware="", pool=[], control="no-pool")
    with pytest.raises(DfmlError, match="no run there has ended"):
        results.of_runs(tmp_path, given)
