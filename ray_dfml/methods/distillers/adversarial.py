"""DAFL, ZSKT, DFME and DaST: generator and student take turns, and each step of the student asks about new images.

[Chen2019] Data-Free Learning of Student Networks, arXiv 1904.01186 (DAFL). [Micaelli2019] Zero-shot Knowledge Transfer
via Adversarial Belief Matching, arXiv 1905.09768 (ZSKT). [Truong2021] Data-Free Model Extraction, arXiv 2011.14779
(DFME). [Zhou2020] DaST, arXiv 2003.12703. The adaptation to teachers that name a class is that of the package.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ray_dfml.core import zero_order
from ray_dfml.core.images import to_bytes, to_pixels
from ray_dfml.methods.base import Metrics
from ray_dfml.methods.distillers.making import LastingGenerator, method_of
from ray_dfml.methods.students.config import Batch, StudentConfig
from ray_dfml.methods.students.loop import Study, Work
from ray_dfml.methods.students.stage import FLOOR
from ray_dfml.methods.students.training import labels_of


class AdversarialConfig(StudentConfig):
    """Settings of a generator and a student that take turns."""

    batch: int = Field(default=250, ge=2, description="Images of a step of the generator and of the student.")
    student_steps: int = Field(default=5, ge=1, description="Steps of the student after a step of the generator.")
    optimiser: Literal["adam", "sgd"] = Field(default="sgd", description="Optimiser of the student.")
    lr: float = Field(default=0.1, gt=0, description="First step size of the student; a cosine takes it to 0.")
    weight_decay: float = Field(default=5e-4, ge=0, description="Weight decay of SGD.")
    generator_lr: float = Field(default=1e-3, gt=0, description="Adam step size of the generator.")
    latent: int = Field(default=256, ge=1, description="d_z: length of a latent code.")
    width: int = Field(default=64, ge=4, description="Channels of the generator's last hidden layer.")

    @property
    def generator_batches(self) -> int:
        """Batches that a step of the generator asks about."""
        return 0

    @field_validator("answers")
    @classmethod
    def _named_class(cls, answers: str) -> str:
        if answers != "hard":
            raise ValueError("these methods learn the class that a teacher names; leave method.answers at hard")
        return answers

    @model_validator(mode="after")
    def _pays_for_a_round(self) -> "AdversarialConfig":
        if self.budget < self.batch * (self.generator_batches + 1):
            raise ValueError("method.budget is below one round; raise it or lower method.batch")
        return self

    def batches(self) -> list[Batch]:
        """Rounds of a step of the generator and `student_steps` of the student; the last may have fewer of these."""
        first, whole = self.generator_batches, self.generator_batches + self.student_steps
        rounds, rest = divmod(self.budget // self.batch, whole)
        sizes = [whole] * rounds + ([rest] if rest > first else [])
        return self._bounded([Batch(size * self.batch, size * self.batch) for size in sizes])


class DaflConfig(AdversarialConfig):
    """DAFL: the generator seeks batches in which the student sees as much of every class."""

    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay of SGD.")
    latent: int = Field(default=512, ge=1, description="d_z: length of a latent code.")
    information: float = Field(default=20.0, ge=0, description="Weight of sum_c q_c log q_c, of the student's mean q.")


class ZsktConfig(AdversarialConfig):
    """ZSKT: the generator seeks images on which the student is not of the teacher's opinion."""

    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay of SGD.")

    @property
    def generator_batches(self) -> int:
        """One: what the student should have said."""
        return 1


class DfmeConfig(AdversarialConfig):
    """DFME: as ZSKT, with an L1 loss whose gradient in the pixels is estimated by a forward difference."""

    generator_lr: float = Field(default=1e-4, gt=0, description="Adam step size of the generator.")
    epsilon: float = Field(default=1e-3, gt=0, description="Length of the displacement of an image.")
    smoothing: float = Field(default=1e-3, gt=0, lt=1, description="What a one-hot answer leaves to the other classes.")

    @property
    def generator_batches(self) -> int:
        """Two: the images, and the displaced images."""
        return 2


class DastConfig(AdversarialConfig):
    """DaST: the generator is told the label, and seeks images of this label on which the student is wrong."""

    control: float = Field(default=1.0, ge=0, description="Weight of the student's cross-entropy on the wished label.")

    @property
    def generator_batches(self) -> int:
        """One: what the student should have said."""
        return 1


GeneratorStep = Callable[[AdversarialConfig, Study, LastingGenerator], float]
"""Take one step of the generator; return its loss before the step."""


StudentLoss = Callable[[AdversarialConfig, Tensor, Tensor], Tensor]
"""The loss (scalar) of logits [n q] against the classes [n] that the teacher named."""


def turns(step: GeneratorStep, loss: StudentLoss, *, told: bool = False) -> Work:
    """The work of a round; with `told` the generator is told the wished label."""

    def work(cfg: AdversarialConfig, study: Study) -> Metrics:
        """A step of the generator, then steps of the student, each on new images that the teacher is asked about."""
        made = LastingGenerator(study, cfg.latent, cfg.width, len(study.card.classes) if told else 0)
        size, found = cfg.batch, []
        of_generator = step(cfg, study, made)
        lr = cfg.lr * 0.5 * (1 + math.cos(math.pi * study.r / cfg.total_rounds))
        for _ in range((study.batch.asked - study.asked) // size):
            with torch.no_grad():
                images = to_bytes(made.net(made.theta, made.codes(size)[0], first_order=True))
            answers = torch.tensor(labels_of(study.ask(images)), device=study.device)
            pixels = to_pixels(images, study.device)
            found.append(study.lesson.step(pixels, lambda logits, a=answers: loss(cfg, logits, a), lr))
        made.store()
        return {"student/loss": float(torch.stack(found).mean()), "generator/loss": of_generator}

    return work


def _descend(cfg: AdversarialConfig, made: LastingGenerator, loss: Tensor, leaf: Tensor) -> float:
    made.step(torch.autograd.grad(loss, leaf)[0], cfg.generator_lr)
    return float(loss.detach())


def _student(study: Study, images: Tensor) -> Tensor:
    """Logits [n q] of the student, which is frozen and normalises with its running statistics."""
    lesson, pupil = study.lesson, study.lesson.pupil
    return lesson.network(pupil.theta, lesson.normalised(images), pupil.stats, first_order=True)


def _told(study: Study, images: Tensor) -> Tensor:
    """The classes int64 [n] that the teacher names."""
    return torch.tensor(labels_of(study.ask(to_bytes(images))), device=study.device)


def dafl_step(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> float:
    """[Chen2019]: the one-hot and the activation term have no gradient any more, and the information term remains."""
    assert isinstance(cfg, DaflConfig)
    leaf = made.theta.detach().requires_grad_()
    q = _student(study, made.net(leaf, made.codes(cfg.batch)[0], first_order=True)).softmax(-1).mean(0)
    return _descend(cfg, made, cfg.information * (q * q.clamp_min(FLOOR).log()).sum(), leaf)


def zskt_step(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> float:
    """[Micaelli2019]: KL(teacher || student) of a one-hot teacher is the student's cross-entropy; it is ascended."""
    leaf = made.theta.detach().requires_grad_()
    images = made.net(leaf, made.codes(cfg.batch)[0], first_order=True)
    return _descend(cfg, made, -F.cross_entropy(_student(study, images), _told(study, images)), leaf)


def dast_step(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> float:
    """[Zhou2020]: exp(-CE(student, teacher)) plus the control of the label, which the student takes over."""
    assert isinstance(cfg, DastConfig)
    leaf = made.theta.detach().requires_grad_()
    z, wished = made.codes(cfg.batch)
    images = made.net(leaf, z, first_order=True)
    logits = _student(study, images)
    loss = torch.exp(-F.cross_entropy(logits, _told(study, images))) + cfg.control * F.cross_entropy(logits, wished)
    return _descend(cfg, made, loss, leaf)


def centred(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[Truong2021] logits [n q] that a teacher who names `labels` [n] may have: log-probabilities minus their mean.

    The named class has probability 1 - smoothing, and the others share the rest.
    """
    named = F.one_hot(labels, classes).bool()
    rest = torch.full(named.shape, smoothing / (classes - 1), device=labels.device)
    logs = torch.where(named, torch.tensor(1 - smoothing, device=labels.device), rest).log()
    return logs - logs.mean(-1, keepdim=True)


def dfme_step(cfg: AdversarialConfig, study: Study, made: LastingGenerator) -> float:
    """[Truong2021]: ascent of |student - teacher|_1 along a forward difference in one direction per image.

    The displacement is of the pixels in [0, 1], not of what comes before a tanh, and is asked about in float32: in
    bytes it would vanish. It counts as it is after clamping to [0, 1] (`core.zero_order`).
    """
    assert isinstance(cfg, DfmeConfig)
    leaf = made.theta.detach().requires_grad_()
    images = made.net(leaf, made.codes(cfg.batch)[0], first_order=True)

    def losses(displaced: Tensor) -> Tensor:
        x = displaced.flatten(0, 1)
        told = torch.tensor(labels_of(study.ask(x.cpu().numpy())), device=study.device)
        with torch.no_grad():
            logits = _student(study, x)
        return (logits - centred(told, logits.shape[1], cfg.smoothing)).abs().mean(-1).view(displaced.shape[:2])

    here, slope = zero_order.gradient(losses, images, rng=study.rng, directions=1, mu=cfg.epsilon)
    (grad,) = torch.autograd.grad(images, leaf, -slope / len(images))
    made.step(grad, cfg.generator_lr)
    return -float(here.mean())


def _cross_entropy(cfg: AdversarialConfig, logits: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(logits, answers)


def _l1(cfg: AdversarialConfig, logits: Tensor, answers: Tensor) -> Tensor:
    assert isinstance(cfg, DfmeConfig)
    return (logits - centred(answers, logits.shape[1], cfg.smoothing)).abs().mean()


DAFL = method_of(DaflConfig, turns(dafl_step, _cross_entropy))
ZSKT = method_of(ZsktConfig, turns(zskt_step, _cross_entropy))
DFME = method_of(DfmeConfig, turns(dfme_step, _l1))
DAST = method_of(DastConfig, turns(dast_step, _cross_entropy, told=True))
