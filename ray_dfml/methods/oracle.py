"""`maml-oracle`: the same learner, trained by MAML on real meta-train images. It is a ceiling, and not data-free.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Algorithm 2.
"""

from pydantic import Field

from ray_dfml.errors import first_of
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import panels, replay
from ray_dfml.methods.base import Cost, MetaConfig, Method, MethodConfig, Metrics, Send, State, World, initial_learner
from ray_dfml.types import Arrays, Shard


class Config(MethodConfig):
    """Number of meta-updates = `rounds` x `updates_per_round`."""

    rounds: int = Field(default=100, ge=1, description="Outer iterations.")
    updates_per_round: int = Field(default=10, ge=1, description="Meta-updates in a round.")
    replay: MetaConfig = MetaConfig()


def notes(cfg: Config, world: World) -> list[str]:
    """Lines that name the classes with too few images for a task, and the data sets with too few classes."""
    ready = _classes(cfg, world)
    small = [f"{name} has {len(images)}" for name, images in world.real.items() if name not in ready]
    said = bank_of.notes(cfg.replay, world.way, ready)
    if small:
        said.append(
            f"maml-oracle: {len(small)} of {len(world.real)} training classes have fewer than the "
            f"{cfg.replay.shot + cfg.replay.query} images of a task and are left out: {first_of(small)}"
        )
    return said


def _classes(cfg: Config, world: World) -> list[str]:
    return bank_of.ready(world.real, cfg.replay.shot + cfg.replay.query)


def init(cfg: Config, world: World) -> State:
    """The learner drawn from the run's seed, as in every method. Raises UsageError if no task can be drawn."""
    if world.real:
        bank_of.check("maml-oracle", "method.replay", cfg.replay, world.way, _classes(cfg, world))
    return replay.with_optimiser(initial_learner(world))


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Make `updates_per_round` meta-updates on tasks of real images."""
    metrics: Metrics = {}
    for u in range(cfg.updates_per_round):
        state, metrics = replay.update(cfg.replay, world, state, world.real, (r, "real", u), send)
    return state, {f"replay/{name}": value for name, value in metrics.items()}


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """The number of updates. Nothing is recovered."""
    updates = cfg.rounds * cfg.updates_per_round
    return Cost(least=updates, most=updates, meta=cfg.replay)


METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    notes=notes,
    cost=cost,
    panels=panels.LAST_UPDATE,
    shown={"replay/accuracy": "training"},
    needs_pool=False,
    needs_real=True,
)
