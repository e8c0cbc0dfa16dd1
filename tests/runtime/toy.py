"""A toy world: small images of separable classes, teachers of them, FREE in about a second, and equality in bits."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ray_dfml import examples, gallery
from ray_dfml.config import RunConfig, resolve
from ray_dfml.data import weights_file
from ray_dfml.data.pool import Pool
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.errors import Interrupted
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import build_pool as builder
from ray_dfml.runtime import driver
from ray_dfml.runtime.checkpoint import Checkpoints
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.local import LocalBackend, LocalSession, no_teachers
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.runtime.storage import Folder
from ray_dfml.scorer import Entry, Scorer
from ray_dfml.types import Score

CLASSES = {"train": 12, "val": 6, "test": 8}

EVAL = ("eval.episodes=20", "eval.val_episodes=10", "eval.query=3", "eval.shots=[1]", "eval.steps=3", "eval.every=1")

FREE = (
    "method.rounds=6", "method.warmup=1", "method.width=4", "method.latent=8", "method.images_per_class=8",
    "method.teachers_per_round=2", "method.steps=2", "method.replay.shot=1", "method.replay.query=3",
    "method.replay.max_updates=2", "method.replay.tasks=3", "method.replay.inner_steps=2", "method.alignment_every=2",
)  # fmt: skip

ORACLE = (
    "method.rounds=2", "method.updates_per_round=3", "method.replay.shot=1", "method.replay.query=3",
    "method.replay.tasks=3", "method.replay.inner_steps=2",
)  # fmt: skip

PURER = (
    "method.rounds=4", "method.image_warmup=1", "method.image_steps=2", "method.updates=2", "method.curriculum_after=2",
    "method.curriculum_patience=1", "method.images_per_class=5", "method.meta.shot=1", "method.meta.query=3",
    "method.meta.tasks=2", "method.meta.inner_steps=1",
)  # fmt: skip

BIDF = (
    "method.rounds=3", "method.teachers_per_round=2", "method.iterations=3", "method.images_per_class=6",
    "method.width=4", "method.latent=8", "method.inner_steps=2", "method.generate_every=3", "method.replay.shot=1",
    "method.replay.query=3", "method.replay.tasks=3", "method.replay.inner_steps=1",
)  # fmt: skip

DRO = ("method.rounds=2", "method.steps_per_round=3", "method.hidden=16", "method.chunk=2048")

NO_POOL = (
    "method.rounds=2", "method.updates_per_round=3", "method.classes=6", "method.images_per_class=4",
    "method.replay.shot=1", "method.replay.query=3", "method.replay.tasks=3", "method.replay.inner_steps=2",
)  # fmt: skip

DISTILLER = (
    "method.budget=56", "method.batch=8", "method.student=conv4", "method.replays=1", "method.last_steps=2",
    "method.student_batch=4", "eval.every=1",
)  # fmt: skip
INVERTER = (*DISTILLER, "method.iterations=2")
ZSDB3 = (*DISTILLER, "method.budget=200", "method.batch=2", "method.candidates=4", "method.directions=2")

IDEAL = (
    "method.budget=24", "method.batch=8", "method.first=8", "method.growth=0", "method.student=conv4",
    "method.student_batch=4", "method.steps=1", "method.last_steps=2", "method.images=[dip,mutants]",
    "eval.every=1",
)  # fmt: skip

SHARED_ANSWERS = (
    "method.budget=20", "method.batch=8", "method.images=[shapes,dip]", "method.steps=3", "method.fits=2",
    "method.minibatch=6", "method.inversion.images_per_class=1", "method.inversion.steps=2",
)  # fmt: skip

SETTINGS: dict[str, tuple[str, ...]] = {
    "free": FREE + EVAL, "maml-oracle": ORACLE + EVAL, "purer": PURER + EVAL, "bidf-mkd": BIDF + EVAL,
    "dro": DRO + EVAL, "no-pool": NO_POOL + EVAL, "ideal": IDEAL,
    "shared-answers": SHARED_ANSWERS + EVAL,
    **dict.fromkeys(("dafl", "zskt", "dast"), DISTILLER), **dict.fromkeys(("deepinversion", "cmi"), INVERTER),
    "dfme": (*DISTILLER, "method.generator_steps=1"), "zsdb3": ZSDB3,
}  # fmt: skip
"""Method -> its small settings; the baselines have only those of the test."""

LOCAL = Machine(backend="local")


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def flags(method: str, *more: str) -> list[str]:
    """The small settings as words of a command line."""
    return [word for text in (*SETTINGS.get(method, EVAL), *more) for word in ("--set", text)]


def write_images(root: Path) -> None:
    """Class folders under train, val and test: every class is a pattern of 4x4 blocks, every image adds noise."""
    rng = np.random.default_rng(0)
    for split, count in CLASSES.items():
        for c in range(count):
            pattern = np.kron(rng.integers(0, 256, (4, 4)), np.ones((4, 4)))
            folder = root / split / f"{split}{c:02d}"
            folder.mkdir(parents=True)
            for i in range(20):
                pixels = np.clip(pattern + rng.normal(0, 40, (16, 16)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")


def build_pool(path: Path, spec: str, *, models: int, way: int, archs: tuple[str, ...] = ("conv4",)) -> Path:
    """A pool of quickly trained teachers."""
    image, planned = builder.plan(spec, models=models, archs=archs, way=way, seed=0)
    recipe = PretrainConfig(epochs=4, batch=16)
    builder.build(
        Pool.create(path), spec, image, planned, recipe, backend=LocalBackend(no_teachers), seed=0,
        on_teacher=lambda *_: None,
    )  # fmt: skip
    return path


def damage(pool: Path, copy: Path, place: int, factor: float) -> str:
    """Copy a pool and multiply one teacher's kernels, with the sha256 of what is written. Returns that teacher's id."""
    shutil.copytree(pool, copy)
    content = yaml.safe_load((copy / "pool.yaml").read_text())
    entry = content["teachers"][place]
    file = copy / entry["weights"]
    tensors = weights_file.from_safetensors(file.read_bytes())
    weights_file.write(file, {name: x * factor if x.ndim > 1 else x for name, x in tensors.items()})
    entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "pool.yaml").write_text(yaml.safe_dump(content))
    return str(entry["id"])


def config(method: str, pool: Path | None, data: str | None, *more: str, **values: Any) -> RunConfig:
    """The small configuration of a method."""
    return resolve(
        method, settings=[*SETTINGS.get(method, EVAL), *more], pool=(str(pool),) if pool else (),
        data=(data,) if data else (), **values,
    )  # fmt: skip


def train(config: RunConfig, path: Path, machine: Machine = LOCAL) -> list[dict[str, Any]]:
    """A whole run without its report. Returns the rows of `scores.json`."""
    inputs = driver.read_inputs(config)
    folder = RunFolder.create(path, config, {"pool": inputs.pools, "data": inputs.data})
    return driver.run(config, inputs, folder, machine, Progress(quiet=True))


def scores_of(trainer: Trainer, *selections: str) -> list[Score]:
    """Test scores of a trainer's weights in all readings of its method."""
    cfg, world, weights = trainer.config, trainer.world, trainer.candidates()
    val, test = ([(one.data, split) for one in trainer._sets if one.split == split] for split in ("val", "test"))
    scorer = Scorer(cfg.eval, way=world.way, head=world.head, val=val, test=test, ask=trainer.score)
    return scorer.test([
        Entry(method=cfg.name, selection=name, weights=weights[name], readings=trainer.method.readings)
        for name in selections
    ])  # fmt: skip


def last_state(run: Path) -> dict[str, Any]:
    """The state in the last checkpoint."""
    found = Checkpoints(Folder(run / "checkpoints")).load()
    assert found is not None, f"{run}: no checkpoint"
    return found[1]


def status(run: Path) -> dict[str, Any]:
    """`status.json`."""
    return json.loads((run / "status.json").read_text())


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal trees: the same keys, types, shapes and bits."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor | np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), f"{where} differs"
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs ended in the same bits: weights, the whole last state, scores, and the accuracy of every episode."""
    assert (a / "learner.safetensors").read_bytes() == (b / "learner.safetensors").read_bytes()
    assert_equal(last_state(a), last_state(b))
    assert json.loads((a / "scores.json").read_text()) == json.loads((b / "scores.json").read_text())
    for name in ("episodes.parquet", gallery.FILE, examples.FILE):
        assert (a / name).exists() == (b / name).exists(), name
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes(), name


def stopped_after_each_round(config: RunConfig, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a run that is stopped after every round and resumed, until it is done."""
    save = LocalSession.save

    def save_and_stop(session: LocalSession, rounds: int, row: dict[str, Any]) -> None:
        save(session, rounds, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalSession, "save", save_and_stop)
    inputs = driver.read_inputs(config)
    folder = RunFolder.create(path, config, {"pool": inputs.pools, "data": inputs.data})
    for _ in range(config.total_rounds):
        with pytest.raises(Interrupted):
            driver.run(config, inputs, folder, LOCAL, Progress(quiet=True))
    driver.run(config, inputs, folder, LOCAL, Progress(quiet=True))
