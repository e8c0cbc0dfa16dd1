"""Run folders as files: what reports and comparisons read, without a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ray_dfml import config
from ray_dfml.core.scoring import mean_ci95

Scores = Mapping[str, Sequence[float]]

FREE, AVERAGE, RANDOM = [50.0, 60.0, 70.0, 80.0], [40.0, 52.0, 58.0, 70.0], [20.0, 20.0, 40.0, 40.0]


GLYPHS = "glyphs@cdcdcdcd"


def place(data: str) -> str:
    """A spec of data of that name."""
    name = data.partition("@")[0]
    return name if name == "glyphs" else f"{name}:somewhere/{name}"


def make(
    path: Path, scores: Scores, *, name: str = "free", seed: int = 0, settings: Sequence[str] = (), rounds: int = 2,
    state: str = "done", data: Sequence[str] = (GLYPHS,), **changes: Any,
) -> Path:  # fmt: skip
    """A run folder with `scores`: "METHOD/SELECTION" -> accuracies of its episodes; `changes` are of every score."""
    path.mkdir(parents=True)
    tree = config.resolve(
        name, seed=seed, pool=["pools/p"], data=[place(one) for one in data], settings=settings
    ).model_dump(mode="json")
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    noted = {"pool": [{"path": "pools/p", "sha256": "ab"}], "data": [{"spec": place(one), "data": one} for one in data]}
    (path / "manifest.json").write_text(json.dumps(noted))
    (path / "status.json").write_text(json.dumps({"state": state, "round": rounds, "rounds": 2, "last_error": None}))
    lines = [
        {"round": r, f"seconds/{name}.recover": 1.5, "seconds/round": 4.0, "validation": 30.0} for r in range(rounds)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, episodes = [], []
    for key, accuracies in scores.items():
        method, selection = key.split("/")
        mean, ci95 = mean_ci95(np.array(accuracies))
        row = {"method": method, "data": data[0], "split": "test", "way": 5, "shot": 1, "episodes": len(accuracies)}
        row |= {"bn": "transductive", "profile": "fixed", "selection": selection, "mean": mean, "ci95": ci95} | changes
        rows.append(row)
        shown = {k: row[k] for k in ("method", "data", "shot", "selection")}
        episodes += [shown | {"episode": i, "accuracy": value} for i, value in enumerate(accuracies)]
    (path / "scores.json").write_text(json.dumps(rows))
    if episodes:
        pq.write_table(pa.Table.from_pylist(episodes), path / "episodes.parquet")
    return path


def rename(run: Path, data: str) -> None:
    """Call the data of all scores of a run otherwise."""
    rows = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps([row | {"data": data} for row in rows]))
    table = pq.read_table(run / "episodes.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"data": data} for row in table]), run / "episodes.parquet")


def step(method: str, selection: str, lr: float, data: str = GLYPHS) -> dict[str, Any]:
    """A chosen step as `status.json` has it."""
    return {"method": method, "selection": selection, "data": data, "lr": lr}


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def row_of(rows: Sequence[Mapping[str, Any]], method: str, selection: str = "last") -> Mapping[str, Any]:
    """The one row of a method and selection."""
    (found,) = [row for row in rows if (row["method"], row["selection"]) == (method, selection)]
    return found
