"""FourierFT (arXiv 2405.03003): delta W is the inverse transform of a few real coefficients.

delta W[a, b] = sum_l c_l cos 2 pi (a j_l / out + b k_l / in). The places z = j * in + k on the grid
[out, in] are shared by targets of equal shape; the scale of `c` includes alpha / (in out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..basis import locations
from ..errors import FormatError
from ..fields import Fields
from .base import Expansion, Layout, Method, check_bytes

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Fourierft", "inverse_transform"]

_MAX_COUNT = 1 << 16
# Transforms are computed in float64 a block of rows at a time, 4 MiB each way.
NUMBERS_AT_ONCE = 1 << 18


class Fourierft(Method):
    """Config: `n` (coefficients per target), `alpha` (scale). Coefficients: `c` [targets, n]."""

    name = "fourierft"
    kinds = ("delta",)
    also = ("weight",)
    bases = ("philox-sign", "peft-mt19937", "stored")

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """n in 1..65536, finite alpha."""
        return {"n": fields.number("n", 1, _MAX_COUNT), "alpha": fields.take("alpha", float)}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """c [targets, n]."""
        return {"c": (len(targets), config["n"])}

    def constants(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, NDArray[np.float32]]:
        """alpha / (in out)."""
        sizes = np.array([t.in_features * t.out_features for t in targets], dtype=np.float64)
        return {"c": (config["alpha"] / sizes).astype(np.float32)}

    def stored_basis(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """places.<out>x<in> [n] for every grid that occurs."""
        return {_indices_name(t): (("U32",), (config["n"],)) for t in targets}

    def check(self, adapter: AdapterContents, where: str) -> None:
        """Every grid has 2**32 places at most and n different ones; stored places lie on it."""
        count = adapter.config["n"]
        for target in {(t.in_features, t.out_features): t for t in adapter.targets}.values():
            grid = target.in_features * target.out_features
            if not count <= grid < 1 << 32:
                raise FormatError(
                    f"{where}: {target.name} must have from n = {count} to 2**32 - 1 places, "
                    f"got {target.out_features} x {target.in_features}"
                )
            if adapter.basis.kind == "stored":
                indices = adapter.stored_basis[_indices_name(target)]
                if indices.max() >= grid or len(np.unique(indices)) < count:
                    raise FormatError(
                        f"{where}: {_indices_name(target)} must be {count} different places "
                        f"below {grid}"
                    )

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """D [in, out] per target, the transpose of delta W."""
        targets = adapter.targets
        check_bytes("deltas", 4 * sum(t.in_features * t.out_features for t in targets))
        rows = adapter.coefficients["c"].dense()
        return {
            t.name: {"delta": {"D": _of_target(adapter, t, row, basis)}}
            for t, row in zip(targets, rows, strict=True)
        }


def _of_target(
    adapter: AdapterContents, target: Target, row: NDArray[np.float32], basis: BasisCache
) -> NDArray[np.float32]:
    indices = _indices(adapter, target, basis)
    return inverse_transform(row, indices, target.in_features, target.out_features)


def _indices_name(target: Target) -> str:
    return f"places.{target.out_features}x{target.in_features}"


def _indices(adapter: AdapterContents, target: Target, basis: BasisCache) -> NDArray[np.int64]:
    """int64 [n] on the grid of out rows and in columns."""
    kind, seed, count = adapter.basis.kind, adapter.seed, adapter.config["n"]
    high, wide = target.out_features, target.in_features
    if kind == "stored":
        return adapter.stored_basis[_indices_name(target)].astype(np.int64)
    draw = {
        "philox-sign": lambda: (locations(seed, count, high, wide),),
        "peft-mt19937": lambda: (_as_peft(seed, count, high * wide),),
    }[kind]
    indices: NDArray[np.int64] = basis.keep((kind, "fourierft", seed, count, high, wide), draw)[0]
    return indices


def _as_peft(seed: int, count: int, size: int) -> NDArray[np.int64]:
    from ..mt19937 import permutation_head  # for adapters of PEFT alone

    return permutation_head(seed, count, size)


def inverse_transform(
    values: NDArray[np.float32], indices: NDArray[np.int64], wide: int, high: int
) -> NDArray[np.float32]:
    """D [wide, high] with D[b, a] = sum_l values_l cos 2 pi (a j_l / high + b k_l / wide).

    cos(x) is half of e^ix + e^-ix: a place (j, k) and its mirror (-j, -k) give the same numbers, of
    which one lies in the half k <= wide / 2 that a real transform reads. D is its own mirror too,
    D[-b, -a] = D[b, a], so half of its columns are copied.
    """
    j, k = np.divmod(indices, wide)
    mirrored = 2 * k > wide
    j, k = np.where(mirrored, -j % high, j), np.where(mirrored, wide - k, k)
    alone = (k == 0) | (2 * k == wide)  # these rows are their own mirrors: no half is elsewhere
    weights = np.where(alone, 1.0, 0.5) * values
    rows, columns = wide // 2 + 1, high // 2 + 1
    spectrum = np.empty((rows, columns), dtype=np.complex64)
    step = max(1, NUMBERS_AT_ONCE // high)
    for start in range(0, rows, step):
        part = spectrum[start : start + step]
        here = (k >= start) & (k < start + step)
        sums = np.bincount((k[here] - start) * high + j[here], weights[here], len(part) * high)
        part[:] = np.fft.rfft(sums.reshape(len(part), high)).conj()
    spectrum[0].imag = 0
    if wide % 2 == 0:
        spectrum[-1].imag = 0
    found = np.empty((wide, high), dtype=np.float32)
    step = max(1, NUMBERS_AT_ONCE // wide)
    for start in range(0, columns, step):
        some = spectrum[:, start : start + step].T.astype(np.complex128)
        real = np.fft.irfft(some, wide, norm="forward").astype(np.float32).T  # [b, columns]
        found[:, start : start + real.shape[1]] = real
        # Columns a with 0 < a < high / 2 give high - a too; b = 0 stays, the others turn round.
        first, last = max(start, 1), min(start + step, (high + 1) // 2)
        copied = real[:, first - start : max(last - start, 0)][:, ::-1]
        mirror = found[:, high - last + 1 : high - last + 1 + copied.shape[1]]
        mirror[0], mirror[1:] = copied[0], copied[:0:-1]
    return found
