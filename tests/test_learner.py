"""The exported learner: what is written is read, adapting is the evaluated mathematics, errors are one line."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.net import net
from ray_dfml.data import weights_file
from ray_dfml.data.folders import read_folder
from ray_dfml.errors import DfmlError, RejectedError, UsageError
from ray_dfml.learner import CHUNK, Learner, export
from ray_dfml.types import ImageSpec, LearnerWeights
from tests.support import finetune

IMAGE = ImageSpec(channels=3, height=16, width=20, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
WAY = 4
HEADS = pytest.mark.parametrize("head", ["maml", "anil", "protonet"])
COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 30]], np.uint8)


def flat(seed: int = 0, image: ImageSpec = IMAGE) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh weights, and the statistics that they give to noise."""
    generator = torch.Generator().manual_seed(seed)
    network = net("conv4", image.shape, WAY)
    theta = network.init(generator)
    return theta, network.with_stats(theta, torch.randn(16, *image.shape, generator=generator))[1]


def exported(folder: Path, *, image: ImageSpec = IMAGE, **changes: Any) -> Learner:
    """A learner that went through its files."""
    theta, stats = flat(image=image)
    weights = LearnerWeights(
        arch="conv4", image=image, outputs=WAY, theta=theta, stats=stats, head="maml", steps=10, lr=0.01
    )
    about: dict[str, Any] = {
        "method": "free", "bn": "transductive", "selection": "val", "profile": "fixed", "seed": 3,
    }  # fmt: skip
    of_weights = {name: value for name, value in changes.items() if name not in about}
    export(folder, replace(weights, **of_weights), **(about | {k: v for k, v in changes.items() if k in about}))
    return Learner.load(folder)


def blobs(per_class: int, classes: int = WAY, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of one colour per class, class after class within each shot: uint8 [n 3 h w], class numbers [n]."""
    rng = np.random.default_rng(seed)
    y = np.tile(np.arange(classes), per_class)
    noise = rng.integers(-30, 31, (len(y), *IMAGE.shape))
    return np.clip(COLOURS[y][:, :, None, None] + noise, 0, 255).astype(np.uint8), y


def one_line(error: type[DfmlError], call: Any, *needles: str) -> None:
    """The call fails with this error, in one line that holds every needle."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for needle in needles:
        assert needle in message


# --------------------------------------------------------------------------------------------------------------- files


def test_round_trip_keeps_every_bit_and_names_tensors(tmp_path):
    theta, stats = flat()
    learner = exported(tmp_path)
    weights = learner.weights
    assert torch.equal(weights.theta, theta)
    assert torch.equal(weights.stats, stats)
    assert (learner.image, learner.way, weights.arch) == (IMAGE, WAY, "conv4")
    assert (learner.bn, weights.steps, weights.lr, learner.selection) == ("transductive", 10, 0.01, "val")
    assert (learner.method, learner.profile, learner.seed, weights.head) == ("free", "fixed", 3, "maml")
    assert json.loads((tmp_path / "learner.json").read_text()) == {
        "format": 1, "method": "free", "arch": "conv4", "way": 4, "head": "maml",
        "input": {"channels": 3, "height": 16, "width": 20}, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3],
        "bn": "transductive", "steps": 10, "lr": 0.01, "selection": "val", "profile": "fixed", "seed": 3,
    }  # fmt: skip
    names = weights_file.read(tmp_path / "learner.safetensors").keys()
    assert {"head.weight", "blocks.0.norm.running_var"} <= names
    assert {p.name for p in tmp_path.iterdir()} == {"learner.json", "learner.safetensors"}
    again = Learner.load(tmp_path / "learner.safetensors")
    assert torch.equal(again.weights.theta, theta)


def test_export_refuses_values_that_load_would_refuse(tmp_path):
    theta, stats = flat()
    exported(tmp_path, theta=theta, stats=stats)
    before = (tmp_path / "learner.safetensors").read_bytes()
    broken = theta.clone()
    broken[7] = float("nan")
    one_line(RejectedError, lambda: exported(tmp_path, theta=broken), "NaN")
    assert (tmp_path / "learner.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        ({"format": 2}, ["learner.json", "format"]),
        ({"arch": "conv9"}, ["arch", "conv9", "conv4"]),
        ({"way": 3}, ["learner.safetensors", "head.weight", "[3, 32]", "[4, 32]"]),
        ({"mean": [0.5]}, ["mean", "3 values"]),
        ({"std": [0.2, 0.0, 0.2]}, ["std"]),
        ({"bn": "batch"}, ["bn", "transductive"]),
        ({"head": "linear"}, ["head", "protonet"]),
        ({"input": {"channels": 3, "height": 16}}, ["input.width"]),
        ({"extra": 1}, ["extra"]),
        ({"lr": "0.01"}, ["lr"]),
    ],
)
def test_a_card_that_was_changed_is_refused_with_the_place(tmp_path, change, needles):
    exported(tmp_path)
    file = tmp_path / "learner.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    one_line(RejectedError, lambda: Learner.load(tmp_path), *needles)


def test_damaged_and_missing_files(tmp_path):
    exported(tmp_path)
    weights, card = tmp_path / "learner.safetensors", tmp_path / "learner.json"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4])
    one_line(RejectedError, lambda: Learner.load(tmp_path), "learner.safetensors")
    tensors = weights_file.from_safetensors(good)
    tensors["head.bias"][0] = float("inf")
    weights_file.write(weights, tensors)
    one_line(RejectedError, lambda: Learner.load(tmp_path), "head.bias", "infinite")
    weights.write_bytes(good)
    text = card.read_text()
    card.write_text(text[: len(text) // 2])
    one_line(RejectedError, lambda: Learner.load(tmp_path), "learner.json")
    card.unlink()
    one_line(UsageError, lambda: Learner.load(tmp_path), "learner.json", "copy both")
    weights.unlink()
    one_line(UsageError, lambda: Learner.load(tmp_path), "learner.safetensors", "no such file")
    (tmp_path / "w.pt").write_bytes(b"")
    one_line(UsageError, lambda: Learner.load(tmp_path / "w.pt"), ".safetensors")


# ------------------------------------------------------------------------------------------------------------ adapting


def test_a_card_of_before_there_were_heads_is_of_a_maml_learner(tmp_path):
    exported(tmp_path, head="anil")
    file = tmp_path / "learner.json"
    card = json.loads(file.read_text())
    assert card.pop("head") == "anil"
    assert Learner.load(tmp_path).weights.head == "anil"
    file.write_text(json.dumps(card))
    assert Learner.load(tmp_path).weights.head == "maml"


@HEADS
@pytest.mark.parametrize("classes", [3, WAY])
@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_predictions_are_those_of_the_evaluation_bit_for_bit(tmp_path, bn, head, classes):
    learner = exported(tmp_path, bn=bn, head=head)
    (x, y), (q, _) = blobs(2, classes), blobs(3, classes, seed=1)
    theta, stats = flat()
    mean, std = torch.tensor(IMAGE.mean), torch.tensor(IMAGE.std)
    expected = finetune(
        net("conv4", IMAGE.shape, WAY), theta, stats, normalise(to_pixels(x), mean, std), torch.tensor(y),
        normalise(to_pixels(q), mean, std), steps=10, lr=0.01, bn=bn, head=head,
    )  # fmt: skip
    adapted = learner.adapt(x, y)
    assert torch.equal(adapted._logits(q), expected)
    np.testing.assert_allclose(adapted.predict_proba(q), expected.double().softmax(-1).numpy(), atol=1e-12)


@HEADS
@pytest.mark.parametrize("bn", ["transductive", "support"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_separable_images_are_learnt_with_masked_outputs(tmp_path, bn, classes, head):
    learner = exported(tmp_path, bn=bn, steps=20, lr=0.05, head=head)
    (x, y), (q, wanted) = blobs(5, classes), blobs(15, classes, seed=1)
    names = ["red", "green", "blue", "yellow"]
    adapted = learner.adapt(x, [names[i] for i in y])
    assert adapted.classes == tuple(names[:classes])
    found = adapted.predict(q)
    assert np.mean([a == names[b] for a, b in zip(found, wanted, strict=True)]) > 0.95
    probabilities = adapted.predict_proba(q)
    assert probabilities.shape == (len(q), classes)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    assert found == [adapted.classes[i] for i in probabilities.argmax(axis=1)]


@HEADS
def test_masked_outputs_have_no_influence(tmp_path, head):
    theta, stats = flat()
    shifted = theta.clone()
    shifted[-1] += 100.0  # the bias of the last head output
    (x, y), (q, _) = blobs(3, 2), blobs(4, 2, seed=1)
    plain = exported(tmp_path, theta=theta, stats=stats, head=head).adapt(x, y).predict_proba(q)
    moved = exported(tmp_path, theta=shifted, stats=stats, head=head).adapt(x, y).predict_proba(q)
    np.testing.assert_array_equal(plain, moved)


def test_renaming_classes_only_renames_predictions_and_bits_repeat(tmp_path):
    learner = exported(tmp_path)
    (x, y), (q, _) = blobs(2), blobs(5, seed=2)
    first, second = ["a", "b", "c", "d"], ["c", "a", "d", "b"]
    rename = dict(zip(first, second, strict=True))
    one, two = (learner.adapt(x, [names[i] for i in y]) for names in (first, second))
    assert two.classes == tuple(rename[name] for name in one.classes)
    assert two.predict(q) == [rename[name] for name in one.predict(q)]
    np.testing.assert_array_equal(one.predict_proba(q), two.predict_proba(q))
    np.testing.assert_array_equal(one.predict_proba(q), one.predict_proba(q))
    assert torch.equal(learner.weights.theta, flat()[0])


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_answers_from_eight_threads_equal_those_from_one(tmp_path, bn):
    """Two learners of one architecture, many requests at once, each adapted to a support of its own."""
    learners = [exported(tmp_path, bn=bn) for _ in range(2)]
    learners[1].weights.theta.mul_(1.1)
    (query, _), supports = blobs(3, seed=99), [blobs(2, seed=i) for i in range(8)]

    def ask(i: int) -> tuple[list[Any], np.ndarray]:
        adapted = learners[i % 2].adapt(*supports[i % 8])
        return adapted.predict(query), adapted.predict_proba(query)

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for i, (labels, rows) in enumerate(pool.map(ask, range(64))):
            assert labels == alone[i % 8][0]
            assert np.array_equal(rows, alone[i % 8][1])
    assert not np.array_equal(alone[0][1], alone[1][1])


@pytest.mark.parametrize("labels", [np.array([7, 3]), torch.tensor([7, 3]), [("a", 1), ("b", 2)], [True, None]])
def test_labels_of_any_hashable_kind(tmp_path, labels):
    x, y = blobs(2, 2)
    kinds = labels if isinstance(labels, list) else labels.tolist()
    given = [labels[i] for i in y] if isinstance(labels, list) else labels[y]
    adapted = exported(tmp_path, steps=20, lr=0.05).adapt(x, given)
    assert adapted.classes == tuple(kinds)
    assert adapted.predict(x) == [kinds[i] for i in y]


def test_every_form_of_images_gives_the_same_bits(tmp_path):
    learner = exported(tmp_path)
    x, y = blobs(2)
    wanted = learner.adapt(x, y).predict_proba(x)
    last = x.transpose(0, 2, 3, 1)
    pixels = x.astype(np.float32) / 255
    for form in (last, torch.tensor(x), torch.tensor(last), pixels, torch.tensor(pixels), pixels.astype(np.float64)):
        np.testing.assert_array_equal(learner.adapt(form, y).predict_proba(form), wanted)


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_one_query_or_none(tmp_path, bn):
    learner = exported(tmp_path, bn=bn)
    x, y = blobs(3)
    adapted = learner.adapt(x, y)
    assert adapted.predict(x[:0]) == []
    assert adapted.predict_proba(x[:0]).shape == (0, WAY)
    if bn == "transductive":
        alone = exported(tmp_path, bn="support").adapt(x, y)
        np.testing.assert_array_equal(adapted.predict_proba(x[:1]), alone.predict_proba(x[:1]))
        assert not np.allclose(adapted.predict_proba(x[:2])[0], adapted.predict_proba(x[[0, 5]])[0], atol=1e-4)
    else:
        many = np.concatenate([x] * (CHUNK // len(x) + 2))
        alone = np.concatenate([adapted.predict_proba(x[i : i + 1]) for i in range(len(x))])
        np.testing.assert_allclose(adapted.predict_proba(many)[-len(x) :], alone, atol=1e-5)


def test_what_adapt_refuses(tmp_path):
    learner = exported(tmp_path)
    x, y = blobs(2)
    one_line(UsageError, lambda: learner.adapt(np.concatenate([x, x[:2]]), [*y, 8, 9]), "6 classes", "at most 4")
    one_line(UsageError, lambda: learner.adapt(x, ["a"] * 8), "1 distinct")
    one_line(UsageError, lambda: learner.adapt(x, y[:-1]), "8 images and 7 labels")
    one_line(UsageError, lambda: learner.adapt(x, [[i] for i in y]), "hashable")
    one_line(UsageError, lambda: learner.adapt(x[:, :, :8], y), "[8, 3, 8, 20]", "[n, 3, 16, 20]", "resize")
    one_line(UsageError, lambda: learner.adapt(x[0], y), "[3, 16, 20]")
    one_line(UsageError, lambda: learner.adapt(x.astype(np.float32), y), "divide by 255")
    one_line(UsageError, lambda: learner.adapt(np.full(x.shape, np.nan), y), "NaN")
    one_line(UsageError, lambda: learner.adapt(x.astype(np.int64), y), "int64")
    one_line(UsageError, lambda: learner.adapt(x, y).predict(x[:, :1]), "[8, 1, 16, 20]")


# ------------------------------------------------------------------------------------------------------------- folders


def save(path: Path, colour: Any, mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> None:
    """A file of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_class_folders_and_plain_folders(tmp_path):
    save(tmp_path / "s/dog/2.png", (10, 200, 30))
    save(tmp_path / "s/dog/1.jpg", (10, 200, 30), size=(7, 9))
    save(tmp_path / "s/cat/9.PNG", 77, "L")
    (tmp_path / "s/dog/notes.txt").write_text("not an image")
    (tmp_path / "s/.hidden").mkdir()
    images, labels, names, _ = read_folder(tmp_path / "s", IMAGE)
    assert images.shape == (3, 3, 16, 20)
    assert images.dtype == np.uint8
    assert labels == ["cat", "dog", "dog"]
    assert names == ["cat/9.PNG", "dog/1.jpg", "dog/2.png"]
    assert (images[0] == 77).all()
    assert (images[2] == np.array([10, 200, 30], np.uint8)[:, None, None]).all()
    grey = ImageSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
    assert read_folder(tmp_path / "s", grey)[0].shape == (3, 1, 8, 8)
    images, labels, names, _ = read_folder(tmp_path / "s/dog", IMAGE)
    assert labels == ["", ""]
    assert names == ["1.jpg", "2.png"]
    assert len(images) == 2


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    picture = Image.new("RGB", (20, 16), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 20, 8))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    image = read_folder(tmp_path, IMAGE)[0][0]
    assert image[:, :7].max() == 0
    assert image[:, -7:].min() == 255


def test_folders_that_cannot_be_read(tmp_path):
    one_line(UsageError, lambda: read_folder(tmp_path / "none", IMAGE), "no such folder")
    one_line(RejectedError, lambda: read_folder(tmp_path, IMAGE), "no images")
    (tmp_path / "s/empty").mkdir(parents=True)
    save(tmp_path / "s/full/1.png", (1, 2, 3))
    one_line(RejectedError, lambda: read_folder(tmp_path / "s", IMAGE), "empty", "without images")
    (tmp_path / "s/empty/bad.png").write_bytes((tmp_path / "s/full/1.png").read_bytes()[:40])
    one_line(RejectedError, lambda: read_folder(tmp_path / "s", IMAGE), "bad.png", "cannot be decoded")
    save(tmp_path / "s/3.png", (1, 2, 3))
    one_line(RejectedError, lambda: read_folder(tmp_path / "s", IMAGE), "3.png", "beside folders")
    odd = ImageSpec(channels=2, height=8, width=8, mean=(0.5, 0.5), std=(0.5, 0.5))
    one_line(UsageError, lambda: read_folder(tmp_path, odd), "2")


def test_files_to_predictions(tmp_path):
    for name, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
        for i in range(3):
            save(tmp_path / f"support/{name}/{i}.png", tuple(v + 5 * i for v in colour))
            save(tmp_path / f"query/{name}-{i}.png", tuple(v + 3 * i for v in colour))
    learner = exported(tmp_path, steps=20, lr=0.05)
    x, y, *_ = read_folder(tmp_path / "support", learner.image)
    q, _, names, _ = read_folder(tmp_path / "query", learner.image)
    assert learner.adapt(x, y).predict(q) == [name.split("-")[0] for name in names]
