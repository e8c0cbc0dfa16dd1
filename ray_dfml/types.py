"""What crosses a process border. Values only: NumPy arrays, numbers, strings, and dicts or lists of these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Arrays = dict[str, Any]
"""Names to NumPy arrays, numbers, strings, or nested dicts and lists of these. Cheap to ship, no pickle of our own."""


def size_text(shape: Sequence[int]) -> str:
    """A size as people write it: `3x32x32`."""
    return "x".join(str(number) for number in shape)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Images as a network takes them: `channels x height x width`, pixels in [0, 1], then `(x - mean) / std`."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What is known of a pool member without its data. Accuracies are the owner's claims, in percent."""

    id: str
    arch: str
    image: ImageSpec
    classes: tuple[str, ...]
    """Class names in the order of the logits, `dataset/name` where the data set is known."""
    access: str = "weights"
    sha256: str = ""
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work for a shard. Its result depends on the job and the shared values only."""

    index: int
    """Position in the batch: results come back in this order."""
    seed: int
    """Derived from (run seed, round, op, index); the only source of randomness of the job."""
    teacher: str | None = None
    values: Arrays = field(default_factory=dict)
    cost: float = 1.0
    """Work relative to the other jobs of the batch (multiply-accumulates of one image). Never changes a result."""
    memory: int = 0
    """Bytes that the job's teacher occupies on a shard."""


class Backend(Protocol):
    """Where work is done. One verb."""

    def map(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """Run `op` on every job with the same `shared` values; results in job order, whoever ran or re-ran them.

        A teacher that cannot be used (bad values, or a process that died twice on it) gives `{"rejected": reason}`.
        """
        ...
