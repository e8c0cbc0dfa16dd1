"""Pure torch: tensors and seeds in, tensors out. No files, no cluster, no configuration objects.

Axes: n images, c channels, h height, w width, q classes (logits), d latent, p flat parameters, t tasks, s support, u
query. Pixels are in [0, 1] unless a docstring says "normalised". Losses are in nats, averaged over images unless
stated. Weights of a network are one flat float vector `[p]`; `weights.Layout` names its parts.
"""
