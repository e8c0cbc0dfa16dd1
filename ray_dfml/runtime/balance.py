"""Decides which jobs go together and which go first, by their cost. Results never depend on it.

[Graham1969] Bounds on Multiprocessing Timing Anomalies, SIAM J. Appl. Math. 17(2): longest processing time first.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from ray_dfml.types import Job


def check_distinct(jobs: Sequence[Job]) -> None:
    """Raise ValueError if two jobs have the same index, since results find their job by it."""
    twice = [index for index, count in Counter(job.index for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"{len(jobs)} jobs: index {twice[0]} is given twice")


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """Jobs by falling cost, so that no long job begins last. Jobs of equal cost keep their order."""
    return sorted(jobs, key=lambda job: -job.cost)


def chunks(jobs: Sequence[Job], shards: int, limit: int) -> list[list[Job]]:
    """Cut jobs into chunks for shards that batch. Chunks come by falling cost, and jobs in a chunk by index.

    First `_parts` makes one part per shard, of about equal costs. Then a part is cut wherever its teachers would occupy
    more than `limit` bytes together. A teacher that is larger than that by itself gets a chunk of its own.
    """
    found = [chunk for part in _parts(jobs, shards) for chunk in _cut(sorted(part, key=lambda job: job.index), limit)]
    return sorted(found, key=lambda chunk: -sum(job.cost for job in chunk))


def _parts(jobs: Sequence[Job], shards: int) -> list[list[Job]]:
    """Give each job, the costliest first, to the part with the least cost so far.

    The costliest part is then at most 4/3 - 1/(3 shards) times as costly as in the best division ([Graham1969] Theorem
    2). Jobs of equal cost are counted out first and then given to the parts as slices of neighbours.
    """
    parts: list[list[Job]] = [[] for _ in range(shards)]
    load = [0.0] * shards
    for cost, equal in groupby(longest_first(jobs), key=lambda job: job.cost):
        run = list(equal)
        counts = [0] * shards
        for _ in run:
            least = load.index(min(load))
            load[least] += cost
            counts[least] += 1
        rest = iter(run)
        for part, count in zip(parts, counts, strict=True):
            part.extend(islice(rest, count))
    return parts


def _cut(part: Sequence[Job], limit: int) -> Iterator[list[Job]]:
    chunk: list[Job] = []
    held: dict[str | None, int] = {}
    for job in part:
        held[job.teacher] = job.memory
        if chunk and sum(held.values()) > limit:
            yield chunk
            chunk, held = [], {job.teacher: job.memory}
        chunk.append(job)
    if chunk:
        yield chunk
