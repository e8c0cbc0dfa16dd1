"""ICFIL calibrates an adapted learner at meta-test, with images recovered from it and the real support.

[Hu2023] PURER, arXiv 2303.11183. The paper names three stages, but no release holds them, so all numbers here are a
reconstruction. First the adapted learner is inverted into images of the support's classes. Then a contrastive loss
draws real and recovered images of a class together in feature space. Last, the head is trained on the real support
again. No query is involved.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ray_dfml.core import episodes, losses, optim
from ray_dfml.core.inner_loop import Head, adapt, adapted, plain_grad
from ray_dfml.core.net import Net


class IcfilConfig(BaseModel):
    """Settings of the calibration after the adaptation to a support. With `steps` 0 it is off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=0, ge=0, description="Contrastive steps on the backbone; 0 leaves calibration out.")
    lr: float = Field(default=0.01, gt=0, description="SGD step size of the contrastive steps.")
    temperature: float = Field(default=0.1, gt=0, description="Temperature of the contrastive loss.")
    images: int = Field(default=5, ge=1, description="Images recovered per class of the support.")
    inversion_steps: int = Field(default=200, ge=0, description="Adam steps on the recovered images.")
    image_lr: float = Field(default=0.25, gt=0, description="Adam step size of the images, in normalised units.")
    shift: int = Field(default=2, ge=0, description="Largest random cyclic shift of the images, pixels.")
    tv_weight: float = Field(default=1e-4, ge=0, description="Weight of the images' total variation.")
    l2_weight: float = Field(default=1e-5, ge=0, description="Weight of the images' norm.")
    bn_weight: float = Field(
        default=1e-2, ge=0, description="Weight of the distance to the support's batch-norm statistics; 0 drops it."
    )
    head: Literal["keep", "fresh"] = Field(default="keep", description="Start of the head's training on the support.")
    head_steps: int = Field(default=10, ge=0, description="SGD steps on the head, the backbone frozen.")
    head_lr: float = Field(default=0.01, gt=0, description="SGD step size of the head.")


def inversion_loss(
    cfg: IcfilConfig, network: Net, phi: Tensor, stats: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """[Hu2023] L_inv (scalar) of normalised images [n c h w] with labels [n].

    It is the cross-entropy of the network under fixed statistics `stats` [k], plus the total variation and the norm of
    the images, plus the distance of their own statistics to `stats`.
    """
    logits, found = network.with_stats(phi, images, stats, first_order=True)
    loss = F.cross_entropy(logits[:, : int(labels.max()) + 1], labels)
    loss = loss + cfg.tv_weight * losses.variation_norms(images) + cfg.l2_weight * torch.linalg.vector_norm(images)
    if cfg.bn_weight and stats.numel():
        loss = loss + cfg.bn_weight * losses.statistics_norms(found, stats, network.stats_layout.sizes)
    return loss


def invert(cfg: IcfilConfig, network: Net, phi: Tensor, stats: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """Recover images [n c h w] that the network with weights [p] takes for `labels` [n].

    The images start from N(0, 1), live in normalised space, and are not clamped.
    """
    images = torch.randn(len(labels), *network.shape, generator=rng).to(phi)
    adam = optim.Adam.zeros(images)
    for _ in range(cfg.inversion_steps):
        at = torch.randint(-cfg.shift, cfg.shift + 1, (2,), generator=rng).tolist()

        def loss(x: Tensor, at: list[int] = at) -> Tensor:
            return inversion_loss(cfg, network, phi, stats, x.roll(at, (2, 3)), labels)

        images, adam = optim.adam_step(images, plain_grad(loss)(images), adam, lr=cfg.image_lr)
    return images


def calibrate(
    cfg: IcfilConfig,
    network: Net,
    phi: Tensor,
    stats: Tensor | None,
    support: Tensor,
    labels: Tensor,
    *,
    head: Head,
    seed: int,
) -> Tensor:
    """Calibrated weights [p] of a learner adapted to a support: normalised images [s c h w], labels [s] in 0..k-1.

    `stats` [k] are the statistics of batch norm, or None if it uses those of the batch. The inversion needs fixed
    statistics, and in the second case takes those that the support has under phi. In the contrast, real and recovered
    images are two separate batches, since queries will never be normalised together with recovered images. A
    `protonet` head becomes the class means of the new features; other heads are trained. With `cfg.steps` 0 the result
    is phi itself.
    """
    if not cfg.steps:
        return phi
    rng, way = torch.Generator().manual_seed(seed), int(labels.max()) + 1
    made = episodes.interleaved(way, cfg.images).to(labels.device)
    with torch.no_grad():
        fixed = network.with_stats(phi, support, first_order=True)[1] if stats is None else stats
    images = invert(cfg, network, phi, fixed, made, rng)
    classes = torch.cat([labels, made])
    domain = torch.cat([torch.zeros_like(labels), torch.ones_like(made)])
    backbone, last = network.split(phi)

    def contrast(w: Tensor) -> Tensor:
        both = [network.features(torch.cat([w, last]), x, stats, first_order=True) for x in (support, images)]
        return losses.supervised_contrastive(torch.cat(both), classes, domain, temperature=cfg.temperature)

    moved = adapt(contrast, backbone, lr=cfg.lr, steps=cfg.steps, grad_of=plain_grad)
    if cfg.head == "fresh":
        last = network.split(network.init(rng).to(phi))[1]
    return adapted(
        network,
        torch.cat([moved, last]),
        support,
        labels,
        head="protonet" if head == "protonet" else "anil",
        lr=cfg.head_lr,
        steps=cfg.head_steps,
        grad_of=plain_grad,
        stats=stats,
        way=way,
    )
