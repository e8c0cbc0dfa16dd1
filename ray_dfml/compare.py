"""`report` puts runs side by side, with accuracy, cost, and the paired difference to the best baseline.

It reads run folders only. Two scores belong to the same `set` if they are of the same episodes, that is if they agree
in all of FIELDS. Nothing is compared across sets.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_dfml import plots, report
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.errors import RejectedError
from ray_dfml.files import resolved
from ray_dfml.methods import METHODS, UNTRAINED
from ray_dfml.plots import number
from ray_dfml.report import Record, dicts
from ray_dfml.scorer import POOLED

BASELINES = tuple(name for name, method in METHODS.items() if method.baseline)
"""The methods that a difference may be taken to, in any reading."""

FIELDS = ("data", "split", "way", "shot", "query", "eval.seed", "episodes", "bn")
"""What two scores of the same episodes agree in. `data` is the name and content hash of the data set."""

KEYS = (
    "kind", "set", "method", "selection", "preset", "profile", "seeds", "mean", "ci95", "sd", "difference",
    "difference_ci95", "against", "steps", "rounds", "recover_seconds", "seconds", "state", "runs", "note", "data",
    "split", "way", "shot", "bn", "episodes", "query", "eval_seed",
)  # fmt: skip
"""Keys of a row. `kind` is `run`, or `mean` for a mean of seeds; `seeds`, `steps` and `runs` are lists; accuracies are
in percent, differences in percentage points."""


@dataclass(frozen=True)
class Comparison:
    """Rows with KEYS, set after set, in the order to show them; and remarks as (set, text) pairs."""

    rows: list[dict[str, Any]]
    notes: list[tuple[int, str]]

    def tree(self) -> dict[str, Any]:
        """The comparison for JSON: `runs`, `groups` (means of seeds) and `notes`."""
        kinds = {name: [row for row in self.rows if row["kind"] == kind] for name, kind in _KINDS.items()}
        return kinds | {"notes": [{"set": where, "note": text} for where, text in self.notes]}


_OF_TRAINING = ("preset", "profile", "rounds", "recover_seconds", "seconds")
"""Keys that describe the training of the run's own method. Scores of other methods in the run have none of them."""

_KINDS = {"runs": "run", "groups": "mean"}


@dataclass(frozen=True, eq=False)
class _Entry:
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
        known = any(method == one or method.startswith(f"{one}-") for one in BASELINES)
        return known and self.row["selection"] != "test-best" and self.row["mean"] is not None


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare all scores of run folders. A folder named twice counts once.

    Raises UsageError for a folder that is no run, and RejectedError for a file that cannot be read.
    """
    records = list({run.resolve(): report.read(run) for run in map(resolved, runs)}.values())
    entries = _once([entry for record in records for entry in _entries(record)])
    sets: dict[tuple[str, ...], list[_Entry]] = {}
    for entry in sorted(entries, key=_place):
        sets.setdefault(entry.where, []).append(entry)
    rows, notes = [], []
    for i, (where, members) in enumerate(sets.items(), 1):
        reference, reason = _reference(where, members, entries)
        rows += [row | {"set": i} for row in _rows(members, reference, reason)]
        notes += [(i, remark) for remark in _left_out(members, entries)]
    rows += [_without_scores(record) for record in records if not record.scores]
    return Comparison([{key: row.get(key) for key in KEYS} for row in rows], notes)


# ------------------------------------------------------------------------------------------------------------- reading


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
        "runs": [text(record.path)],
    }


def _entries(record: Record) -> list[_Entry]:
    about, found = _about(record), _episodes(record.path / "episodes.parquet")
    evaluation = _part(record.config, "eval")
    query, eval_seed = (_whole(evaluation.get(key)) for key in ("query", "seed"))
    entries = []
    for score in record.scores:
        method, data, known = str(score.get("method")), str(score.get("data")), _identity(record, score.get("data"))
        row = about if _own(record, method) else about | dict.fromkeys(_OF_TRAINING)
        row = row | {key: _text(score.get(key)) for key in ("split", "selection", "bn")}
        row = row | {key: _whole(score.get(key)) for key in ("way", "shot", "episodes")}
        row |= {"method": text(method), "data": known or text(data), "query": query}
        row |= {"eval_seed": eval_seed, "mean": number(score.get("mean")), "ci95": number(score.get("ci95"))}
        row["steps"] = _steps(record, method, str(score.get("selection")), data)
        where = (known, row["split"], row["way"], row["shot"], query, eval_seed, row["episodes"], row["bn"])
        unknown = f"not recorded in {record.path.resolve()}"
        must = {"data", "query", "eval.seed"}
        named = [unknown if v is None and f in must else json.dumps(v) for f, v in zip(FIELDS, where, strict=True)]
        key = tuple(repr(score.get(k)) for k in ("method", "data", "shot", "selection"))
        accuracies, flaw = _checked(row, found.get(key, []))
        settings = _settings(record, method)
        entries.append(_Entry(row, tuple(named), settings, _adaptation(record, method), accuracies, flaw))
    return entries


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
    whole = len(pairs) == row["episodes"] and [i for i, _ in pairs] == list(range(len(pairs)))
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
    if method != UNTRAINED:
        pools = [one.get("sha256") for one in dicts(record.manifest.get("pool"))]
        kept["pool"] = pools or record.config.get("pool")
    return json.dumps(kept, sort_keys=True, default=str)


def _own(record: Record, method: str) -> bool:
    """Whether a score is of the run's own method, in any reading, and not of `random` beside it."""
    return method == record.name or method.startswith(f"{record.name}-")


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


def _without_scores(record: Record) -> dict[str, Any]:
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


# ----------------------------------------------------------------------------------------------------------- comparing


def _once(entries: Sequence[_Entry]) -> list[_Entry]:
    """Merge equal scores of `random`, which many runs have beside their own, into one that names all these runs.

    A run of `random` itself comes first, since it knows its preset, profile and cost.
    """
    kept: dict[object, _Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.row["rounds"] is None):
        row = entry.row
        content = None if entry.accuracies is None else entry.accuracies.tobytes()
        same = (entry.where, row["selection"], *row["seeds"], row["mean"], row["ci95"], content)
        key: object = same if row["method"] == UNTRAINED else id(entry)
        if key in kept:
            entry = replace(kept[key], row=kept[key].row | {"runs": kept[key].row["runs"] + row["runs"]})
        kept[key] = entry
    return list(kept.values())


def _place(entry: _Entry) -> tuple[Any, ...]:
    row = entry.row
    names = [str(row[key]) for key in ("data", "split")]
    return (*names, row["way"] or 0, row["shot"] or 0, str(row["bn"]), entry.where)


def _reference(
    where: tuple[str, ...], members: Sequence[_Entry], entries: Iterable[_Entry]
) -> tuple[Sequence[_Entry] | None, str]:
    """All seeds of the baseline with the highest mean in a set; or None, and the reason."""
    known = _families([entry for entry in members if entry.baseline])
    if known:
        best = max(known, key=lambda family: _mean(family, "mean", 0.0))
        flaw = next((f"{entry.name}: {entry.flaw}" for entry in best if entry.flaw), None)
        return (None, f"the best baseline, {flaw}") if flaw else (best, "")
    others = [entry for entry in entries if entry.baseline]
    if not others:
        return None, "no baseline among these runs"
    nearest = min(others, key=lambda entry: len(_differing(where, entry.where)))
    return None, f"no baseline on these episodes: {_apart(nearest, where)}"


def _differing(a: tuple[str, ...], b: tuple[str, ...]) -> list[str]:
    return [name for name, x, y in zip(FIELDS, a, b, strict=True) if x != y]


def _apart(entry: _Entry, where: tuple[str, ...]) -> str:
    unknown = " or not recorded" if any("not recorded in" in value for value in (*entry.where, *where)) else ""
    return f"{entry.name} has other{unknown} {', '.join(_differing(entry.where, where))}"


def _left_out(members: Sequence[_Entry], entries: Iterable[_Entry]) -> list[str]:
    """One remark for each baseline, apart from `random`, that has the same kind of task but other episodes."""

    def kind(entry: _Entry) -> tuple[Any, ...]:
        names = [part.partition("@")[0] for part in str(entry.row["data"]).split(" + ")]
        return (*names, *(entry.row[key] for key in ("split", "way", "shot")))

    first = members[0]
    known = [entry for entry in entries if entry.baseline and entry.row["method"] != UNTRAINED]
    found = [entry for entry in known if entry.where != first.where and kind(entry) == kind(first)]
    return [f"not compared: {_apart(entry, first.where)}" for entry in found]


def _families(members: Iterable[_Entry]) -> list[list[_Entry]]:
    """Group scores with equal settings, method and selection: a group holds the seeds of one configuration."""
    families: dict[tuple[str, ...], list[_Entry]] = {}
    for entry in members:
        families.setdefault((entry.settings, entry.row["method"], entry.row["selection"]), []).append(entry)
    return list(families.values())


def _rows(members: Sequence[_Entry], reference: Sequence[_Entry] | None, reason: str) -> list[dict[str, Any]]:
    """The scores of a set, best first. Seeds of equal settings stand together, followed by their mean."""
    rows = []
    for family in sorted(_families(members), key=lambda family: -_mean(family, "mean", 0.0)):
        family.sort(key=lambda entry: entry.row["seeds"])
        rows += [entry.row | _against([entry], reference, reason) for entry in family]
        if len({seed for entry in family for seed in entry.row["seeds"]}) > 1:
            rows.append(_group(family) | _against(family, reference, reason))
    return rows


def _against(family: Sequence[_Entry], reference: Sequence[_Entry] | None, reason: str) -> dict[str, Any]:
    """The paired difference to the reference, or a note why there is none.

    If either has several seeds, their accuracies are averaged in each episode first.
    """
    flaw = reason or next((f"{entry.name}: {entry.flaw}" for entry in family if entry.flaw), None)
    if reference is not None and any(entry is one for entry in family for one in reference):
        return {"note": "the reference" if len(family) == len(reference) else "a seed of the reference"}
    accuracies = [entry.accuracies for entry in family if entry.accuracies is not None]
    if flaw or reference is None:
        return {"note": flaw}
    base = [entry.accuracies for entry in reference if entry.accuracies is not None]
    difference, ci95 = mean_ci95(np.mean(accuracies, axis=0) - np.mean(base, axis=0))
    name = reference[0].name if len(reference) == 1 else f"{len(reference)} seeds of {reference[0].name}"
    found = {"difference": round(difference, 4), "difference_ci95": round(ci95, 4), "against": name}
    own, other = family[0].adaptation, reference[0].adaptation
    unlike = [key for key in {**own, **other} if own and other and own.get(key) != other.get(key)]
    return found | ({"note": f"adapts with other {', '.join(unlike)} than the reference"} if unlike else {})


def _group(family: Sequence[_Entry]) -> dict[str, Any]:
    """The row for the mean of several seeds.

    All seeds meet the same episodes, so `ci95` is over episodes, in each of which the seeds are averaged. `sd` is the
    sample standard deviation of the seeds' means.
    """
    means = [entry.row["mean"] for entry in family if entry.row["mean"] is not None]
    accuracies = [entry.accuracies for entry in family if entry.accuracies is not None]
    row = family[0].row | {
        name: [value for entry in family for value in entry.row[name]] for name in ("seeds", "runs", "steps")
    }
    row |= {"kind": "mean", "mean": _mean(family, "mean", None), "ci95": None, "steps": sorted(set(row["steps"]))}
    row["state"] = ", ".join(dict.fromkeys(entry.row["state"] for entry in family))
    row["sd"] = round(float(np.std(means, ddof=1)), 4) if len(means) > 1 else None
    if len(accuracies) == len(family):
        row["mean"], row["ci95"] = (round(value, 4) for value in mean_ci95(np.mean(accuracies, axis=0)))
    return row | {name: _mean(family, name, None) for name in ("rounds", "recover_seconds", "seconds")}


def _mean(family: Sequence[_Entry], name: str, default: Any) -> Any:
    values = [entry.row[name] for entry in family if entry.row[name] is not None]
    return round(sum(values) / len(values), 4) if values else default
