"""What services, which give no weights, can teach a learner: trials on validation episodes of Omniglot or other data.

Usage: python benchmarks/no_weights.py pools POOL OUT
       python benchmarks/no_weights.py answers SPEC POOL
       python benchmarks/no_weights.py validate SPEC RUN RUN...
       python benchmarks/no_weights.py panel SPEC POOL RUN [--images strokes] [--queries 2000] [--target logprobs]

`pools` copies a pool of 20 Conv4 into OUT: `labels` (all give labels), `probs`, and `mixed`, of which the first ten
give weights, five probabilities and five labels.

`answers` joins the answers of all teachers to an image into one vector, and classifies real validation episodes by the
nearest class mean of these vectors. That is no data-free learner, since it asks the teachers about the episodes: it
tells how much the answers hold.

`validate` prints the accuracy of the learners of run folders, and the paired difference to the first one.

`panel` starts from the learner of a run of `no-pool`. It asks all teachers about the same images of sources, as dark on
light and as magnified as those of the preset `no-pool-characters`, and trains the learner's features to hold the
answers. `logprobs` and `label` are read by a linear layer, with squared error or cross-entropy; `components` are the
principal components of the log-probabilities, which the features must equal, so that distances between images are the
teachers'.
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ray_dfml.config import resolve
from ray_dfml.core import episodes, optim
from ray_dfml.core.images import normalise, to_bytes, to_pixels
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.core.sources import SOURCES
from ray_dfml.core.sources.warp import Warp, warp, zoom
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.evaluate import EvalConfig
from ray_dfml.learner import Learner
from ray_dfml.methods import no_pool
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.runtime.shard import Shard
from ray_dfml.scorer import Episodes, Part, accuracies
from ray_dfml.types import Labelled, LearnerWeights

SHOTS = (1, 5)
ACCESS = {
    "labels": ("label",) * 20,
    "probs": ("probs",) * 20,
    "mixed": ("weights",) * 10 + ("probs",) * 5 + ("label",) * 5,
}
LEAST = 1e-4
"""The least probability whose logarithm is a target, as of a service that rounds to four decimals."""


def make_pools(given: argparse.Namespace) -> None:
    """Copy the pool with other levels of access."""
    for name, levels in ACCESS.items():
        shutil.copytree(given.pool, given.out / name, dirs_exist_ok=True)
        path = given.out / name / "pool.yaml"
        content = yaml.safe_load(path.read_text())
        for entry, access in zip(content["teachers"], levels, strict=True):
            entry["access"] = access
        path.write_text(yaml.safe_dump(content))


def validation(spec: str) -> Labelled:
    """The validation images."""
    part = datasets.load(spec).subset("val")
    return Labelled("validation", "val", np.ascontiguousarray(part.images), part.labels)


def accuracy(weights: LearnerWeights, data: Labelled, shot: int, count: int) -> np.ndarray:
    """Accuracies [count] in percent on validation episodes, 5-way."""
    of = Episodes(
        weights=weights.digest, reading="finetune", data=data.data, split=data.split, shot=shot, lr=weights.lr
    )
    part = Part(episodes=of, start=0, stop=count)
    return accuracies(LocalBackend(no_teachers), EvalConfig(), weights, part, data, way=5)


def row(name: str, found: dict[int, np.ndarray], first: dict[int, np.ndarray]) -> str:
    """A row of a table: the accuracies, and their paired differences to the first ones."""
    cells = [name]
    for shot in SHOTS:
        cells.append("{:.2f} ± {:.2f}".format(*mean_ci95(found[shot])))
        cells.append("{:+.2f} ± {:.2f}".format(*mean_ci95(found[shot] - first[shot])) if found is not first else "")
    return f"| {' | '.join(cells)} |"


def logits_of(pool: Pool, pixels: Tensor) -> Tensor:
    """Logits [n t q] that the t teachers give to pixels [n c h w]."""
    shard, found = Shard(lambda id: (pool.entry(id).inside, *pool.load(id))), []
    for card in pool.cards:
        teacher = shard.teacher(card.id)
        mean, std = (torch.tensor(values) for values in (teacher.card.image.mean, teacher.card.image.std))
        with torch.no_grad():
            parts = [teacher.net(teacher.theta, normalise(x, mean, std), teacher.stats, first_order=True)
                     for x in pixels.split(500)]  # fmt: skip
        found.append(torch.cat(parts))
    return torch.stack(found, 1)


def nearest(vectors: Tensor, labels: np.ndarray, shot: int, count: int) -> np.ndarray:
    """Accuracies [count] in percent of the nearest class mean of vectors [n d], in 5-way episodes."""
    rng, found = torch.Generator().manual_seed(shot), []
    rows = [torch.tensor(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    truth = episodes.interleaved(5, 15).sort().values
    for _ in range(count):
        drawn = [rows[i] for i in torch.randperm(len(rows), generator=rng)[:5].tolist()]
        drawn = [own[torch.randperm(len(own), generator=rng)[: shot + 15]] for own in drawn]
        means = torch.stack([vectors[own[:shot]].mean(0) for own in drawn])
        best = torch.cdist(vectors[torch.cat([own[shot:] for own in drawn])], means).argmin(1)
        found.append(100 * float((best == truth).float().mean()))
    return np.array(found)


def answers(given: argparse.Namespace) -> None:
    """Print what the joined answers of all teachers tell of new classes."""
    data, pool = validation(given.spec), Pool.open(given.pool)
    logits = logits_of(pool, to_pixels(data.images))
    forms = {
        "logits": logits - logits.mean(2, keepdim=True),
        "log-probabilities": logits.log_softmax(2).clamp_min(np.log(LEAST)),
        "probabilities": logits.softmax(2),
        "labels": F.one_hot(logits.argmax(2), logits.shape[2]).float(),
    }
    print("| answers | 1-shot | 5-shot |\n|---|---|---|")
    for name, form in forms.items():
        cells = ["{:.2f} ± {:.2f}".format(*mean_ci95(nearest(form.flatten(1), data.labels, shot, given.episodes)))
                 for shot in SHOTS]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def validate(given: argparse.Namespace) -> None:
    """Print a row for each run."""
    data, first = validation(given.spec), None
    print("| run | 1-shot | over the first | 5-shot | over the first |\n|---|---|---|---|---|")
    for run in given.runs:
        weights = Learner.load(run).weights
        found = {shot: accuracy(weights, data, shot, given.episodes) for shot in SHOTS}
        first = first or found
        print(row(run.name, found, first), flush=True)


def asked_about(names: list[str], count: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Images [n c h w] of sources in equal parts, dark on light; five warps of each, strokes magnified."""
    cfg: no_pool.Config = no_pool.Config.model_validate(
        resolve("no-pool", preset="no-pool-characters").method.model_dump()
    )
    bend = Warp(rotation=cfg.rotation, scale=cfg.scale, shear=cfg.shear, shift=cfg.shift, elastic=cfg.elastic,
                mirror=False)  # fmt: skip
    parts = []
    for name in names:
        each = count // len(names)
        base = SOURCES[name].function(rng, -(-each // 5), shape)
        base = zoom(rng, base, cfg.zoom_low, cfg.zoom_high) if name == "strokes" else base
        parts.append(warp(rng, (1 - base).repeat_interleave(5, 0), bend, fill="edge")[:each])
    return torch.cat(parts)


def panel(given: argparse.Namespace) -> None:
    """Train features to hold the answers of all teachers, and print accuracies before and after."""
    pool, weights, data = Pool.open(given.pool), Learner.load(given.run).weights, validation(given.spec)
    rng, net, theta = torch.Generator().manual_seed(given.seed), weights.net, weights.theta.clone()
    pixels = to_pixels(to_bytes(asked_about(given.images.split(","), given.queries, weights.image.shape, rng)))
    logits = logits_of(pool, pixels)
    best, (count, q) = logits.argmax(2), logits.shape[1:]
    shares = torch.stack([best[:, t].bincount(minlength=q) / len(best) for t in range(count)])
    print(f"rarest of {q} answers, mean over teachers: {100 * shares.min(1).values.mean():.1f} %")
    x = normalise(pixels, torch.tensor(weights.image.mean), torch.tensor(weights.image.std))
    soft = logits.log_softmax(2).clamp_min(np.log(LEAST))
    soft = soft - soft.mean(2, keepdim=True)
    soft = (soft - soft.mean(0)) / soft.std((0, 2), keepdim=True)
    size = net.features(theta, x[:2]).shape[1]
    flat = soft.flatten(1)
    own = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:size].T
    own = 2 + 0.8 * own / own.std()  # features are not negative
    read = torch.randn(count * q, size, generator=rng) / size**0.5
    adam, adam_read = optim.Adam.zeros(theta), optim.Adam.zeros(read)

    def loss_of(theta: Tensor, read: Tensor, rows: Tensor) -> Tensor:
        features = net.features(theta, x[rows], first_order=True)
        if given.target == "components":
            return (features - own[rows]).square().mean() + 0 * read.sum()
        found = F.linear(features, read).unflatten(1, (count, q))
        if given.target == "label":
            return F.cross_entropy(found.flatten(0, 1), best[rows].flatten())
        return (found - found.mean(2, keepdim=True) - soft[rows]).square().mean()

    began = time.process_time()
    first = {shot: accuracy(weights, data, shot, given.episodes) for shot in SHOTS}
    print("| after | 1-shot | over the start | 5-shot | over the start |\n|---|---|---|---|---|")
    print(row("0 steps", first, first), flush=True)
    for step in range(1, given.steps + 1):
        rows = torch.randint(0, len(x), (128,), generator=rng)
        leaves = theta.detach().requires_grad_(), read.detach().requires_grad_()
        loss = loss_of(*leaves, rows)
        grads = torch.autograd.grad(loss, leaves)
        lr = given.lr * 0.5 * (1 + np.cos(np.pi * step / given.steps))
        theta, adam = optim.adam_step(theta, grads[0], adam, lr=lr)
        read, adam_read = optim.adam_step(read, grads[1], adam_read, lr=3 * lr)
        if step % given.every == 0:
            now = replace(weights, theta=theta.detach())
            found = {shot: accuracy(now, data, shot, given.episodes) for shot in SHOTS}
            print(row(f"{step} steps, loss {float(loss.detach()):.3f}", found, first), flush=True)
    print(f"{time.process_time() - began:.0f} s")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="kind", required=True)
    pools = kinds.add_parser("pools")
    pools.add_argument("pool", type=Path)
    pools.add_argument("out", type=Path)
    asked = kinds.add_parser("answers")
    shown = kinds.add_parser("validate")
    trained = kinds.add_parser("panel")
    for one, count in ((asked, 300), (shown, 300), (trained, 200)):
        one.add_argument("spec")
        one.add_argument("--episodes", type=int, default=count)
    for one in (asked, trained):
        one.add_argument("pool", type=Path)
    shown.add_argument("runs", type=Path, nargs="+")
    trained.add_argument("run", type=Path)
    trained.add_argument("--images", default="strokes")
    trained.add_argument("--queries", type=int, default=2000)
    trained.add_argument("--target", default="logprobs", choices=("logprobs", "label", "components"))
    trained.add_argument("--steps", type=int, default=400)
    trained.add_argument("--every", type=int, default=400)
    trained.add_argument("--lr", type=float, default=2e-3)
    trained.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    {"pools": make_pools, "answers": answers, "validate": validate, "panel": panel}[given.kind](given)


if __name__ == "__main__":
    main()
