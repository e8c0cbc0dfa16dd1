"""Losses on logits [n q], in nats, averaged over images.

[Wei2024] FREE, arXiv 2405.00984, Eq. 1 and 3. [Hu2023] PURER, arXiv 2303.11183. [Hinton2015] Distilling the Knowledge,
arXiv 1503.02531.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p_teacher || p_student) [n] of each image, of logits [n q]; >= 0, in nats ([Hinton2015], temperature 1)."""
    log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def distillation(teacher: Tensor, student: Tensor, *, form: str = "kl") -> Tensor:
    """Distillation loss (scalar) of student logits [n q] against teacher logits [n q], which get no gradient.

    `kl` is the mean KL ([Wei2024] Eq. 3). `probdot` is the released code's `kl_div` on probabilities t and s, the mean
    of t (log t - s) over all n*q entries. Its gradient is minus that of the inner product <t, s> / (n q). It is
    bounded, and it vanishes where the student is certain and wrong.
    """
    teacher = teacher.detach()
    if form == "kl":
        return kl(teacher, student).mean()
    if form == "probdot":
        log_t = teacher.log_softmax(-1)
        return (log_t.exp() * (log_t - student.softmax(-1))).mean()
    raise ValueError(f"unknown distillation form {form!r}; known: kl, probdot")


def disagreement(teacher: Tensor, student: Tensor, *, form: str = "kl", clamp: float = 10.0) -> Tensor:
    """The adversarial term of [Wei2024] Eq. 1 (scalar), which the inversion minimises.

    Only images on which teacher and student predict the same class count; this mask has no gradient.
    `kl` is -mean_j 1[argmax t_j = argmax s_j] min(KL(t_j || s_j), clamp).
    `probdot` is the released code's form, minus the mean over images of sum_c s (log s - t) under the same mask. With a
    constant s, to minimise it is to minimise <s, t>.
    """
    agree = (teacher.argmax(-1) == student.argmax(-1)).to(teacher.dtype).detach()
    return -(agree * disagreements(teacher, student, form=form, clamp=clamp)).mean()


def disagreements(teacher: Tensor, student: Tensor, *, form: str = "kl", clamp: float = 10.0) -> Tensor:
    """How far teacher and student are apart on each image [n], as `disagreement` counts it and without its mask."""
    if form == "kl":
        return kl(teacher, student).clamp(max=clamp)
    if form == "probdot":
        log_s = student.log_softmax(-1)
        return (log_s.exp() * (log_s - teacher.softmax(-1))).sum(-1)
    raise ValueError(f"unknown adversarial form {form!r}; known: kl, probdot")


def inversion(
    teacher: Tensor,
    labels: Tensor,
    student: Tensor | None,
    *,
    adversarial: float,
    form: str = "kl",
    clamp: float = 10.0,
    units: Tensor | None = None,
) -> Tensor:
    """[Wei2024] Eq. 1 (scalar): CE of the teacher on the wished labels [n], plus `adversarial` x `disagreement`.

    `units` [way] are the outputs of the teacher that the outputs of the student stand for; by default they are all.
    """
    loss = F.cross_entropy(teacher, labels)
    if student is None or adversarial == 0.0:
        return loss
    if units is not None and teacher.shape[-1] != len(units):
        teacher = teacher[:, units]
    return loss + adversarial * disagreement(teacher, student, form=form, clamp=clamp)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of vertical neighbours plus that of horizontal ones (scalar), of images [n c h w]."""
    return (x[:, :, 1:] - x[:, :, :-1]).abs().mean() + (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean()


def batch_norm_distance(found: Tensor, stored: Tensor) -> Tensor:
    """Squared distance per entry (scalar) between batch-norm statistics [k] of images and those a teacher stores."""
    return torch.mean((found - stored) ** 2)


def variation_norms(x: Tensor) -> Tensor:
    """[Hu2023] total variation (scalar): the sum of four L2 norms, each over the whole batch [n c h w].

    The norms are of the differences of neighbours along rows, columns and both diagonals.
    """
    differences = (
        x[:, :, :, 1:] - x[:, :, :, :-1],
        x[:, :, 1:] - x[:, :, :-1],
        x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(d) for d in differences]).sum()


def statistics_norms(found: Tensor, stored: Tensor, sizes: Sequence[int]) -> Tensor:
    """[Hu2023] R_BN (scalar): sum over the batch-norm layers of ||mean - stored mean|| + ||var - stored var||.

    `found` and `stored` [k] hold means and variances in parts of `sizes`, as `Net.stats_layout` lays them out.
    """
    parts = (found - stored).split(list(sizes))
    return torch.stack([torch.linalg.vector_norm(part) for part in parts]).sum()


def supervised_contrastive(features: Tensor, labels: Tensor, domain: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Contrastive loss between real and recovered images (scalar, nats); a reconstruction of ICFIL ([Hu2023]).

    Every image is an anchor once, with its label and its domain, `labels` [n] and `domain` [n]. Its positives are the
    images of the same class in the other domain, and there must be one. The loss of an anchor is -log softmax over all
    other images, averaged over its positives; the loss is the mean over anchors. `features` [n f] are normalised here
    to length 1.
    """
    f = F.normalize(features, dim=1)
    itself = torch.eye(len(f), dtype=torch.bool, device=f.device)
    scores = (f @ f.T / temperature).masked_fill(itself, float("-inf"))
    log_p = scores.log_softmax(1).masked_fill(itself, 0.0)
    positive = (labels[:, None] == labels) & (domain[:, None] != domain)
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()
