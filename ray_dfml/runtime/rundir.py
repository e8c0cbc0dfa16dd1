"""The run folder, which records everything that a run did. It is made in one step and never overwritten.

`status.json` says how the run stands. Every file but the two logs is replaced in one step (temporary file, then
rename). The logs grow line by line; when a run resumes, lines past its checkpoint are dropped.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ray_dfml import yaml_text
from ray_dfml.config import RunConfig, build
from ray_dfml.data import weights_file
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.files import naming
from ray_dfml.runtime import locks
from ray_dfml.runtime.accounts import EXPORTED, spending
from ray_dfml.runtime.learning import CHECKPOINTS
from ray_dfml.runtime.remote_run import Remote
from ray_dfml.runtime.shard import accelerators
from ray_dfml.scores import as_row
from ray_dfml.types import Score, Spent


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: write a temporary file in the same folder, flush it to disk, and rename it."""
    weights_file.write_bytes(path, text.encode())


def write_table(path: Path, table: pa.Table) -> None:
    """Replace a Parquet file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        pq.write_table(table, temporary)
    os.replace(temporary, path)


def read_status(folder: Path) -> dict[str, Any]:
    """What `status.json` says; nothing where there is none. Raises RejectedError if it cannot be read."""
    path = folder / "status.json"
    return _json(path) if path.exists() else {}


def update_status(folder: Path, **fields: Any) -> None:
    """Update fields of `status.json`. The others keep their values."""
    known = read_status(folder) | fields | {"updated": _now()}
    write_text(folder / "status.json", json.dumps(known, indent=2) + "\n")


class RunFolder:
    """Reads and writes one run folder."""

    def __init__(self, path: Path, remote: Remote | None = None) -> None:
        """`remote` publishes the folder, if it is the scratch folder of a run in an object store."""
        self.path, self.remote = path, remote
        self.place = remote.uri if remote else path
        self._began = time.time()

    def publish(self) -> None:
        """Let readers of an object store see the folder as it is now; for a run on a disk they do already.

        Raises ResourceError if the store refuses.
        """
        if self.remote:
            self.remote.publish()

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, manifest: Mapping[str, Any], remote: Remote | None = None
    ) -> "RunFolder":  # fmt: skip
        """Make a new run folder with configuration and manifest. Raises UsageError if `path` exists."""
        if path.exists():
            raise UsageError(f"{path}: exists already; add --resume to continue that run, or choose another --run-dir")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with naming(path):
                (temporary / CHECKPOINTS).mkdir(parents=True)
                (temporary / "config.yaml").write_text(_yaml(config))
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
                (temporary / "metrics.jsonl").touch()
                (temporary / EXPORTED).touch()
                (temporary / "scores.json").write_text("[]\n")
                (temporary / "status.json").write_text(json.dumps({"state": "created", "round": None}))
            os.rename(temporary, path)
        except OSError:
            if path.exists():
                raise UsageError(f"{path}: another process has just made it; choose another --run-dir") from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path, remote)

    @classmethod
    def open(cls, path: Path, remote: Remote | None = None) -> "RunFolder":
        """Open an existing run folder. Raises UsageError if there is none."""
        if not (path / "config.yaml").is_file():
            raise UsageError(f"{path}: not a run folder (no config.yaml); start a run without --resume")
        if remote:
            (path / CHECKPOINTS).mkdir(exist_ok=True)  # object stores have no empty folders
        return cls(path, remote)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let this process alone write to the folder. Raises UsageError if another one stays at work in it.

        What a killed one left half written is removed.
        """
        lock = locks.hold(self.path / ".lock", f"{self.path}: another process is at work in this run folder")
        try:
            for left in self.path.rglob(".*.tmp"):
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def config(self) -> RunConfig:
        """The resolved configuration of the run.

        Raises RejectedError if it cannot be read, or if it lacks a setting that this version has, since the default
        need not be what the run began with.
        """
        path = self.path / "config.yaml"
        try:
            tree = yaml_text.load(path.read_text())
            config = build(tree)
        except (OSError, ValueError, yaml.YAMLError, UsageError) as error:
            raise RejectedError(f"{path}: {error}") from None
        lacking = _lacking(tree, config.model_dump(mode="json"))
        if lacking:
            raise RejectedError(f"{path}: has no {lacking}, so another version wrote it; start a new run")
        return config

    def manifest(self) -> dict[str, Any]:
        """The manifest the run began with. Raises RejectedError if it cannot be read."""
        return _json(self.path / "manifest.json")

    def status(self, **fields: Any) -> None:
        """Update fields of `status.json`. The others keep their values."""
        update_status(self.path, **fields)

    def spent(self, totals: Mapping[str, Spent]) -> None:
        """Write what was asked of teachers to `status.json` and `manifest.json`."""
        found = spending(totals)
        self.status(queries=found)
        write_text(self.path / "manifest.json", json.dumps(self.manifest() | {"queries": found}, indent=2))

    def change_budget(self, config: RunConfig) -> None:
        """Replace `config.yaml` by a configuration that differs in its budgets alone."""
        write_text(self.path / "config.yaml", _yaml(config))

    def read_status(self) -> dict[str, Any]:
        """What `status.json` says; nothing where there is none. Raises RejectedError if it cannot be read."""
        return read_status(self.path)

    def read_scores(self) -> list[dict[str, Any]]:
        """The rows of `scores.json`. Raises RejectedError if it cannot be read."""
        return _json(self.path / "scores.json")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one object to `metrics.jsonl`."""
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The objects of `metrics.jsonl`. A last line that is being written is left out."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def resume_log(self, rounds: int, last: Mapping[str, Any]) -> None:
        """Keep the metrics of rounds 0..rounds-1, since a resumed run writes those of later rounds again.

        `last` holds the metrics of round rounds-1. They are added if a process died between checkpoint and log.
        """
        path = self.path / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["round"] < rounds:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        if last and not any(json.loads(line)["round"] == last["round"] for line in kept[-1:]):
            kept.append(json.dumps(last) + "\n")
        write_text(path, "".join(kept))

    def write_scores(self, scores: Sequence[Score], profile: str) -> list[dict[str, Any]]:
        """Write `scores.json`, and the accuracy of every episode to `episodes.parquet`, for paired comparisons."""
        rows = [as_row(score, profile) for score in scores]
        columns: dict[str, list[Any]] = {
            name: [] for name in ("method", "data", "shot", "selection", "episode", "accuracy")
        }
        for score in scores:
            for index, accuracy in enumerate(score.accuracies):
                for name, value in zip(
                    columns, (score.method, score.data, score.shot, score.selection, index, accuracy), strict=True
                ):
                    columns[name].append(value)
        write_table(self.path / "episodes.parquet", pa.table(columns))
        write_text(self.path / "scores.json", json.dumps(rows, indent=2) + "\n")
        return rows


def manifest(
    config: RunConfig, *, pools: Sequence[Mapping[str, Any]], data: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What is needed to repeat the run: command, versions, git state, seed, hardware, hashes of pool and data."""
    packages = ("ray-dfml", "torch", "torchvision", "numpy", "pyarrow", "ray")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": _now(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "git": _git(),
        "seed": config.seed,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "accelerators": accelerators(),
        },
        "pool": list(pools),
        "data": list(data),
    }


def _yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RejectedError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RejectedError(f"{path}: not whole: {error}; put back a copy of it, or start a new run") from None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    here = Path(__file__).parent

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    tracked = ask("ls-files", "--error-unmatch", Path(__file__).name)
    if tracked is None:
        return {}
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _lacking(tree: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first dotted key of `wanted` that `tree` lacks, or an empty text."""
    for key, value in wanted.items():
        if key not in tree:
            return key
        inner = _lacking(tree[key] or {}, value) if isinstance(value, dict) else ""
        if inner:
            return f"{key}.{inner}"
    return ""
