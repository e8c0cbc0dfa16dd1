"""ICFIL: calibration of an adapted learner between its own recovered images and the real support, at meta-test.

[Hu2023] PURER, arXiv 2303.11183. The paper names the three stages and no release holds them: all numbers
here are a reconstruction. The adapted learner is inverted into images of the support's classes; a contrastive loss then
draws each class of the two domains together in feature space, and the head is trained on the real support again.
No query is involved.
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
    """Calibration after the adaptation to a support. Off with `steps` 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=0, ge=0, description="Contrastive steps on the backbone; 0 leaves calibration out.")
    lr: float = Field(default=0.01, gt=0, description="Their step size (SGD).")
    temperature: float = Field(default=0.1, gt=0, description="Of the contrastive loss.")
    images: int = Field(default=5, ge=1, description="Images recovered per class of the support.")
    inversion_steps: int = Field(default=200, ge=0, description="Adam steps on these images.")
    image_lr: float = Field(default=0.25, gt=0, description="Their step size, in normalised units.")
    shift: int = Field(default=2, ge=0, description="Largest random cyclic shift of the images, pixels.")
    tv_weight: float = Field(default=1e-4, ge=0, description="Weight of the images' total variation.")
    l2_weight: float = Field(default=1e-5, ge=0, description="Weight of the images' norm.")
    bn_weight: float = Field(
        default=1e-2, ge=0, description="Weight of the distance to the support's batch-norm statistics; 0 drops it."
    )
    head: Literal["keep", "fresh"] = Field(default="keep", description="Start of the head's training on the support.")
    head_steps: int = Field(default=10, ge=0, description="SGD steps on the head, the backbone frozen.")
    head_lr: float = Field(default=0.01, gt=0, description="Their step size.")


def inversion_loss(
    cfg: IcfilConfig, network: Net, phi: Tensor, stats: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """[Hu2023] L_inv (scalar) of normalised images [n c h w] with labels [n]: cross-entropy of the network under fixed
    statistics [k], plus total variation, norm, and the distance of the images' own statistics to these."""
    logits, found = network.with_stats(phi, images, stats, first_order=True)
    loss = F.cross_entropy(logits[:, : int(labels.max()) + 1], labels)
    loss = loss + cfg.tv_weight * losses.variation_norms(images) + cfg.l2_weight * torch.linalg.vector_norm(images)
    if cfg.bn_weight and stats.numel():
        loss = loss + cfg.bn_weight * losses.statistics_norms(found, stats, network.stats_layout.sizes)
    return loss


def invert(cfg: IcfilConfig, network: Net, phi: Tensor, stats: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """Images [n c h w] in normalised space, unclamped, that weights [p] take for `labels` [n]. Start: N(0, 1)."""
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

    `stats` [k] are the statistics of batch norm, None where it uses those of the batch. The inversion needs fixed ones:
    then it uses those that the support has under phi. In the contrast the real and the recovered images are each a
    batch of their own: a query will never be normalised together with recovered images. A `protonet` head becomes the
    class means of the new features; the others are trained. With `cfg.steps` 0, phi itself.
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
