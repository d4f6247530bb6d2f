"""Independent random streams from one seed."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(seed: int, stream: str, index: int) -> int:
    """A generator seed in [0, 2**63) for entry `index` of the named stream.

    A hash, not arithmetic: neighbouring seeds, streams and indices give unrelated generators.
    (torch's CPU generator uses the low 32 bits.)
    """
    digest = blake2b(b"%d %s %d" % (seed, stream.encode(), index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rank_seed(seed: int, rank: int, step: int) -> int:
    """Of the random numbers that forward passes draw in a rank other than 0, from a step on."""
    return derive_seed(seed, f"rank {rank}", step)
