"""The report of a run folder: complete where the files are, clean where they are not, and never markup from a file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ray_dfml import config, plots, report
from ray_dfml.core.net import net
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.learner import export
from ray_dfml.methods import METHODS
from ray_dfml.types import ImageSpec, LearnerWeights
from tests.data.pools import two_teachers

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "link", "img", "hr", "input"}


def score(method: str, mean: float, *, shot: int | None = 1, ci95: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A row of `scores.json`."""
    row = {
        "method": method, "data": "glyphs@cdcdcdcd", "split": "test", "way": 5, "shot": shot, "episodes": 600,
        "bn": "transductive", "profile": "fixed", "selection": "last", "mean": mean, "ci95": ci95,
    }  # fmt: skip
    return row | changes


SCORES = [score("random", 40.0), score("average", 40.9), score("free", 52.0, selection="val"), score("free", 51.0)]


def metric_row(r: int) -> dict[str, Any]:
    """A round of FREE."""
    return {
        "round": r, "validation": 50.0 + r if r % 2 else None, "recover/ce": 1 / (r + 1), "recover/accuracy": 90.0,
        "recover/loss_first": 3.0, "recover/loss_last": 2.0, "replay/loss_first": 1.2, "replay/loss_last": 1.0,
        "replay/accuracy_best": 80.0, "replay/updates": 11, "align/path_cosine": 0.1, "align/path_product": -0.2,
        "bell/loss": 0.4, "seconds/free.recover": 1.0, "seconds/maml.grad": 2.0, "seconds/learner": 0.5,
        "seconds/round": 3.5,
    }  # fmt: skip


def make(run: Path, *, rounds: int = 6, scores: list[dict[str, Any]] | None = None, **manifest: Any) -> Path:
    """A finished run folder."""
    run.mkdir()
    tree = config.resolve("free", seed=7, pool=["pools/p"], data=["glyphs"]).model_dump(mode="json")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    noted = {
        "command": "ray-dfml train free", "started": "2025-01-02T03:04:05+00:00", "seed": 7,
        "versions": {"python": "3.11.9", "torch": "2.10.0"}, "git": {}, "hardware": {"cpus": 2, "accelerators": []},
        "pool": [{"path": "pools/p", "sha256": "ab" * 32, "teachers": 2}],
        "data": [{"spec": "glyphs", "data": "glyphs@cdcdcdcd", "md5": "cd" * 16}],
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(noted | manifest))
    status = {"state": "done", "round": rounds, "rounds": rounds, "seconds": 1.0, "last_error": None}
    (run / "status.json").write_text(json.dumps(status | {"rejected": {"t-3": "head.weight: 2 values are NaN"}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(metric_row(r)) + "\n" for r in range(rounds)))
    (run / "scores.json").write_text(json.dumps(SCORES if scores is None else scores))
    return run


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Page(HTMLParser):
    """Balanced tags, text, and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data + " "


def written(run: Path) -> tuple[Page, str]:
    """The page, parsed, and the model card."""
    report.write(run)
    page = (run / "report.html").read_text()
    assert "url(http" not in page
    return Page(page), (run / "MODEL_CARD.md").read_text()


def test_a_finished_run_is_shown_whole(tmp_path):
    page, card = written(make(tmp_path / "run"))
    for needle in ("free", "fixed", "52.00 ± 0.50", "transductive", "t-3", "2 values are NaN", "ab" * 32, "cd" * 16,
                   "ray-dfml train free", "torch", "2.10.0", "6 of 6", "21.0 s", "Validation accuracy", "Replay loss",
                   "Time per stage", "maml.grad", "57.1 %"):  # fmt: skip
        assert needle in page.text, needle
    assert page.tags.count("svg") == 10
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    for needle in ("52.00 ± 0.50", "ab" * 32, "cd" * 16, "2 teachers", "t-3", "## Limits"):
        assert needle in card, needle
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")) == []


def test_the_same_files_give_the_same_bytes(tmp_path):
    run = make(tmp_path / "run")
    written(run)
    first = [(run / name).read_bytes() for name in ("report.html", "MODEL_CARD.md")]
    written(run)
    assert first == [(run / name).read_bytes() for name in ("report.html", "MODEL_CARD.md")]


def test_rows_not_above_random_are_marked_and_the_own_method_stands_first(tmp_path):
    page, card = written(make(tmp_path / "run"))
    assert page.text.count("not above random (+0.90)") == 1
    assert "+12.00" in page.text
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| glyphs")]
    assert [(row[2], row[5]) for row in rows] == [
        ("free", "val"), ("free", "last"), ("average", "last"), ("random", "last"),
    ]  # fmt: skip
    assert [row[4] for row in rows] == ["+12.00", "+11.00", "not above random (+0.90)", "the reference"]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (score("free", 41.0), False),  # a gain of exactly both intervals
        (score("free", 41.1), True),
        (score("free", 39.0), False),
        (score("free", 41.1, ci95=0.7), False),
        (score("free", 90.0, episodes=100), None),
        (score("free", 90.0, bn="support"), None),
        (score("free", 90.0, shot=5), None),
        (score("free", 90.0, data="other"), None),
        (score("random", 40.0), None),
    ],
)
def test_verdict_compares_equal_episodes_only(row, wanted):
    assert report.verdict(row, [SCORES[0], row])[0] is wanted


def test_everything_from_files_is_escaped(tmp_path):
    run = make(tmp_path / "run", command=f"ray-dfml {EVIL} `|`", pool=[{"path": EVIL, "sha256": EVIL, "teachers": 1}],
               data=[{"spec": EVIL, "md5": EVIL}], versions={EVIL: EVIL}, hardware={EVIL: [EVIL]}, started=EVIL,
               scores=[score(EVIL, 50.0, data=EVIL, split=EVIL, bn=EVIL, profile=EVIL, selection=EVIL)])  # fmt: skip
    edit(run / "status.json", rejected={EVIL: f"a|b\n# {EVIL}"}, last_error=EVIL, state=EVIL)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metric_row(6) | {f"seconds/{EVIL}": 1.0, "seconds/$x_$": 2.0}) + "\n")
    tree = yaml.safe_load((run / "config.yaml").read_text()) | {"name": EVIL, "profile": EVIL, "preset": EVIL}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    page, card = written(run)
    assert "script" not in page.tags
    assert EVIL in page.text
    outside_code = re.sub(r"`[^`\n]*`", "", card)
    assert "<script" not in outside_code
    assert "\n# <" not in card
    assert card.count("\n# ") == 0  # the title is the first line, and no value made another
    table = [line for line in card.splitlines() if line.startswith("| &lt;script")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table if "5-way" in line] == [10]


def test_only_the_configuration_is_needed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: random\n")
    page, card = written(run)
    assert "svg" not in page.tags
    for needle in ("No scores", "No metrics", "not recorded", "unknown"):
        assert needle in page.text
    assert "no learner" in card
    assert "Learner.load" not in card


def test_a_baseline_of_one_round_gives_a_page_without_plots(tmp_path):
    run = make(tmp_path / "run", rounds=0)
    (run / "metrics.jsonl").write_text(
        '{"round": 0, "validation": null, "seconds/learner": 0.02, "seconds/round": 0.02}\n'
    )
    page, _ = written(run)
    assert "svg" not in page.tags
    assert "0.02 s" in page.text


def test_bad_lines_and_values_of_the_log_are_passed_over(tmp_path):
    run = make(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metric_row(5) | {"bell/loss": 9.0}) + "\n")  # round 5 again, after a resume
        file.write(json.dumps({"round": 6, "bell/loss": float("nan"), "recover/ce": "high", "validation": True}) + "\n")
        file.write('[1]\n{"round": 7, "bell/lo')
    page, _ = written(run)
    assert "2 lines of metrics.jsonl" in page.text
    rounds, values = plots.series(report.read(run).metrics, "bell/loss")
    assert rounds.tolist() == [0, 1, 2, 3, 4, 5]
    assert values.tolist() == [0.4] * 5 + [9.0]


def test_long_runs_are_smoothed_and_binned(tmp_path):
    page, _ = written(make(tmp_path / "run", rounds=500))
    assert page.tags.count("svg") == 10
    assert (tmp_path / "run/report.html").stat().st_size < 2_000_000
    spent = plots.stages(report.read(tmp_path / "run").metrics)
    assert list(spent) == ["maml.grad", "free.recover", "learner"]
    assert spent["maml.grad"].sum() == 1000


def test_the_pool_is_described_while_it_is_unchanged(tmp_path):
    pool = two_teachers(tmp_path / "pool")
    noted = {"path": str(pool.path), "sha256": pool.sha256(), "teachers": 2}
    page, card = written(make(tmp_path / "one", pool=[noted]))
    assert "2 × conv4" in page.text
    assert "2 x conv4" in card
    assert "Source of 2: test" in card
    assert "2 teachers state no authorization" in card
    _, card = written(make(tmp_path / "two", pool=[noted | {"sha256": "0" * 64}]))
    assert "changed since this run" in card
    assert "Source of" not in card


def test_learner_ledger_and_errors_are_shown(tmp_path):
    run = make(tmp_path / "run", scores=[score("free", 80.0)])
    image = ImageSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
    network = net("conv4", image.shape, 5)
    weights = LearnerWeights(
        arch="conv4", image=image, outputs=5, theta=network.init(torch.Generator().manual_seed(0)),
        stats=network.initial_stats(), head="maml", steps=10, lr=0.01,
    )  # fmt: skip
    export(run, weights, method="free", bn="support", selection="last", profile="fixed", seed=0)
    (run / "ledger.jsonl").write_text(
        '{"teacher": "api", "sent": 30, "answered": 28}\n{"teacher": "api", "sent": 12, "answered": 12}\n'
    )
    edit(run / "status.json", state="failed", last_error="ValueError: something")
    page, card = written(run)
    for needle in ("failed", "ValueError: something", "api", "42", "not compared"):
        assert needle in page.text, needle
    assert "2 to 5 classes" in card
    assert "16x16 pixels with 1 channel." in card
    assert "Selection is `last`" in card
    assert "learner.safetensors, sha256 | `" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_time_of_all_rounds_is_that_of_the_metrics_else_of_the_status(tmp_path):
    run = make(tmp_path / "run")
    assert (report.read(run).seconds, report.read(run).rounds) == (21.0, 6)
    (run / "metrics.jsonl").unlink()
    assert (report.read(run).seconds, report.read(run).rounds) == (1.0, 6)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scores.json", "[{"),
        ("scores.json", "{}"),
        ("status.json", "[]"),
        ("config.yaml", "- a"),
        ("config.yaml", "a: ["),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, name, text):
    run = make(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(RejectedError) as caught:
        report.write(run)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (run / "report.html").exists()


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


STEP = {"method": "free", "selection": "val", "data": "glyphs", "lr": 0.2}


def test_notes_and_test_steps_are_shown_and_escaped(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    edit(run / "status.json", notes=["the term is dropped for <b>x</b>"], test_step=[STEP, STEP | {"lr": "odd"}])
    report.write(run)
    page, card = (run / "report.html").read_text(), (run / "MODEL_CARD.md").read_text()
    assert "the term is dropped for &lt;b&gt;x&lt;/b&gt;" in page
    for text in (page, card):
        assert "free/val 0.2" in text
        assert "odd" not in text
        assert "<b>x</b>" not in text


def test_a_student_is_drawn_over_its_queries() -> None:
    """The axis is that of the images asked about, and no other plot of the validation says that weights are kept."""
    rows = [{"round": r, "queries": 1500.0 * (r + 1), "validation": 50.0 + r} for r in range(4)]
    x, y = plots.series([*rows, {"round": 4, "queries": None, "validation": 60.0}], "validation", "queries")
    assert (x.tolist(), y.tolist()) == ([1500, 3000, 4500, 6000], [50, 51, 52, 53])
    for name in ("ideal", "dfme", "zsdb3"):
        first, *rest = plots.draw(rows, METHODS[name].panels)
        assert first["title"] == "Accuracy over queries"
        assert ">queries<" in first["svg"]
        assert re.search(r">[1-6],\d00<", first["svg"])
        assert not any("alidation" in plot["title"] for plot in rest)
    (first,) = plots.draw(rows, METHODS["free"].panels)
    assert first["title"] == "Validation accuracy"
    assert ">round<" in first["svg"]
