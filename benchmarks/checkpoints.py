"""What a round writes, and what the learner tells the driver, with full banks: bytes and seconds.

Usage: python benchmarks/checkpoints.py OUT [--size 32] [--rounds 12]
FREE on 64 classes of 400 images each, where a round adds 30 images to each class of 4 of 100 teachers of 5 classes;
PURER on the same teachers, whose images and moments a round changes for 4 of them, or for all. The states are those
that the methods begin with, the images are noise: what is measured is the writing, by `runtime.learning.Learning` as in
a run.
"""

import argparse
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_dfml.config import resolve
from ray_dfml.core import seeds
from ray_dfml.methods import METHODS
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods.base import State, World
from ray_dfml.runtime.learning import Learning
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.types import ImageSpec, TeacherCard

CLASSES, TEACHERS, WAY, VISITED, CAPACITY, ADDED = 64, 100, 5, 4, 400, 30


def world(size: int) -> World:
    """A hundred Conv4 teachers of 5 of 64 classes each."""
    image = ImageSpec(channels=3, height=size, width=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    rng = np.random.default_rng(0)
    cards = tuple(
        TeacherCard(
            id=f"t{i}", arch="conv4", image=image,
            classes=tuple(f"c/{c}" for c in rng.choice(CLASSES, WAY, replace=False)),
        )
        for i in range(TEACHERS)
    )  # fmt: skip
    return World(cards=cards, arch="conv4", image=image, way=WAY, seed=0)


def moved(state: State, keys: tuple[str, ...]) -> State:
    """The state with other numbers in every tensor below `keys`, as a round leaves it."""

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: other(item) for key, item in value.items()}
        return torch.rand_like(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {key: other(value) if key in keys else value for key, value in state.items()}


def of_free(state: State, of: World, rounds: int) -> Iterator[State]:
    """States of FREE with a full bank."""
    rng, shape = np.random.default_rng(1), of.image.shape
    bank = {f"c/{c}": rng.integers(0, 256, (CAPACITY, *shape), dtype=np.uint8) for c in range(CLASSES)}
    for _ in range(rounds):
        for i in rng.choice(TEACHERS, VISITED):
            for name in of.cards[i].classes:
                bank = bank_of.add(bank, name, rng.integers(0, 256, (ADDED, *shape), dtype=np.uint8), CAPACITY)
        state = moved(state, ("theta", "stats", "adam", "theta_g", "adam_g", "adam_bell")) | {"bank": bank}
        yield state


def of_purer(state: State, of: World, rounds: int, visited: int) -> Iterator[State]:
    """States of PURER whose rounds visit so many teachers."""
    for r in range(rounds):
        ids = [of.cards[int(i)].id for i in torch.randperm(TEACHERS, generator=seeds.generator(r))[:visited]]
        state = moved(state, ("theta", "stats", "adam"))
        yield (
            state := {**state, "images": state["images"] | moved({id: state["images"][id] for id in ids}, tuple(ids))}
        )


def measure(name: str, method: str, of: World, out: Path, rounds: int, visited: int) -> None:
    """One row: the medians over the rounds after the first."""
    config = resolve(method, settings=[])
    folder = out / name.replace(" ", "-")
    folder.mkdir(parents=True)
    learning = Learning(config.model_dump(mode="json"), of, [], LocalBackend(no_teachers), folder)
    learning.begin()
    begun = METHODS[method].init(config.method, of)
    states = of_free(begun, of, rounds) if method == "free" else of_purer(begun, of, rounds, visited)
    written, told, seconds = [], [], []
    for r, state in enumerate(states):
        trainer = learning._trainer
        trainer.state = {**trainer.state, **state}
        before = {path.name for path in folder.iterdir()}
        began = time.perf_counter()
        done = learning.save(r + 1, {"round": r, "validation": 50.0, **{f"metric/{i}": i / 7 for i in range(30)}})
        seconds.append(time.perf_counter() - began)
        told.append(len(pickle.dumps(done)))
        fresh = [path for path in folder.iterdir() if path.name not in before]
        images = sum(path.stat().st_size for path in fresh if path.name.startswith(("bank-", "images-")))
        written.append((images, sum(path.stat().st_size for path in fresh) - images))
    held = sum(path.stat().st_size for path in folder.iterdir())
    images, other = np.median(written[1:], 0)
    print(
        f"| {name} | {sum(written[0]) / 1e6:.1f} | {images / 1e6:.2f} | {other / 1e6:.2f} | {held / 1e6:.0f} "
        f"| {np.median(seconds[1:]):.2f} | {max(told) / 1e3:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="New folder for the checkpoints.")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    pool = world(given.size)
    print("| state | first, MB | images of a round, MB | the rest, MB | folder, MB | seconds | to the driver, kB |")
    print("|---|---|---|---|---|---|---|")
    measure("free", "free", pool, given.out, given.rounds, VISITED)
    measure(f"purer {VISITED} of {TEACHERS}", "purer", pool, given.out, given.rounds, VISITED)
    measure(f"purer all {TEACHERS}", "purer", pool, given.out, 3, TEACHERS)
