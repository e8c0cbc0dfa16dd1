"""The loop of every `recover` op: it groups jobs, rejects bad teachers, and returns results in job order."""

from collections.abc import Callable, Sequence

from ray_dfml.errors import RejectedError, rejection
from ray_dfml.types import Arrays, Job, Shard, Teacher

Slot = tuple[int, Job, Teacher]
"""Position of a job in its batch, the job, and its teacher."""

Invert = Callable[[Sequence[Job], Sequence[Teacher], bool], Sequence[Arrays | None]]
"""(jobs, their teachers, whether to batch) -> a result per job, or None if its loss is not finite. The teachers have
one architecture, input and number of classes."""


def recover(
    shard: Shard, jobs: Sequence[Job], invert: Invert, teacher: Callable[[Job], Teacher] | None = None,
    ask: Callable[[Job], Arrays] | None = None,
) -> list[Arrays]:  # fmt: skip
    """Results of jobs that each name a teacher, in job order.

    `teacher` gets the teacher of a job, by default from the shard, and raises RejectedError if it cannot be read. A
    shard that batches inverts teachers of one kind together; another one inverts each alone. The result of a job is
    `{"rejected": reason}` if its teacher cannot be read or its loss is not finite. A job whose values say `asked` is
    done by `ask` instead, which raises RejectedError if the teacher cannot be used.
    """
    results: dict[int, Arrays] = {}
    slots: list[Slot] = []
    for i, job in enumerate(jobs):
        try:
            if ask and job.values.get("asked"):
                results[i] = ask(job)
            else:
                slots.append((i, job, teacher(job) if teacher else shard.teacher(str(job.teacher))))
        except RejectedError as error:
            results[i] = rejection(error)
    for group in groups(slots, batched=shard.batched):
        found = invert([job for _, job, _ in group], [teacher for *_, teacher in group], len(group) > 1)
        for (i, *_), result in zip(group, found, strict=True):
            results[i] = {"rejected": "the inversion loss is not finite"} if result is None else result
    return [results[i] for i in range(len(jobs))]


def groups(slots: Sequence[Slot], *, batched: bool) -> list[list[Slot]]:
    """Group the slots that one call inverts: each slot alone, or all of one architecture, input size and number of
    classes."""
    if not batched:
        return [[slot] for slot in slots]
    found: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        card = slot[2].card
        found.setdefault((card.arch, card.image.shape, len(card.classes)), []).append(slot)
    return list(found.values())
