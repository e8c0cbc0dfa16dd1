"""IDEAL: each teacher is asked about made images, a batch in a round, and its student learns from all answers so far.

[Zhang2023] IDEAL: Query-Efficient Data-Free Learning from Black-Box Models, ICLR 2023. What a round does is
`students.distil`; the loop over teachers and rounds is `students.loop`. docs/methods_ideal.md has the equations, the
three profiles, and where paper and released code disagree.
"""

from collections.abc import Sequence

from ray_dfml.methods import pictures
from ray_dfml.methods.base import Method, Panel, World
from ray_dfml.methods.ideal.config import PRESETS, PROFILES, Config
from ray_dfml.methods.students import distil, loop
from ray_dfml.types import LEVELS, Arrays, Job, Shard


def notes(cfg: Config, world: World) -> list[str]:
    """Lines that say what the image sources assume about the data."""
    return distil.notes(cfg)


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `ideal.recover` op: a batch of queries, and the training after it (`students.loop.recover`)."""
    return loop.recover(shard, jobs, Config.model_validate(shared["cfg"]), distil.work)


PANELS = (
    loop.ACCURACY,
    Panel(
        "Students and teachers agree", "%", "Share of a round's new images that both give the same class, before the "
        "student learns from them.", {"agreement": "mean over the teachers"},
    ),
    Panel(
        "Student loss", "nats per image", "Mean over a round's steps.", {"student/loss": "mean over the teachers"}
    ),
    Panel(
        "Rarest class", "%", "Share of the answers that name the class with the fewest.",
        {"answers/rarest": "mean over the teachers"},
    ),
)  # fmt: skip

METHOD = Method(
    Config=Config,
    init=loop.init,
    learn=loop.learn,
    plan=loop.plan,
    shared=loop.shared,
    recover=recover,
    notes=notes,
    profiles=PROFILES,
    presets=PRESETS,
    panels=PANELS,
    pictures=pictures.seen,
    shown={"agreement": "agreement"},
    access=LEVELS,
    queries=loop.queries,
    students=loop.students,
)  # fmt: skip
