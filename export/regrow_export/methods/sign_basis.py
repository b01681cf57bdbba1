"""The seeded sign basis in ONNX operators, equal to the bit to `regrow_format.basis`.

Philox needs unsigned 32 x 32 -> 64 bit products. ONNX Runtime 1.20 multiplies no unsigned integers,
so products are int64, which wrap to the same bits; only the shift by 32, which must not repeat the
sign, goes through uint64. Counters depend on the seed, which is a graph input, from the second
round on: a runtime cannot fold the basis into constants when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder

__all__ = ["head_rows", "logical_high", "round_keys", "sign_bits", "words"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_BLOCK_BITS = 128


def logical_high(g: GraphBuilder, product: str) -> str:
    """Bits 32 to 63 of an int64, as a number below 2**32."""
    shift = g.constant(np.array([32], dtype=np.uint64))
    return g.cast(g.op("BitShift", g.cast(product, "uint64"), shift, direction="RIGHT"), "int64")


def _low(g: GraphBuilder, value: str) -> str:
    """Bits 0 to 31 of an int64."""
    return g.op("BitwiseAnd", value, g.integers(0xFFFFFFFF))


def _xor(g: GraphBuilder, *values: str) -> str:
    result = values[0]
    for value in values[1:]:
        result = g.op("BitwiseXor", result, value)
    return result


def round_keys(g: GraphBuilder, seed: str) -> list[tuple[str, str]]:
    """The two key words of every round, int64 [1] below 2**32, from a seed of uint32 [2]."""
    k0, k1 = g.split(g.cast(seed, "int64"), 2, axis=0)
    keys = [(k0, k1)]
    for _ in range(_ROUNDS - 1):
        k0 = _low(g, g.op("Add", k0, g.integers(_W0)))
        k1 = _low(g, g.op("Add", k1, g.integers(_W1)))
        keys.append((k0, k1))
    return keys


def _philox(g: GraphBuilder, counter: Sequence[str], keys: Sequence[tuple[str, str]]) -> list[str]:
    """The four output words, int64 below 2**32, of counters that broadcast to 3 dimensions."""
    x0, x1, x2, x3 = counter
    for k0, k1 in keys:
        p0 = g.op("Mul", x0, g.integers(_M0))
        p1 = g.op("Mul", x2, g.integers(_M1))
        x0, x2 = _xor(g, logical_high(g, p1), x1, k0), _xor(g, logical_high(g, p0), x3, k1)
        x1, x3 = _low(g, p1), _low(g, p0)
    return [x0, x1, x2, x3]


def words(g: GraphBuilder, keys: Sequence[tuple[str, str]], role: int, blocks: int) -> str:
    """The words of vector 0, layer 0 of a role: int64 [1, blocks, 4] below 2**32, in order."""
    zero = g.constant(np.zeros((1, 1, 1), dtype=np.int64))
    block = g.constant(np.arange(blocks, dtype=np.int64).reshape(1, -1, 1))
    of_role = g.constant(np.full((1, 1, 1), int(role), dtype=np.int64))
    return g.op("Concat", *_philox(g, [block, zero, of_role, zero], keys), axis=2)


def sign_bits(
    g: GraphBuilder,
    keys: Sequence[tuple[str, str]],
    role: int,
    layers: Sequence[int],
    vectors: int,
    entries: int,
) -> str:
    """The first `entries` signs of basis vectors 0 to `vectors` - 1 in each layer.

    Args:
        keys: from `round_keys`; several calls may share them.

    Returns:
        Name of a uint8 value [layers, entries, vectors]; 1 is +1, 0 is -1.
    """
    blocks = -(-entries // _BLOCK_BITS)
    counter = [
        g.constant(np.arange(blocks, dtype=np.int64).reshape(1, -1, 1)),
        g.constant(np.arange(vectors, dtype=np.int64).reshape(1, 1, -1)),
        g.constant(np.full((1, 1, 1), int(role), dtype=np.int64)),
        g.constant(np.array(layers, dtype=np.int64).reshape(-1, 1, 1)),
    ]
    # Each word is [layers, blocks, vectors]; words, then bytes, then bits go before the vectors.
    words = [g.op("Unsqueeze", word, g.integers(2)) for word in _philox(g, counter, keys)]
    stacked = g.cast(g.op("Concat", *words, axis=2), "uint32")
    octets = g.cast(_spread(g, stacked, "uint32", range(0, 32, 8), 0xFF), "uint8")
    bits = _spread(g, octets, "uint8", range(8), 1)
    flat = g.op("Reshape", bits, g.integers(len(layers), blocks * _BLOCK_BITS, vectors))
    return head_rows(g, flat, blocks * _BLOCK_BITS, entries)


def _spread(g: GraphBuilder, value: str, dtype: str, shifts: range, mask: int) -> str:
    """Shift by each of `shifts` and mask, along a new axis before the last."""
    by = g.constant(np.array(shifts, dtype=dtype).reshape(-1, 1))
    wide = g.op("Unsqueeze", value, g.integers(-2))
    shifted = g.op("BitShift", wide, by, direction="RIGHT")
    return g.op("BitwiseAnd", shifted, g.constant(np.array([mask], dtype=dtype)))


def head_rows(g: GraphBuilder, value: str, have: int, want: int, *, axis: int = 1) -> str:
    """The first `want` of `have` entries of an axis."""
    if want == have:
        return value
    return g.op("Slice", value, g.integers(0), g.integers(want), g.integers(axis))
