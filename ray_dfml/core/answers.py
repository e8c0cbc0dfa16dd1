"""What a teacher answers at a level of access: logits, probabilities that may be rounded or cut, or a label."""

import numpy as np
import torch
from torch import Tensor


def answers(logits: Tensor, access: str, *, decimals: int | None = None, top_k: int | None = None) -> np.ndarray:
    """The answers of a classifier with these logits [n q]: float32 [n q], or int64 labels [n].

    `access` is `weights`, which gives logits too, `logits`, `probs` or `label`. Of probabilities the `top_k` largest
    are kept, the first ones among equals, and the others are 0; then they are rounded to `decimals`, so they need not
    sum to 1. Among equal logits the label is the first one.
    """
    if access in ("weights", "logits"):
        return logits.float().cpu().numpy()
    if access == "label":
        return logits.argmax(-1).cpu().numpy()
    probs = logits.softmax(-1)
    if top_k is not None and top_k < probs.shape[1]:
        order = torch.sort(probs, stable=True, dim=-1, descending=True).indices
        probs = probs.scatter(-1, order[:, top_k:], 0.0)
    found = probs.cpu().numpy()
    return found if decimals is None else found.round(decimals)
