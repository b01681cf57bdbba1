"""Philox4x32-10, the counter-based generator behind every basis.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and the
known-answer vectors of Random123. Integers only, so the result is the same on every platform.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UsageError

__all__ = ["check_seed", "key_of", "philox4x32", "philox_words"]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


def check_seed(seed: int) -> int:
    """Return `seed` if it is a uint64, else raise `UsageError`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise UsageError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return seed


def key_of(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a uint64 seed, low word first."""
    check_seed(seed)
    return seed & 0xFFFFFFFF, seed >> 32


def philox4x32(
    c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, key: tuple[int, int]
) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 over counters that broadcast against each other.

    Args:
        c0, c1, c2, c3: counter words, integers in [0, 2**32), any broadcastable shapes.
        key: two key words in [0, 2**32).

    Returns:
        uint32 [..., 4], the four output words of each counter.
    """
    return np.stack(philox_words(c0, c1, c2, c3, key), axis=-1).astype(np.uint32)


def philox_words(
    c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, key: tuple[int, int]
) -> tuple[NDArray[np.uint64], ...]:
    """As `philox4x32`, but the four words apart, each below 2**32 in uint64.

    Counters broadcast only when rounds mix them: with two words that vary, each along its own axis,
    the first two rounds cost nothing.
    """
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x2 = (p1 >> _SHIFT) ^ x1, (p0 >> _SHIFT) ^ x3
        # In place where the array is new: what is fetched from memory costs more than what is done.
        x0 ^= np.uint64(k0)
        x2 ^= np.uint64(k1)
        p0 &= _LOW
        p1 &= _LOW
        x1, x3 = p1, p0
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return x0, x1, x2, x3
