"""What a run reads: the learner's shape from mixed teachers and data, images brought to it, teachers read on demand."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.core.net import net
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.runtime import driver, inputs
from ray_dfml.runtime.driver import read_inputs
from ray_dfml.runtime.inputs import fitted, learner_input
from ray_dfml.types import ImageSpec
from tests.runtime import toy


def spec(channels: int, height: int, width: int, mean: Sequence[float], std: Sequence[float] = (1.0,)) -> ImageSpec:
    """Normalised by `mean`, and by `std` in every channel."""
    std = tuple(std) * (channels // len(std))
    return ImageSpec(channels=channels, height=height, width=width, mean=tuple(mean), std=std)


def untrained(path: Path, image: ImageSpec, *classes: Sequence[str], arch: str = "conv4") -> Path:
    """A pool of fresh networks, one per tuple of class names."""
    pool = Pool.create(path)
    for i, names in enumerate(classes):
        network = net(arch, image.shape, len(names))
        tensors = network.layout.unflatten(network.init(torch.Generator().manual_seed(i)))
        tensors |= network.stats_layout.unflatten(network.initial_stats())
        pool.add(f"{path.name}-{i}", tensors, arch=arch, image=image, classes=names, accuracy=None, source="a test")
    return path


def mixed(method: str, pools: Sequence[Path], data: Sequence[str], *more: str) -> driver.RunConfig:
    """The small configuration of a method on several pools and data sets."""
    config = toy.config(method, None, None, *more)
    return config.model_copy(update={"pool": tuple(str(path) for path in pools), "data": tuple(data)})


COLOUR = spec(3, 20, 12, (0.1, 0.2, 0.6), (0.5,))


@pytest.mark.parametrize("turned", [False, True])
def test_the_input_of_the_learner_is_the_largest_of_each_size(turned: bool) -> None:
    found = {"grey": spec(1, 16, 24, (0.3,), (0.25,)), "colour": COLOUR}
    image = learner_input(dict(reversed(found.items())) if turned else found)
    assert image.shape == (3, 20, 24)
    assert image.mean == pytest.approx((0.2, 0.25, 0.45))
    assert image.std == pytest.approx((0.375,) * 3)


def test_the_average_is_over_teachers_not_over_kinds() -> None:
    three = {"a": spec(1, 16, 16, (0.0,)), "b": spec(1, 16, 16, (0.0,)), "c": spec(1, 16, 16, (0.9,))}
    assert learner_input(three).mean == pytest.approx((0.3,))


def test_a_normalisation_that_all_share_keeps_its_bits() -> None:
    """0.1 + 0.1 + 0.1 is not 3 times 0.1."""
    one = spec(3, 16, 16, (0.1, 0.2, 0.7), (0.3,))
    assert learner_input({str(i): one for i in range(3)}) == one
    grey = spec(1, 28, 28, (0.1,), (0.3,))
    found = learner_input({"a": grey, "b": spec(3, 16, 16, (0.1,) * 3, (0.3,)), "c": grey})
    assert found == spec(3, 28, 28, (0.1,) * 3, (0.3,))


def test_channels_that_cannot_be_turned_into_each_other_are_refused() -> None:
    two = {"pair": spec(2, 16, 16, (0.0, 0.0)), "colour": COLOUR}
    message = r"^pair takes 2x16x16 images and colour 3x20x12: channels .* split the pool or the data$"
    with pytest.raises(UsageError, match=message):
        learner_input(two)
    assert learner_input({"pair": two["pair"], "grey": spec(1, 28, 16, (0.0,))}).shape == (2, 28, 16)


def test_a_learner_that_cannot_take_the_images_is_refused(tmp_path: Path) -> None:
    pool = untrained(tmp_path / "p", spec(1, 16, 7, (0.0,)), "abc", arch="mlp")
    with pytest.raises(UsageError, match=r"^learner\.arch: alexnet cannot take 1x16x7 images: they are too small$"):
        read_inputs(mixed("random", [pool], (), "learner.arch=alexnet"))


def test_the_way_is_that_of_the_teacher_with_the_fewest_classes(tmp_path: Path) -> None:
    """Class names are united: five of two pools, of which one is in both."""
    grey, colour = spec(1, 16, 16, (0.0,)), spec(3, 20, 20, (0.5,) * 3, (0.25,))
    pools = [untrained(tmp_path / "g", grey, "abc"), untrained(tmp_path / "c", colour, "cd", "ed")]
    assert read_inputs(mixed("random", pools, ())).world.way == 2
    for way in (3, 5):
        assert read_inputs(mixed("random", pools, (), f"learner.way={way}")).world.way == way
    with pytest.raises(UsageError, match=r"^learner\.way=6: the teachers know 5 classes together; lower it"):
        read_inputs(mixed("random", pools, (), "learner.way=6"))


def test_the_learner_has_the_head_that_is_asked_for(toy_pool: Path, toy_data: str) -> None:
    assert read_inputs(toy.config("free", toy_pool, toy_data)).world.head == "maml"
    assert read_inputs(toy.config("free", toy_pool, toy_data, "learner.head=anil")).world.head == "anil"


def test_one_domain_keeps_its_bits(toy_pool: Path, toy_data: str) -> None:
    found, cards = read_inputs(toy.config("free", toy_pool, toy_data)), Pool.open(toy_pool).cards
    assert (found.world.image, found.world.cards, found.world.way) == (cards[0].image, cards, 2)
    for one in found.sets:
        part = datasets.load(toy_data).subset(one.split)
        assert (one.images.tobytes(), one.labels.tobytes()) == (part.images.tobytes(), part.labels.tobytes())
    assert found.notes == []


def test_images_are_brought_to_the_input_of_the_learner(
    tmp_path: Path, toy_pool: Path, toy_data: str, colour_data: str
) -> None:
    """A grey set of 16 pixels for a learner of 3x20x20, which a pool of colour teachers makes it; a set of that size
    stays as it is."""
    colour = untrained(tmp_path / "c", spec(3, 20, 20, (0.5,) * 3, (0.25,)), "ab", "bc")
    found = read_inputs(mixed("free", [toy_pool, colour], [toy_data, colour_data]))
    assert found.world.image.shape == (3, 20, 20)
    assert found.world.image.mean == pytest.approx((1 / 6,) * 3), "four teachers of mean 0, two of mean 0.5"
    assert [(one.data, one.split) for one in found.sets] == [
        (datasets.load(spec).identity, split) for spec in (toy_data, colour_data) for split in ("val", "test")
    ]
    for one in found.sets[2:]:
        assert one.images.tobytes() == datasets.load(colour_data).subset(one.split).images.tobytes()
    for one in found.sets[:2]:
        part = datasets.load(toy_data).subset(one.split)
        assert one.images.shape == (len(part.images), 3, 20, 20)
        assert (one.images == one.images[:, :1]).all(), "grey has three equal channels"
        mean = part.images.mean((1, 2, 3))
        assert np.abs(one.images.mean((1, 2, 3)) - mean).max() < 8, "an image stays as bright as it was"
        assert np.corrcoef(one.images.mean((1, 2, 3)), mean)[0, 1] > 0.99, "and stays in its place"
    assert found.notes == [f"--data {toy_data}: images of 1x16x16 are brought to the learner's 3x20x20"]


def test_without_a_pool_the_data_sets_decide(toy_data: str, colour_data: str) -> None:
    found = read_inputs(mixed("maml-oracle", [], [toy_data, colour_data], "learner.way=4"))
    assert (found.world.image.shape, found.world.way) == ((3, 20, 20), 4)
    assert {images.shape[1:] for images in found.world.real.values()} == {(3, 20, 20)}
    train = datasets.load(toy_data).subset("train")
    wanted = to_bytes(fit(to_pixels(train.images[train.labels == 3]), (3, 20, 20)))
    assert np.array_equal(found.world.real[f"{train.name}-0/{train.class_names[3]}"], wanted)
    assert read_inputs(mixed("random", [], [toy_data])).world.way == 5


def test_a_run_needs_a_pool_or_data() -> None:
    with pytest.raises(UsageError, match="random: name a pool with --pool, or data with --data"):
        read_inputs(toy.config("random", None, None))


def test_fitted_images_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)
    whole = fitted(images, (1, 20, 12), "it")
    assert (whole.dtype, whole.shape) == (np.uint8, (7, 1, 20, 12))
    monkeypatch.setattr(inputs, "FIT_IMAGES", 3)
    assert np.array_equal(fitted(images, (1, 20, 12), "it"), whole)


def test_fitted_images_are_those_of_pixel_space() -> None:
    """Halving a size with a constant half keeps the constants; three channels become their mean, rounded."""
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[:, :, 4:] = np.array([10, 20, 31])[:, None, None]
    small = fitted(image, (1, 4, 4), "it")
    assert small[0, 0, 0].tolist() == [0] * 4
    assert small[0, 0, 3].tolist() == [20] * 4


def test_images_that_fit_are_not_copied() -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    assert np.shares_memory(fitted(images, (3, 8, 8), "it"), images)
    assert fitted(images[::2], (3, 8, 8), "it").flags.c_contiguous


def test_data_of_other_channels_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^--data x: cannot turn images of 3 channels into 2"):
        fitted(np.zeros((1, 3, 8, 8), np.uint8), (2, 8, 8), "--data x")


def test_teachers_are_read_when_they_are_asked_for(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is read once to check it, and then once whenever it is asked for; nothing else reads one."""
    reads: list[str] = []
    load = Pool.load

    def note(pool: Pool, id: str) -> tuple[np.ndarray, np.ndarray]:
        reads.append(id)
        return load(pool, id)

    monkeypatch.setattr(Pool, "load", note)
    inputs = read_inputs(mixed("free", [toy_pool, toy_pool], [toy_data]))
    found = inputs.teachers
    ids = [card.id for card in Pool.open(toy_pool).cards]
    assert reads == ids * 2
    assert list(found) == [card.id for card in inputs.world.cards] == [f"{i}:{id}" for i in (0, 1) for id in ids]
    assert (len(found), f"1:{ids[0]}" in found, ids[0] in found) == (8, True, False)
    assert reads == ids * 2
    card, theta, stats = found[f"1:{ids[2]}"]
    assert reads == [*ids * 2, ids[2]]
    assert card.id == f"1:{ids[2]}"
    assert [x.tobytes() for x in (theta, stats)] == [x.tobytes() for x in load(Pool.open(toy_pool), ids[2])]
    with pytest.raises(KeyError):
        found[ids[0]]


def test_the_teachers_of_a_large_pool_are_checked_by_who_needs_them(
    tmp_path: Path, toy_pool: Path, toy_data: str, free_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those in an object store; the bits are the same, and a bad one is rejected with its reason."""
    config, note = toy.config("free", toy_pool, toy_data), "the weights of each teacher are checked when they are"
    size = inputs._weights_bytes(Pool.open(toy_pool))
    assert size == sum(theta.nbytes + stats.nbytes for _, theta, stats in read_inputs(config).teachers.values())
    monkeypatch.setattr(inputs, "CHECKED_BYTES", size)
    assert not [line for line in read_inputs(config).notes if note in line]
    monkeypatch.setattr(inputs, "CHECKED_BYTES", size - 1)
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "load", None)
        assert [line for line in read_inputs(config).notes if line.startswith(f"{toy_pool}: {note}")]
    toy.train(config, tmp_path / "run")
    toy.assert_same_run(tmp_path / "run", free_run)
    copy = Path(shutil.copytree(toy_pool, tmp_path / "pool"))
    first, *others = (card.id for card in Pool.open(copy).cards)
    (copy / "weights" / f"{first}.safetensors").write_bytes(b"other")
    config = toy.config("average", copy, toy_data)
    assert read_inputs(config).rejected == {}
    toy.train(config, tmp_path / "bad")
    assert list(toy.status(tmp_path / "bad")["rejected"]) == [first]
    assert len(others) == 3


def test_a_teacher_that_changes_after_it_was_checked_is_refused(tmp_path: Path, toy_data: str) -> None:
    pool = toy.build_pool(tmp_path / "pool", toy_data, models=3, way=2)
    config = toy.config("average", pool, toy_data)
    found = read_inputs(config)
    first, second, third = found.teachers
    (pool / "weights" / f"{second}.safetensors").write_bytes(b"other")
    (pool / "weights" / f"{third}.safetensors").unlink()
    with pytest.raises(RejectedError, match=f"^{re.escape(second)}: .* has sha256 .* pool.yaml says"):
        found.teachers[second]
    folder = driver.RunFolder.create(tmp_path / "run", config, {})
    driver.run(config, found, folder, toy.LOCAL, driver.Progress(quiet=True))
    state, left = toy.last_state(tmp_path / "run"), found.teachers[first][1]
    assert list(state["rejected"]) == list(toy.status(tmp_path / "run")["rejected"]) == [second, third]
    assert "cannot be read" in state["rejected"][third]
    assert state["theta"].numpy().tobytes() == left.tobytes(), "the average is over the one that is left"


def test_what_scores_do_not_measure_is_noted(tmp_path: Path, toy_data: str) -> None:
    """Episodes of classes that a teacher knows, and a calibration that other commands leave out."""
    image = spec(1, 16, 16, (0.5,))
    tested = datasets.load(toy_data).subset("test")
    known = [f"folder/{name}" for name in tested.class_names[:2]]
    pool = untrained(tmp_path / "pool", image, known, ("folder/other", "folder/another"))
    found = read_inputs(toy.config("free", pool, toy_data)).notes
    assert found == [
        f"--data {toy_data}, split test: teachers know 2 of its {len(tested.class_names)} classes, which are not new"
    ]
    calibrated = read_inputs(toy.config("free", pool, toy_data, "eval.icfil.steps=1")).notes
    assert calibrated[1:] == ["scores are with our ICFIL, a reconstruction; `adapt` and `evaluate` leave it out"]


def test_the_same_images_twice_are_refused(tmp_path: Path, toy_pool: Path, toy_data: str, other_data: str) -> None:
    """The same images are refused in any place, since scores would be mixed up. Others of one name are accepted."""
    copy = f"folder:{shutil.copytree(toy_data.partition(':')[2], tmp_path / 'copy')}"
    with pytest.raises(UsageError, match=f"--data {toy_data} and --data {copy} are the same images; name one of them"):
        read_inputs(mixed("free", [toy_pool], [toy_data, copy]))
    found = read_inputs(mixed("free", [toy_pool], [toy_data, other_data]))
    assert len({one.data for one in found.sets}) == 2
    assert [one["data"] for one in found.data] == list(dict.fromkeys(one.data for one in found.sets))


def test_one_data_set_twice_is_refused(toy_pool: Path, toy_data: str) -> None:
    with pytest.raises(UsageError, match=f"^--data {toy_data} is given twice; name it once$"):
        read_inputs(mixed("free", [toy_pool], [toy_data, toy_data]))


def test_what_a_run_holds_counts_real_images_and_the_state(toy_pool: Path, toy_data: str) -> None:
    """PURER's state has the images and moments of all teachers, which go to the shards and come back."""
    free, purer = (driver.read_inputs(toy.config(name, toy_pool, toy_data)) for name in ("free", "purer"))
    real = sum(one.images.nbytes for one in free.sets)
    assert real == (120 + 160) * 16 * 16
    images = 4 * 2 * 5 * 16 * 16 * 4 * 3
    for one in (free, purer):
        assert one.held_bytes() == real + 2 * one.state_bytes
    assert purer.state_bytes > images
