"""`evaluate` on data of another size than the learner's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml import learner, scorer
from ray_dfml.core.net import net
from ray_dfml.data import datasets
from ray_dfml.errors import UsageError
from ray_dfml.runtime import meta_test
from ray_dfml.runtime.inputs import fitted
from ray_dfml.scorer import Part
from ray_dfml.types import ImageSpec, Labelled, LearnerWeights


def export(folder: Path, shape: tuple[int, int, int]) -> Path:
    """An untrained two-way learner of images of this shape."""
    channels, height, width = shape
    image = ImageSpec(channels=channels, height=height, width=width, mean=(0.4,) * channels, std=(0.3,) * channels)
    network = net("conv4", shape, 2)
    weights = LearnerWeights(
        arch="conv4", image=image, outputs=2, theta=torch.zeros(network.layout.numel), stats=network.initial_stats(),
        head="maml", steps=1, lr=0.1,
    )  # fmt: skip
    learner.export(folder, weights, method="free", bn="transductive", selection="last", profile="fixed", seed=0)
    return folder / learner.WEIGHTS


def evaluated(weights: Path, spec: str) -> list[dict[str, Any]]:
    return meta_test.meta_test(
        weights, spec=spec, split="test", way=None, shots=[1], episodes=4, bn=None, seed=0, workers=1, backend="local"
    )


def test_images_of_another_size_are_brought_to_the_learner(
    tmp_path: Path, toy_data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared images are the fitted ones, and one line says so."""
    seen: dict[str, np.ndarray] = {}

    def note(backend: Any, cfg: Any, weights: Any, part: Part, labelled: Labelled, **more: Any) -> np.ndarray:
        seen[part.episodes.split] = labelled.images
        return scorer.accuracies(backend, cfg, weights, part, labelled, **more)

    monkeypatch.setattr(meta_test, "accuracies", note)
    rows = evaluated(export(tmp_path, (3, 20, 20)), toy_data)
    assert [(row["method"], row["episodes"], row["data"]) for row in rows] == [
        ("free", 4, datasets.load(toy_data).identity), ("random", 4, datasets.load(toy_data).identity),
    ]  # fmt: skip
    assert set(seen) == {"val", "test"}
    for split, images in seen.items():
        assert np.array_equal(images, fitted(datasets.load(toy_data).subset(split).images, (3, 20, 20), ""))
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"--data {toy_data}: images of 1x16x16 are brought to the learner's 3x20x20"


def test_images_of_the_learners_size_are_used_as_they_are(
    tmp_path: Path, toy_data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(evaluated(export(tmp_path, (1, 16, 16)), toy_data)) == 2
    assert "brought" not in capsys.readouterr().err


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said on the terminal, but for one line about the cost."""
    lines = capsys.readouterr().err.splitlines()
    costs = [line for line in lines if line.startswith("cost: ")]
    assert len(costs) == 1
    return [line for line in lines if line not in costs]


def test_random_gets_a_step_of_its_own_on_validation_episodes(
    tmp_path: Path, toy_data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner keeps the step of its export, whatever the test would like."""
    asked: dict[tuple[str, float], set[str]] = {}

    def answer(backend: Any, cfg: Any, weights: LearnerWeights, part: Part, *_: Any, **__: Any) -> np.ndarray:
        mine = bool((weights.theta == 0).all())
        asked.setdefault(("free" if mine else "random", part.episodes.lr), set()).add(part.episodes.split)
        best = 0.2 if part.episodes.split == "val" else 0.5
        return np.full(part.stop - part.start, 100 * (part.episodes.lr == best))

    monkeypatch.setattr(meta_test, "accuracies", answer)
    evaluated(export(tmp_path, (1, 16, 16)), toy_data)
    others = {("random", lr): {"val"} for lr in (0.01, 0.05, 0.5)}
    assert asked == {("free", 0.1): {"test"}, ("random", 0.2): {"val", "test"}, **others}
    line = "random adapts with steps of 0.2, chosen on validation episodes of these data"
    assert said(capsys) == [line]


def test_without_validation_episodes_random_takes_the_learners_step(
    tmp_path: Path, toy_data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = datasets.load(toy_data)
    bare = datasets.replace(whole, class_splits={**(whole.class_splits or {}), "val": ()})
    monkeypatch.setattr(meta_test.datasets, "load", lambda spec: bare)
    assert len(evaluated(export(tmp_path, (1, 16, 16)), toy_data)) == 2
    assert said(capsys) == [f"random adapts with the learner's step: {toy_data} has no validation episodes"]


def test_other_channels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_data: str) -> None:
    one = datasets.load(toy_data)
    colour = datasets.replace(one, images=np.repeat(one.images, 3, 1), mean=one.mean * 3, std=one.std * 3)
    monkeypatch.setattr(meta_test.datasets, "load", lambda spec: colour)
    with pytest.raises(UsageError, match=r"^--data x: cannot turn images of 3 channels into 2"):
        evaluated(export(tmp_path, (2, 16, 16)), "x")
