"""Which candidates a teacher is asked about: a share for every class, half of it where the student doubts."""

import torch
from torch import Tensor


def quotas(counts: Tensor, batch: int, least: float) -> Tensor:
    """How many of a batch's images each class may have: int64 [q], whose sum is at most `batch`.

    Classes that have few answers get more: shares are in proportion to max((N + batch)/q - n_c, least x batch/q), where
    class c has n_c answers [q] and all have N.
    """
    classes = len(counts)
    short = (counts.sum() + batch) / classes - counts
    short = short.clamp_min(max(least * batch / classes, 1e-6))
    return (short / short.sum() * batch).floor().long()


def keys(logits: Tensor, doubt: float, rng: torch.Generator) -> Tensor:
    """Keys [n] in [0, 1], of which the lowest are chosen, of candidates with the student's logits [n q].

    With probability `doubt` a key is the margin between the two most probable classes, else it is uniform.
    """
    top = logits.softmax(-1).topk(2, -1).values
    by_doubt, uniform = torch.rand(2, len(logits), generator=rng).to(logits.device)
    return torch.where(by_doubt < doubt, top[:, 0] - top[:, 1], uniform)


def choose(keys: Tensor, classes: Tensor, quotas: Tensor, batch: int) -> Tensor:
    """Rows [batch] of the candidates to ask about, of keys [n] and predicted classes [n]; n >= batch.

    The lowest keys of a class go first, up to its quota. What is left of the batch goes to the lowest keys of the rest.
    """
    order = keys.argsort(stable=True)
    taken = torch.nn.functional.one_hot(classes[order], len(quotas)).cumsum(0)
    rank = taken.gather(1, classes[order][:, None])[:, 0]
    beyond = rank > quotas[classes[order]]
    return order[beyond.long().argsort(stable=True)[:batch]].sort().values
