"""How every method's `recover` treats its jobs: which teachers go together, which are rejected, in what order results
come back."""

from collections.abc import Callable, Sequence

from ray_dfml.errors import RejectedError
from ray_dfml.types import Arrays, Job, Shard, Teacher

Slot = tuple[int, Job, Teacher]
"""Position of a job in its batch, the job, and its teacher."""

Invert = Callable[[Sequence[Job], Sequence[Teacher], bool], Sequence[Arrays | None]]
"""(jobs, their teachers, whether to batch) -> a result per job, None where the loss is not finite. The teachers are of
one architecture, input and number of classes."""


def recover(shard: Shard, jobs: Sequence[Job], invert: Invert) -> list[Arrays]:
    """Results of jobs that each name a teacher, in job order.

    Teachers of one kind are inverted together where the shard batches, else each alone. A job whose teacher cannot be
    read, or whose loss is not finite, gives `{"rejected": reason}`.
    """
    results: dict[int, Arrays] = {}
    slots: list[Slot] = []
    for i, job in enumerate(jobs):
        try:
            slots.append((i, job, shard.teacher(str(job.teacher))))
        except RejectedError as error:
            results[i] = {"rejected": str(error)}
    for group in groups(slots, batched=shard.batched):
        found = invert([job for _, job, _ in group], [teacher for *_, teacher in group], len(group) > 1)
        for (i, *_), result in zip(group, found, strict=True):
            results[i] = {"rejected": "the inversion loss is not finite"} if result is None else result
    return [results[i] for i in range(len(jobs))]


def groups(slots: Sequence[Slot], *, batched: bool) -> list[list[Slot]]:
    """Slots that one call inverts: each alone, or all of one architecture, input size and number of classes."""
    if not batched:
        return [[slot] for slot in slots]
    found: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        card = slot[2].card
        found.setdefault((card.arch, card.image.shape, len(card.classes)), []).append(slot)
    return list(found.values())
