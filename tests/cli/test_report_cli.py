"""`ray-dfml report`: the same numbers as text, Markdown, CSV, HTML and JSON, and never markup from a file."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.compare import KEYS
from tests.run_folders import AVERAGE, FREE, RANDOM, edit, make
from tests.runtime import toy
from tests.test_report import Page

Command = Callable[..., toy.Done]

EVIL = '<script>alert("|")</script>'


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of FREE, the average of the teachers, and a run that failed."""
    made = [make(tmp_path / f"s{s}", {"free/last": FREE, "random/last": RANDOM}, seed=s) for s in (0, 1)]
    made.append(make(tmp_path / "average", {"average/last": AVERAGE, "random/last": RANDOM}, name="average"))
    made.append(make(tmp_path / "failed", {}, state="failed", rounds=1))
    return made


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A run all of whose texts are markup."""
    run = make(tmp_path / "a|b", {"free/last": FREE}, data=[EVIL], bn=EVIL, split=EVIL)
    edit(run / "status.json", state=f"{EVIL}\x1b[2J\n# title")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("preset: null", f"preset: '={EVIL}'"))
    return run


def test_the_pages_of_runs_are_made_again(runs: list[Path], command: Command) -> None:
    (runs[0] / "report.html").write_text("old")
    done = command("report", *runs[:2], "--html", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == [str(run / "report.html") for run in runs[:2]]
    for run in runs[:2]:
        Page((run / "report.html").read_text())
        assert (run / "MODEL_CARD.md").is_file()
    assert not (runs[2] / "report.html").exists()
    done = command("report", "memory://bucket/run", "--html")
    assert (done.code, "needs a run folder on a disk" in done.err) == (2, True)
    done = command("report", runs[0], "--html", "--out", runs[0] / "x.md")
    assert (done.code, "do not give --out" in done.err) == (2, True)


def test_text_is_a_table_per_set_of_episodes(runs: list[Path], command: Command) -> None:
    done = command("report", *runs)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == ("glyphs@cdcdcdcd test, 5-way 1-shot, transductive: 4 episodes of seed 0, 15 queries a class")
    assert lines[1] == f"Difference to average/last of {runs[2]}."
    head = lines[2]
    assert re.split(r"  +", head) == [
        "method", "selection", "profile", "seed", "accuracy, %", "sd of seeds", "difference", "step", "rounds",
        "recover, s", "total, s", "state", "run", "note",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[3:9]] == ["free"] * 3 + ["average", "random", "random"]
    for line in lines[3:6]:
        assert line[head.index("difference") :].startswith("+10.00 ± 1.39 ")
        assert line[head.index("accuracy") :].startswith("65.00 ± ")
    assert "mean of 2 seeds" in lines[5]
    assert lines[6].endswith("the reference")
    assert f"{runs[0]} +1" in lines[7]
    assert "Runs without scores" in lines
    assert "1 of 2 rounds done" in done.out
    assert "the seeds averaged in each" in " ".join(done.out.split())
    assert "sample standard deviation" in " ".join(lines)


def test_json_and_csv_have_the_same_numbers(tmp_path: Path, runs: list[Path], command: Command) -> None:
    out = tmp_path / "all.csv"
    done = command("report", *runs, "--out", out, "--json")
    assert done.code == 0, done.err
    tree = json.loads(done.out)
    assert set(tree) == {"runs", "groups", "notes"}
    assert {row["kind"] for row in tree["runs"]} == {"run"}
    assert [(row["method"], row["kind"]) for row in tree["groups"]] == [("free", "mean"), ("random", "mean")]
    assert all(tuple(row) == KEYS for row in tree["runs"] + tree["groups"])
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tree["runs"]) + len(tree["groups"])
    for kind, wanted in (("run", tree["runs"]), ("mean", tree["groups"])):
        for row, given in zip([row for row in rows if row["kind"] == kind], wanted, strict=True):
            assert tuple(row) == KEYS
            for key, value in given.items():
                shown = "; ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
                assert row[key] == shown
    assert rows[0]["difference"] == "10.0"
    assert float(rows[0]["difference_ci95"]) == pytest.approx(1.96 * 2**0.5 / 2, abs=1e-4)


def test_markdown_has_whole_rows(tmp_path: Path, runs: list[Path], evil: Path, command: Command) -> None:
    out = tmp_path / "out.md"
    done = command("report", evil, *runs, "--out", out)
    assert (done.code, done.out, done.err) == (0, "", f"wrote {out}\n")
    text = out.read_text("utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert "a\\|b" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Runs"]
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M)]
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "+10.00 ± 1.39" in text


def test_html_is_one_escaped_page(tmp_path: Path, runs: list[Path], evil: Path, command: Command) -> None:
    out = tmp_path / "out.HTML"
    out.write_text("an older page")
    assert command("report", evil, *runs, "--out", out).code == 0
    text = out.read_text("utf-8")
    page = Page(text)
    assert page.tags.count("table") == 3
    assert "script" not in page.tags
    assert "http" not in text
    assert page.links == []
    assert EVIL in page.text
    assert "+10.00 ± 1.39" in page.text
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_text_and_csv_cannot_drive_a_terminal_or_a_spreadsheet(tmp_path: Path, evil: Path, command: Command) -> None:
    done = command("report", evil, "--out", tmp_path / "out.csv")
    assert done.code == 0, done.err
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["preset"] == f"'={EVIL}"
    assert row["state"] == f"{EVIL}?[2J # title"
    assert "\x1b" not in command("report", evil).out


def test_what_is_no_run_or_no_format_is_refused(tmp_path: Path, runs: list[Path], command: Command) -> None:
    for words, says in (
        ((tmp_path,), "not a run folder"),
        ((runs[0], "--out", tmp_path / "out.txt"), "name a file that ends in .md, .csv, .html"),
        ((runs[0], "--out", tmp_path / "none" / "out.md"), "name a file in one that does"),
        ((), "RUN"),
    ):
        done = command("report", *words)
        assert (done.code, done.out) == (2, ""), done.err
        assert says in done.err
        assert done.err.count("\n") == 1
    (runs[0] / "scores.json").write_text("[{")
    done = command("report", runs[0], "--out", tmp_path / "out.md")
    assert done.code == 3
    assert "scores.json" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out.md").exists()


def test_a_real_run_is_compared_with_its_random(free_run: Path, command: Command) -> None:
    done = command("report", free_run, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["runs"]
    scores = json.loads((free_run / "scores.json").read_text())
    assert len(rows) == len(scores)
    means = {(row["method"], row["selection"]): row["mean"] for row in scores}
    for row in rows:
        assert row["mean"] == means[row["method"], row["selection"]]
        if row["method"] == "free":
            assert row["difference"] == pytest.approx(row["mean"] - means["random", "last"], abs=1e-3)
            assert row["recover_seconds"] > 0
            assert row["seconds"] > row["recover_seconds"]
