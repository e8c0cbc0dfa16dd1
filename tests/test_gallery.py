"""The gallery of a run: bounded, the same for the same rounds, readable again, and never trusted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ray_dfml import gallery, report
from ray_dfml.errors import RejectedError
from ray_dfml.methods import pictures
from ray_dfml.methods.base import MethodConfig, Seen, World
from ray_dfml.types import ImageSpec, TeacherCard
from tests.test_report import Page, make

NAN = float("nan")


def seen(
    teacher: str,
    name: str,
    count: int = 4,
    *,
    kind: Any = "recovered",
    shape: tuple[int, ...] = (1, 8, 8),
    value: int = 0,
) -> Seen:
    """Images of one value, of all of which the teacher is half sure."""
    images = np.full((count, *shape), value, np.uint8)
    return Seen(kind=kind, teacher=teacher, name=name, images=images, said=(name,) * count, confidence=(50.0,) * count)


def written(found: gallery.Gallery, folder: Path) -> Path:
    """The gallery as a file."""
    path = folder / gallery.FILE
    path.write_bytes(gallery.to_file(found))
    return path


def test_the_classes_met_last_are_kept_and_a_few_are_followed(tmp_path):
    found: gallery.Gallery = {}
    for r in range(30):
        found = gallery.taken(found, [seen("t", f"c{(5 * r + i) % 40}", value=r) for i in range(5)], r)
    assert len(found["latest"]) == gallery.CLASSES
    assert {int(e["round"][0]) for e in found["latest"].values()} == {26, 27, 28, 29}
    assert len(found["course"]) == gallery.FOLLOWED
    again = gallery.read(written(found, tmp_path))
    assert [e["class"] for e in again["latest"]] == [e["class"] for e in found["latest"].values()]
    assert all((e["images"] == np.array(e["round"])[:, None, None, None]).all() for e in again["course"])


def test_teachers_are_followed_by_turns():
    both = [seen(t, c) for t in "ab" for c in "uvwxyz"]
    course = gallery.taken({}, both, 0)["course"].values()
    assert [(e["teacher"], e["class"]) for e in course] == [("a", "u"), ("b", "u"), ("a", "v"), ("b", "v"), ("a", "w"),
                                                            ("b", "w")]  # fmt: skip


@pytest.mark.parametrize("rounds", [1, 2, 10, 11, 12, 57, 1000])
def test_a_followed_class_is_spread_over_the_rounds_and_ends_with_the_last(rounds):
    found: gallery.Gallery = {}
    for r in range(rounds):
        found = gallery.taken(found, [seen("t", "c", value=r % 256)], r)
    (entry,) = found["course"].values()
    kept = entry["round"].tolist()
    assert kept[0] == 0
    assert kept[-1] == rounds - 1
    assert len(kept) <= gallery.MOMENTS
    assert len(kept) >= min(rounds, gallery.MOMENTS // 2)
    assert len(set(np.diff(kept[:-1]).tolist())) <= 1
    assert entry["images"][:, 0, 0, 0].tolist() == [r % 256 for r in kept]
    assert len(entry["said"]) == len(kept)


def test_a_gallery_of_a_round_is_a_function_of_it():
    """The gallery of before is as it was, so that a round that is done twice gives the same one."""
    first = gallery.taken({}, [seen("t", "c", value=1)], 0)
    kept = gallery.to_file(first)
    once, twice = (gallery.to_file(gallery.taken(first, [seen("t", "c", value=2)], 1)) for _ in range(2))
    assert once == twice
    assert gallery.to_file(first) == kept


def test_large_images_become_small_ones(tmp_path):
    found = gallery.taken({}, [seen("t", "c", shape=(3, 128, 96), value=7)], 0)
    (entry,) = gallery.read(written(found, tmp_path))["latest"]
    assert entry["images"].shape == (4, 3, 64, 48)
    assert (entry["images"] == 7).all()


def test_the_largest_page_is_below_its_limit(tmp_path):
    rng, found = np.random.default_rng(0), {}
    for r in range(20):
        both = [seen(f"t{i}", f"c{r % 2}", kind=kind, shape=(3, 64, 64)) for kind in ("recovered", "asked")
                for i in range(20)]  # fmt: skip
        noise = [one._replace(images=rng.integers(0, 256, one.images.shape, np.uint8)) for one in both]
        found = gallery.taken(found, noise, r)
    run = make(tmp_path / "run", rounds=500)
    assert written(found, run).stat().st_size < gallery.FILE_BYTES
    report.write(run)
    text = (run / "report.html").read_text()
    assert len(text) < 4_200_000  # of 5 MB; the rest is for what the test shows
    shown = text.count("<img ")
    assert shown == text.count('alt="')
    assert 200 < shown < 2 * 20 * 4 + 6 * 10
    assert f"{2 * 20 * 4 + 6 * 10 - shown} pictures are left out" in text


def test_the_page_shows_what_the_teacher_said_and_escapes_it(tmp_path):
    evil = "<b>x</b>"
    one = Seen(kind="recovered", teacher=evil, name="a/cat", images=np.zeros((2, 1, 4, 4), np.uint8),
               said=("a/cat", f"a/{evil}"), confidence=(97.4, NAN))  # fmt: skip
    run = make(tmp_path / "run")
    written(gallery.taken({}, [one], 3), run)
    report.write(run)
    text = (run / "report.html").read_text()
    Page(text)
    assert evil not in text
    assert "The teacher gives its class to 1 of 2" in text
    assert "a/cat, recovered from &lt;b&gt;x&lt;/b&gt; in round 3; the teacher says a/cat, 97 %" in text
    assert '<span class="below"> &lt;b&gt;x&lt;/b&gt;</span>' in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        safetensors.numpy.save({"latest-00": np.zeros((1, 1, 4, 4), np.uint8)}),
        safetensors.numpy.save({"x": np.zeros(1, np.uint8)}, {"gallery": "[]"}),
        safetensors.numpy.save({"x": np.zeros((1, 2, 4, 4), np.uint8)}, {"gallery": '{"latest": [{"tensor": "x"}]}'}),
        safetensors.numpy.save(
            {"x": np.zeros((2, 1, 4, 4), np.uint8)},
            {"gallery": '{"latest": [{"tensor": "x", "said": [], "confidence": [], "round": []}], "course": []}'},
        ),
        bytes(gallery.FILE_BYTES + 1),
    ],
    ids=["empty", "json", "no words", "a list", "two channels", "other lengths", "large"],
)
def test_another_file_is_named_in_one_line(tmp_path, content):
    run = make(tmp_path / "run")
    (run / gallery.FILE).write_bytes(content)
    with pytest.raises(RejectedError, match=r"recovered\.safetensors: not a gallery") as caught:
        report.write(run)
    assert len(str(caught.value).splitlines()) == 1


def world(access: Any) -> World:
    """A world of one teacher of three classes."""
    image = ImageSpec(channels=1, height=4, width=4, mean=(0.0,), std=(1.0,))
    card = TeacherCard(id="t", arch="conv4", image=image, classes=("a", "b", "c"), access=access)
    return World(cards=(card,), arch="conv4", image=image, way=2, seed=0)


def images(count: int) -> np.ndarray:
    """Images that bear their number."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)


TASK = {
    "teacher": "t", "classes": ["c", "a"], "images": images(12), "labels": np.arange(12) % 2,
    "logits": np.log(np.tile([[0.75, 0.25]], (12, 1))),
}  # fmt: skip


def test_a_recovered_task_shows_the_first_images_of_each_class():
    first, second = pictures.seen(MethodConfig(), world("weights"), [TASK])
    assert (first.name, first.said, second.name, second.said) == ("c", ("c",) * 4, "a", ("c",) * 4)
    assert first.images[:, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert second.images[:, 0, 0, 0].tolist() == [1, 3, 5, 7]
    assert first.confidence == pytest.approx((75.0,) * 4)


def test_labels_have_no_confidence_and_may_be_of_no_class_of_the_task():
    task = TASK | {"told": np.array([True, True, False, False] * 3)}
    first, _ = pictures.seen(MethodConfig(), world("label"), [{"support": task, "query": TASK}])
    assert first.said == ("c", pictures.OTHER, "c", pictures.OTHER)
    assert np.isnan(first.confidence).all()
    soft, _ = pictures.seen(MethodConfig(), world("probs"), [task])
    assert np.isnan(soft.confidence).tolist() == [False, True, False, True]


def test_what_was_asked_is_shown_by_its_answer():
    asked = {"teacher": "t", "images": images(3), "answers": np.array([9, 9, 2, 0, 2])}
    first, second = pictures.seen(MethodConfig(), world("label"), [asked])
    assert (first.kind, first.name, second.name) == ("asked", "a", "c")
    assert second.images[:, 0, 0, 0].tolist() == [0, 2]
    assert np.isnan(first.confidence).all()
    soft = asked | {"answers": np.array([[0.1, 0.9, 0.0]] * 3, np.float32)}
    (only,) = pictures.seen(MethodConfig(), world("probs"), [soft])
    assert (only.name, only.confidence) == ("b", pytest.approx((90.0,) * 3))
    assert pictures.seen(MethodConfig(), world("label"), [asked | {"images": images(0)}]) == []
