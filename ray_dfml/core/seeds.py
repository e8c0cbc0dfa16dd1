"""Seeds derived from names, so that a result depends neither on the process that computes it nor on the time."""

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as `(run seed, round, op, job)`; equal parts give equal seeds on any machine."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(*parts: int | str) -> torch.Generator:
    """A random generator seeded by `derive(*parts)`.

    Draws are made on the CPU and then moved, so that all devices see the same ones.
    """
    return torch.Generator().manual_seed(derive(*parts))
