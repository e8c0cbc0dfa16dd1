"""What the page of a run says first, and that everybody can read it."""

import json
import re
from typing import Any

import numpy as np
import pytest

from ray_dfml import examples, gallery, plots, report
from ray_dfml.methods import METHODS
from ray_dfml.report import pictures
from tests import test_gallery
from tests.test_report import Page, edit, make, metric_row, score


def answer_of(text: str) -> str:
    """The sentence of a page."""
    found = re.search(r'<section class="answer (\w+)" aria-label="Answer">\s*<p>(.*?)</p>', text, re.DOTALL)
    assert found
    return f"{found[1]}: {found[2]}"


def page_of(tmp_path: Any, scores: list[dict[str, Any]], **status: Any) -> str:
    """The text of the page of a run with these scores and this status."""
    run = make(tmp_path / "run", scores=scores)
    edit(run / "status.json", **status)
    report.write(run)
    return (run / "report.html").read_text()


def test_the_answer_says_how_good_against_what_and_whether_it_is_noise(tmp_path):
    said = answer_of(page_of(tmp_path, [score("random", 40.0), score("free", 52.0, selection="val"), score("free", 9)]))
    assert said == (
        "good: After 1 labelled image of each of 5 new classes of glyphs, the learner of free is right about 52.00 ± "
        "0.50 % of further images, 12.00 points above an untrained network on the same 600 episodes: more than both "
        "intervals together, so more than noise."
    )


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([score("random", 40.0), score("free", 40.9)], "noise: .*[+]0.90 points from an untrained .* does not show"),
        ([score("random", 40.0), score("free", 40.0)], "noise: .*as often as an untrained network .* does not show"),
        ([score("free", 52.0)], "none: .*nothing else was scored on the same test, so this says little."),
        ([score("random", 40.0, shot=5), score("free", 52.0, shot=5)], "good: After 5 labelled images of each"),
        (
            [score("random", 10.0, shot=None, episodes=None), score("free", 96.0, shot=None, episodes=None)],
            "good: The student of free is right about 96.00 .* points above the untrained student on the same images",
        ),
        (
            [score(f"{name}:{one}", mean, shot=None, episodes=None)
             for name, mean in (("free", 96.0), ("random", 10.0)) for one in "ab"],
            "good: 2 scores of students of free .* have a mean of 96.00 %, from 96.00 to 96.00; each is above",
        ),
        (
            [score("free", 50.0, data="a@1"), score("free", 60.0, data="pooled"), score("random", 1.0, data="pooled")],
            "none: .* new classes of all data sets, the learner of free is right about 60.00",
        ),
    ],
)  # fmt: skip
def test_answers(tmp_path, scores, wanted):
    said = answer_of(page_of(tmp_path, scores))
    assert re.match(wanted, said), said


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ("failed", "bad: No score: the run ended before its test, after 6 of 6 rounds."),
        ("running", "none: No score yet: 6 of 6 rounds are done, and the run is running."),
        ("done", "none: The run is done, but was given no data to test on"),
    ],
)
def test_an_answer_without_scores(tmp_path, state, wanted):
    assert answer_of(page_of(tmp_path, [], state=state)).startswith(wanted)


def test_each_plot_has_words_and_a_table(tmp_path):
    text = page_of(tmp_path, [])
    assert text.count("<svg ") == text.count('<svg role="img" aria-label="') == text.count("<details><summary>Numbers")
    (first, *_) = plots.draw([metric_row(r) for r in range(6)], METHODS["free"].panels)
    assert first["heads"] == ["round", "validation"]
    assert first["rows"] == [["1", "51"], ["3", "53"], ["5", "55"]]
    assert "validation: from 51 to 55" in first["svg"]


def test_tables_of_long_runs_are_thinned_to_their_ends():
    (first, *_) = plots.draw([{"round": r, "validation": 1.0 * r} for r in range(5000)], ())
    assert len(first["rows"]) == 24
    assert (first["rows"][0], first["rows"][-1]) == (["0", "0"], ["4,999", "4999"])


def test_a_page_stays_below_5_mb_in_the_worst_case(tmp_path):
    """Noise in the largest pictures that are kept, as many as there can be, in a long run of many teachers."""
    rng, found, long = np.random.default_rng(0), {}, "data/" + "a-class-with-a-long-name-" * 5
    for r in range(gallery.MOMENTS):
        for kind in ("recovered", "asked"):
            some = [test_gallery.seen(f"t{i}", f"{long}{i}", kind=kind, shape=(3, 64, 64)) for i in range(20)]
            found = gallery.taken(found, [one._replace(images=noise(rng, len(one.images))) for one in some], r)
    run = make(tmp_path / "run", rounds=3000, scores=[score("random", 40.0), score("free", 52.0)])
    (run / gallery.FILE).write_bytes(gallery.to_file(found))
    (run / examples.FILE).write_bytes(examples.to_file([
        {"kind": "student", "teacher": f"t{i}", "data": "d@1", "split": "test", "looked": 9, "parts": [
            {"which": which, "query": noise(rng, n), "classes": [long] * n, "labels": [0] * n, "predicted": [0] * n}
            for which, n in (("right", 10), ("wrong", 20))
        ], "confusions": {"pairs": [], "classes": 9, "matrix": None}} for i in range(3)
    ]))  # fmt: skip
    lines = [{"teacher": f"a-service-{i:04d}", "sent": 10**6, "answered": 10**6} for i in range(3000)]
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit(run / "status.json", rejected={f"a-teacher-{i:04d}": "a reason " * 20 for i in range(3000)})
    report.write(run)
    text = (run / "report.html").read_text()
    assert 3_000_000 < len(text.encode()) < 5_000_000
    of = Page(text)
    left = re.search(r"(\d+) pictures are left out, so that this page stays below 5 MB", of.text)
    assert left
    kept = text.count("<img ")
    assert kept + int(left[1]) == sum(len(one["images"]) for part in found.values() for one in part.values()) + 3 * 30
    assert len(set(re.findall(r'<img src="data:image/png;base64,([^"]+)', text))) > 150
    assert "2500 more are in status.json" in " ".join(of.text.split())
    assert "2500 more teachers are in ledger.jsonl" in " ".join(of.text.split())


def noise(rng: np.random.Generator, count: int) -> np.ndarray:
    """Pictures that no PNG makes smaller."""
    return rng.integers(0, 256, (count, 3, 64, 64), np.uint8)


def test_pictures_are_left_out_from_the_ends_of_their_strips():
    def strip(count: int) -> list[dict[str, Any]]:
        return [{"uri": "x" * 10, "number": n} for n in range(count)]

    gallery_ = {"classes": [{"images": strip(4)}, {"images": strip(2)}], "course": [{"images": strip(4)}]}
    test = {"parts": [{"rows": [{"support": strip(1), "images": strip(3)}]}]}
    assert pictures.thinned([gallery_], [test], most=140) == 0
    assert pictures.thinned([gallery_], [test], most=80) == 6
    left = [*gallery_["classes"], *gallery_["course"]]
    assert [[one["number"] for one in of["images"]] for of in left] == [[0, 1], [0, 1], [0, 3]]
    (row,) = test["parts"][0]["rows"]
    assert (len(row["support"]), len(row["images"])) == (1, 1)


def test_no_colour_is_fixed_outside_the_variables(tmp_path):
    """A colour in a plot or a rule would be the same on a dark page."""
    text = page_of(tmp_path, [score("random", 40.0), score("free", 52.0)])
    assert "prefers-color-scheme: dark" in text
    rest = re.sub(r"--[\w-]+: #[0-9a-f]+;", "", text)
    style = " ".join(a + b for a, b in re.findall(r"<style>(.*?)</style>|style=\"(.*?)\"", rest, re.DOTALL))
    assert "stroke" in style
    assert re.findall(r"#[0-9a-f]{3,6}\b", style) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = text.split("@media (prefers-color-scheme: dark)")[:2]
    for name in used:
        assert f"--{name}: " in light, name
        assert f"--{name}: " in dark.split("body {")[0], name


def test_tables_that_may_be_wide_can_be_scrolled_with_the_keyboard(tmp_path):
    text = page_of(tmp_path, [score("random", 40.0), score("free", 52.0)])
    Page(text)
    assert re.findall(r'<div class="scroll"(?! tabindex="0" role="region" aria-label=")', text) == []
