"""What the pool doctor finds: ten planted faults among twenty good teachers, in one pool a seed.

Usage: python benchmarks/doctor.py SPEC OUT --seeds 3 4 5 [--good 20] [--pool SEED=POOL ...]
The good teachers of a seed are those of a pool that is named, or the first that `pool build --seed SEED` would make.
The faults, at random places among them:

* labels (4): teachers of further classes with the recipe of `pool build`, trained on shuffled labels until they know
  all of their images by heart. Their reported accuracy is that on these images.
* noise (3): fresh weights and statistics; fresh weights with the statistics of a good teacher; a good teacher's weights
  in a random order (`pool.fraction_poisoned`).
* copies (3): a good teacher with its classes renamed and in another order; one with noise of 5 % of its weights' spread
  added to all weights; and one whose hidden channels are in another order, which has the same answers.

A fault is found if the doctor would leave the teacher out. A copy is found too if its original is left out in its
place, and that does not count against the original. All else that is left out is wrongly accused.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core import seeds
from ray_dfml.core.net import net
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.doctor.examine import examine
from ray_dfml.runtime import build_pool
from ray_dfml.runtime.choice import shuffled
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.types import TeacherCard

LABELS, WAY = 4, 5
Member = tuple[TeacherCard, Tensor, Tensor]
"""Card, weights [p] and running statistics [k]."""


def good_ones(spec: str, seed: int, count: int, path: Path) -> list[Member]:
    """The good teachers of a seed, which are built in `path` unless they are there."""
    image, planned = build_pool.plan(spec, models=count, archs=["conv4"], way=WAY, seed=seed)
    pool = Pool.at(path)
    build_pool.build(
        pool, spec, image, planned, PretrainConfig(), backend=LocalBackend(no_teachers), seed=seed,
        on_teacher=lambda id, accuracy: print(f"  {id} {accuracy:.0f} %", flush=True),
    )  # fmt: skip
    return [(card, *(torch.tensor(part) for part in pool.load(card.id))) for card in pool.cards[:count]]


def by_heart(spec: str, seed: int, first: int) -> list[Member]:
    """Teachers trained on shuffled labels; the epoch that is best on the training images is kept."""
    image, planned = build_pool.plan(spec, models=first + LABELS, archs=["conv4"], way=WAY, seed=seed)
    images, found = datasets.load(spec).subset("train").images, []
    for id, arch, names, job in planned[first:]:
        rows = job.values["rows"][~job.values["held_out"]]
        rng = seeds.rng(seed, "shuffle", id)
        labels = job.values["labels"][~job.values["held_out"]][torch.randperm(len(rows), generator=rng).numpy()]
        twice = {
            "images": images[np.concatenate([rows, rows])], "labels": np.concatenate([labels, labels]),
            "held_out": np.arange(2 * len(rows)) >= len(rows),
        }  # fmt: skip
        (made,) = LocalBackend(no_teachers).map(
            "pretrain", [replace(job, values=job.values | twice)], {"cfg": PretrainConfig().model_dump()}
        )
        print(f"  {id} on shuffled labels: {made['accuracy_best']:.0f} % of its own images", flush=True)
        card = TeacherCard(
            id=id, arch=arch, image=image, classes=names, access="weights", sha256="", accuracy=made["accuracy_best"]
        )
        found.append((card, torch.tensor(made["theta"]), torch.tensor(made["stats"])))
    return found


def noises(good: Sequence[Member], rng: torch.Generator) -> list[Member]:
    """Three teachers that know nothing, under the cards of good ones."""
    (a, _, _), (b, _, stats), (c, theta, rest) = good
    network = net(a.arch, a.image.shape, len(a.classes))
    _, mixed, same = shuffled((c, theta.numpy(), rest.numpy()), int(torch.randint(2**31, (1,), generator=rng)))
    return [
        (a, network.init(rng), network.initial_stats()), (b, network.init(rng), stats),
        (c, torch.tensor(mixed), torch.tensor(same)),
    ]  # fmt: skip


def copied(good: Sequence[Member], rng: torch.Generator) -> list[Member]:
    """Three copies of good teachers: with another order of classes, with a little noise, with hidden units swapped."""
    (a, theta_a, stats_a), (b, theta_b, stats_b), (c, theta_c, stats_c) = good
    network = net(a.arch, a.image.shape, len(a.classes))
    order = torch.arange(len(a.classes)).roll(1)
    parts = network.layout.unflatten(theta_a)
    turned = {name: part[order] if name.startswith("head.") else part for name, part in parts.items()}
    noisy = {
        name: part + 0.05 * part.std(correction=0) * torch.randn(part.shape, generator=rng)
        for name, part in network.layout.unflatten(theta_b).items()
    }
    renamed = replace(a, classes=tuple(f"{name}-copy" for name in a.classes))
    return [
        (renamed, network.layout.flatten(turned), stats_a), (b, network.layout.flatten(noisy), stats_b),
        (c, *_swapped(c, theta_c, stats_c, rng)),
    ]  # fmt: skip


def _swapped(card: TeacherCard, theta: Tensor, stats: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A Conv4 with the channels of its first three blocks in another order, which computes the same."""
    network = net(card.arch, card.image.shape, len(card.classes))
    parts, rest = dict(network.layout.unflatten(theta)), dict(network.stats_layout.unflatten(stats))
    for block in range(3):
        order = torch.randperm(len(parts[f"blocks.{block}.conv.weight"]), generator=rng)
        for group in (parts, rest):
            mine = [name for name in group if name.startswith(f"blocks.{block}.")]
            group |= {name: group[name][order] for name in mine}
        after = f"blocks.{block + 1}.conv.weight"
        parts[after] = parts[after][:, order]
    return network.layout.flatten(parts), network.stats_layout.flatten(rest)


def planted(spec: str, seed: int, good: Sequence[Member], path: Path) -> tuple[Pool, dict[str, str], dict[str, str]]:
    """A pool of the good teachers and the faults in a random order; id of a fault -> its kind, and copy -> original."""
    rng = seeds.rng(seed, "faults")
    drawn = [good[n] for n in torch.randperm(len(good), generator=rng)[:6].tolist()]
    faults = [("labels", one) for one in by_heart(spec, seed, len(good))]
    faults += [("noise", one) for one in noises(drawn[:3], rng)] + [("copy", one) for one in copied(drawn[3:], rng)]
    members = [("good", one) for one in good] + faults
    pool, kinds, originals, ids = (
        Pool.create(path),
        {},
        {},
        {card.id: f"g{n:02d}" for n, (card, _, _) in enumerate(good)},
    )
    for n in torch.randperm(len(members), generator=rng).tolist():
        kind, (card, theta, stats) = members[n]
        id = ids[card.id] if kind == "good" else f"f{n - len(good):02d}"
        network = net(card.arch, card.image.shape, len(card.classes))
        tensors = network.layout.unflatten(theta) | network.stats_layout.unflatten(stats)
        pool.add(
            id, tensors, arch=card.arch, image=card.image, classes=card.classes, accuracy={"reported": card.accuracy},
            source="benchmark",
        )  # fmt: skip
        if kind != "good":
            kinds[id] = kind
        if kind == "copy":
            originals[id] = ids[card.id]
    return pool, kinds, originals


def main() -> None:
    """Plant, examine, count, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--good", type=int, default=20)
    parser.add_argument("--pool", action="append", default=[], metavar="SEED=POOL")
    given = parser.parse_args()
    pools = {int(seed): Path(path) for seed, _, path in (text.partition("=") for text in given.pool)}
    lines = ["| seed | labels | noise | copies | found | wrongly accused |", "|---|---|---|---|---|---|"]
    for seed in given.seeds:
        print(f"seed {seed}", flush=True)
        good = good_ones(given.spec, seed, given.good, pools.get(seed, given.out / f"good-{seed}"))
        clean = _accused(Pool.open(pools.get(seed, given.out / f"good-{seed}")))
        pool, kinds, originals = planted(given.spec, seed, good, given.out / f"planted-{seed}")
        out = _accused(pool)
        found = {id for id in kinds if id in out or originals.get(id) in out}
        wrong = set(out) - set(kinds) - {originals[id] for id in kinds if id in originals and id not in out}
        count, of = Counter(kinds[id] for id in found), Counter(kinds.values())
        shares = " | ".join(f"{count[kind]} of {of[kind]}" for kind in ("labels", "noise", "copy"))
        lines.append(f"| {seed} | {shares} | {len(found)} of {len(kinds)} | {len(wrong)} of {len(good)} |")
        for id in sorted(set(kinds) - found) + sorted(wrong):
            print(f"  missed {kinds[id]} {id}" if id in kinds else f"  accused {id}: {out[id]}", flush=True)
        print(f"  without faults, {len(clean)} of {len(good)} are accused", flush=True)
    print("\n".join(lines))


def _accused(pool: Pool) -> dict[str, list[str]]:
    return examine(pool).leave_out()


if __name__ == "__main__":
    main()
