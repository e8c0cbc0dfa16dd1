"""Examples of a test: what is shown is what was predicted, bounded, readable again, and never trusted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_dfml import examples, report
from ray_dfml.core import episodes
from ray_dfml.errors import RejectedError
from ray_dfml.evaluate import EvalConfig
from ray_dfml.gallery import packed
from ray_dfml.types import Labelled
from tests.test_report import Page, make


def labelled(classes: int, each: int = 8) -> Labelled:
    """Images that bear their class, in order of classes."""
    labels = np.repeat(np.arange(classes), each)
    images = (labels[:, None, None, None] * np.ones((1, 1, 4, 4))).astype(np.uint8)
    return Labelled("toy@1", "test", images, labels, tuple(f"toy/c{c:02d}" for c in range(classes)))


def of_episodes(classes: int, way: int, wrong: bool) -> examples.Example:
    """Three episodes in which all is right, or way 0 is always taken for way 1."""
    of, cfg = labelled(classes), EvalConfig(query=4)
    right = np.arange(4 * way) % way
    ways = np.where(right == 0, 1, right) if wrong else right
    shown = {"best": (2, 100.0), "worst": (0, 12.5)}
    return examples.of_episodes(cfg, of, way=way, shot=2, predicted=dict.fromkeys(range(3), ways), shown=shown)


@pytest.mark.parametrize(("way", "shown"), [(2, 2 * 4), (5, 5 * 3), (12, 10)])
def test_images_are_those_of_the_episode(way, shown):
    found = of_episodes(14, way, wrong=True)
    best, worst = found["parts"]
    assert (best["which"], best["number"], worst["which"], worst["number"]) == ("best", 2, "worst", 0)
    drawn = episodes.draw(labelled(14).labels, way=way, shot=2, query=4, seed=0, index=2)
    names = [f"toy/c{c:02d}" for c in labelled(14).labels[drawn.support[:way]]]
    assert best["classes"] == names
    assert len(best["query"]) == len(best["labels"]) == shown
    of_image = [f"toy/c{image[0, 0, 0]:02d}" for image in best["query"]]
    assert of_image == [best["classes"][label] for label in best["labels"]]
    assert [f"toy/c{image[0, 0, 0]:02d}" for image in best["support"]] == names[: examples.WAYS]
    assert best["predicted"] == [label or 1 for label in best["labels"]]


def test_confusions_are_counted_by_class_and_not_by_way():
    found = of_episodes(3, 2, wrong=True)["confusions"]
    assert sum(pair["count"] for pair in found["pairs"]) == 3 * 4
    assert all(pair["class"] != pair["said"] and pair["count"] <= pair["of"] for pair in found["pairs"])
    for row in found["matrix"]["shares"]:
        assert all(share is None or 0 <= share <= 100 for share in row)
    assert of_episodes(3, 2, wrong=False)["confusions"]["pairs"] == []
    many = of_episodes(40, 20, wrong=True)["confusions"]
    assert many["matrix"] is None
    assert len(many["pairs"]) <= examples.PAIRS


def test_a_student_is_shown_right_and_wrong():
    of = labelled(3)
    wanted = of.labels
    said = np.where(np.arange(24) % 8 < 2, (wanted + 1) % 3, wanted)
    found = examples.of_student(of, "t", ["c00", "c01", "c02"], np.arange(24), wanted, said)
    right, wrong = found["parts"]
    assert right["labels"] == right["predicted"] == [0, 1, 2]
    assert (wrong["labels"], wrong["predicted"]) == ([0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0])
    assert found["confusions"]["pairs"][0] == {"class": "c00", "said": "c01", "count": 2, "of": 8}
    assert found["confusions"]["matrix"]["shares"][0] == [75.0, 25.0, 0.0]


def test_a_page_shows_them_and_says_that_they_are_real(tmp_path):
    run = make(tmp_path / "run")
    both = [of_episodes(5, 3, wrong=True), of_episodes(5, 3, wrong=False)]
    (run / examples.FILE).write_bytes(examples.to_file(both))
    report.write(run)
    text = (run / "report.html").read_text()
    Page(text)
    assert text.count("These are real images of toy") == 2
    assert "The worst of the episodes, number 0: 12.5 % of its queries are right" in text
    assert text.count("<img ") == text.count(' alt="') > 20
    assert "None was, in 3 episodes" in text
    again = examples.read(run / examples.FILE)
    for part, one in zip(both[0]["parts"], again[0]["parts"], strict=True):
        assert (part["query"] == one["query"]).all()
        assert {**part, "query": 0, "support": 0} == {**one, "query": 0, "support": 0}


@pytest.mark.parametrize("said", [{}, {"examples": [{"parts": [{}]}]}, {"examples": [{"data": 1, "parts": []}]}, []])
def test_another_file_is_named_in_one_line(tmp_path: Path, said: Any) -> None:
    run = make(tmp_path / "run")
    (run / examples.FILE).write_bytes(packed({"x": np.zeros((1, 1, 4, 4), np.uint8)}, said))
    with pytest.raises(RejectedError, match=r"examples\.safetensors: not") as caught:
        report.write(run)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("changes", [{"looked": None}, {"split": None, "kind": None}, {"confusions": {"pairs": []}}])
def test_an_example_without_all_of_it_is_named_in_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = make(tmp_path / "run")
    (run / examples.FILE).write_bytes(examples.to_file([of_episodes(3, 3, wrong=True) | changes]))
    with pytest.raises(RejectedError, match=r"examples\.safetensors: not"):
        report.write(run)


def test_a_run_shows_its_own_best_and_worst_episode(free_run: Path) -> None:
    (found,) = examples.read(free_run / examples.FILE)
    rows = [row for row in pq.read_table(free_run / "episodes.parquet").to_pylist()
            if (row["method"], row["selection"]) == ("free", "val")]  # fmt: skip
    accuracies = [row["accuracy"] for row in rows]
    best, worst = found["parts"]
    assert best["accuracy"] == pytest.approx(max(accuracies), abs=0.01)
    assert worst["accuracy"] == pytest.approx(min(accuracies), abs=0.01)
    assert (best["number"], worst["number"]) == (int(np.argmax(accuracies)), int(np.argmin(accuracies)))
    for part in (best, worst):  # the toy episodes have 2 x 3 queries, and all are shown
        share = np.mean(np.array(part["labels"]) == np.array(part["predicted"]))
        assert part["accuracy"] == pytest.approx(100 * share, abs=0.01)
