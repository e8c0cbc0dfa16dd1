"""DAFL, ZSKT, DFME and DaST: generator and student take turns, and each step of the student asks about new images.

[Chen2019] Data-Free Learning of Student Networks, arXiv 1904.01186 (DAFL). [Micaelli2019] Zero-shot Knowledge Transfer
via Adversarial Belief Matching, arXiv 1905.09768 (ZSKT). [Truong2021] Data-Free Model Extraction, arXiv 2011.14779
(DFME). [Zhou2020] DaST, arXiv 2003.12703. The adaptation to teachers that name a class is that of the package.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ray_dfml.core import zero_order
from ray_dfml.core.generators import generator
from ray_dfml.core.images import to_bytes, to_pixels
from ray_dfml.methods.base import Metrics
from ray_dfml.methods.distillers.making import LastingGenerator, NamedConfig, method_of
from ray_dfml.methods.students import lessons
from ray_dfml.methods.students.config import Batch
from ray_dfml.methods.students.loop import Study, Work
from ray_dfml.methods.students.stage import FLOOR
from ray_dfml.methods.students.training import labels_of


class AdversarialConfig(NamedConfig):
    """Settings of a generator and a student that take turns.

    The defaults replay what was paid for. With `replays` 0 each batch serves one step of the student, as published.
    """

    batch: int = Field(default=25, ge=2, description="Images of a step of the generator, and of a batch of queries.")
    generator_steps: int = Field(default=10, ge=1, description="Steps of the generator in a round.")
    student_steps: int = Field(default=5, ge=1, description="Batches of queries after the steps of the generator.")
    generator_lr: float = Field(default=1e-3, gt=0, description="Adam step size of the generator.")
    latent: int = Field(default=256, ge=1, description="d_z: length of a latent code.")
    width: int = Field(default=64, ge=4, description="Channels of the generator's last hidden layer.")

    @property
    def generator_batches(self) -> int:
        """Batches that the generator asks about in a round."""
        return 0

    @model_validator(mode="after")
    def _pays_for_a_round(self) -> "AdversarialConfig":
        if self.budget < self.batch * (self.generator_batches + 1):
            raise ValueError("method.budget is below one round; raise it or lower method.batch")
        return self

    def batches(self) -> list[Batch]:
        """Rounds of the generator's steps and `student_steps` batches; the last may have fewer of these."""
        first, whole = self.generator_batches, self.generator_batches + self.student_steps
        rounds, rest = divmod(self.budget // self.batch, whole)
        sizes = [whole] * rounds + ([rest] if rest > first else [])
        return self._bounded([Batch(size * self.batch, size * self.batch) for size in sizes])

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError for a shape [c h w] that the generator cannot make."""
        generator(shape, self.latent, self.width)


class DaflConfig(AdversarialConfig):
    """DAFL: the generator seeks batches in which the student sees as much of every class."""

    latent: int = Field(default=512, ge=1, description="d_z: length of a latent code.")
    one_hot: float = Field(
        default=1.0, ge=0, description="Weight of the student's cross-entropy to its own best class."
    )
    information: float = Field(default=20.0, ge=0, description="Weight of sum_c q_c log q_c, of the student's mean q.")


class ZsktConfig(AdversarialConfig):
    """ZSKT: the generator seeks images on which the student is not of the teacher's opinion."""

    @property
    def generator_batches(self) -> int:
        """One: what the student should have said."""
        return 1


class DfmeConfig(AdversarialConfig):
    """DFME: as ZSKT, with an L1 loss whose gradient in the pixels is estimated by a forward difference."""

    batch: int = Field(default=10, ge=2, description="Images of a step of the generator, and of a batch of queries.")
    generator_steps: int = Field(default=20, ge=1, description="Steps of the generator in a round.")
    generator_lr: float = Field(default=3e-3, gt=0, description="Adam step size of the generator.")
    loss: Literal["cross_entropy", "l1"] = Field(
        default="cross_entropy", description="What the student minimises; l1 is of logits that the answer may have had."
    )
    epsilon: float = Field(default=1e-3, gt=0, description="Length of the displacement of an image.")
    smoothing: float = Field(default=1e-3, gt=0, lt=1, description="What a one-hot answer leaves to the other classes.")

    @property
    def generator_batches(self) -> int:
        """Two in each step: the images, and the displaced images."""
        return 2 * self.generator_steps


class DastConfig(AdversarialConfig):
    """DaST: the generator is told the label, and seeks images of this label on which the student is wrong."""

    control: float = Field(default=1.0, ge=0, description="Weight of the student's cross-entropy on the wished label.")

    @property
    def generator_batches(self) -> int:
        """One: what the student should have said."""
        return 1


GeneratorSteps = Callable[[AdversarialConfig, Study, LastingGenerator], list[float]]
"""Take the steps of the generator in a round; return the loss before each."""


StudentLoss = Callable[[AdversarialConfig, Tensor, Tensor], Tensor]
"""The loss (scalar) of logits [n q] against the classes [n] that the teacher named."""


def turns(steps: GeneratorSteps, loss: StudentLoss, *, told: bool = False) -> Work:
    """The work of a round; with `told` the generator is told the wished label."""

    def work(cfg: AdversarialConfig, study: Study) -> Metrics:
        """Steps of the generator, then batches of queries, of which the student learns at once or again and again."""
        study.lesson.average = cfg.average
        made = LastingGenerator(study, cfg.latent, cfg.width, len(study.card.classes) if told else 0)
        of_generator = steps(cfg, study, made)
        batches = range((study.batch.asked - study.asked) // cfg.batch)
        with torch.no_grad():
            images = [to_bytes(made.net(made.theta, made.codes(cfg.batch)[0], first_order=True)) for _ in batches]
        made.store()
        found = _again(cfg, study, images, loss) if cfg.replays else _once(cfg, study, images, loss)
        return {"student/loss": lessons.mean(found), "generator/loss": sum(of_generator) / len(of_generator)}

    return work


def _once(cfg: AdversarialConfig, study: Study, batches: list[np.ndarray], loss: StudentLoss) -> list[Tensor]:
    """One step on each batch of images, which the teacher is asked about first. The step size is that of the round."""
    lr, found = cfg.lr * 0.5 * (1 + math.cos(math.pi * study.r / cfg.total_rounds)), []
    for images in batches:
        answers = torch.tensor(labels_of(study.ask(images)), device=study.device)
        found.append(
            study.lesson.step(to_pixels(images, study.device), lambda logits, a=answers: loss(cfg, logits, a), lr)
        )
    return found


def _again(cfg: AdversarialConfig, study: Study, batches: list[np.ndarray], loss: StudentLoss) -> list[Tensor]:
    """Ask about all batches, keep the answers, and train on all that are known."""
    for images in batches:
        study.keep(images, study.ask(images))
    answers = torch.tensor(labels_of(study.answers), device=study.device)
    return lessons.replay(cfg, study, lambda rows, logits: loss(cfg, logits, answers[rows]))


def _descend(
    cfg: AdversarialConfig, made: LastingGenerator, z: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> list[float]:
    """Steps of the generator on the loss of its images of the codes `z`; returns the loss before each."""
    found = []
    for _ in range(cfg.generator_steps):
        leaf = made.theta.detach().requires_grad_()
        loss = loss_of(made.net(leaf, z, first_order=True))
        made.step(torch.autograd.grad(loss, leaf)[0], cfg.generator_lr)
        found.append(float(loss.detach()))
    return found


def _student(study: Study, images: Tensor) -> Tensor:
    """Logits [n q] of the student, which is frozen and normalises with its running statistics."""
    lesson, pupil = study.lesson, study.lesson.pupil
    return lesson.network(pupil.theta, lesson.normalised(images), pupil.stats, first_order=True)


def _told(cfg: AdversarialConfig, study: Study, made: LastingGenerator, z: Tensor) -> Tensor:
    """The classes int64 [n] that the teacher names for images of the codes `z`, before the generator's first step.

    The student learns from them too, if it learns again.
    """
    with torch.no_grad():
        images = to_bytes(made.net(made.theta, z, first_order=True))
    answers = study.ask(images)
    if cfg.replays:
        study.keep(images, answers)
    return torch.tensor(labels_of(answers), device=study.device)


def dafl_steps(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> list[float]:
    """[Chen2019]: one-hot term and information term of the student; the activation term says nothing of a service."""
    assert isinstance(cfg, DaflConfig)

    def loss(images: Tensor) -> Tensor:
        logits = _student(study, images)
        q = logits.softmax(-1).mean(0)
        sure = F.cross_entropy(logits, logits.argmax(-1))
        return cfg.one_hot * sure + cfg.information * (q * q.clamp_min(FLOOR).log()).sum()

    return _descend(cfg, made, made.codes(cfg.batch)[0], loss)


def zskt_steps(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> list[float]:
    """[Micaelli2019]: KL(teacher || student) of a one-hot teacher is the student's cross-entropy; it is ascended."""
    z = made.codes(cfg.batch)[0]
    told = _told(cfg, study, made, z)
    return _descend(cfg, made, z, lambda images: -F.cross_entropy(_student(study, images), told))


def dast_steps(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> list[float]:
    """[Zhou2020]: exp(-CE(student, teacher)) plus the control of the label, which the student takes over."""
    assert isinstance(cfg, DastConfig)
    z, wished = made.codes(cfg.batch)
    told = _told(cfg, study, made, z)

    def loss(images: Tensor) -> Tensor:
        logits = _student(study, images)
        return torch.exp(-F.cross_entropy(logits, told)) + cfg.control * F.cross_entropy(logits, wished)

    return _descend(cfg, made, z, loss)


def centred(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[Truong2021] logits [n q] that a teacher who names `labels` [n] may have: log-probabilities minus their mean.

    The named class has probability 1 - smoothing, and the others share the rest.
    """
    named = F.one_hot(labels, classes).bool()
    rest = torch.full(named.shape, smoothing / (classes - 1), device=labels.device)
    logs = torch.where(named, torch.tensor(1 - smoothing, device=labels.device), rest).log()
    return logs - logs.mean(-1, keepdim=True)


def dfme_steps(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> list[float]:
    """[Truong2021]: ascent of |student - teacher|_1 along a forward difference in one direction per image.

    The displacement is of the pixels in [0, 1], not of what comes before a tanh, and is asked about in float32: in
    bytes it would vanish. It counts as it is after clamping to [0, 1] (`core.zero_order`). Codes are drawn anew for
    each step. The answers to what was not displaced are kept with the bytes of the images, if the student learns again.
    """
    assert isinstance(cfg, DfmeConfig)
    found: list[float] = []
    answers: list[np.ndarray]

    def losses(displaced: Tensor) -> Tensor:
        x = displaced.flatten(0, 1)
        answers.append(study.ask(x.cpu().numpy()))
        told = torch.tensor(labels_of(answers[-1]), device=study.device)
        with torch.no_grad():
            logits = _student(study, x)
        return (logits - centred(told, logits.shape[1], cfg.smoothing)).abs().mean(-1).view(displaced.shape[:2])

    for _ in range(cfg.generator_steps):
        leaf = made.theta.detach().requires_grad_()
        images, answers = made.net(leaf, made.codes(cfg.batch)[0], first_order=True), []
        here, slope = zero_order.gradient(losses, images, rng=study.rng, directions=1, mu=cfg.epsilon)
        (grad,) = torch.autograd.grad(images, leaf, -slope / len(images))
        made.step(grad, cfg.generator_lr)
        found.append(-float(here.mean()))
        if cfg.replays:
            study.keep(to_bytes(images), answers[0])
    return found


def _cross_entropy(cfg: AdversarialConfig, logits: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(logits, answers)


def _of_dfme(cfg: AdversarialConfig, logits: Tensor, answers: Tensor) -> Tensor:
    assert isinstance(cfg, DfmeConfig)
    if cfg.loss == "cross_entropy":
        return F.cross_entropy(logits, answers)
    return (logits - centred(answers, logits.shape[1], cfg.smoothing)).abs().mean()


TURNS: dict[str, Any] = {"batch": 250, "generator_steps": 1, "replays": 0.0, "flip": "off"}
"""A step of the generator, and steps of the student on batches that are seen once."""

DAFL = method_of(DaflConfig, turns(dafl_steps, _cross_entropy), TURNS | {"weight_decay": 1e-4})
ZSKT = method_of(ZsktConfig, turns(zskt_steps, _cross_entropy), TURNS | {"weight_decay": 1e-4})
DFME = method_of(DfmeConfig, turns(dfme_steps, _of_dfme), TURNS | {"generator_lr": 1e-4, "loss": "l1"})
DAST = method_of(DastConfig, turns(dast_steps, _cross_entropy, told=True), TURNS)
