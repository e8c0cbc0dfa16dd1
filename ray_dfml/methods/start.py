"""Where the learner of a method starts: at random, at the mean of the teachers' weights, or after `no-pool`.

The rounds of the start are the first ones of a run, each with a checkpoint. They change the learner's weights and
batch-norm statistics alone. The method begins after them, with fresh optimisers and its own round 0. What it gains over
its start, its teachers have taught; a run of `no-pool` with the same seed and settings ends in the same bits as the
start does.
"""

from collections.abc import Sequence
from dataclasses import replace

from ray_dfml.errors import UsageError
from ray_dfml.methods import no_pool, replay
from ray_dfml.methods.base import Cost, Metrics, Send, State, World
from ray_dfml.methods.baselines import check_same_network, fetch, mean
from ray_dfml.types import Shard, TeacherCard

RANDOM, AVERAGE, NO_POOL = "random", "average", "no-pool"
STARTS = (RANDOM, AVERAGE, NO_POOL, *no_pool.PRESETS)
"""What `learner.start` may be. A preset of `no-pool` stands for `no-pool` with its settings."""

KEY = "start"
"""The key in the state of the optimiser of a start that is not done yet."""


def meta_trains(start: str) -> bool:
    """Whether a start is `no-pool`, and so has settings."""
    return start not in (RANDOM, AVERAGE)


def rounds(start: str, cfg: no_pool.Config | None) -> int:
    """The rounds that a start takes: none, one to fetch the teachers' weights, or those of `no-pool`."""
    return cfg.rounds if cfg else int(start == AVERAGE)


def _open(cards: Sequence[TeacherCard]) -> tuple[TeacherCard, ...]:
    return tuple(card for card in cards if card.access == "weights")


def check(start: str, cfg: no_pool.Config | None, world: World) -> None:
    """Raise UsageError for a start that the world cannot have."""
    if cfg:
        no_pool.check(cfg, world, "start")
    elif start == AVERAGE:
        if world.cards and not _open(world.cards):
            raise UsageError(f"learner.start=average: no teacher gives its weights ({world.cards[0].id} does not)")
        check_same_network("learner.start=average", replace(world, cards=_open(world.cards)))


def notes(start: str, cfg: no_pool.Config | None) -> list[str]:
    """Lines that say what the learner had learned before the method began."""
    if cfg:
        updates = cfg.rounds * cfg.updates_per_round
        return [f"the learner starts after {updates} meta-updates of no-pool", *no_pool.assumptions(cfg)]
    return ["the learner starts at the mean of the weights of its teachers"] if start == AVERAGE else []


def learn(cfg: no_pool.Config | None, world: World, state: State, r: int, send: Send) -> tuple[State, Metrics]:
    """Round `r` of a start: of `no-pool` with its settings, or of the mean of the teachers' weights without any."""
    if cfg is None:
        found = fetch(_open(world.cards), send)
        return {**state, "theta": mean([one.theta for one in found]), "stats": mean([one.stats for one in found])}, {}
    learner = {name: state[name] for name in ("theta", "stats")}
    begun = learner | state[KEY] if KEY in state else replay.with_optimiser(learner)
    done, metrics = no_pool.learn(cfg, world, begun, r, [], send)
    left = {name: value for name, value in state.items() if name != KEY} | {name: done[name] for name in learner}
    if r < cfg.rounds - 1:
        left[KEY] = {name: done[name] for name in ("adam", "updates")}
    return left, {name.replace("replay", "start"): value for name, value in metrics.items()}


def cost(cfg: no_pool.Config | None, world: World, shard: Shard) -> Cost | None:
    """What a start takes; None if it takes next to nothing."""
    return no_pool.cost(cfg, world, shard) if cfg else None
