"""What a shard recovers in a visit of BiDf-MKD to a teacher: a support set and a query set.

[Hu2023b] Learning to Learn from APIs: Black-Box Data-Free Meta-Learning, arXiv 2305.18413 (ICML 2023). Between the two
sets the learner is distilled on the support set, and the query set is recovered at the boundary of this task model. A
teacher whose weights are open is inverted, or labels images of sources (`methods.sourced`). A service is asked
(`bidf.asked`), or its surrogate is inverted and the service is asked about the finished sets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.generators import generator
from ray_dfml.core.net import Net, net
from ray_dfml.methods import recovery, sourced
from ray_dfml.methods.bidf import asked, distillation
from ray_dfml.methods.bidf.config import Config
from ray_dfml.methods.inversion import BETAS, Inversion, Judge
from ray_dfml.methods.sourced import GENERATOR
from ray_dfml.methods.surrogates import stage as surrogates
from ray_dfml.types import Arrays, Job, Service, Shard, Teacher

Answered = Callable[[Job, Arrays], Arrays]
"""(job, set that was recovered for it) -> the set as it is distilled from."""


def synthesize(
    cfg: Config, teachers: Sequence[Teacher], judge: Judge | None, names: Sequence[int], shape: tuple[int, int, int],
    way: int, *, device: torch.device, batched: bool, stream: str,
) -> list[Arrays]:  # fmt: skip
    """Recover one set of images from each of b teachers ([Hu2023b] label-conditional inversion).

    Each teacher gets a fresh generator. Adam moves generator and codes between two of the `cfg.iterations` passes, and
    the images of the pass with the lowest loss are kept. After a pass whose loss is not finite, weights, codes and
    moments stay, and the next pass has other views. `names` and `stream` seed the draws. Returns tasks as
    `Inversion.task` makes them, with `loss_first` and `loss_last`.
    """
    net_g = generator(shape, cfg.latent, cfg.width, cfg.told(way))
    inversion = Inversion(cfg, net_g, teachers, way, names, device=device, batched=batched, stream=stream)
    theta_g = torch.stack([net_g.reset(rng) for rng in inversion.rngs]).to(device)
    z = inversion.codes()
    adam_g, adam_z = optim.Adam.zeros(theta_g), optim.Adam.zeros(z)
    first, best = torch.zeros(len(teachers)), torch.full((len(teachers),), math.inf, device=device)
    kept: tuple[Tensor, Tensor] | None = None
    for i in range(cfg.iterations):
        leaf_g, leaf_z = theta_g.detach().requires_grad_(), z.detach().requires_grad_()
        loss, images, logits = inversion.losses(leaf_g, leaf_z, judge)
        grad_g, grad_z = torch.autograd.grad(loss.sum(), (leaf_g, leaf_z))
        loss, images, logits = loss.detach(), images.detach(), logits.detach()
        first = loss if i == 0 else torch.where(first.isfinite(), first, loss)
        better = loss < best  # false where the loss is not a number
        best = torch.where(better, loss, best)
        old = kept or (images, logits)
        kept = (_rows(better, images, old[0]), _rows(better, logits, old[1]))
        if i < cfg.iterations - 1:
            sound = loss.isfinite()
            theta_g, adam_g = _step(cfg, theta_g, grad_g, adam_g, sound)
            z, adam_z = _step(cfg, z, grad_z, adam_z, sound)
    assert kept is not None
    return [
        inversion.task(j, kept[0][j], kept[1][j]) | {"loss_first": float(first[j]), "loss_last": float(best[j])}
        for j in range(len(teachers))
    ]


def _step(cfg: Config, x: Tensor, grad: Tensor, adam: optim.Adam, sound: Tensor) -> tuple[Tensor, optim.Adam]:
    """An Adam step on the rows of x [b ...] where `sound` [b] is true. The other rows and their moments stay."""
    new, found = optim.adam_step(x, grad, adam, lr=cfg.lr_generator, betas=BETAS)
    moments = optim.Adam(_rows(sound, found.m, adam.m), _rows(sound, found.v, adam.v), found.step)
    return _rows(sound, new, x), moments


def _rows(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` [b ...] where `which` [b] is true, else those of `old`."""
    return torch.where(which.view(-1, *(1,) * (new.dim() - 1)), new, old)


@dataclass(frozen=True, kw_only=True)
class Visits:
    """What all visits of a round have in common: the settings, the learner at theta [p], and the device."""

    cfg: Config
    shape: tuple[int, int, int]
    way: int
    learner: Net
    theta: Tensor
    mean: Tensor
    std: Tensor
    boundary: bool
    device: torch.device

    @classmethod
    def of(cls, shared: Arrays, device: torch.device) -> "Visits":
        """The visits of a round, from the values that its jobs share."""
        shape, way = tuple(shared["shape"]), shared["way"]
        theta, mean, std = (torch.tensor(shared[name], device=device) for name in ("theta", "mean", "std"))
        return cls(
            cfg=Config.model_validate(shared["cfg"]), shape=shape, way=way, learner=net(shared["arch"], shape, way),
            theta=theta, mean=mean, std=std, boundary=shared["boundary"], device=device,
        )  # fmt: skip

    def inverted(
        self, jobs: Sequence[Job], teachers: Sequence[Teacher], batched: bool, answered: Answered
    ) -> list[Arrays | None]:
        """Both sets of each teacher that is inverted, or None where a loss is not finite, of which nothing is asked."""
        names, fine = [job.seed for job in jobs], [True] * len(jobs)

        def sets(stream: str, judge: Judge | None) -> list[Arrays]:
            found = synthesize(
                self.cfg, teachers, judge, names, self.shape, self.way, device=self.device, batched=batched,
                stream=stream,
            )  # fmt: skip
            for j, task in enumerate(found):
                fine[j] = fine[j] and math.isfinite(task["loss_last"])
            return [answered(job, task) if so else task for job, task, so in zip(jobs, found, fine, strict=True)]

        support = sets("support", None)
        query = sets("query", self._judge(support, batched))
        return [{"support": s, "query": q} if so else None for s, q, so in zip(support, query, fine, strict=True)]

    def asked(self, job: Job, service: Service) -> Arrays:
        """Both sets of a teacher that is asked, about images of sources or, of a service, by zero-order gradients.

        `job.values["asked"]` says which.
        """

        def one_set(stream: str, judge: Judge | None) -> Arrays:
            if service.card.access == "weights":
                return sourced.labelled(
                    self.cfg, service, self.shape, self.way, job.seed, device=self.device, stream=stream, judge=judge
                )  # fmt: skip
            one = asked.Asking(
                self.cfg, service, self.shape, self.way, job.seed, stream=stream, device=self.device
            )  # fmt: skip
            if job.values["asked"] != GENERATOR:
                return one.from_sources(judge)
            return one.generated(
                generator(self.shape, self.cfg.latent, self.cfg.width, self.cfg.told(self.way)), judge
            )  # fmt: skip

        support = one_set("support", None)
        return {"support": support, "query": one_set("query", self._judge([support], False))}

    def _judge(self, support: Sequence[Arrays], batched: bool) -> Judge | None:
        if not self.boundary:
            return None
        return distillation.task_models(self.cfg, self.learner, self.theta, support, self.mean, self.std, batched)


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `bidf-mkd.recover` op: recover a support set, distil the learner on it, and recover a query set.

    A job names the teacher. Its result holds `support` and `query` as recovered tasks. In the rounds that distil
    services it is `surrogates.distil`.
    """
    if "distil" in shared:
        return surrogates.distil(shard, jobs, shared)
    visits = Visits.of(shared, shard.device)

    def answered(job: Job, task: Arrays) -> Arrays:
        if "surrogate" not in job.values:
            return task
        return asked.answered(visits.cfg, shard.service(str(job.teacher)), task)

    def ask(job: Job) -> Arrays:
        return visits.asked(job, shard.service(str(job.teacher)))

    invert = partial(visits.inverted, answered=answered)
    return recovery.recover(shard, jobs, invert, partial(surrogates.teacher, shard), ask)
