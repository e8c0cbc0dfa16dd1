"""Which teachers of its pools a run uses, and which of them are spoiled on purpose: the settings `pool.*`."""

from collections.abc import Mapping

import torch

from ray_dfml.config import ChoiceConfig
from ray_dfml.core import seeds
from ray_dfml.core.net import net
from ray_dfml.data.pool import Entry, Pool
from ray_dfml.errors import UsageError, first_of
from ray_dfml.runtime.shard import Loaded

Members = Mapping[str, tuple[Entry, Pool]]
"""Id in the run -> the entry in its pool, and the pool."""


def chosen(members: Members, cfg: ChoiceConfig, seed: int) -> tuple[Members, list[str]]:
    """The teachers that a run uses, in the order of `members`, and lines about those that it leaves out.

    Those of `without` go first, then teachers below `min_accuracy` and those of unknown accuracy. Of the others the
    first `limit` of a random order stay, so that a smaller limit gives a subset of a larger one. A teacher of several
    pools is named by its id in the run, `N:ID`, or by its id in its pool. Raises UsageError if too few are there.
    """
    notes: list[str] = []
    if cfg.without:
        named = {id: {id, entry.id} & set(cfg.without) for id, (entry, _) in members.items()}
        out = [id for id, names in named.items() if names]
        if len(out) == len(members):
            raise UsageError("pool.without: every usable teacher is left out; keep one")
        unknown = sorted(set(cfg.without).difference(*named.values()))
        notes += [f"pool.without leaves out {len(out)} teachers: {first_of(out)}"] if out else []
        notes += [f"pool.without names no usable teacher by {first_of(unknown)}"] if unknown else []
        members = {id: member for id, member in members.items() if not named[id]}
    if cfg.min_accuracy is not None:
        good = {id: one for id, one in members.items() if (one[0].accuracy.reported or 0.0) >= cfg.min_accuracy}
        weak = [id for id in members if id not in good]
        if not good:
            raise UsageError(f"pool.min_accuracy={cfg.min_accuracy:g}: no teacher reports as much; lower it")
        if weak:
            notes.append(f"pool.min_accuracy={cfg.min_accuracy:g} leaves out {len(weak)} teachers: {first_of(weak)}")
        members = good
    if cfg.limit is not None:
        if cfg.limit > len(members):
            raise UsageError(f"pool.limit={cfg.limit}: there are {len(members)} usable teachers; lower it")
        kept = set(_order(members, seed, "limit")[: cfg.limit])
        notes.append(f"pool.limit={cfg.limit}: {cfg.limit} of {len(members)} usable teachers are used")
        members = {id: member for id, member in members.items() if id in kept}
    return members, notes


def spoiled(members: Members, cfg: ChoiceConfig, seed: int) -> dict[str, int]:
    """Id of each teacher that is spoiled -> the seed of its shuffle.

    Raises UsageError if one of them is a service, whose weights are not here.
    """
    ids = _order(members, seed, "poisoned")[: round(cfg.fraction_poisoned * len(members))]
    services = [id for id in ids if members[id][0].api is not None]
    if services:
        raise UsageError(f"pool.fraction_poisoned: {services[0]} is a service, whose weights cannot be shuffled")
    return {id: seeds.derive(seed, "poison", id) for id in ids}


def _order(members: Members, seed: int, what: str) -> list[str]:
    ids = list(members)
    return [ids[n] for n in torch.randperm(len(ids), generator=seeds.rng(seed, "pool", what)).tolist()]


def shuffled(teacher: Loaded, seed: int) -> Loaded:
    """A teacher that knows nothing: the values of each weight tensor of two dimensions or more in a random order.

    Biases, batch-norm parameters and statistics stay, and so do mean and spread of the weights.
    """
    card, theta, stats = teacher
    rng = torch.Generator().manual_seed(seed)
    layout = net(card.arch, card.image.shape, len(card.classes)).layout
    parts = layout.unflatten(torch.tensor(theta))
    mixed = {
        name: x.flatten()[torch.randperm(x.numel(), generator=rng)].view(x.shape) if x.ndim > 1 else x
        for name, x in parts.items()
    }
    return card, layout.flatten(mixed).numpy(), stats
