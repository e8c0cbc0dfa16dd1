"""What the doctor says: findings with a severity, in the order of severity."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
"""An error makes a teacher unusable. A warning says that it probably does harm. A note is for the reader to weigh."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    severity: Severity
    kind: str
    """A word for programs, such as `noise`."""
    teachers: tuple[str, ...]
    """Ids of the teachers that it is about; empty if it is about the pool."""
    text: str
    leave_out: tuple[str, ...] = ()
    """Ids of the teachers that the doctor would leave out for this."""

    def line(self) -> str:
        """The finding as a line for a terminal."""
        who = ", ".join(self.teachers) if len(self.teachers) <= 4 else f"{len(self.teachers)} teachers"
        return f"{self.severity:<8} {who or 'pool'}: {self.text}"

    def tree(self) -> dict[str, str]:
        """The finding about one teacher as a JSON object."""
        return {"severity": self.severity, "kind": self.kind, "text": self.text}


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Findings with the most severe first, and otherwise in the order in which they came."""
    return sorted(found, key=lambda one: get_args(Severity).index(one.severity))
