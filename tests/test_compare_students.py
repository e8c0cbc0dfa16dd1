"""Students beside each other: which of them are of the same images and of the same teacher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_dfml.compare import compare
from tests.run_folders import AVERAGE, FREE, RANDOM, make, row_of


def distilled(path: Path, teacher: str, classes: Sequence[str], accuracies: Sequence[float], **more: Any) -> Path:
    """A run of IDEAL with the student of one teacher, on the same images as any other."""
    run = make(path, {"ideal/last": accuracies, "random/last": RANDOM}, name="ideal", way=None, shot=None, **more)
    card = {"kind": "student", "teacher": teacher, "classes": list(classes)}
    (run / "learner.json").write_text(json.dumps(card))
    return run


def test_students_are_compared_if_they_have_one_teacher(tmp_path):
    """Students of other teachers, or of a teacher of that name with other classes, are in sets of their own."""
    first = distilled(tmp_path / "a", "t", ["d/0", "d/1"], FREE)
    same = distilled(tmp_path / "b", "t", ["d/1", "d/0"], AVERAGE, seed=1)
    other = distilled(tmp_path / "c", "u", ["d/0", "d/1"], AVERAGE)
    fewer = distilled(tmp_path / "d", "t", ["d/0", "d/2"], AVERAGE)
    unknown = distilled(tmp_path / "e", "t", ["d/0", "d/1"], AVERAGE)
    (unknown / "learner.json").unlink()
    rows = compare([first, same, other, fewer, unknown]).rows
    sets: dict[int, set[str]] = {}
    for row in rows:
        sets.setdefault(row["set"], set()).update(Path(run).name for run in row["runs"])
        if row["method"] == "ideal" and row["kind"] == "run":
            assert "random/last of" in row["against"]
    assert sorted(map(sorted, sets.values())) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_students_of_several_teachers_are_known_by_their_cards(tmp_path):
    scores = {"ideal:t/last": FREE, "random:t/last": RANDOM, "ideal:u/last": AVERAGE, "random:u/last": RANDOM}
    run = make(tmp_path / "a", scores, name="ideal", way=None, shot=None)
    (run / "students").mkdir()
    for teacher in ("t", "u"):
        card = {"kind": "student", "teacher": teacher, "classes": ["d/0", "d/1"]}
        (run / "students" / f"{teacher}.json").write_text(json.dumps(card))
    one = distilled(tmp_path / "b", "u", ["d/0", "d/1"], FREE)
    rows = compare([run, one]).rows
    assert row_of(rows, "ideal:u")["set"] == row_of(rows, "ideal")["set"] != row_of(rows, "ideal:t")["set"]
