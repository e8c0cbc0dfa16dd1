"""Reads the scores of run folders, each with the episodes that it was taken on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_dfml import plots
from ray_dfml.errors import RejectedError
from ray_dfml.methods import METHODS, UNTRAINED
from ray_dfml.plots import number
from ray_dfml.report import Record, dicts
from ray_dfml.scorer import POOLED

BASELINES = tuple(name for name, method in METHODS.items() if method.baseline)
"""The methods that a difference may be taken to, in any reading."""

FIELDS = ("data", "split", "way", "shot", "query", "eval.seed", "episodes", "bn")
"""What two scores of the same episodes agree in. `data` is the name and content hash of the data set."""

_OF_TRAINING = ("preset", "profile", "rounds", "recover_seconds", "seconds")
"""Keys that describe the training of the run's own method. Scores of other methods in the run have none of them."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A score: its row, the FIELDS of its episodes, all settings but the seed, and the accuracies [episodes].

    `adaptation` holds the settings of the adaptation to an episode. `flaw` says why there are no accuracies.
    """

    row: dict[str, Any]
    where: tuple[str, ...]
    settings: str
    adaptation: dict[str, Any]
    accuracies: np.ndarray | None
    flaw: str | None

    @property
    def name(self) -> str:
        """Method, selection and run."""
        return f"{self.row['method']}/{self.row['selection']} of {self.row['runs'][0]}"

    @property
    def baseline(self) -> bool:
        """Whether the score may be a reference. Weights that were chosen on test may not."""
        method = self.row["method"]
        known = any(method == one or method.startswith((f"{one}-", f"{one}:")) for one in BASELINES)
        return known and self.row["selection"] != "test-best" and self.row["mean"] is not None


def text(value: object) -> str:
    """A value from a file in one line of printable characters, so that it cannot drive a terminal or break a table."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))


def _about(record: Record) -> dict[str, Any]:
    spent = plots.stages(record.metrics).get(f"{record.name}.recover")
    config, seed = record.config, _whole(record.config.get("seed"))
    return {
        "kind": "run",
        "method": text(record.name),
        "preset": _text(config.get("preset")),
        "profile": _text(config.get("profile")),
        "seeds": [] if seed is None else [seed],
        "rounds": record.rounds,
        "recover_seconds": None if spent is None else round(float(spent.sum()), 3),
        "seconds": None if record.seconds is None else round(record.seconds, 3),
        "state": text(record.status.get("state", "unknown")),
        "runs": [text(record.place)],
    }


def entries_of(record: Record) -> list[Entry]:
    """All scores of a run folder. Raises RejectedError for a table of episodes that cannot be read."""
    about, found = _about(record), _episodes(record.path / "episodes.parquet")
    evaluation = _part(record.config, "eval")
    query, eval_seed = (_whole(evaluation.get(key)) for key in ("query", "seed"))
    entries = []
    for score in record.scores:
        method, data, known = str(score.get("method")), str(score.get("data")), _identity(record, score.get("data"))
        pairs = found.get(tuple(repr(score.get(k)) for k in ("method", "data", "shot", "selection")), [])
        if score.get("shot") is None:
            entries.append(_of_student(record, about, score, known, pairs))
            continue
        row = about if _own(record, method) else about | dict.fromkeys(_OF_TRAINING)
        row = row | {key: _text(score.get(key)) for key in ("split", "selection", "bn")}
        row = row | {key: _whole(score.get(key)) for key in ("way", "shot", "episodes")}
        row |= {"method": text(method), "data": known or text(data), "query": query}
        row |= {"eval_seed": eval_seed, "mean": number(score.get("mean")), "ci95": number(score.get("ci95"))}
        row["steps"] = _steps(record, method, str(score.get("selection")), data)
        where = (known, row["split"], row["way"], row["shot"], query, eval_seed, row["episodes"], row["bn"])
        unknown = f"not recorded in {record.where}"
        must = {"data", "query", "eval.seed"}
        named = [unknown if v is None and f in must else json.dumps(v) for f, v in zip(FIELDS, where, strict=True)]
        accuracies, flaw = _checked(row, pairs)
        settings = _settings(record, method)
        entries.append(Entry(row, tuple(named), settings, _adaptation(record, method), accuracies, flaw))
    return entries


def _of_student(
    record: Record, about: Mapping[str, Any], score: Mapping[str, Any], known: str | None, pairs: Sequence[Any]
) -> Entry:
    """A top-1 score. Two of them belong together if they are of the same images, and of students of one teacher.

    A teacher is known by its id and its classes; if the run has no card of its student, it is like no other.
    """
    method, data = str(score.get("method")), known or text(score.get("data"))
    row = dict(about) if _own(record, method) else dict(about) | dict.fromkeys(_OF_TRAINING)
    row |= {key: _text(score.get(key)) for key in ("split", "selection", "bn")}
    row |= dict.fromkeys(("way", "shot", "query", "eval_seed", "episodes"))
    row |= {"method": text(method), "data": data, "mean": number(score.get("mean")), "ci95": number(score.get("ci95"))}
    row["steps"] = []
    here = f"not recorded in {record.where}"
    where = [f"{known or here} of {_taught(record, method) or here}", str(row["split"]), "top-1"]
    where += ["top-1"] * 3 + [str(len(pairs)), str(row["bn"])]
    accuracies, flaw = _checked(row, pairs)
    return Entry(row, tuple(where), _settings(record, method), {}, accuracies, flaw)


def _taught(record: Record, method: str) -> str | None:
    """The teacher of a student, with a hash of the names of its classes; None if the run does not say."""
    teacher = method.partition(":")[2] or next(iter(record.students), "")
    classes = record.students.get(teacher, {}).get("classes")
    if not isinstance(classes, list):
        return None
    return f"{text(teacher)}@{hashlib.sha256(json.dumps(sorted(map(str, classes))).encode()).hexdigest()[:8]}"


def _episodes(path: Path) -> dict[tuple[str, ...], list[tuple[int, float]]]:
    """(method, data, shot, selection) -> (episode, accuracy) pairs in order of episodes."""
    if not path.exists():
        return {}
    found: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    try:
        with pq.ParquetFile(path) as file:
            columns = file.read().to_pydict()
        names = ("method", "data", "shot", "selection", "episode", "accuracy")
        for *key, episode, accuracy in zip(*(columns[name] for name in names), strict=True):
            found.setdefault(tuple(repr(k) for k in key), []).append((int(episode), float(accuracy)))
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        raise RejectedError(
            f"{path}: not a table of episodes; restore the file, or remove it to report without differences"
        ) from None
    return {key: sorted(pairs) for key, pairs in found.items()}


def _checked(row: Mapping[str, Any], pairs: Sequence[tuple[int, float]]) -> tuple[np.ndarray | None, str | None]:
    """The accuracies [episodes], or the reason why they cannot be used: they must have the mean of the score."""
    if not pairs:
        return None, "no accuracies of its episodes in episodes.parquet"
    accuracies, mean = np.array([accuracy for _, accuracy in pairs]), row["mean"]
    whole = row["episodes"] in (None, len(pairs)) and [i for i, _ in pairs] == list(range(len(pairs)))
    if not whole or mean is None or not abs(accuracies.mean() - mean) < 1e-3:
        return None, "episodes.parquet and scores.json disagree"
    return accuracies, None


def _identity(record: Record, data: object) -> str | None:
    """The data of a score as NAME@HASH, or for `pooled` those of all data sets of the run.

    None if the hash is not recorded.
    """
    if data != POOLED:
        return text(data) if "@" in str(data) else None
    sets = [one.get("data") for one in dicts(record.manifest.get("data"))]
    return f"{POOLED} {' + '.join(map(text, sets))}" if sets and all(sets) else None


def _steps(record: Record, method: str, selection: str, data: str) -> list[float]:
    """The step sizes of the adaptation at test.

    They are what the run chose for the data, or for all data sets in the case of `pooled`; if it chose none, `eval.lr`.
    A reading without steps has none.
    """
    if method.endswith(("-direct", "-assign")) or _part(record.config, "learner").get("head") == "protonet":
        return []
    wanted = {"method": method.removesuffix("-finetune"), "selection": selection}
    chosen = [one for one in dicts(record.status.get("test_step")) if wanted.items() <= one.items()]
    own = [one.get("lr") for one in chosen if data in (POOLED, one.get("data"))]
    known = {step for lr in own if (step := number(lr)) is not None}
    if known:
        return sorted(known)
    given = number(_part(record.config, "eval").get("lr"))
    return [] if given is None else [given]


def _settings(record: Record, method: str) -> str:
    """All settings that decide a score, apart from the seed. `random` has only those of the learner and the test."""
    names = {"learner", "eval"} if method == UNTRAINED else set(record.config) - {"seed", "data", "pool"}
    kept = {name: record.config.get(name) for name in names}
    if method == UNTRAINED:
        kept["learner"] = {key: value for key, value in _part(record.config, "learner").items() if key != "start"}
    else:
        pools = [one.get("sha256") for one in dicts(record.manifest.get("pool"))]
        kept["pool"] = pools or record.config.get("pool")
    return json.dumps(kept, sort_keys=True, default=str)


def _own(record: Record, method: str) -> bool:
    """Whether a score is of the run's own method, in any reading, and not of `random` beside it."""
    return method == record.name or method.startswith((f"{record.name}-", f"{record.name}:"))


def _adaptation(record: Record, method: str) -> dict[str, Any]:
    """The settings of the adaptation to an episode, in which a method and its baseline should agree."""
    learner, evaluation = _part(record.config, "learner"), _part(record.config, "eval")
    if method.endswith(("-direct", "-assign")):
        return {}
    named = {f"learner.{key}": learner.get(key) for key in ("arch", "head")}
    if _own(record, method) and isinstance(record.learner.get("arch"), str):
        named["learner.arch"] = record.learner["arch"]
    steps = ("steps", "lrs" if evaluation.get("lrs") else "lr", "icfil")
    return named | {f"eval.{key}": evaluation.get(key) for key in steps}


def without_scores(record: Record) -> dict[str, Any]:
    """The row of a run that has no scores, with a note that says how far it is."""
    validation = plots.series(record.metrics, "validation")[1]
    facts = ["no scores" if record.config.get("data") else "no scores: no data to test on"]
    if record.status.get("rounds"):
        facts.append(f"{record.rounds} of {text(record.status['rounds'])} rounds done")
    if len(validation):
        facts.append(f"last validation {validation[-1]:.2f} %")
    if record.status.get("last_error"):
        facts.append(text(record.status["last_error"]))
    return _about(record) | {"steps": [], "note": "; ".join(facts)}


def _part(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    return None if value is None else text(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
