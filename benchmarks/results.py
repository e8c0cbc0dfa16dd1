"""The numbers of the README and of docs/results.md: read from run folders, kept in the package, put into the pages.

Usage: python benchmarks/results.py collect TABLE FOLDER
       python benchmarks/results.py add TABLE FOLDER --title TEXT --hardware TEXT [--pool PATH MINUTES COMMAND]...
                                    [--control no-pool]
       python benchmarks/results.py render [--check]

`collect` measures the numbers of a table of `ray_dfml/reproduce/numbers` again, from what its steps made in FOLDER.

`add` makes a table of the runs FOLDER/ROW-SEED, which `ray-dfml train ... --run-dir FOLDER/ROW-SEED` made, or replaces
it: for each row its command, and for each shot its accuracy and the paired difference to the control. PATH is a pool
that the runs name. COMMAND made it in MINUTES: arguments of `ray-dfml`, to which `--out` is added if they are those of
`pool build`, or a script of `benchmarks` that makes the folder `{out}/NAME`, NAME being the last part of PATH. A run
that has not ended is left out, and said so. docs/img/TABLE.png shows validation accuracy against minutes, and against
queries if these differ.

`render` writes the results of README.md, between its markers, and docs/results.md, from the templates in
`benchmarks/pages`; with `--check` it only says whether they are what it would write.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results_pages import PAGES, ROOT, rendered
from results_picture import draw

from ray_dfml import plots, report, yaml_text
from ray_dfml.errors import DfmlError
from ray_dfml.files import resolved
from ray_dfml.report import Record
from ray_dfml.report.scores import own
from ray_dfml.reproduce.measure import measure, placeholders
from ray_dfml.reproduce.registry import NUMBERS, Table, filled, read
from ray_dfml.runtime.rundir import write_text

RUNS = "run folders"
UNKNOWN = {"value": 0.0, "half": 1.0}
"""Stands in a number until it is measured."""


def save(name: str, tree: dict[str, Any]) -> None:
    """Check a table and write its file."""
    table = Table.model_validate({"name": name} | tree)
    whole = table.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    write_text(NUMBERS / f"{name}.yaml", yaml_text.dump(whole))


def collect(table: Table, folder: Path) -> dict[str, Any]:
    """The table with the numbers, minutes, queries and commits that its runs in `folder` have."""
    tree = table.model_dump(mode="json", exclude_defaults=True)
    for raw, number in zip(tree["numbers"], table.numbers, strict=True):
        found = measure(table, number, folder)
        raw |= {"value": round(found.value, 2), "half": round(found.half, 2)}
        raw["each"] = [round(value, 2) for value in found.each]
        if made := _commits(_records(table, number.of.step, number.seeds, folder)):
            raw["commit"] = made
    for name, step in table.steps.items():
        seeds = sorted({s for one in table.numbers for s in one.seeds if name in dict(table.needed(one))})
        if records := _records(table, name, seeds if step.every_seed else seeds[:1], folder):
            tree["steps"][name]["minutes"] = round(_mean([record.seconds or 0.0 for record in records]) / 60, 1)
            tree["steps"][name]["queries"] = round(_mean([_sent(record) for record in records]))
    return tree | {"evidence": RUNS}


def _records(table: Table, name: str, seeds: Sequence[int], folder: Path) -> list[Record]:
    """The run folders of a step, or none if it makes none."""
    step = table.steps[name]
    made = [Path(*filled([str(folder / step.makes)], placeholders(step, seed, folder))) for seed in seeds]
    return [report.read(run) for run in made if (run / "config.yaml").is_file()]


def _commits(records: Sequence[Record]) -> str | None:
    """The commits that runs were made at, or None if not all runs say. A run with changes beside it is named."""
    git = [record.manifest.get("git") or {} for record in records]
    for record, one in zip(records, git, strict=True):
        if one.get("dirty"):
            print(f"{record.path.name}: there were files that its commit does not hold", file=sys.stderr)
    found = {one.get("commit") for one in git}
    return None if None in found else ", ".join(sorted({_landed(str(commit)) for commit in found}))


def _landed(commit: str) -> str:
    """The commit in the history of HEAD: itself; if it was rebased, the one with its subject; or the last one before
    it, if the package is the same there."""
    if _git("merge-base", "--is-ancestor", commit, "HEAD") is not None:
        return commit[:7]
    subject = _git("log", "-1", "--format=%s", commit)
    log = [line.partition(" ") for line in (_git("log", "--format=%h %s") or "").splitlines()]
    found = [short for short, _, said in log if subject and said == subject]
    base = _git("merge-base", commit, "HEAD")
    if not found and base and _git("diff", "--quiet", base, commit, "--", "ray_dfml") is not None:
        return base[:7]
    if len(found) != 1:
        raise DfmlError(f"commit {commit[:7]} is not in the history of HEAD, and {len(found)} there have its subject")
    return found[0]


def _git(*words: str) -> str | None:
    """What git prints, or None if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sent(record: Record) -> float:
    return sum(one["sent"] for one in record.queries.values())


def of_runs(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A table of the runs in a folder, its numbers not yet measured."""
    rows: dict[str, dict[int, Record]] = {}
    for run in sorted(folder.iterdir()):
        named = re.fullmatch(r"(.+)-(\d+)", run.name)
        if named and (run / "config.yaml").is_file():
            record = report.read(run)
            if record.status.get("state") == "done" and record.scores:
                rows.setdefault(named[1], {})[int(named[2])] = record
            else:
                print(f"left out, since it has not ended: {run.name}", file=sys.stderr)
    if not rows:
        raise DfmlError(f"{folder}: no run there has ended that is named ROW-SEED")
    pools = {str(resolved(path)): resolved(path).name for path, _, _ in given.pool}
    steps = {
        name: _pool(name, command, float(minutes), list(pools.values()))
        for name, (_, minutes, command) in zip(pools.values(), given.pool, strict=True)
    }
    numbers: list[dict[str, Any]] = []
    for row, records in rows.items():
        commands = [_command(record, pools, row, seed) for seed, record in records.items()]
        if len({tuple(sorted(words)) for words in commands}) > 1:
            shown = " | ".join(map(shlex.join, commands))
            raise DfmlError(f"{row}: its seeds were made by different commands: {shown}")
        run = commands[0]
        steps[row] = {"run": run, "makes": f"{row}-{{seed}}", "minutes": 0.0, "after": _named(run, pools.values())}
        for shot in (5, 1):
            numbers += _numbers(given, row, shot, records, rows.get(given.control, {}))
    used = {name for step in steps.values() for word in step.get("run", []) for name in re.findall(_DATA, word)}
    return {
        "name": given.table, "title": given.title, "hardware": given.hardware, "evidence": RUNS,
        "data": sorted(used), "steps": steps, "numbers": numbers,
    }  # fmt: skip


_DATA = r"\{data\}/([\w.-]+)"
_LOCAL = re.compile(r"(^|[=:,\[])(/|\.\.?/|~)")
"""A path or an address in a word of a command."""


def _named(words: Sequence[str], pools: Iterable[str]) -> list[str]:
    """The pools that a command reads."""
    return [name for name in pools if any(word == f"{{out}}/{name}" for word in words)]


def _pool(name: str, command: str, minutes: float, pools: Sequence[str]) -> dict[str, Any]:
    """The step that makes a pool, by a command of `ray-dfml` or a script."""
    words = shlex.split(command)
    after = [other for other in _named(words, pools) if other != name]
    kind = "script" if words[0].startswith("benchmarks/") else "run"
    if words[:2] == ["pool", "build"]:
        words += ["--out", f"{{out}}/{name}", "--resume"]
    return {kind: words, "makes": name, "minutes": minutes, "after": after}


def _command(record: Record, pools: Mapping[str, str], row: str, seed: int) -> list[str]:
    """The arguments of `ray-dfml` that a run was started with, its paths and its seed replaced by placeholders."""
    words = shlex.split(record.manifest["command"])[1:]
    words = [word for word in words if word not in ("--resume-or-start", "--quiet")]
    if "--seed" not in words:
        words += ["--seed", str(seed)]
    places = iter(record.config["pool"])  # as absolute paths, in the order of the command
    for i, word in enumerate(words[:-1]):
        value = words[i + 1]
        if word == "--run-dir":
            words[i + 1] = f"{{out}}/{row}-{{seed}}"
        elif word == "--seed":
            words[i + 1] = "{seed}"
        elif word == "--pool":
            place = str(resolved(next(places)))
            if place not in pools:
                raise DfmlError(f"{row}-{seed}: its pool is {place}; name it with --pool")
            words[i + 1] = f"{{out}}/{pools[place]}"
        elif word == "--data" and "/" in value:
            words[i + 1] = f"{value.partition(':')[0]}:{{data}}/{value.rpartition('/')[2]}"
    local = [word for word in words if _LOCAL.search(word)]
    if local:
        raise DfmlError(f"{row}-{seed}: its command names a path of this machine: {local[0]}")
    return [*words, "--resume-or-start"]


def _numbers(
    given: argparse.Namespace, row: str, shot: int, records: Mapping[int, Record], control: Mapping[int, Record]
) -> list[dict[str, Any]]:
    """The accuracy of a row, and its paired difference to the control if that has the same seeds."""
    seeds, name = sorted(records), given.control
    score, base = _headline(records[seeds[0]], shot), _headline(next(iter(control.values())), shot) if control else None
    if score is None:
        return []
    id = f"{given.table}-{re.sub('[^a-z0-9]+', '-', row.lower()).strip('-')}"
    how = f"{given.title}, 5-way {shot}-shot, {len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}"
    same = {"seeds": seeds, "each": [0.0] * len(seeds), "covers": "episodes", "row": row, "commit": "unknown"} | UNKNOWN
    same["of"] = {"step": row} | score
    named = {"id": f"{id}-{shot}shot", "what": f"{row}: {how}", "unit": "%", "column": f"{shot}-shot"}
    made = [same | named]
    if row != name and base is not None and set(seeds) <= set(control):
        named = {"id": f"{id}-over-{name}-{shot}shot", "what": f"{row} over {name}: {how}", "unit": "points"}
        made.append(same | named | {"column": f"over {name}, {shot}-shot", "minus": {"step": name} | base})
    elif row != name:
        print(f"{row}, {shot}-shot: no difference, since {name} has not all of its seeds", file=sys.stderr)
    return made


def _headline(record: Record, shot: int) -> dict[str, Any] | None:
    """The score that stands for a run at a number of shots: its first, which is of the weights that were chosen."""
    for score in record.scores:
        if own(record, score) and score["shot"] == shot:
            return {key: score[key] for key in ("method", "shot", "selection")}
    return None


def curves(table: Table, folder: Path) -> dict[str, list[list[dict[str, float]]]]:
    """Row -> for each seed the points of its validation: `minutes`, `queries` of a teacher, and `validation`."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    for name in dict.fromkeys(one.row for one in table.numbers if one.row):
        seeds = next(one.seeds for one in table.numbers if one.row == name)
        for record in _records(table, name, seeds, folder):
            minutes, queries, points = 0.0, 0.0, []
            for line in record.metrics:
                minutes += (plots.number(line.get("seconds/round")) or 0.0) / 60
                queries = plots.number(line.get("queries", line.get("surrogate/queries"))) or queries
                if (validation := plots.number(line.get("validation"))) is not None:
                    points.append({"minutes": minutes, "queries": queries, "validation": validation})
            if points:
                found.setdefault(name, []).append(points)
    return found


def render(check: bool) -> int:
    """Write the pages, or say which ones are not what would be written."""
    stale = []
    for page in PAGES:
        file, text = ROOT / page, rendered(page)
        if file.read_text("utf-8") != text:
            stale.append(page)
            if not check:
                write_text(file, text)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    does = parser.add_subparsers(dest="does", required=True)
    again = does.add_parser("collect")
    new = does.add_parser("add")
    for one in (again, new):
        one.add_argument("table")
        one.add_argument("folder", type=Path)
    new.add_argument("--title", required=True)
    new.add_argument("--hardware", required=True)
    new.add_argument("--pool", nargs=3, action="append", default=[], metavar=("PATH", "MINUTES", "COMMAND"))
    new.add_argument("--control", default="no-pool")
    does.add_parser("render").add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.does == "render":
        return render(given.check)
    try:
        table = read(NUMBERS / f"{given.table}.yaml") if given.does == "collect" else None
        table = table or Table.model_validate(of_runs(given.folder, given))
        save(given.table, collect(table, given.folder))
        if given.does == "add":
            draw(curves(table, given.folder), ROOT / "docs" / "img" / f"{given.table}.png")
    except DfmlError as error:
        raise SystemExit(f"results.py: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
