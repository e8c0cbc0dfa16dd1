"""What the size of the test step does to 1-shot accuracy: `random`, and exported learners, on the same real episodes.

Usage: python benchmarks/test_step.py SPEC RUN [RUN ...] [--episodes 200] [--steps 0.01,0.05,0.2]
The last rows divide the weights of `random` by sqrt(20), as an average of 20 independent networks does.
"""

import argparse
import math

import numpy as np
import torch

from ray_dfml import Learner, evaluate
from ray_dfml.core import seeds
from ray_dfml.core.scoring import mean_ci95
from ray_dfml.data import load
from ray_dfml.runtime.shard import Shard


def main() -> None:
    """Print one line per weights and step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", default="0.01,0.05,0.2")
    given = parser.parse_args()
    test, shard = load(given.spec).subset("test"), Shard(lambda id: (_ for _ in ()).throw(KeyError(id)))
    learners = {run: Learner.load(run) for run in given.runs}
    first = next(iter(learners.values()))
    network, stats = first.net, first.net.initial_stats()
    fresh = network.init(seeds.generator(first.seed, "theta"), zero_head_bias=True)
    parts = network.layout.unflatten(fresh / math.sqrt(20))
    scaled = {name: torch.ones_like(p) if name.endswith("norm.weight") else p for name, p in parts.items()}
    weights = {"random": (fresh, stats), "random / sqrt(20)": (network.layout.flatten(scaled), stats)}
    weights |= {run: (one.theta, one.stats) for run, one in learners.items()}
    for lr in (float(step) for step in given.steps.split(",")):
        cfg = evaluate.EvalConfig(lr=lr)
        for name, (theta, running) in weights.items():
            shared = evaluate.shared(
                cfg,
                arch=first.arch,
                image=first.image,
                outputs=first.way,
                theta=theta.numpy(),
                stats=running.numpy(),
                reading="finetune",
                images=np.ascontiguousarray(test.images),
                labels=test.labels,
            )
            jobs = evaluate.jobs(cfg, way=first.way, shot=1, count=given.episodes)
            results = shard.run("evaluate", jobs, shared)
            mean, ci95 = mean_ci95(np.concatenate([result["accuracies"] for result in results]))
            print(f"step {lr:g}  {name:<24} {mean:.2f} ± {ci95:.2f}", flush=True)


if __name__ == "__main__":
    main()
