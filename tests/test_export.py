"""Exported graphs: ONNX Runtime gives the predictions of the learner and the student, for any number of images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from ray_dfml import export
from ray_dfml.core.net import net
from ray_dfml.learner import Learner
from ray_dfml.student import Student
from ray_dfml.student import export as export_student
from ray_dfml.types import ImageSpec, LearnerWeights
from tests.runtime import toy

Command = Callable[..., toy.Done]
IMAGE = ImageSpec(channels=1, height=28, width=28, mean=(0.4,), std=(0.3,))
CLASSES = ("a", "b", "c")


@pytest.fixture
def student(tmp_path: Path) -> Student:
    """A LeNet of three classes."""
    network, rng = net("lenet", IMAGE.shape, len(CLASSES)), torch.Generator().manual_seed(0)
    weights = LearnerWeights(
        arch="lenet", image=IMAGE, outputs=3, theta=network.init(rng), stats=network.initial_stats(), head="maml",
        steps=0, lr=1.0,
    )  # fmt: skip
    file = tmp_path / "run" / "learner.safetensors"
    export_student(file, weights, method="ideal", teacher="t", classes=CLASSES, queries=1, profile="fixed", seed=0)
    return Student.load(file)


def pixels(n: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise in [0, 1]."""
    return np.random.default_rng(n).random((n, *shape), np.float32)


def ran(file: Path, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What ONNX Runtime makes of the images, and the classes that the file names."""
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {"images": images})[0], json.loads(session.get_modelmeta().custom_metadata_map["classes"])


def test_a_student_in_onnx(student: Student, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "s.onnx"
    done = command("export", tmp_path / "run", "--out", file)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{file}: images n x 1x28x28 in [0, 1] -> probabilities of 3 classes\n"
    for n in (1, 5):
        images = pixels(n, IMAGE.shape)
        found, classes = ran(file, images)
        assert classes == list(CLASSES)
        np.testing.assert_allclose(found, student.predict_proba(images), atol=1e-5)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bn", ["support", "running"])
def test_an_adapted_learner_as_a_program(free_run: Path, bn: str) -> None:
    """Its answers are those of `AdaptedLearner`, also for fewer classes than the learner has outputs."""
    learner = Learner.load(free_run)
    learner.bn = bn  # pyright: ignore[reportAttributeAccessIssue]
    adapted = learner.adapt(pixels(4, learner.image.shape), ["one", "two", "one", "two"])
    module = export.program(export.of_adapted(adapted)).module()
    for n in (1, 7):
        images = pixels(n, learner.image.shape)
        np.testing.assert_allclose(module(torch.tensor(images)).numpy(), adapted.predict_proba(images), atol=1e-6)


def test_a_learner_that_was_not_adapted_gives_features(free_run: Path) -> None:
    learner = Learner.load(free_run)
    images = torch.tensor(pixels(3, learner.image.shape))
    graph = export.of_learner(learner)
    of, mean, std = learner.weights, learner.image.mean[0], learner.image.std[0]
    expected = of.net.features(of.theta, (images - mean) / std, of.stats)
    torch.testing.assert_close(export.program(graph).module()(images), expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "x.pt"), "ends in .onnx"),
        (("--out", "{there}"), "exists already"),
        (("--out", "nowhere/x.onnx"), "a folder that does not exist"),
        (("--out", "x.onnx", "--support", "."), "leave out --support"),
        (("--out", "x.onnx", "--teacher", "other"), "student"),
    ],
)
def test_bad_words_are_refused(
    student: Student, tmp_path: Path, command: Command, words: tuple[str, ...], said: str
) -> None:  # fmt: skip
    (tmp_path / "there.onnx").write_text("kept")
    given = [word.replace("{there}", str(tmp_path / "there.onnx")) for word in words]
    done = command("export", tmp_path / "run", *given)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert (tmp_path / "there.onnx").read_text() == "kept"
