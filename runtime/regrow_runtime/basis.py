"""The seeded basis: frozen pseudo-random signs, regenerated from a seed and never stored.

Entry `p` of basis vector `i` is bit `p % 32`, least significant first, of word `(p % 128) // 32` of
Philox block `p // 128`; bit 1 stands for +1, bit 0 for -1. Counter words are (block, vector, role,
layer). `docs/basis.md` has the definition with its test vectors, for clients in other languages.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .philox import key_of, philox4x32

__all__ = [
    "PHILOX_SIGN",
    "BasisCache",
    "BasisSpec",
    "Role",
    "combine",
    "locations",
    "plus_minus",
    "sign_bits",
    "signs",
]

_BLOCK_BITS = 128
# Philox works on uint64 temporaries: 8,192 counters keep them in a core's second-level cache.
_COUNTERS_AT_ONCE = 8192
# Signs are widened to float32 a block at a time: 4 MiB, whatever k and the layer's size are.
_FLOATS_AT_ONCE = 1 << 20


class Role(IntEnum):
    """Counter word c2: what a stream is used for, so that no two uses share numbers."""

    NOLA_A = 0
    NOLA_B = 1
    VERA_A = 2
    VERA_B = 3
    FOURIER_LOCATIONS = 4


@dataclass(frozen=True)
class BasisSpec:
    """Names the basis that an adapter was trained with, as it stands in the adapter file.

    Kinds: "philox-sign", "peft-mt19937" (what PEFT draws from the seed) and "stored"; `fields` are
    what the kind needs besides, such as PEFT's widths.
    """

    kind: str = "philox-sign"
    version: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)


PHILOX_SIGN = BasisSpec()


def _words(
    key: tuple[int, int], role: int, layer: int, vectors: range, blocks: int
) -> NDArray[np.uint32]:
    """uint32 [len(vectors), 4 * blocks]: the words of some basis vectors, in reading order."""
    index = np.arange(vectors.start, vectors.stop, dtype=np.uint64)[:, None]
    block = np.arange(blocks, dtype=np.uint64)[None, :]
    return philox4x32(block, index, role, layer, key).reshape(len(vectors), 4 * blocks)


def sign_bits(
    seed: int, role: int, vectors: int, entries: int, *, layer: int = 0
) -> NDArray[np.uint8]:
    """The first `entries` signs of basis vectors 0 to `vectors` - 1, one bit each.

    Returns:
        uint8 [vectors, ceil(entries / 8)], least significant bit first; bit 1 is +1, bit 0 is -1.
    """
    key = key_of(seed)
    blocks = -(-entries // _BLOCK_BITS)
    width = -(-entries // 8)
    bits = np.empty((vectors, width), dtype=np.uint8)
    step = max(1, _COUNTERS_AT_ONCE // max(blocks, 1))
    for start in range(0, vectors, step):
        part = range(start, min(start + step, vectors))
        words = _words(key, role, layer, part, blocks).astype("<u4", copy=False)
        bits[part.start : part.stop] = words.view(np.uint8)[:, :width]
    return bits


def signs(seed: int, role: int, vector: int, entries: int, *, layer: int = 0) -> NDArray[np.int8]:
    """int8 [entries] of +1 and -1: one basis vector, any one, without those before it."""
    blocks = -(-entries // _BLOCK_BITS)
    words = _words(key_of(seed), role, layer, range(vector, vector + 1), blocks)
    bits = np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), bitorder="little")
    return bits[:entries].astype(np.int8) * 2 - 1


def plus_minus(bits: NDArray[np.uint8], entries: int) -> NDArray[np.float32]:
    """float32 [vectors, entries] of +1 and -1 from `sign_bits`."""
    ones = np.unpackbits(bits, axis=1, count=entries, bitorder="little")
    return ones.astype(np.float32) * np.float32(2) - np.float32(1)


def combine(
    coefficients: NDArray[np.float32], bits: NDArray[np.uint8], entries: int
) -> NDArray[np.float32]:
    """Sum over i of coefficients[t, i] times sign vector i.

    With integer coefficients of at most 8 bits and k up to 2**16 every partial sum is an integer
    below 2**24, which float32 holds exactly in any order: the result is the same bits everywhere.

    Args:
        coefficients: float32 [targets, k].
        bits: uint8 [k, ceil(entries / 8)] as from `sign_bits`.
        entries: how many signs of each vector to use.

    Returns:
        float32 [targets, entries].
    """
    count, k = coefficients.shape
    total = np.empty((count, entries), dtype=np.float32)
    twice = coefficients * np.float32(2)
    offset = coefficients.sum(axis=1, keepdims=True)
    step = max(8, _FLOATS_AT_ONCE // max(k, 1) // 8 * 8)
    for start in range(0, entries, step):
        stop = min(start + step, entries)
        packed = bits[:, start // 8 : -(-stop // 8)]
        ones = np.unpackbits(packed, axis=1, bitorder="little")[:, : stop - start]
        np.matmul(twice, ones.astype(np.float32), out=total[:, start:stop])
    total -= offset
    return total


def locations(
    seed: int, count: int, rows: int, columns: int, *, layer: int = 0
) -> NDArray[np.int64]:
    """Distinct places in a rows x columns grid for FourierFT, in the order they are drawn.

    Words of role 4, vector 0 map to `z = (word * N) >> 32` with N = rows * columns; repeats are
    dropped. The row of a place is `z // columns`, its column `z % columns`.

    Returns:
        int64 [count], places z.

    Raises:
        UsageError: the grid has 2**32 places or more, or fewer than `count`.
    """
    places = rows * columns
    if rows < 1 or columns < 1 or places >= 2**32:
        raise UsageError(f"rows x columns must be from 1 to 2**32 - 1, got {rows} x {columns}")
    if not 0 <= count <= places:
        raise UsageError(f"count must be at most {places} ({rows} x {columns}), got {count}")
    found: dict[int, None] = {}
    key, block, step = key_of(seed), 0, max(16, count // 3)
    while len(found) < count:
        index = np.arange(block, block + step, dtype=np.uint64)
        words = philox4x32(index, 0, Role.FOURIER_LOCATIONS, layer, key).reshape(-1)
        drawn = (words.astype(np.uint64) * np.uint64(places)) >> np.uint64(32)
        found.update(dict.fromkeys(drawn.tolist()))
        block += step
    return np.fromiter(found, dtype=np.int64, count=len(found))[:count]


class BasisCache:
    """Keeps recent bases; safe to use from several threads.

    Args:
        max_bytes: what may be kept; 0 keeps nothing, so every use regenerates the basis.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, tuple[NDArray[Any], ...]] = OrderedDict()
        self._lock = threading.Lock()
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(array.nbytes for arrays in self._kept.values() for array in arrays)

    def keep(
        self, key: Hashable, make: Callable[[], tuple[NDArray[Any], ...]]
    ) -> tuple[NDArray[Any], ...]:
        """What `make` gives, from memory if it was made under this key before."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            self.misses += 1
        made = make()
        with self._lock:
            self._kept[key] = made
            while self._size() > self.max_bytes:
                self._kept.popitem(last=False)
        return made

    def bits(
        self, seed: int, role: int, vectors: int, entries: int, *, layer: int = 0
    ) -> NDArray[np.uint8]:
        """As `sign_bits`, from memory if it is there."""
        key = ("philox-sign", seed, int(role), vectors, entries, layer)
        made = self.keep(key, lambda: (sign_bits(seed, role, vectors, entries, layer=layer),))
        return made[0]

    def clear(self) -> None:
        """Forget everything: the next use is a cold one."""
        with self._lock:
            self._kept.clear()
