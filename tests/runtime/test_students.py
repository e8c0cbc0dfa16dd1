"""Runs that distil: the students that they leave, their top-1 scores, and how they are loaded, used and evaluated."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_dfml import Learner, Student, compare, top1
from ray_dfml.core import seeds
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.data import datasets
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import METHODS
from ray_dfml.runtime import driver, estimate
from ray_dfml.scores import KEYS
from ray_dfml.types import Labelled
from tests.runtime import toy

CLASSES = 3


def write(root: Path, block: int, *channels: int) -> str:
    """Three classes of images of 4x4 blocks, all of them in each split."""
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        pattern = np.kron(rng.integers(0, 256, (4, 4, *channels)), np.ones((block, block, *(1 for _ in channels))))
        for split, count in {"train": 20, "val": 5, "test": 8}.items():
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def split_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of 16x16 pixels."""
    return write(tmp_path_factory.mktemp("known"), 4)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, split_data: str) -> Path:
    """A pool of one teacher of all classes."""
    return toy.build_pool(tmp_path_factory.mktemp("single") / "pool", split_data, models=1, way=CLASSES)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, split_data: str) -> Path:
    """A pool of two teachers of two classes each."""
    return toy.build_pool(tmp_path_factory.mktemp("several") / "pool", split_data, models=2, way=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, single: Path, split_data: str) -> Path:
    """A finished run on the pool of one."""
    path = tmp_path_factory.mktemp("run") / "ideal"
    toy.train(toy.config("ideal", single, split_data), path)
    return path


def scores(run: Path) -> list[dict]:
    return json.loads((run / "scores.json").read_text())


def test_a_run_leaves_a_student_with_its_card(run: Path, single: Path, split_data: str) -> None:
    student = Student.load(run)
    card = json.loads((run / "learner.json").read_text())
    assert card == student.card.model_dump(mode="json")
    assert card["queries"] == toy.last_state(run)["students"][card["teacher"]]["asked"] == 24
    assert sorted(student.classes) == [f"folder/class{c}" for c in range(CLASSES)]
    test = datasets.load(split_data).subset("test")
    probabilities = student.predict_proba(test.images)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert student.predict(test.images) == [student.classes[i] for i in probabilities.argmax(1)]
    assert student.predict(torch.tensor(test.images).float() / 255) == student.predict(test.images)
    assert student.predict(test.images[:0]) == []
    right = [
        name == f"folder/{test.class_names[i]}"
        for name, i in zip(student.predict(test.images), test.labels, strict=True)
    ]
    assert scores(run)[0]["mean"] == pytest.approx(100 * np.mean(right), abs=1e-3)


def test_the_predictions_are_those_of_the_mean_weights(run: Path, split_data: str) -> None:
    student, images = Student.load(run), datasets.load(split_data).subset("test").images
    pupil = toy.last_state(run)["students"][student.card.teacher]["pupil"]
    theta, stats = (torch.tensor(np.asarray(pupil[name])) for name in ("mean_theta", "mean_stats"))
    x = normalise(to_pixels(images), torch.tensor(student.image.mean), torch.tensor(student.image.std))
    logits = student.weights.net(theta, x, stats, first_order=True)
    np.testing.assert_array_equal(student.predict_proba(images), logits.detach().double().softmax(-1).numpy())


def test_scores_are_top1_with_the_interval_of_a_proportion_beside_the_untrained_student(run: Path) -> None:
    own, fresh = scores(run)
    assert (own["method"], fresh["method"]) == ("ideal", "random")
    for row in (own, fresh):
        assert tuple(row) == KEYS
        assert (row["way"], row["shot"], row["episodes"]) == (None, None, None)
        assert (row["split"], row["bn"], row["selection"]) == ("test", "running", "last")
        p, n = row["mean"] / 100, 8 * CLASSES
        assert row["ci95"] == pytest.approx(196 * (p * (1 - p) / n) ** 0.5, abs=1e-3)
    table = pq.read_table(run / "episodes.parquet").to_pydict()
    assert set(table["accuracy"]) <= {0.0, 100.0}
    assert np.mean(table["accuracy"][: 8 * CLASSES]) == pytest.approx(own["mean"], abs=1e-3)


def test_metrics_have_true_queries_and_the_validation_of_each_round(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["queries"] for row in rows] == [8, 16, 24]
    assert all(0 <= row["validation"] <= 100 for row in rows)
    notes = toy.status(run)["notes"]
    assert any("assumes that neighbouring pixels are alike" in note for note in notes)
    assert not any("not new" in note for note in notes)


def test_several_teachers_have_a_student_each(tmp_path: Path, several: Path, split_data: str) -> None:
    toy.train(toy.config("ideal", several, split_data), tmp_path / "run")
    ids = sorted(toy.last_state(tmp_path / "run")["students"])
    assert sorted(file.stem for file in (tmp_path / "run" / "students").glob("*.safetensors")) == ids
    assert not (tmp_path / "run" / "learner.json").exists()
    found = scores(tmp_path / "run")
    assert sorted(row["method"] for row in found) == [f"ideal:{id}" for id in ids] + [f"random:{id}" for id in ids]
    assert {Student.load(tmp_path / "run", teacher=id).card.teacher for id in ids} == set(ids)
    with pytest.raises(UsageError, match=f"has 2 students; name a teacher: {ids[0]}"):
        Student.load(tmp_path / "run")
    with pytest.raises(UsageError, match="no such student"):
        Student.load(tmp_path / "run", teacher="nobody")


def test_evaluate_repeats_the_scores(
    run: Path, split_data: str, command: Callable[..., toy.Done], tmp_path: Path, several: Path
) -> None:
    done = command("evaluate", run, "--data", split_data, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == scores(run)
    toy.train(toy.config("ideal", several, split_data), tmp_path / "run")
    rows = json.loads(command("evaluate", tmp_path / "run", "--data", split_data, "--json").out)
    assert rows == scores(tmp_path / "run")
    assert command("evaluate", run, "--data", split_data).code == 0


def test_students_of_other_sizes_are_scored_as_evaluate_does(
    tmp_path: Path, several: Path, split_data: str, command: Callable[..., toy.Done]
) -> None:
    """Teachers of 1x16x16 and 3x20x20 images: each student sees the data brought to its size once."""
    large = toy.build_pool(tmp_path / "pool", write(tmp_path / "data", 5, 3), models=1, way=CLASSES)
    config = toy.config("ideal", several, split_data).model_copy(update={"pool": (str(several), str(large))})
    inputs = driver.read_inputs(config)
    assert {(one.split, one.shape): one.images.shape[1:] for one in inputs.sets} == {
        (split, shape): shape for split in ("val", "test") for shape in ((1, 16, 16), (3, 20, 20))
    }
    toy.train(config, tmp_path / "run")
    rows = json.loads(command("evaluate", tmp_path / "run", "--data", split_data, "--json").out)
    assert rows == scores(tmp_path / "run")
    assert len(rows) == 6


def test_reports_show_students(run: Path, command: Callable[..., toy.Done]) -> None:
    done = command("report", run)
    assert done.code == 0, done.err
    assert "top-1" in done.out
    rows = compare.compare([run]).rows
    own = next(row for row in rows if row["method"] == "ideal")
    assert own["against"].startswith("random/last")
    assert own["difference"] == pytest.approx(own["mean"] - scores(run)[1]["mean"], abs=1e-2)


def test_a_run_that_resumes_after_every_round(
    tmp_path: Path, run: Path, single: Path, split_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.config("ideal", single, split_data)
    toy.stopped_after_each_round(config, tmp_path / "run", monkeypatch)
    toy.assert_same_run(tmp_path / "run", run)


def test_a_run_without_data_leaves_a_student_without_scores(tmp_path: Path, single: Path) -> None:
    assert toy.train(toy.config("ideal", single, None), tmp_path / "run") == []
    assert Student.load(tmp_path / "run").card.selection == "last"


def test_a_student_is_no_learner_and_a_learner_no_student(run: Path, free_run: Path) -> None:
    with pytest.raises(UsageError, match="a student, which adapts to no classes"):
        Learner.load(run)
    with pytest.raises(RejectedError, match=r"learner\.json"):
        Student.load(free_run)


def test_data_that_no_teacher_knows_are_refused(single: Path, toy_data: str) -> None:
    with pytest.raises(UsageError, match="no teacher knows any of its classes"):
        driver.read_inputs(toy.config("ideal", single, toy_data))


def test_a_plan_names_the_student_and_the_minutes_of_its_test(single: Path, split_data: str) -> None:
    config = toy.config("ideal", single, split_data)
    plan = estimate.estimate(config, driver.read_inputs(config), toy.LOCAL)
    assert plan["rounds"] == 3
    assert plan["student parameters"] > 0
    assert "learner parameters" not in plan


def test_classes_are_matched_by_whole_names_or_by_what_follows_the_slash() -> None:
    assert top1.units(["mnist/1", "mnist/0"], ["mnist/0", "mnist/1", "mnist/2"]).tolist() == [1, 0, -1]
    assert top1.units(["1", "0"], ["mnist/0", "mnist/1"]).tolist() == [1, 0]
    assert top1.units(["svhn/0", "mnist/0"], ["mnist/0", "mnist/1"]).tolist() == [1, -1]
    assert top1.units(["cat"], ["mnist/0"]).tolist() == [-1]
    of = Labelled("d", "test", None, np.array([2, 0, 1, 0]), ("d/a", "d/b", "d/c"))
    rows, wanted = top1.rows_known(of, ["d/c", "d/a"])
    assert (rows.tolist(), wanted.tolist()) == ([0, 1, 3], [0, 1, 1])


def test_the_untrained_student_is_the_one_that_the_run_began_with(run: Path, split_data: str) -> None:
    from ray_dfml.runtime.top1_test import untrained

    student = Student.load(run)
    drawn = student.weights.net.init(seeds.rng(0, "student", student.card.teacher))
    assert torch.equal(untrained(student).theta, drawn)


@pytest.mark.parametrize("method", ["dfme", "dafl", "zskt", "dast", "deepinversion", "cmi", "zsdb3"])
def test_the_older_methods_run_and_leave_students(method: str, tmp_path: Path, single: Path, split_data: str) -> None:
    config = toy.config(method, single, split_data)
    rows = toy.train(config, tmp_path / "run")
    assert [row["method"] for row in rows] == [method, "random"]
    card = Student.load(tmp_path / "run").card
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    planned = sum(METHODS[method].queries(config.method, driver.read_inputs(config).world).values())
    assert (card.method, card.queries) == (method, planned)
    assert sum(line["answered"] for line in lines) <= sum(line["sent"] for line in lines) <= planned
