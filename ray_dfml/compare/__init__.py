"""`report` puts runs side by side, with accuracy, cost, and paired differences to the best baseline and to the control.

It reads run folders only. Two scores belong to the same `set` if they are of the same episodes, that is if they agree
in all of FIELDS. Nothing is compared across sets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import report
from ray_dfml.compare.entries import BASELINES as BASELINES
from ray_dfml.compare.entries import FIELDS, Entry, entries_of, without_scores
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.files import Uri, located
from ray_dfml.methods import CONTROL, UNTRAINED

KEYS = (
    "kind", "set", "method", "selection", "preset", "profile", "seeds", "mean", "ci95", "sd", "difference",
    "difference_ci95", "against", "over_control", "over_control_ci95", "control", "steps", "rounds",
    "recover_seconds", "seconds", "state", "runs", "note", "data",
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


_KINDS = {"runs": "run", "groups": "mean"}


def compare(runs: Sequence[Path | Uri]) -> Comparison:
    """Compare all scores of run folders. A folder named twice counts once.

    Raises UsageError for a folder that is no run, and RejectedError for a file that cannot be read.
    """
    records = list({_name(run): report.read(run) for run in map(located, runs)}.values())
    entries = _once([entry for record in records for entry in entries_of(record)])
    sets: dict[tuple[str, ...], list[Entry]] = {}
    for entry in sorted(entries, key=_place):
        sets.setdefault(entry.where, []).append(entry)
    rows, notes = [], []
    for i, (where, members) in enumerate(sets.items(), 1):
        reference, reason = _reference(where, members, entries)
        rows += [row | {"set": i} for row in _rows(members, reference, reason, _controls(members))]
        notes += [(i, remark) for remark in _left_out(members, entries)]
    rows += [without_scores(record) for record in records if not record.scores]
    return Comparison([{key: row.get(key) for key in KEYS} for row in rows], notes)


def _name(run: Path | Uri) -> Path | Uri:
    """By what a run is known that is named twice."""
    return run.resolve() if isinstance(run, Path) else run


def _once(entries: Sequence[Entry]) -> list[Entry]:
    """Merge equal scores of `random`, which many runs have beside their own, into one that names all these runs.

    A run of `random` itself comes first, since it knows its preset, profile and cost.
    """
    kept: dict[object, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.row["rounds"] is None):
        row = entry.row
        content = None if entry.accuracies is None else entry.accuracies.tobytes()
        same = (entry.where, row["selection"], *row["seeds"], row["mean"], row["ci95"], content)
        key: object = same if row["method"] == UNTRAINED else id(entry)
        if key in kept:
            entry = replace(kept[key], row=kept[key].row | {"runs": kept[key].row["runs"] + row["runs"]})
        kept[key] = entry
    return list(kept.values())


def _place(entry: Entry) -> tuple[Any, ...]:
    row = entry.row
    names = [str(row[key]) for key in ("data", "split")]
    return (*names, row["way"] or 0, row["shot"] or 0, str(row["bn"]), entry.where)


def _reference(
    where: tuple[str, ...], members: Sequence[Entry], entries: Iterable[Entry]
) -> tuple[Sequence[Entry] | None, str]:
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


def _apart(entry: Entry, where: tuple[str, ...]) -> str:
    unknown = " or not recorded" if any("not recorded in" in value for value in (*entry.where, *where)) else ""
    return f"{entry.name} has other{unknown} {', '.join(_differing(entry.where, where))}"


def _left_out(members: Sequence[Entry], entries: Iterable[Entry]) -> list[str]:
    """One remark for each baseline, apart from `random`, that has the same kind of task but other episodes."""

    def kind(entry: Entry) -> tuple[Any, ...]:
        names = [part.partition("@")[0] for part in str(entry.row["data"]).split(" + ")]
        return (*names, *(entry.row[key] for key in ("split", "way", "shot")))

    first = members[0]
    known = [entry for entry in entries if entry.baseline and entry.row["method"] != UNTRAINED]
    found = [entry for entry in known if entry.where != first.where and kind(entry) == kind(first)]
    return [f"not compared: {_apart(entry, first.where)}" for entry in found]


def _families(members: Iterable[Entry]) -> list[list[Entry]]:
    """Group scores with equal settings, method and selection: a group holds the seeds of one configuration."""
    families: dict[tuple[str, ...], list[Entry]] = {}
    for entry in members:
        families.setdefault((entry.settings, entry.row["method"], entry.row["selection"]), []).append(entry)
    return list(families.values())


def _controls(members: Iterable[Entry]) -> list[list[Entry]]:
    """The scores of the control in a set whose episodes are known; a list holds the seeds of one configuration."""
    known = _families([entry for entry in members if entry.baseline and entry.row["method"] == CONTROL])
    return [family for family in known if not any(entry.flaw for entry in family)]


def _rows(
    members: Sequence[Entry], reference: Sequence[Entry] | None, reason: str, controls: Sequence[Sequence[Entry]]
) -> list[dict[str, Any]]:
    """The scores of a set, best first. Seeds of equal settings stand together, followed by their mean."""

    def differences(family: Sequence[Entry]) -> dict[str, Any]:
        found, control = _against(family, reference, reason), _over(family, controls)
        said = [one["note"] for one in (found, control) if one.get("note")]
        return found | control | {"note": "; ".join(said) or None}

    rows = []
    for family in sorted(_families(members), key=lambda family: -_mean(family, "mean", 0.0)):
        family.sort(key=lambda entry: entry.row["seeds"])
        rows += [entry.row | differences([entry]) for entry in family]
        if len({seed for entry in family for seed in entry.row["seeds"]}) > 1:
            rows.append(_group(family) | differences(family))
    return rows


def _against(family: Sequence[Entry], reference: Sequence[Entry] | None, reason: str) -> dict[str, Any]:
    """The paired difference to the reference, or a note why there is none."""
    flaw = reason or next((f"{entry.name}: {entry.flaw}" for entry in family if entry.flaw), None)
    if reference is not None and _shared(family, reference):
        return {"note": "the reference" if len(family) == len(reference) else "a seed of the reference"}
    if flaw or reference is None:
        return {"note": flaw}
    difference, ci95 = _paired(family, reference)
    found = {"difference": difference, "difference_ci95": ci95, "against": _named(reference)}
    return found | {"note": _warning(family, reference, "the reference")}


def _over(family: Sequence[Entry], controls: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """The paired difference to the best control, among those that adapt as the family does if there are any."""
    if any(entry.flaw for entry in family) or any(_shared(family, control) for control in controls):
        return {}
    alike = [control for control in controls if not _unlike(family, control)] or controls
    if not alike:
        return {}
    best = max(alike, key=lambda control: _mean(control, "mean", 0.0))
    difference, ci95 = _paired(family, best)
    found = {"over_control": difference, "over_control_ci95": ci95, "control": _named(best)}
    return found | {"note": _warning(family, best, CONTROL)}


def _warning(family: Sequence[Entry], other: Sequence[Entry], name: str) -> str | None:
    unlike = _unlike(family, other)
    return f"adapts with other {', '.join(unlike)} than {name}" if unlike else None


def _shared(family: Sequence[Entry], other: Sequence[Entry]) -> bool:
    return any(entry is one for entry in family for one in other)


def _named(family: Sequence[Entry]) -> str:
    return family[0].name if len(family) == 1 else f"{len(family)} seeds of {family[0].name}"


def _paired(family: Sequence[Entry], other: Sequence[Entry]) -> tuple[float, float]:
    """The mean over episodes of the difference in accuracy, and the half-width of its interval.

    If either has several seeds, their accuracies are averaged in each episode first.
    """
    own, base = (
        np.mean([entry.accuracies for entry in some if entry.accuracies is not None], axis=0)
        for some in (family, other)
    )
    difference, ci95 = mean_ci95(own - base)
    return round(difference, 4), round(ci95, 4)


def _unlike(family: Sequence[Entry], other: Sequence[Entry]) -> list[str]:
    """The settings of the adaptation in which two families differ."""
    own, base = family[0].adaptation, other[0].adaptation
    return [key for key in {**own, **base} if own and base and own.get(key) != base.get(key)]


def _group(family: Sequence[Entry]) -> dict[str, Any]:
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


def _mean(family: Sequence[Entry], name: str, default: Any) -> Any:
    values = [entry.row[name] for entry in family if entry.row[name] is not None]
    return round(sum(values) / len(values), 4) if values else default
