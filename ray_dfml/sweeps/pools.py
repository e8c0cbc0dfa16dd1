"""The pools of a sweep: folders that are there, or one that the sweep builds for itself from a recipe."""

from collections.abc import Callable
from pathlib import Path

from ray_dfml.data.pool import Pool
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.runtime import build_pool, cost_lines, host
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.place import opened
from ray_dfml.sweeps.spec import PoolRecipe, Sweep

POOL = "pool"
"""The folder in a sweep of the pool that it builds."""


def of(sweep: Sweep, folder: Path) -> tuple[str, ...]:
    """The pool folders of a sweep's trials, whether they are there yet or not."""
    return (str(folder / POOL),) if isinstance(sweep.pool, PoolRecipe) else sweep.pool


def build(recipe: PoolRecipe, path: Path, *, local: bool, say: Callable[[str], None]) -> None:
    """Train the teachers of a recipe that the pool in `path` lacks; with `local` in this process, else on shards."""
    image, planned = build_pool.plan(
        recipe.data, models=recipe.models, archs=recipe.archs, way=recipe.way, seed=recipe.seed, note=say
    )
    pool = Pool.at(path)
    lacking = recipe.models - len(pool.cards)
    if not lacking:
        return
    say(f"pool: {lacking} teachers of {recipe.data} are trained")
    cfg = PretrainConfig(epochs=recipe.epochs)
    machine = Machine(backend="local" if local else "ray", workers=min(recipe.models, host.processors()))
    say(cost_lines.of_pool(recipe.data, build_pool.lacking(pool, planned), cfg, 1 if local else machine.workers))
    with opened(machine) as place:
        build_pool.build(
            pool, recipe.data, image, planned, cfg, backend=place.backend(),
            at_once=2 * machine.workers, seed=recipe.seed, access=recipe.access, on_teacher=lambda *_: None,
        )  # fmt: skip
