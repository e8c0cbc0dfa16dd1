"""Helpers for the `cost` of a method: they time a piece of its work on this machine."""

import time
from collections.abc import Callable

from ray_dfml.core.net import net
from ray_dfml.methods.base import ReplayConfig, World
from ray_dfml.types import TeacherCard


def seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, after one call to warm up. If that call takes a second or more, it is the only one."""
    first = _seconds(work)
    return first if first >= 1 else _seconds(work)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def of_mean_teacher(world: World, seconds_of: Callable[[TeacherCard], float]) -> float:
    """Seconds of work on a teacher of mean cost. The teacher nearest to the mean is timed, and its time is scaled."""
    costs = {card: net(card.arch, card.image.shape, len(card.classes)).macs for card in world.cards}
    mean = sum(costs.values()) / len(costs)
    nearest = min(costs, key=lambda card: abs(costs[card] - mean))
    return seconds_of(nearest) * mean / costs[nearest]


def until_plateau(cfg: ReplayConfig) -> tuple[int, int]:
    """The fewest and the most updates that `replay.until_plateau` makes."""
    return min(cfg.patience + 1, cfg.max_updates), cfg.max_updates
