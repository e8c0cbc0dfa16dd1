"""Figures 4, 5 and 8 of FREE, from pools and run folders.

Usage: python -m benchmarks.papers.figures tsne OUT.png --pool POOL --data SPEC [--class NAME] [--steps 100]
       python -m benchmarks.papers.figures gradients OUT.png NAME=RUN[,RUN ...] ...
       python -m benchmarks.papers.figures cka OUT.png --data SPEC TITLE=POOL:N[,POOL:N ...] ...
Each prints the numbers that its picture shows. `tsne` has two panels: ten real images of a class as ten teachers see
them, which is the paper's figure, and images of the class recovered from the teachers that know it, beside real ones,
as one teacher sees them that does not know it. `gradients` draws runs with `method.alignment_every=1`: products of the
gradients of a round's tasks at the same weights, means over the runs of a name. `cka` draws a map for each title, of
the first N teachers of its pools, on 500 real images, which are brought to each teacher's size.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.papers import features as made
from benchmarks.papers.tsne import same_neighbour, tsne
from ray_dfml.core.similarity import linear_cka
from ray_dfml.data import datasets
from ray_dfml.types import Teacher

LARGEST = 150_000
"""Bytes of a picture at most."""
KNOWN = 10
"""Teachers and images of the t-SNE."""
SMOOTH = 5
"""Rounds of a moving mean of the gradients' products."""


def save(figure: Figure, out: Path) -> None:
    """Write a picture. It has the same bytes for the same data."""
    figure.savefig(out, dpi=100, metadata={"Software": None})
    if out.stat().st_size > LARGEST:
        raise SystemExit(f"{out}: {out.stat().st_size} bytes, more than {LARGEST}")


def dots(axes: Axes, places: np.ndarray, groups: np.ndarray, names: Sequence[str], title: str) -> None:
    """Points [n 2] in the colour of their group [n]; groups named `real` are black crosses."""
    for i, name in enumerate(names):
        at, real = places[groups == i], name == "real"
        style = {"c": "black", "marker": "x"} if real else {"c": [f"C{i % 10}"], "marker": "o" if i < 10 else "s"}
        axes.scatter(at[:, 0], at[:, 1], s=24, label=name, **style)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_tsne(args: argparse.Namespace) -> None:
    """Figure 4."""
    name = args.of_class or made.commonest(args.pool)
    data = datasets.load(args.data)
    label = data.class_names.index(name.partition("/")[2])
    rng = np.random.default_rng(args.seed)
    rows = rng.permutation(np.flatnonzero(data.labels == label))[: 4 * KNOWN]
    everyone, knowing = made.teachers(args.pool), made.teachers(args.pool, of_class=name, most=KNOWN)
    seeing: list[Teacher] = [everyone[i] for i in rng.permutation(len(everyone))[:KNOWN]]
    stranger = next(one for one in everyone if name not in one.card.classes)

    seen = np.concatenate([made.features(one, data.images[rows[:KNOWN]]).numpy() for one in seeing])
    by_teacher, by_image = np.repeat(np.arange(len(seeing)), KNOWN), np.tile(np.arange(KNOWN), len(seeing))
    near = [same_neighbour(seen, of) for of in (by_teacher, by_image)]
    print(f"{name}: {len(seen)} points, {len(seeing)} teachers, {KNOWN} images; nearest neighbour of the same teacher "
          f"{near[0]:.2f}, of the same image {near[1]:.2f}")  # fmt: skip

    images = [made.recovered(one, name, steps=args.steps, seed=args.seed) for one in knowing] + [data.images[rows]]
    groups = np.repeat(np.arange(len(images)), [len(part) for part in images])
    felt = made.features(stranger, np.concatenate(images)).numpy()
    of_recovered = groups < len(knowing)
    print(f"recovered from {len(knowing)} teachers in {args.steps} steps, as {stranger.card.id} sees them: nearest "
          f"neighbour among recovered ones of the same teacher "
          f"{same_neighbour(felt[of_recovered], groups[of_recovered]):.2f}; recovered and real kept apart "
          f"{same_neighbour(felt, of_recovered):.2f}")  # fmt: skip

    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots(left, tsne(seen, seed=args.seed), by_teacher, [f"teacher {i}" for i in range(len(seeing))],
         f"{KNOWN} real images, as {len(seeing)} teachers see them")  # fmt: skip
    dots(right, tsne(felt, seed=args.seed), groups, [f"teacher {i}" for i in range(len(knowing))] + ["real"],
         f"recovered from {len(knowing)} teachers, and real (x)")  # fmt: skip
    save(figure, args.out)


def draw_gradients(args: argparse.Namespace) -> None:
    """Figure 5."""
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    panels = {"align/base_product": "mean inner product", "align/base_cosine": "mean cosine"}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, word in enumerate(args.runs):
            name, _, runs = word.partition("=")
            rounds, values = made.over_rounds([Path(run) for run in runs.split(",")], key)
            mean = values.mean(0)
            window = min(SMOOTH, len(mean)) | 1
            smooth = np.convolve(np.pad(mean, window // 2, mode="edge"), np.ones(window) / window, "valid")[: len(mean)]
            axes.plot(rounds, mean, color=f"C{i}", lw=0.6, alpha=0.4)
            axes.plot(rounds, smooth, color=f"C{i}", lw=1.8, label=name)
            third = max(1, len(mean) // 3)
            said = ", ".join(f"{part:.4f}" for part in (values[:, :third].mean(), values[:, -third:].mean()))
            each = ", ".join(f"{value:.4f}" for value in values[:, -third:].mean(1))
            print(f"{name}: {title} in the first and last third of {len(mean)} rounds {said}; last third by run {each}")
        axes.axhline(0, color="#8a94a0", lw=0.8)
        axes.set_xlabel("round")
        axes.set_title(f"{title} of the tasks' gradients", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    save(figure, args.out)


def draw_cka(args: argparse.Namespace) -> None:
    """Figure 8."""
    part = datasets.load(args.data).subset("test").images
    images = part[np.random.default_rng(args.seed).permutation(len(part))[: args.images]]
    figure = Figure(figsize=(3.6 * len(args.maps), 3.5), layout="constrained")
    for axes, word in zip(figure.subplots(1, len(args.maps), squeeze=False)[0], args.maps, strict=True):
        title, _, pools = word.partition("=")
        known: list[Teacher] = []
        for pool in pools.split(","):
            place, _, most = pool.rpartition(":")
            known += made.teachers(place, most=int(most))
        known.sort(key=made.group_of)
        groups = [made.group_of(one) for one in known]
        alike = linear_cka([made.features(one, images) for one in known]).numpy()
        for (one, other), value in made.between(alike, groups).items():
            print(f"{title}: {one} and {other}: mean CKA {value:.3f}")
        shown = axes.imshow(alike, cmap="viridis", vmin=0, vmax=1)
        names = list(dict.fromkeys(groups))
        starts = [groups.index(name) for name in names]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        for edge in starts[1:]:
            axes.axhline(edge - 0.5, color="white", lw=1)
            axes.axvline(edge - 0.5, color="white", lw=1)
        if len(names) > 1:
            middles = [start + (groups.count(name) - 1) / 2 for name, start in zip(names, starts, strict=True)]
            axes.set_yticks(middles, [name.replace(" ", "\n") for name in names])
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
    figure.colorbar(shown, ax=axes, label="linear CKA", shrink=0.85)
    save(figure, args.out)


def main() -> None:
    """Draw the figure that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for name, draw in (("tsne", draw_tsne), ("gradients", draw_gradients), ("cka", draw_cka)):
        one = kinds.add_parser(name)
        one.set_defaults(draw=draw)
        one.add_argument("out", type=Path)
        one.add_argument("--seed", type=int, default=0)
        if name == "tsne":
            one.add_argument("--pool", required=True)
            one.add_argument("--class", dest="of_class", default="")
            one.add_argument("--steps", type=int, default=100)
        if name == "gradients":
            one.add_argument("runs", nargs="+", metavar="NAME=RUN[,RUN]")
        else:
            one.add_argument("--data", required=True)
        if name == "cka":
            one.add_argument("maps", nargs="+", metavar="TITLE=POOL:N[,POOL:N]")
            one.add_argument("--images", type=int, default=500)
    args = parser.parse_args()
    args.draw(args)


if __name__ == "__main__":
    main()
