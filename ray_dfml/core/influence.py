"""How a gradient step on some tasks changes the loss on others, to first order.

[Pruthi2020] Estimating Training Data Influence by Tracing Gradient Descent, arXiv 2002.08484, Eq. 1 (TracIn).
"""

from typing import NamedTuple

from torch import Tensor


class Influence(NamedTuple):
    """What a step along the mean of some gradients does to a loss."""

    product: float
    """Mean inner product with that loss's gradient: a small step of size s lowers the loss by s times it."""
    half: float
    """Half-width of its 95 % interval over the gradients (normal approximation); infinite for a single one."""
    cosine: float
    """Cosine of the mean gradient with that of the loss, in [-1, 1]; 0 if one of them is 0."""

    @property
    def harms(self) -> bool:
        """Whether the step raises the loss, by the whole interval."""
        return self.product + self.half < 0

    @property
    def helps(self) -> bool:
        """Whether the step lowers the loss, by the whole interval."""
        return self.product - self.half > 0


def influence(grads: Tensor, wanted: Tensor) -> Influence:
    """The influence of t tasks with gradients [t p] on a loss with gradient [p], at the same weights ([Pruthi2020])."""
    grads, wanted = grads.double(), wanted.double()
    products = grads @ wanted
    count, mean = len(products), grads.mean(0)
    half = 1.96 * float(products.std()) / count**0.5 if count > 1 else float("inf")
    length = mean.norm() * wanted.norm()
    cosine = float(mean @ wanted / length) if length > 0 else 0.0
    return Influence(float(products.mean()), half, cosine)
