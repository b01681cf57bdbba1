"""The seeded basis: frozen pseudo-random signs, regenerated from a seed and never stored.

Entry `p` of basis vector `i` is bit `p % 32`, least significant first, of word `(p % 128) // 32` of
Philox block `p // 128`; bit 1 stands for +1, bit 0 for -1. Counter words are (block, vector, role,
layer). `docs/basis.md` has the definition with its test vectors, for clients in other languages.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RegrowError, UsageError
from .integers import PackedSigns, integer_product
from .philox import key_of, philox4x32, philox_words
from .record import Record

__all__ = [
    "PHILOX_SIGN",
    "BasisCache",
    "BasisSpec",
    "Role",
    "combine",
    "locations",
    "plus_minus",
    "sign_bits",
    "sign_rows",
    "signs",
]

_BLOCK_BITS = 128
# Philox works on uint64 temporaries: 8,192 counters keep them in a core's second-level cache. They
# give 2**20 signs, which are widened to a byte each, or 128 signs of each of more vectors.
COUNTERS_AT_ONCE = 8192
# Bytes are widened to float32 a block at a time, 4 MiB.
FLOATS_AT_ONCE = 1 << 20
# Below, to multiply from bits takes less than what to pack them takes.
LEAST_PACKED = 1 << 20
_BITS = (1 << np.arange(8)).astype(np.uint8)[:, None]


Bits = NDArray[np.uint8]


class Role(IntEnum):
    """Counter word c2: what a stream is used for, so that no two uses share numbers."""

    NOLA_A = 0
    NOLA_B = 1
    VERA_A = 2
    VERA_B = 3
    FOURIER_LOCATIONS = 4
    SAMPLING = 5  # of tokens: block is the token's place, vector the sample's row


class BasisSpec(Record):
    """Names the basis that an adapter was trained with, as it stands in the adapter file.

    Kinds: "philox-sign", "peft-mt19937" (what PEFT draws from the seed) and "stored"; `fields` are
    what the kind needs besides, such as PEFT's widths.
    """

    kind: str = "philox-sign"
    version: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)


PHILOX_SIGN = BasisSpec()


def _planes(key: tuple[int, int], role: int, layer: int, vectors: int, blocks: range) -> Bits:
    """uint8 [16 * len(blocks), vectors]: a row has the bits of 8 entries, the first one lowest."""
    planes = np.empty((len(blocks), 4, 4, vectors), dtype=np.uint8)
    block = np.arange(blocks.start, blocks.stop, dtype=np.uint64)[:, None]
    for start in range(0, vectors, COUNTERS_AT_ONCE):
        index = np.arange(start, min(start + COUNTERS_AT_ONCE, vectors), dtype=np.uint64)
        for number, word in enumerate(philox_words(block, index, role, layer, key)):
            halved = word.astype(np.uint32)
            for byte in range(4):
                planes[:, number, byte, start : start + index.size] = halved  # its lowest byte
                halved >>= np.uint32(8)
    return planes.reshape(-1, vectors)


def _all_planes(seed: int, role: int, vectors: int, entries: int, layer: int) -> Iterator[Bits]:
    """The rows of `_planes` for `entries` entries, in parts of bounded size."""
    key, rows = key_of(seed), -(-entries // 8)
    blocks = -(-entries // _BLOCK_BITS)
    step = max(1, COUNTERS_AT_ONCE // max(vectors, 1))
    for start in range(0, blocks, step):
        part = range(start, min(start + step, blocks))
        yield _planes(key, role, layer, vectors, part)[: rows - 16 * start]


def _widened(planes: Bits) -> Bits:
    """uint8 [8 * rows, vectors] of 1 and 0, a row for each entry."""
    ones = np.empty((len(planes), 8, planes.shape[1]), dtype=np.uint8)
    np.bitwise_and(planes[:, None], _BITS, out=ones)
    np.not_equal(ones, 0, out=ones.view(np.bool_))
    return ones.reshape(-1, planes.shape[1])


def _joined(blocks: Iterable[Bits], vectors: int, count: int) -> Bits:
    """uint8 [count, vectors], the first rows of the blocks, without holding all blocks too."""
    rows, start = np.empty((count, vectors), dtype=np.uint8), 0
    for block in blocks:
        part = block[: count - start]
        rows[start : start + len(part)] = part
        start += len(part)
    return rows


def sign_bits(seed: int, role: int, vectors: int, entries: int, *, layer: int = 0) -> Bits:
    """The first `entries` signs of basis vectors 0 to `vectors` - 1, one bit each.

    Returns:
        uint8 [vectors, ceil(entries / 8)], least significant bit first; bit 1 is +1, bit 0 is -1.
    """
    planes = _all_planes(seed, role, vectors, entries, layer)
    return np.ascontiguousarray(_joined(planes, vectors, -(-entries // 8)).T)


def sign_rows(
    seed: int, role: int, vectors: int, entries: int, *, layer: int = 0
) -> Iterator[Bits]:
    """The same signs as bytes, entry by entry, in blocks: RAM does not grow with the basis.

    Yields:
        uint8 [some entries, vectors] of 1 (+1) and 0 (-1), C-contiguous; at most 2**20 of them, or
        128 entries. After the last block there may be up to seven entries more than asked for.
    """
    return map(_widened, _all_planes(seed, role, vectors, entries, layer))


def signs(seed: int, role: int, vector: int, entries: int, *, layer: int = 0) -> NDArray[np.int8]:
    """int8 [entries] of +1 and -1: one basis vector, any one, without those before it."""
    block = np.arange(-(-entries // _BLOCK_BITS))
    words = philox4x32(block, vector, role, layer, key_of(seed)).astype("<u4", copy=False)
    bits = np.unpackbits(words.reshape(-1).view(np.uint8), bitorder="little")
    return bits[:entries].astype(np.int8) * 2 - 1


def plus_minus(rows: Bits) -> NDArray[np.float32]:
    """float32 of +1 and -1 from the ones and zeros of `sign_rows`."""
    values = rows.astype(np.float32)
    values *= 2
    values -= 1
    return values


def combine(
    values: NDArray[Any],
    rows: Iterable[Bits] | PackedSigns,
    entries: int,
    scale: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Sum over i of values[t, i] times sign vector i, then one multiply by scale[t].

    The sum of codes of at most 8 bits is exact for k up to 2**16: no partial sum passes 2**24,
    which float32 holds too, in any order of adding. The result is the same bits everywhere.

    Args:
        values: [targets, k], int8 codes or float32.
        rows: blocks of [some entries, k] as from `sign_rows`; for codes also packed signs.
        entries: how many signs of each vector to use; the blocks may hold more.
        scale: float32 [targets]; 1 if None.

    Returns:
        float32 [targets, entries].
    """
    if isinstance(rows, PackedSigns):
        return _combine_packed(values, rows, entries, scale)
    total = np.empty((len(values), entries), dtype=np.float32)
    _sum_blocks(values, rows, total)
    # Halved, so that the factor of 2, which rounds nothing, joins the scale.
    total -= values.sum(axis=1, keepdims=True, dtype=np.float32) / 2
    total *= np.float32(2) if scale is None else 2 * scale[:, None]
    return total


def _combine_packed(
    values: NDArray[np.int8], signs: PackedSigns, entries: int, scale: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    scale = np.ones(len(values), dtype=np.float32) if scale is None else scale
    step = max(1, FLOATS_AT_ONCE // signs.entries)
    # Made first, and copied to: residents that hold ONNX Runtime's buffers would leave a hole in
    # memory beside each, which doubles what they take.
    total = np.empty((len(values), entries), dtype=np.float32)
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        total[part] = signs.combine(values[part], scale[part])[:, :entries]
    return total


def _sum_blocks(values: NDArray[Any], rows: Iterable[Bits], total: NDArray[np.float32]) -> None:
    """Fill `total` [targets, entries] with the sums of values where a bit is 1."""
    product: Callable[[Bits], NDArray[Any]] | None = None
    if values.dtype == np.int8:
        product = integer_product(values)
    if product is None:
        product = _float_product(values.astype(np.float32, copy=False))
    step, entries = max(128, FLOATS_AT_ONCE // max(len(values), 1)), total.shape[1]
    start = 0
    for block in rows:
        for first in range(0, len(block), step):
            part = block[first : min(first + step, len(block), first + entries - start)]
            total[:, start : start + len(part)] = product(part)
            start += len(part)
        if start == entries:
            break


def _float_product(values: NDArray[np.float32]) -> Callable[[Bits], NDArray[np.float32]]:
    """From ones [entries, k] to float32 [targets, entries], a few entries at a time."""
    step = max(8, FLOATS_AT_ONCE // max(values.shape[1], 1))

    def product(ones: Bits) -> NDArray[np.float32]:
        found = np.empty((len(ones), len(values)), dtype=np.float32)
        for start in range(0, len(ones), step):
            part = ones[start : start + step].astype(np.float32)
            np.matmul(part, values.T, out=found[start : start + step])
        return found.T

    return product


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
        self._kept: OrderedDict[Hashable, tuple[Any, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(part.nbytes for parts in self._kept.values() for part in parts)

    def keep(self, key: Hashable, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What `make` gives, from memory if it was made under this key before.

        It is parts that know their `nbytes`: arrays, or packed signs.
        """
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

    def bits(self, seed: int, role: int, vectors: int, entries: int, *, layer: int = 0) -> Bits:
        """As `sign_bits`, from memory if it is there; its transpose is C-contiguous."""
        key = ("philox-sign", seed, int(role), vectors, entries, layer)
        planes = _all_planes(seed, role, vectors, entries, layer)
        bits: Bits = self.keep(key, lambda: (_joined(planes, vectors, -(-entries // 8)).T,))[0]
        return bits

    def rows(
        self, seed: int, role: int, vectors: int, entries: int, *, layer: int = 0
    ) -> Iterator[Bits]:
        """As `sign_rows`, from memory if it is there: a bit per sign, if half of it has room."""
        if vectors * entries > 4 * self.max_bytes:
            with self._lock:
                self.misses += 1
            yield from sign_rows(seed, role, vectors, entries, layer=layer)
            return
        planes = self.bits(seed, role, vectors, entries, layer=layer).T
        step = max(16, COUNTERS_AT_ONCE * 16 // max(vectors, 1))
        for start in range(0, len(planes), step):
            yield _widened(planes[start : start + step])

    def packed(self, seed: int, role: int, vectors: int, entries: int) -> PackedSigns | None:
        """The signs ready to be multiplied with codes, a byte per sign, from their second use on.

        To pack them takes as long as to make them, and many bases serve one adapter only. One that
        serves another is packed then, and is a miss again; from the third use on, a swap is cheap.

        Returns:
            None at the first use, where ONNX Runtime cannot, and where it does not pay: below a
            million signs, and above an eighth of what may be kept (to pack takes thrice as much).
        """
        key: Hashable = ("philox-packed", seed, int(role), vectors, entries)
        bits = ("philox-sign", seed, int(role), vectors, entries, 0)
        with self._lock:
            again = key in self._kept or bits in self._kept
        if not again or not LEAST_PACKED <= vectors * entries <= self.max_bytes // 8:
            return None

        def pack() -> tuple[PackedSigns, ...]:
            bits = np.ascontiguousarray(self.bits(seed, role, vectors, entries))
            signs = np.unpackbits(bits, axis=1, count=entries, bitorder="little").view(np.int8)
            signs += signs
            signs -= 1
            try:
                return (PackedSigns(signs),)
            except RegrowError:
                return ()

        return next(iter(self.keep(key, pack)), None)

    def clear(self) -> None:
        """Forget everything: the next use is a cold one."""
        with self._lock:
            self._kept.clear()
