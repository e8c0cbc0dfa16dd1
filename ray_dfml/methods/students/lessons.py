"""What a student does between two batches of queries: it trains on answers that were paid for already, again and again.

An answer costs once and is kept. So the steps of the student are not bounded by the queries, and how many are taken is
a setting of the method. All methods that distil share this training; they differ in the images that they ask about.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ray_dfml.core.images import draw_view, view
from ray_dfml.core.sources.warp import Warp, warp
from ray_dfml.methods.students.config import ReplayConfig, TrainingConfig
from ray_dfml.methods.students.loop import Study
from ray_dfml.methods.students.training import cross_entropy, labels_of, picks, targets

WARP = {"rotation": 0.12, "scale": 0.08, "shear": 0.08, "shift": 0.06, "elastic": 0.03}
"""Bounds of the warps of training images at `warp` 1."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(rows [b] of the answers so far, logits [b q] of views of their images) -> loss (scalar)."""


def mirrored(cfg: TrainingConfig, study: Study) -> bool:
    """Whether views of the student may be mirrored."""
    return cfg.flip == "on" or (cfg.flip == "auto" and study.card.image.channels > 1)


def look(cfg: TrainingConfig, study: Study, pixels: Tensor, *, fill: str) -> Tensor:
    """A view of pixels [n c h w] that should not change their class: each image warped, or all cropped and mirrored.

    `fill` says what lies outside of a warped image (`core.sources.warp.warp`); crops are padded with black.
    """
    flip = mirrored(cfg, study)
    if cfg.warp:
        bounds = {name: cfg.warp * bound for name, bound in WARP.items()}
        return warp(study.rng, pixels, Warp(**bounds, mirror=flip), fill=fill)
    if not cfg.crop_pad and not flip:
        return pixels
    return view(pixels, draw_view(study.rng, pad=cfg.crop_pad, flip=flip), pad=cfg.crop_pad, fill="zero")


def known(study: Study) -> tuple[Tensor, Tensor]:
    """The images so far, uint8 [n c h w], and their answers as targets (`training.targets`), on the study's device."""
    return torch.tensor(study.images).to(study.device), targets(study.answers).to(study.device)


def repeat(cfg: TrainingConfig, study: Study, steps: int, *, fill: str, loss: Loss | None = None) -> list[Tensor]:
    """Train on the answers so far for `steps` steps, and after the last batch of queries for `last_steps` more.

    Images are drawn with replacement, those of rare classes more often (`balance`). The step size grows over the first
    `warmup_steps` steps of all, and falls to 0 on a cosine over the last ones. Without `loss` it is the cross-entropy.
    Returns the losses (scalars), each before its step.
    """
    images, answers = known(study)
    weights = study.counts().clamp_min(1)[labels_of(study.answers)] ** -cfg.balance
    found: list[Tensor] = []

    def step(rows: Tensor, lr: float) -> None:
        pixels = look(cfg, study, images[rows].float() / 255, fill=fill)
        found.append(study.lesson.step(pixels, partial(loss, rows) if loss else cross_entropy(answers[rows]), lr))

    for rows in picks(weights, steps=steps, batch=cfg.student_batch, rng=study.rng):
        step(rows, cfg.lr * min(1.0, (study.lesson.pupil.step + 1) / max(cfg.warmup_steps, 1)))
    if study.last:
        for i, rows in enumerate(picks(weights, steps=cfg.last_steps, batch=cfg.student_batch, rng=study.rng)):
            step(rows, cfg.lr * 0.5 * (1 + math.cos(math.pi * i / cfg.last_steps)))
    return found


def replay(cfg: ReplayConfig, study: Study, loss: Loss | None = None) -> list[Tensor]:
    """`repeat`, for as many steps as `replays` says of the round's queries.

    While all answers name one class there is nothing to tell apart, and nothing is trained: a student that was sure of
    this class would have no gradient left that a generator could follow.
    """
    if int((study.counts() > 0).sum()) < 2:
        return []
    steps = max(1, round(cfg.replays * study.asked / cfg.student_batch))
    return repeat(cfg, study, steps, fill="edge", loss=loss)


def mean(losses: list[Tensor]) -> float | None:
    """The mean of the losses (scalars) of a round, None without a step."""
    return float(torch.stack(losses).mean()) if losses else None
