"""The mathematics, in pure torch: functions take tensors and seeds, and return tensors.

Nothing here reads a file, knows of a cluster, or takes a configuration object.

Docstrings name axes by letters: n images, c channels, h height, w width, q classes (logits), d latent, p flat
parameters, t tasks, s support, u query. Pixels are in [0, 1] unless a docstring says "normalised". Losses are in nats
and are averaged over images unless a docstring says otherwise. The weights of a network are one flat float vector
`[p]`, and `weights.Layout` names its parts.
"""
