"""The wiring that these methods share: a `Method` of a `work`, and a generator that lives as long as the run."""

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import field_validator
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.generators import Generator, generator
from ray_dfml.methods import pictures
from ray_dfml.methods.base import Method, Panel, Values
from ray_dfml.methods.students import loop
from ray_dfml.methods.students.config import ReplayConfig, StudentConfig
from ray_dfml.methods.students.loop import Study, Work
from ray_dfml.types import LEVELS, Arrays, Job, Shard

PANELS = (
    loop.ACCURACY,
    Panel("Student loss", "nats per image", "Mean over a round's steps.", {"student/loss": "mean over the teachers"}),
    Panel(
        "Generator loss", "as the method defines it", "Mean over a round's steps.",
        {"generator/loss": "mean over the teachers"},
    ),
)  # fmt: skip


PUBLISHED: Values = {
    "optimiser": "sgd", "lr": 0.1, "weight_decay": 5e-4, "last_steps": 0, "warmup_steps": 0, "average": 0.0,
    "balance": 0.0, "warp": 0.0,
}  # fmt: skip
"""How the released codes train a student: what their profiles share."""


class NamedConfig(ReplayConfig):
    """Settings of a method that learns the class that a teacher names, and nothing else of its answers."""

    @field_validator("answers")
    @classmethod
    def _named_class(cls, answers: str) -> str:
        if answers != "hard":
            raise ValueError("these methods learn the class that a teacher names; leave method.answers at hard")
        return answers


def method_of(
    Config: type[StudentConfig], work: Work, published: Values, panels: tuple[Panel, ...] = PANELS
) -> Method[StudentConfig]:
    """A method whose round of one teacher is `work`. The profiles `paper` and `code` are PUBLISHED and `published`."""

    def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """The op: a round of each job's teacher (`students.loop.recover`)."""
        return loop.recover(shard, jobs, Config.model_validate(shared["cfg"]), work)

    profile = {"method": {**PUBLISHED, **published}}
    return Method(
        Config=Config, init=loop.init, learn=loop.learn, plan=loop.plan, shared=loop.shared, recover=recover,
        profiles={"paper": profile, "code": profile}, panels=panels, access=LEVELS, pictures=pictures.seen,
        queries=loop.queries, students=loop.students,
    )  # fmt: skip


class LastingGenerator:
    """A generator with its Adam, which `study.own` keeps from round to round."""

    def __init__(self, study: Study, latent: int, width: int, classes: int = 0) -> None:
        self.net: Generator = generator(study.card.image.shape, latent, width, classes)
        self._study, own = study, study.own
        tensor = partial(torch.tensor, device=study.device)
        if "theta_g" in own:
            self.theta = tensor(own["theta_g"])
            self.adam = optim.Adam(tensor(own["m"]), tensor(own["v"]), int(own["t"]))
        else:
            self.theta = self.net.init(study.rng).to(study.device)
            self.adam = optim.Adam.zeros(self.theta)

    def codes(self, count: int) -> tuple[Tensor, Tensor]:
        """Codes [n d] and wished labels [n]. A generator that is told the label gets codes that end in it, one-hot."""
        study, classes = self._study, len(self._study.card.classes)
        z = torch.randn(count, self.net.latent, generator=study.rng)
        labels = torch.randint(0, classes, (count,), generator=study.rng)
        if self.net.classes:
            z = torch.cat([z, torch.nn.functional.one_hot(labels, classes).float()], -1)
        return z.to(study.device), labels.to(study.device)

    def step(self, grad: Tensor, lr: float) -> None:
        """One step of Adam with betas (0.5, 0.999), as all these methods take it."""
        self.theta, self.adam = optim.adam_step(self.theta, grad, self.adam, lr=lr, betas=(0.5, 0.999))

    def store(self) -> None:
        """Keep the generator for the next round."""
        parts = {"theta_g": self.theta, "m": self.adam.m, "v": self.adam.v}
        self._study.own |= {name: part.cpu().numpy() for name, part in parts.items()} | {"t": self.adam.step}
