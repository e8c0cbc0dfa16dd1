"""What the learner's process does, wherever it runs: it trains, and writes its own checkpoints and the gallery.

The state stays in this process, which returns figures only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_dfml import gallery
from ray_dfml.data import weights_file
from ray_dfml.methods.base import World
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime.checkpoint import Checkpoints, Saved
from ray_dfml.runtime.storage import Folder
from ray_dfml.types import Backend, Labelled

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run folder."""


@dataclass(frozen=True)
class Done:
    """How far a run is: its last checkpoint, the metrics of that round, and the teachers found bad, with reasons."""

    saved: Saved | None = None
    row: dict[str, Any] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    missed: int = 0
    """Rounds that the run has beyond those of its method (`Trainer.missed`)."""
    notes: tuple[str, ...] = ()
    """What a reader must know of how the work went (`Backend.notes`)."""

    @property
    def rounds(self) -> int:
        """Rounds that are done."""
        return self.saved.rounds if self.saved else 0


class Learning:
    """A trainer and the checkpoints of its run, in the folder `checkpoints`; the gallery lies beside it."""

    def __init__(
        self, config: dict[str, Any], world: World, sets: Sequence[Labelled], backend: Backend, checkpoints: Path
    ) -> None:
        self._arguments, self._backend = (config, world, sets, backend), backend
        self._checkpoints = Checkpoints(Folder(checkpoints))
        self._gallery = checkpoints.parent / gallery.FILE

    def begin(self) -> Done:
        """Make the trainer from the last checkpoint, or from the seed if there is none.

        Raises RejectedError for a checkpoint that cannot be read.
        """
        found = self._checkpoints.load()
        saved, state, row = found or (None, None, {})
        self._trainer = Trainer(*self._arguments, state)
        rounds = saved.rounds if saved else 0
        self._show()  # a process may have died between the last checkpoint and this file
        return Done(saved, row, self._trainer.rejected(), self._trainer.missed(rounds))

    def call(self, name: str, *args: Any) -> Any:
        """Call a method of the trainer."""
        return getattr(self._trainer, name)(*args)

    def save(self, rounds: int, row: dict[str, Any]) -> Done:
        """Write a checkpoint of the state after `rounds` rounds. `row` holds the metrics of the last round."""
        state = self._trainer.state
        saved = self._checkpoints.save(rounds, state, row)
        self._show()
        missed = self._trainer.missed(rounds)
        return Done(saved, row, self._trainer.rejected(), missed, tuple(self._backend.notes))

    def _show(self) -> None:
        """Write the gallery of the state, if there is one."""
        if pictures := self._trainer.state["pictures"]:
            weights_file.write_bytes(self._gallery, gallery.to_file(pictures))
