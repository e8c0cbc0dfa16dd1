"""How alike networks are: linear CKA of what they make of the same images, and how alike they sort them.

[Kornblith2019] Similarity of Neural Network Representations Revisited, arXiv 1905.00414, section 3. [Wei2024] FREE,
arXiv 2405.00984, Fig. 8, which maps a pool of teachers with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(features: Sequence[Tensor]) -> Tensor:
    """Linear CKA [k k] of k representations [n f_i] of the same n images; the widths f_i may differ.

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|), in Frobenius norms, of features whose columns have mean 0 ([Kornblith2019]
    Eq. 3). It lies in [0, 1], and is 1 for X = Y; orthogonal maps and scaling of the features leave it as it is. A
    representation that is the same for all images has CKA 0 with all others, and with itself. The images' Gram matrices
    are compared, so the cost does not depend on the order or the number of pairs.
    """
    grams = torch.stack([_gram(x) for x in features])
    return (grams @ grams.T).clamp(0, 1)


def _gram(x: Tensor) -> Tensor:
    """The centred Gram matrix of features [n f] as a vector [n^2] of length 1, or of zeros if all rows are equal."""
    x = x.double()
    x = x - x.mean(0)
    scale = x.abs().max()
    if not scale > 0:
        return x.new_zeros(len(x) ** 2)
    x = x / scale
    gram = (x @ x.T).flatten()
    return gram / gram.norm()


def beyond(x: Tensor, directions: int) -> float:
    """Share in [0, 1] of the variance of features [n f] that lies outside their first principal directions.

    It is 0 for features that spread along no more than `directions` directions, and if all rows are equal.
    """
    squares = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    total = squares.sum()
    return float(squares[directions:].sum() / total) if total > 0 else 0.0


def same_partition(labels: Tensor) -> Tensor:
    """Adjusted Rand index [k k] of k classifiers' labels [k n] of n images: how alike they sort the images.

    It compares which pairs of images get one label, so the classes of two classifiers need not be the same. It is 1 for
    equal partitions and has expectation 0 for random ones with the same sizes of classes (Hubert and Arabie, 1985,
    Eq. 5). Two classifiers that give all images one label sort them equally.
    """
    pairs = (labels[:, :, None] == labels[:, None, :]).flatten(1).double()
    n = labels.shape[1]
    total, both = n * (n - 1) / 2, (pairs @ pairs.T - n) / 2
    each = both.diagonal()
    expected = each[:, None] * each[None] / max(total, 1)
    most = (each[:, None] + each[None]) / 2
    return torch.where(most > expected, (both - expected) / (most - expected).clamp_min(1e-12), 1.0)
