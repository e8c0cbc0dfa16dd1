"""ZSDB3: images of noise are moved away from the nearest boundary of the teacher, and their distances are soft labels.

[Wang2021] Zero-Shot Knowledge Distillation from a Decision-Based Black-Box Model, ICML 2021, arXiv 2106.03310. A
teacher that names a class says by its answers how far an image is from being another one. The distance along a unit
direction is found by halving, and a shorter direction by the signs of [Cheng2020] Sign-OPT, arXiv 1909.10773. An image
that is far from every boundary is a good example of its class, and the class t whose boundary is near is what it
resembles: the soft label has the logit 1/(distance to t) for t and their sum for the image's own class.

Here every answer that was paid for is used twice. The distance to a class is that to the nearest image that was asked
about and named it, which the search across the boundary has made near; and the student learns from all answers, as it
does in the other methods. All searches have a fixed number of steps, so the plan of queries is exact.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ray_dfml.core.images import to_bytes
from ray_dfml.methods.base import Metrics, Panel, Values
from ray_dfml.methods.distillers.making import PANELS, NamedConfig, method_of
from ray_dfml.methods.students import lessons
from ray_dfml.methods.students.config import Batch
from ray_dfml.methods.students.loop import Study
from ray_dfml.methods.students.training import labels_of


class Zsdb3Config(NamedConfig):
    """Settings of ZSDB3. Lengths are L2 norms over an image's pixels, before these are clamped to [0, 1]."""

    batch: int = Field(default=10, ge=2, description="Most samples of a round.")
    candidates: int = Field(default=8, ge=1, description="Images of noise asked about for each sample that is kept.")
    noise: float = Field(default=0.1, ge=0, description="Standard deviation of the Gaussian part of the noise, pixels.")
    iterations: int = Field(default=2, ge=1, description="Moves of a sample away from its nearest boundary.")
    starts: int = Field(default=2, ge=1, description="Random directions in which a search for the boundary may begin.")
    reach: float = Field(default=10.0, gt=0, description="How far a random direction is followed.")
    halvings: int = Field(default=5, ge=1, description="Halvings of a distance to the boundary.")
    searches: int = Field(default=1, ge=0, description="Steps towards a direction in which the boundary is nearer.")
    directions: int = Field(default=8, ge=1, description="Random directions whose signs make such a step.")
    turn: float = Field(default=0.2, gt=0, description="Length of such a step; directions have length 1.")
    epsilon: float = Field(default=0.1, gt=0, description="Displacement of a direction whose sign is asked for.")
    stride: float = Field(default=0.5, gt=0, description="Length of a move; it is halved if the class would change.")
    tries: int = Field(default=2, ge=1, description="Lengths of a move that are asked about.")
    soft: float = Field(default=1.0, ge=0, description="Weight of the soft labels, at `temperature`.")
    temperature: float = Field(default=20.0, gt=0, description="Temperature of the soft labels.")

    @property
    def search_queries(self) -> int:
        """Images asked about to find the distance of a sample to its nearest boundary."""
        return self.starts + self.halvings + self.searches * (self.directions + 1 + self.halvings)

    @property
    def sample_queries(self) -> int:
        """Images asked about for each sample."""
        return self.candidates + self.iterations * (self.search_queries + self.tries)

    @model_validator(mode="after")
    def _pays_for_samples(self) -> "Zsdb3Config":
        if self.budget < 2 * self.sample_queries:
            raise ValueError(
                f"method.budget is below two samples of {self.sample_queries} queries each; raise it, or lower "
                "method.iterations, method.searches or method.directions"
            )
        return self

    def batches(self) -> list[Batch]:
        """Rounds of `batch` samples; the last may have fewer, two at least."""
        rounds, rest = divmod(self.budget // self.sample_queries, self.batch)
        samples = [self.batch] * rounds + ([rest] if rest > 1 else [])
        asked = [count * self.sample_queries for count in samples]
        return self._bounded([Batch(count, count) for count in asked])


class Oracle:
    """What the teacher names, of float images. Answers are kept for the student unless they say nothing new."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __call__(self, x: Tensor, *, keep: bool = True) -> Tensor:
        """The classes int64 [...] of pixels [... c h w], which are clamped to [0, 1] and asked about in float32.

        In bytes a short displacement would vanish. What is kept are the bytes.
        """
        study, images = self._study, x.reshape(-1, *x.shape[-3:]).clamp(0, 1)
        answers = study.ask(images.cpu().numpy())
        if keep:
            study.keep(to_bytes(images), answers)
        return torch.tensor(labels_of(answers), device=study.device).view(x.shape[:-3])


def along(x: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    """Images [... n c h w] moved from images [n c h w] by lengths [... n] along directions [... n d]."""
    return x + (length[..., None] * direction).view(*length.shape, *x.shape[1:])


def halved(
    ask: Oracle, x: Tensor, own: Tensor, direction: Tensor, low: Tensor, high: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Halve `steps` times the interval from low to high [n], between which the class changes from `own` [n]."""
    for _ in range(steps):
        middle = (low + high) / 2
        crossed = ask(along(x, direction, middle)) != own
        low, high = torch.where(crossed, low, middle), torch.where(crossed, middle, high)
    return low, high


def start(cfg: Zsdb3Config, study: Study, ask: Oracle, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Directions [n d] and lengths [n] at which another class is named.

    They lead to the nearest image of another class that is known, or if it is nearer to a random image at `reach` that
    has another class. Where there is neither the length is `reach`, and the sample counts as that far from a boundary.
    """
    known = torch.tensor(study.images, device=study.device).flatten(1).float() / 255
    labels = torch.tensor(labels_of(study.answers), device=study.device)
    drawn = torch.randn(cfg.starts, len(x), x[0].numel(), generator=study.rng).to(study.device)
    drawn = F.normalize(drawn, dim=-1)
    reach = torch.full(drawn.shape[:2], cfg.reach, device=study.device)
    crossed = ask(along(x, drawn, reach)) != own
    first = crossed.int().argmax(0)
    direction = drawn.gather(0, first[None, :, None].expand(1, -1, drawn.shape[-1]))[0]
    apart = torch.cdist(x.flatten(1), known)
    apart = apart.masked_fill((labels[None] == own[:, None]) | (apart == 0), float("inf"))
    length, nearest = apart.min(1)
    nearer = length < torch.where(crossed.any(0), cfg.reach, float("inf"))
    towards = F.normalize(known[nearest] - x.flatten(1), dim=-1)
    direction = torch.where(nearer[:, None], towards, direction)
    return direction, torch.where(nearer, length, torch.full_like(length, cfg.reach))


def nearest_boundary(cfg: Zsdb3Config, study: Study, ask: Oracle, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Directions [n d], of length 1, in which another class is near, and the lengths [n] at which it is named.

    A step of the search turns a direction by `turn` against the mean of random directions, each with the sign that says
    whether the class is kept when the direction is displaced towards it. It is taken if another class is named nearer.
    """
    direction, high = start(cfg, study, ask, x, own)
    low, high = halved(ask, x, own, direction, torch.zeros_like(high), high, cfg.halvings)
    for _ in range(cfg.searches):
        drawn = torch.randn(cfg.directions, *direction.shape, generator=study.rng).to(study.device)
        drawn = F.normalize(drawn, dim=-1)
        displaced = F.normalize(direction + cfg.epsilon * drawn, dim=-1)
        kept = ask(along(x, displaced, high.expand(cfg.directions, -1)), keep=False) == own
        slope = F.normalize((torch.where(kept, 1.0, -1.0)[..., None] * drawn).mean(0), dim=-1)
        turned = F.normalize(direction - cfg.turn * slope, dim=-1)
        shorter = ask(along(x, turned, high)) != own
        direction = torch.where(shorter[:, None], turned, direction)
        low = torch.where(shorter, torch.zeros_like(low), low)
        low, high = halved(ask, x, own, direction, low, high, cfg.halvings)
    return direction, high


def moved(cfg: Zsdb3Config, ask: Oracle, x: Tensor, own: Tensor, direction: Tensor) -> Tensor:
    """Samples [n c h w] after the longest of `tries` moves against their directions [n d] that keeps their class."""
    strides = cfg.stride * 0.5 ** torch.arange(cfg.tries, device=x.device)
    there = along(x, -direction, strides[:, None].expand(-1, len(x))).clamp(0, 1)
    stays = ask(there) == own
    chosen = there.gather(0, stays.int().argmax(0).view(1, -1, 1, 1, 1).expand(1, *x.shape))[0]
    return torch.where(stays.any(0)[:, None, None, None], chosen, x)


def seeds_of(cfg: Zsdb3Config, study: Study, ask: Oracle, count: int) -> tuple[Tensor, Tensor]:
    """Samples [n c h w] of noise and their classes [n]: those of the classes that are rarest among the candidates.

    Noise is uniform, times a uniform factor of the image, plus Gaussian noise.
    """
    total, shape = cfg.candidates * count, study.card.image.shape
    scale = torch.rand(total, 1, 1, 1, generator=study.rng)
    x = torch.rand(total, *shape, generator=study.rng) * scale
    x = (x + cfg.noise * torch.randn(total, *shape, generator=study.rng)).clamp(0, 1).to(study.device)
    labels = ask(x)
    place = F.one_hot(labels, len(study.card.classes)).cumsum(0).gather(1, labels[:, None])[:, 0]
    rows = place.argsort(stable=True)[:count].sort().values
    return x[rows], labels[rows]


def soft_logits(x: Tensor, own: Tensor, known: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[Wang2021] logits [n q] of samples [n d] of classes `own` [n], from known images [m d] with their labels [m].

    Class t has 1/(distance to the nearest image of t), 0 if there is none, and the own class has the sum of the others.
    """
    apart = torch.cdist(x, known).clamp_min(1e-6)
    far = torch.full((len(x), classes), float("inf"), device=x.device)
    least = far.scatter_reduce(1, labels.expand(len(x), -1), apart, "amin")
    near = (1 / least).scatter(1, own[:, None], 0.0)
    return near.scatter(1, own[:, None], near.sum(1, keepdim=True))


def _loss(cfg: Zsdb3Config, study: Study) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of all answers, plus the KL of the finished samples' soft labels, summed over them."""
    finished = torch.tensor(study.own["finished"], device=study.device)
    known = torch.tensor(study.images, device=study.device).flatten(1).float() / 255
    labels = torch.tensor(labels_of(study.answers), device=study.device)
    logits = soft_logits(known[finished], labels[finished], known, labels, len(study.card.classes))
    soft = (logits / cfg.temperature).softmax(-1)
    place = torch.full((len(known),), -1, device=study.device)
    place[finished] = torch.arange(len(finished), device=study.device)

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        at = place[rows]
        of_logits = (logits[at >= 0] / cfg.temperature).log_softmax(-1)
        kl = F.kl_div(of_logits, soft[at[at >= 0]], reduction="sum")
        return F.cross_entropy(logits, labels[rows]) + cfg.soft * kl

    return loss


def work(cfg: Zsdb3Config, study: Study) -> Metrics:
    """Find samples, move them away from the boundary, and train the student on all answers so far."""
    study.lesson.average = cfg.average
    ask, count = Oracle(study), study.batch.asked // cfg.sample_queries
    x, own = seeds_of(cfg, study, ask, count)
    length = torch.zeros(count)
    for _ in range(cfg.iterations):
        direction, length = nearest_boundary(cfg, study, ask, x, own)
        x = moved(cfg, ask, x, own, direction)
    earlier = study.own.get("finished", np.zeros(0, np.int64))
    at = np.arange(len(study.images), len(study.images) + count)
    study.keep(to_bytes(x), own.cpu().numpy())
    study.own["finished"] = np.concatenate([earlier, at])
    found = lessons.replay(cfg, study, _loss(cfg, study))
    return {"student/loss": lessons.mean(found), "boundary": float(length.mean())}


SEARCHED: Values = {
    "budget": 10_000_000, "batch": 200, "candidates": 1, "iterations": 40, "starts": 20, "halvings": 10, "searches": 20,
    "directions": 200, "epsilon": 1e-3, "tries": 3, "optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0,
    "student_batch": 512, "replays": 200.0,
}  # fmt: skip
"""What the paper spends on a sample. Its budget is that of IDEAL's figure 3."""

ZSDB3 = method_of(
    Zsdb3Config, work, SEARCHED,
    (*PANELS[:2], Panel("Distance to the boundary", "L2, pixels", "Mean of a round's samples before their last move; "
                        "of the way before pixels are clamped to [0, 1].", {"boundary": "mean over the teachers"})),
)  # fmt: skip
