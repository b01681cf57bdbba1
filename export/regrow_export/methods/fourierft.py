"""FourierFT inside a graph, in its closed form (arXiv 2405.03003, eqs. 2 to 4).

D[b, a] = sum_l c_l cos 2 pi (a j_l / out + b k_l / in), which is the product of two tables, since
cos(x + y) = cos x cos y - sin x sin y. Angles are reduced in integers: (a j) mod out says which of
`out` cosines it is, so each is as exact as float32 allows, whatever the angle and the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regrow_format.basis import Role
from regrow_format.errors import UsageError

from .base import GraphExpansion
from .rows import scaled
from .sign_basis import logical_high, round_keys, words

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["FourierftGraph", "draws_needed"]

# Words that the graph draws so that it has n different places: too few with a probability below
# e^-42, and then the graph fails, it gives no wrong answer.
_LOG_ODDS = 42.0
_MAX_WORDS = 1 << 22
# ONNX Runtime sums float32 products in strips of 128 terms, but in one go for few columns, where
# the error passes 1e-6 of the result; there float64 costs little.
_THIN = 64


class FourierftGraph:
    """Config: as in the runtime, `n` (alpha is inside the scales)."""

    name = "fourierft"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; c is [targets, n]."""
        count = config["n"]
        keys = round_keys(g, inputs["seed"])
        rows = g.split(scaled(g, inputs, "c"), len(targets), axis=0)  # [1, n] each
        indices: dict[int, str] = {}
        tables: dict[tuple[int, int], tuple[str, str]] = {}
        found: GraphExpansion = {}
        for target, row in zip(targets, rows, strict=True):
            wide, high = target.in_features, target.out_features
            if wide * high not in indices:
                indices[wide * high] = _indices(g, keys, count, wide * high)
            if (wide, high) not in tables:
                tables[wide, high] = _tables(g, indices[wide * high], wide, high)
            delta = _product(g, *tables[wide, high], row, thin=high < _THIN)
            found[target.name] = {"delta": {"D": g.op("Unsqueeze", delta, g.integers(0))}}
        return found


def _product(g: GraphBuilder, left: str, right: str, row: str, *, thin: bool) -> str:
    """float32 [in, out] from the tables and the coefficients [1, n]."""
    twice = g.op("Concat", row, row, axis=1)  # [1, 2 n]: for cosines and for sines
    if not thin:
        return g.op("MatMul", g.op("Mul", left, twice), right)
    scaled_left = g.op("Mul", left, g.cast(twice, "float64"))
    return g.cast(g.op("MatMul", scaled_left, right), "float32")


def _tables(g: GraphBuilder, indices: str, wide: int, high: int) -> tuple[str, str]:
    """Cosines and sines [in, 2 n] of input positions, cosines and -sines [2 n, out] of outputs.

    They are float32, or float64 for a thin layer.
    """
    dtype = "float64" if high < _THIN else "float32"
    size = g.integers(wide)
    rows = g.op("Div", indices, size)
    columns = g.op("Sub", indices, g.op("Mul", rows, size))
    steps = g.op("Unsqueeze", columns, g.integers(0))
    angles = g.op("Mul", _positions(g, wide, (-1, 1)), steps)
    left = _waves(g, angles, wide, 1, dtype)
    steps = g.op("Unsqueeze", rows, g.integers(1))
    angles = g.op("Mul", steps, _positions(g, high, (1, -1)))
    right = _waves(g, angles, high, -1, dtype)
    return g.op("Concat", *left, axis=1), g.op("Concat", *right, axis=0)


def _positions(g: GraphBuilder, size: int, shape: tuple[int, int]) -> str:
    return g.constant(np.arange(size, dtype=np.int64).reshape(shape))


def _waves(g: GraphBuilder, products: str, size: int, sign: int, dtype: str) -> tuple[str, str]:
    """Cosine, and sine times `sign`, of 2 pi products / size."""
    index = g.op("Mod", products, g.integers(size))
    angles = 2 * np.pi * np.arange(size) / size
    cosines = g.constant(np.cos(angles).astype(dtype))
    sines = g.constant((sign * np.sin(angles)).astype(dtype))
    return g.op("Gather", cosines, index), g.op("Gather", sines, index)


def _indices(g: GraphBuilder, keys: Sequence[tuple[str, str]], count: int, grid: int) -> str:
    """int64 [n]: the first different places (word grid) >> 32, as from `basis.locations`."""
    blocks = -(-draws_needed(count, grid) // 4)
    drawn = g.op("Reshape", words(g, keys, Role.FOURIER_LOCATIONS, blocks), g.integers(-1))
    # A word times the grid may pass 2**63: int64 wraps to the same bits, the shift is logical.
    indices = logical_high(g, g.op("Mul", drawn, g.integers(grid)))
    # With one output alone, ONNX's reference evaluator would sort.
    different, _ = g.several(2, "Unique", indices, sorted=0)
    first = g.op("Slice", different, g.integers(0), g.integers(count), g.integers(0))
    return g.op("Reshape", first, g.integers(count))  # fails if there are fewer


def draws_needed(count: int, grid: int) -> int:
    """How many words are enough for `count` different places of `grid`.

    Too few means that all lie in some set of count - 1 places: at most
    C(grid, count - 1) ((count - 1) / grid)^draws in probability.
    """
    if count == 1:
        return 1
    if count > grid or grid >= 1 << 32:
        raise UsageError(f"a grid must have from n = {count} to 2**32 - 1 places, got {grid}")
    few = count - 1
    sets = math.lgamma(grid + 1) - math.lgamma(few + 1) - math.lgamma(grid - few + 1)
    draws = math.ceil((sets + _LOG_ODDS) / math.log(grid / few))
    if draws > _MAX_WORDS:
        raise UsageError(
            f"n must be well below the {grid} places of a layer to be drawn in a graph, got "
            f"{count}: export it merged or swappable"
        )
    return draws
