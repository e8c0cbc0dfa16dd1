"""A round of distillation: images are made and chosen, the teacher is asked, and the student learns from all answers.

[Zhang2023] IDEAL: Query-Efficient Data-Free Learning from Black-Box Models, ICLR 2023. `stage` is its stage 1, and the
rest is its stage 2. docs/methods_ideal.md says what is not in the paper.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.images import to_bytes, to_pixels
from ray_dfml.core.sources import SOURCES
from ray_dfml.methods.base import Metrics
from ray_dfml.methods.students import lessons
from ray_dfml.methods.students.config import GENERATOR, DistilConfig
from ray_dfml.methods.students.loop import Study
from ray_dfml.methods.students.selection import choose, keys, quotas
from ray_dfml.methods.students.stage import Stage
from ray_dfml.methods.students.training import cross_entropy, labels_of, targets


def notes(cfg: DistilConfig) -> list[str]:
    """Lines that say what the image sources assume about the data."""
    said = {GENERATOR: "nothing about the data: it follows the student"}
    said |= {name: f"assumes {source.assumption}" for name, source in SOURCES.items()}
    lines = [f"images of {name}: {said[name]}" for name in cfg.images]
    if cfg.invert:
        lines.append(
            "dark and light of the images changed places: this is knowledge of the domain, which no teacher gave"
        )
    return lines


def work(cfg: DistilConfig, study: Study) -> Metrics:
    """Make images, ask about them, and train the student on all that is known. Returns the figures of the round."""
    study.lesson.average = cfg.average
    agreement = None
    if study.batch.new:
        images = made(cfg, study)
        if cfg.requery:
            study.keep(images, np.zeros(len(images), np.int64))
        else:
            guess = study.lesson.logits(images).argmax(-1).cpu().numpy()
            answers = study.ask(images)
            agreement = 100.0 * float((guess == labels_of(answers)).mean())
            study.keep(images, answers)
    loss = requeried(cfg, study) if cfg.requery else trained(cfg, study)
    counts = study.counts()
    return {
        "agreement": agreement,
        "student/loss": loss,
        "answers/rarest": 100.0 * float(counts.min() / counts.sum()),
    }


def made(cfg: DistilConfig, study: Study) -> np.ndarray:
    """The images of a round as uint8 [n c h w]: candidates of all sources, of which some are chosen."""
    count = study.batch.new
    chosen = len(study.images) > 0 and cfg.candidates > 1
    images = to_bytes(candidates(cfg, study, math.ceil(cfg.candidates * count) if chosen else count))
    if not chosen:
        return images
    logits = study.lesson.logits(images)
    per_class = quotas(study.counts(), count, cfg.quota).to(logits.device)
    rows = choose(keys(logits, cfg.margin, study.rng), logits.argmax(-1), per_class, count)
    return images[rows.cpu().numpy()]


def candidates(cfg: DistilConfig, study: Study, count: int) -> Tensor:
    """Pixels [n c h w] in [0, 1] of the sources: the share of mutants if there are parents, the rest in equal parts."""
    names = [name for name in cfg.images if name == GENERATOR or not SOURCES[name].parents]
    changed = [name for name in cfg.images if name not in names] if len(study.images) else []
    copies = int(cfg.mutants * count) if changed else 0
    rest = count - copies
    parts = [_fresh(cfg, study, name, rest // len(names) + (i < rest % len(names))) for i, name in enumerate(names)]
    parents, labels = torch.tensor(study.images), torch.tensor(labels_of(study.answers))
    fill = border(cfg, study)
    parts += [SOURCES[name].function(study.rng, copies, parents, labels, fill=fill) for name in changed]
    return torch.cat([part.to(study.device) for part in parts])


def _fresh(cfg: DistilConfig, study: Study, name: str, count: int) -> Tensor:
    if name == GENERATOR:
        return Stage(cfg, study, crop_pad=cfg.crop_pad, flip=lessons.mirrored(cfg, study)).images(count)
    images = SOURCES[name].function(study.rng, count, study.card.image.shape)
    return 1 - images if cfg.invert else images


def border(cfg: DistilConfig, study: Study) -> str:
    """What lies outside of an image that is moved: black if the images are grey and light on dark, else its border."""
    return "zero" if study.card.image.channels == 1 and not cfg.invert else "edge"


def trained(cfg: DistilConfig, study: Study) -> float | None:
    """Train the student on the stored images and answers. Returns the mean loss of the steps, None without a step."""
    fill = border(cfg, study)
    if cfg.training == "root":
        found = lessons.repeat(cfg, study, int(cfg.steps * len(study.images) ** 0.5), fill=fill)
    else:
        images, answers = lessons.known(study)
        new = [torch.arange(len(images) - study.batch.new, len(images))]
        whole = cfg.training == "pass"
        parts = torch.randperm(len(images), generator=study.rng).split(cfg.student_batch) if whole else new
        found = []
        for rows in parts:
            if len(rows) > 1:
                pixels = lessons.look(cfg, study, images[rows].float() / 255, fill=fill)
                found.append(study.lesson.step(pixels, cross_entropy(answers[rows]), cfg.lr))
    return lessons.mean(found)


def requeried(cfg: DistilConfig, study: Study) -> float:
    """The released code's pass: every image of the pool in a new view, whose label is asked for again."""
    found, answers = [], np.zeros(len(study.images), np.int64)
    for rows in torch.randperm(len(study.images), generator=study.rng).split(cfg.student_batch):
        at = rows.numpy()
        seen = to_bytes(lessons.look(cfg, study, to_pixels(study.images[at], study.device), fill=border(cfg, study)))
        found_here = study.ask(seen)
        answers[at] = labels_of(found_here)
        if len(at) > 1:
            loss = cross_entropy(targets(found_here).to(study.device))
            found.append(study.lesson.step(to_pixels(seen, study.device), loss, cfg.lr))
    study.renew(answers)
    return float(torch.stack(found).mean())
