"""What PEFT draws from torch's CPU generator, without torch: VeRA's A and B, FourierFT's places.

The generator is MT19937 (Matsumoto, Nishimura, 1998) seeded by `init_genrand`. NumPy's
`RandomState` is the same one, and its streams are frozen (NEP 19), so the words are exact. So is
what is made of them: integers, and floats that are rounded once.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

__all__ = ["DTYPES", "LONG", "permutation_head", "uniform_kaiming"]

# What the base's weights may be; PEFT gives A and B their dtype.
DTYPES = ("float32", "bfloat16", "float16")

_WORDS = 1 << 32
WORDS_AT_ONCE = 1 << 18  # 2 MiB of float64
# From this many numbers on, torch.randperm shuffles in another way.
LONG = (_WORDS - 1) // 20
_MOST = 1 << 30  # 16 seconds: a file of kilobytes must not ask for hours


def _generator(seed: int) -> np.random.RandomState:
    """As `torch.Generator().manual_seed(seed)`, which keeps the low 32 bits of a seed."""
    return np.random.RandomState(seed % _WORDS)


def _words(generator: np.random.RandomState, count: int) -> NDArray[np.uint32]:
    words: NDArray[np.uint32] = generator.randint(0, _WORDS, size=count, dtype=np.uint32)
    return words


def uniform_kaiming(
    seed: int, rank: int, wide: int, high: int, dtype: str = "float32"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """VeRA's A and B as PEFT draws them (`peft.tuners.vera.model._kaiming_init`).

    Both come from one generator, A first, row by row, and are uniform with variance 2 / fan. torch
    multiplies and adds with one rounding, as CPUs with FMA do.

    Args:
        wide, high: the widest input and output of the layers that are adapted.
        dtype: one of `DTYPES`; the numbers are rounded to it.

    Returns:
        A float32 [rank, wide] and B float32 [high, rank].
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.40}")
    if min(rank, wide, high) < 1:
        raise UsageError(f"rank and widths must be at least 1, got {rank}, {wide} and {high}")
    generator = _generator(seed)
    a = _uniform(generator, rank, wide)
    b = _uniform(generator, high, rank)
    return _rounded(a, dtype), _rounded(b, dtype)


def _uniform(generator: np.random.RandomState, rows: int, fan: int) -> NDArray[np.float32]:
    """float32 [rows, fan] from -h to h with h = sqrt(3) sqrt(2) / sqrt(fan)."""
    high = np.float32(math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan)))
    span = np.float64(high + high)
    values = np.empty(rows * fan, dtype=np.float32)
    for start in range(0, values.size, WORDS_AT_ONCE):
        part = values[start : start + WORDS_AT_ONCE]
        parts = (_words(generator, part.size) & np.uint32(0xFFFFFF)).astype(np.float64)
        # A product of 24 by 24 bits, and its sum, are exact in float64: storing rounds, once.
        part[:] = parts * 2.0**-24 * span - np.float64(high)
    return values.reshape(rows, fan)


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Every number rounded to `dtype`, ties to even, in float32."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":  # the upper half of a float32
        words = values.view(np.uint32)
        words += np.uint32(0x7FFF) + (words >> np.uint32(16) & np.uint32(1))
        words &= np.uint32(0xFFFF0000)
    return values


def permutation_head(seed: int, count: int, total: int) -> NDArray[np.int64]:
    """The first `count` numbers of `torch.randperm(total)`, int64; FourierFT's places.

    torch has two shuffles. Below `LONG` numbers step i swaps place i with one from there on, which
    takes `count` steps. From there on each step takes 64 bits, and number i goes to a place up to
    i, from where that place's number moves to i: all `total` steps count, 15 ns each.

    Raises:
        UsageError: `total` is more than 2**30, or less than `count`.
    """
    if total > _MOST:
        raise UsageError(f"total must be at most {_MOST}, got {total}")
    if not 0 <= count <= total:
        raise UsageError(f"count must be from 0 to {total}, got {count}")
    generator = _generator(seed)
    return (_forward if total < LONG else _inside_out)(generator, count, total)


def _forward(generator: np.random.RandomState, count: int, total: int) -> NDArray[np.int64]:
    """Only places that were swapped are kept."""
    steps = np.arange(count)
    drawn = steps + _words(generator, count) % (total - steps)
    moved: dict[int, int] = {}
    found = np.empty(count, dtype=np.int64)
    for step, place in enumerate(drawn.tolist()):
        found[step] = moved.get(place, place)
        moved[place] = moved.get(step, step)
    return found


def _inside_out(generator: np.random.RandomState, count: int, total: int) -> NDArray[np.int64]:
    """Only the first `count` places are kept; most steps do not touch them."""
    found = np.zeros(count, dtype=np.int64)
    for start in range(0, total, WORDS_AT_ONCE):
        steps = np.arange(start, min(start + WORDS_AT_ONCE, total), dtype=np.uint64)
        pairs = _words(generator, 2 * steps.size).reshape(-1, 2).astype(np.uint64)
        drawn = ((pairs[:, 0] << np.uint64(32)) | pairs[:, 1]) % (steps + np.uint64(1))
        for index in np.flatnonzero(drawn < count).tolist():
            step, place = start + index, int(drawn[index])
            if step < count:
                found[step] = found[place]
            found[place] = step
    return found
