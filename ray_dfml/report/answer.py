"""The answer of a run in one sentence: how good it is, against what, and whether that is more than noise."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_dfml.errors import first_of
from ray_dfml.report.record import Record
from ray_dfml.scorer import POOLED

Row = Mapping[str, Any]


class Answer(NamedTuple):
    """What the page of a run says first."""

    text: str
    kind: str
    """`good`, `noise` for a score that is not above that of an untrained network, `bad` for a failure, or `none`."""
    figures: list[Row]
    """The rows of the table that answer: the exported weights on each kind of task of each data set."""


def answer(record: Record, rows: Sequence[Row]) -> Answer:
    """The answer of a run from the rows of its table of scores (`scores.table`)."""
    found = sorted(_exported(record, rows), key=lambda row: row["data"] != POOLED)
    if not found:
        return _without_scores(record)
    students = [row for row in found if row["task"] == "top-1"]
    text = _of_students(record, students) if students else _of_learner(record, found)
    above = [row["above"] for row in found]
    kind = "noise" if False in above else "good" if all(above) else "none"
    return Answer(text, kind, found)


def _exported(record: Record, rows: Sequence[Row]) -> list[Row]:
    """The scores of the weights that the run exported, in the first reading that has any."""
    own = [row for row in rows if row["own"] and row["mean"] is not None]
    names = dict.fromkeys(str(row["method"]) for row in own)
    selection = record.learner.get("selection") or ("val" if any(r["selection"] == "val" for r in own) else "last")
    of_method = [name for name in names if name == record.name or ":" in name] or list(names)[:1]
    return [row for row in own if row["selection"] == selection and row["method"] in of_method]


def _without_scores(record: Record) -> Answer:
    state, done = record.status.get("state", "unknown"), record.rounds
    of = f"{done} of {record.status['rounds']}" if record.status.get("rounds") else str(done)
    if state in ("failed", "budget"):
        return Answer(f"No score: the run ended before its test, after {of} rounds.", "bad", [])
    if state == "done":
        said = "The run is done, but was given no data to test on, so nothing says how good what it learned is."
        return Answer(said, "none", [])
    return Answer(f"No score yet: {of} rounds are done, and the run is {state}.", "none", [])


def _of_learner(record: Record, found: Sequence[Row]) -> str:
    first = found[0]
    images = "1 labelled image" if first["shot"] == 1 else f"{first['shot']} labelled images"
    said = (
        f"After {images} of each of {first['way']} new classes of {_name(first)}, the learner of {record.name} is "
        f"right about {_percent(first)} of further images"
    )
    return f"{said}, {_against(first, 'an untrained network', f'the same {_count(first)} episodes')}"


def _of_students(record: Record, found: Sequence[Row]) -> str:
    first = found[0]
    if len(found) == 1:
        asked = record.learner.get("queries")
        after = f"after {asked:,} questions to its teacher, " if isinstance(asked, int) else ""
        subject = f"{after}the student of {record.name} is right about {_percent(first)} of the test images of "
        return _sentence(f"{subject}{_name(first)}, {_against(first, 'the untrained student', 'the same images')}")
    means = [row["mean"] for row in found]
    names = first_of(list(dict.fromkeys(map(_name, found))), 3)
    said = (
        f"{len(found)} scores of students of {record.name} on test images of {names} have a mean of "
        f"{sum(means) / len(means):.2f} %, from {min(means):.2f} to {max(means):.2f}"
    )
    below = sum(row["above"] is False for row in found)
    if any(row["above"] is None for row in found):
        return f"{said}; not all could be compared with an untrained student."
    if below:
        return f"{said}; {below} of them are not above an untrained student by more than both intervals together."
    return f"{said}; each is above an untrained student by more than both intervals together, so by more than noise."


def _against(row: Row, whom: str, same: str) -> str:
    if row["above"] is None:
        return "but nothing else was scored on the same test, so this says little."
    if row["above"]:
        return (
            f"{row['gain']:.2f} points above {whom} on {same}: more than both intervals together, so more than noise."
        )
    where = f"{row['gain']:+.2f} points from" if row["gain"] else "as often as"
    return f"{where} {whom} on {same}: within both intervals together, so this run does not show that it learned."


def _percent(row: Row) -> str:
    return f"{row['mean']:.2f}" + (f" ± {row['ci95']:.2f}" if row["ci95"] is not None else "") + " %"


def _count(row: Row) -> str:
    episodes = row["episodes"]
    return f"{episodes:,}" if isinstance(episodes, int) else str(episodes)


def _name(row: Row) -> str:
    """The data set without its hash; a score of all data sets together says so."""
    name = str(row["data"]).partition("@")[0]
    return "all data sets" if name == POOLED else name


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
