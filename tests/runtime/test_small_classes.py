"""Classes with too few images: named, and left out with a note while enough remain; bad teachers are named too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ray_dfml.data.pool import Pool
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.runtime import build_pool
from ray_dfml.runtime.driver import read_inputs
from ray_dfml.runtime.launch import left_out
from tests.runtime import toy

Command = Callable[..., toy.Done]


def write(root: Path, counts: dict[str, dict[str, int]], size: int = 16) -> str:
    """The spec of folders of grey images, as many in each class as `counts[split][class]` says."""
    rng = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{n}.png")
    return f"folder:{root}"


@pytest.fixture
def birds(tmp_path: Path) -> str:
    """Enough classes in each split, and one that is too small: for episodes of 1 + 3 images, or to train a teacher."""
    return write(
        tmp_path / "birds",
        {
            "train": {"owl": 6, "jay": 6, "tit": 5, "rare": 1},
            "val": {"crow": 4, "rook": 4, "kite": 2},
            "test": {"wren": 4, "finch": 5, "rare_bird": 3},
        },
    )


def test_small_classes_are_left_out_of_validation_and_test(birds: str) -> None:
    found = read_inputs(toy.config("random", None, birds, "learner.way=2"))
    line = "1 of 3 classes have fewer than the 4 images of 1-shot episodes and are left out of them: "
    assert found.notes == [
        f"--data {birds}, split val: {line}kite has 2", f"--data {birds}, split test: {line}rare_bird has 3"
    ]  # fmt: skip


def test_each_shot_has_its_own_small_classes(birds: str) -> None:
    found = read_inputs(toy.config("random", None, birds, "learner.way=2", "eval.shots=[1,2]", "eval.query=2")).notes
    assert [note.partition("have fewer than the ")[2] for note in found] == [
        "3 images of 1-shot episodes and are left out of them: kite has 2",
        "4 images of 2-shot episodes and are left out of them: kite has 2",
        "4 images of 2-shot episodes and are left out of them: rare_bird has 3",
    ]


def test_too_few_large_classes_are_refused_and_the_small_ones_named(birds: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_inputs(toy.config("random", None, birds, "learner.way=3"))
    assert str(caught.value) == (
        f"--data {birds}, split val: 3-way 1-shot episodes need 3 classes with 4 images (1 support, 3 query), there "
        "are 2; kite has 2; change eval.shots or eval.query, or the way"
    )


def test_the_oracle_names_the_classes_it_cannot_train_on(birds: str) -> None:
    notes = read_inputs(toy.config("maml-oracle", None, birds, "learner.way=2")).notes
    assert (
        "maml-oracle: 1 of 4 training classes have fewer than the 4 images of a task and are left out: "
        "folder-0/rare has 1"
    ) in notes


def test_a_teacher_is_not_given_a_class_of_one_image(birds: str) -> None:
    lines: list[str] = []
    planned = build_pool.plan(birds, models=6, archs=["conv4"], way=3, seed=0, note=lines.append)[1]
    assert {name for _, _, names, _ in planned for name in names} == {"folder/owl", "folder/jay", "folder/tit"}
    said = "1 of 4 training classes have one image, too few to train and to hold out, and are left out: rare"
    assert lines == [f"--data {birds}: {said}"]
    for _, _, _, job in planned:
        values = job.values
        for local in range(3):
            own = values["held_out"][values["labels"] == local]
            assert 0 < own.sum() < len(own)
    with pytest.raises(UsageError, match=r"--way 4: .* has 3 classes of 2 images or more; 1 of 4 .* left out: rare$"):
        build_pool.plan(birds, models=1, archs=["conv4"], way=4, seed=0)


def test_a_set_without_small_classes_gives_the_teachers_it_gave(toy_data: str) -> None:
    """The draw of classes is over all classes, as it was."""
    lines: list[str] = []
    planned = build_pool.plan(toy_data, models=2, archs=["conv4"], way=2, seed=0, note=lines.append)[1]
    assert lines == []
    from ray_dfml.core import seeds

    for i, (_, _, names, _) in enumerate(planned):
        order = torch.randperm(toy.CLASSES["train"], generator=seeds.rng(0, "classes", i))[:2].tolist()
        assert names == tuple(f"folder/train{n:02d}" for n in order)


def test_evaluate_says_what_it_leaves_out(free_run: Path, birds: str, command: Command) -> None:
    done = command("evaluate", free_run, "--data", birds, "--shot", 1, "--episodes", 2)
    assert done.code == 2, "15 queries are more than any class has"
    assert "finch has 5, rare_bird has 3, wren has 4" in done.err


def test_a_name_that_a_pool_could_not_hold_stops_before_training(tmp_path: Path, command: Command) -> None:
    spec = write(tmp_path / "set", {"train": {"a": 3, "b\u2028c": 3}, "val": {"d": 1}, "test": {"e": 1}})
    done = command(
        "pool", "build", "--data", spec, "--models", 1, "--way", 2, "--workers", 1, "--out", tmp_path / "pool"
    )
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert "the class name 'b\\u2028c' is not one line of readable UTF-8 text; rename the class" in done.err
    assert not (tmp_path / "pool").exists()


def test_spaces_of_any_kind_are_kept_in_names(tmp_path: Path) -> None:
    spec = write(tmp_path / "set", {"train": {"red\u00a0fox": 5, "日本\u3000語": 5}, "val": {"d": 1}, "test": {"e": 1}})
    toy.build_pool(tmp_path / "pool", spec, models=1, way=2)
    assert set(Pool.open(tmp_path / "pool").cards[0].classes) == {"folder/red\u00a0fox", "folder/日本\u3000語"}


def test_a_bad_teacher_is_named_at_the_start_and_at_the_end(tmp_path: Path, toy_pool: Path, command: Command) -> None:
    id = toy.damage(toy_pool, tmp_path / "pool", 1, float("nan"))
    words = ("train", "average", "--pool", tmp_path / "pool", "--backend", "local")
    done = command(*words, "--run-dir", tmp_path / "run")
    assert done.code == 0
    lines = done.err.splitlines()
    assert lines[0].startswith(f"1 of 4 teachers left out: {id}: ")
    assert "NaN" in lines[0]
    assert lines[-1] == lines[0]
    done = command(*words, "--run-dir", tmp_path / "other", "--dry-run")
    assert done.err.splitlines()[0] == lines[0]


def test_many_bad_teachers_are_one_line() -> None:
    assert left_out({}, 4) == []
    found = left_out({f"t{n}": f"t{n}: why" for n in range(5)}, 1)
    assert found == ["5 of 6 teachers left out: t0: why, t1: why, t2: why and 2 more"]


def test_an_architecture_that_cannot_take_the_images_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    small = write(tmp_path / "small", {split: dict.fromkeys("abc", 2) for split in ("train", "val", "test")}, 6)
    build_pool.plan(small, models=2, archs=["lenet", "vgg16"], way=3, seed=0)
    with pytest.raises(RejectedError, match=r"^alexnet cannot take 1x6x6 images: they are too small$"):
        build_pool.plan(small, models=2, archs=["lenet", "alexnet"], way=3, seed=0)
