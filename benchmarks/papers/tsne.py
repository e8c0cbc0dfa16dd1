"""t-SNE of a few hundred points, exact.

[Maaten2008] Visualizing Data using t-SNE, JMLR 9, Eq. 1, 4 and 5.
"""

import numpy as np


def squared_distances(x: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [n n] between the rows of x [n d]."""
    squares = (x * x).sum(1)
    found = np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def affinities(x: np.ndarray, perplexity: float) -> np.ndarray:
    """Joint probabilities [n n] of neighbours: symmetric, their sum 1, their diagonal 0 ([Maaten2008] Eq. 1).

    The width of each point's Gaussian is bisected until the entropy of its neighbours is log(perplexity), in nats.
    Raises ValueError unless 1 <= perplexity < n - 1.
    """
    n = len(x)
    if not 1 <= perplexity < n - 1:
        raise ValueError(f"perplexity {perplexity:g}: expected 1 to {n - 2} for {n} points")
    far = squared_distances(x)
    far = far / max(far.mean(), 1e-300)
    low, high, beta = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(100):
        p = conditional(far, beta)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + np.minimum(high, 1e300)) / 2)
    p = conditional(far, beta)
    return (p + p.T) / (2 * n)


def conditional(far: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Rows [n n] of probabilities exp(-beta_i far_ij) / sum, without the point itself."""
    logits = -beta[:, None] * far
    np.fill_diagonal(logits, -np.inf)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def loss_and_grad(p: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """KL(P || Q) in nats, with Student's t with one degree of freedom in the plane, and its gradient [n 2] by y."""
    kernel = 1 / (1 + squared_distances(y))
    np.fill_diagonal(kernel, 0.0)
    q = np.maximum(kernel / kernel.sum(), 1e-300)
    weights = (p - q) * kernel
    grad = 4 * (weights.sum(1)[:, None] * y - weights @ y)
    return float((p * np.log(np.maximum(p, 1e-300) / q)).sum()), grad


def tsne(x: np.ndarray, *, perplexity: float = 30.0, steps: int = 1000, seed: int = 0) -> np.ndarray:
    """Places [n 2] in the plane of points [n d]; near points stay near.

    Gradient descent with momentum and gains from N(0, 1e-4); in the first quarter of the steps P counts twelvefold.
    The seed draws the start, and equal calls have equal results.
    """
    p = affinities(np.asarray(x, np.float64), perplexity)
    n = len(p)
    y = 1e-2 * np.random.default_rng(seed).standard_normal((n, 2))
    velocity, gains, rate = np.zeros_like(y), np.ones_like(y), max(n / 48, 50.0)
    for step in range(steps):
        early = step < steps // 4
        _, grad = loss_and_grad(12 * p if early else p, y)
        gains = np.maximum(np.where(np.sign(grad) == np.sign(velocity), 0.8 * gains, gains + 0.2), 0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * grad
        y = y + velocity
        y = y - y.mean(0)
    return y


def same_neighbour(x: np.ndarray, groups: np.ndarray) -> float:
    """Share in [0, 1] of the rows of x [n d] whose nearest other row has the same group of [n]."""
    far = squared_distances(np.asarray(x, np.float64))
    np.fill_diagonal(far, np.inf)
    return float((groups[far.argmin(1)] == groups).mean())
