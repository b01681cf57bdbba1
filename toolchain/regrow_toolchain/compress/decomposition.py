"""Low-rank factors that keep what a layer does to its inputs, and what that does to the model.

Plain SVD minimises the change of the weights. With the second moment C of a layer's inputs
(calibration samples) the layer's outputs can be kept instead, min ||(V Uᵀ - W) C^½||; SVD-LLM
(arXiv 2403.07378, section 3.1) whitens by Cholesky factors like this. With the second moment G of
the model's gradients at the layer's outputs as well, it is the model's own outputs, to first order
and with G and C taken as independent (as in K-FAC, arXiv 1503.05671): min ||G^½ (V Uᵀ - W) C^½||.
Errors of unlike layers can then be compared, so that one budget can be spread over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow_format.errors import RegrowError
from regrow_toolchain.models import LowRankPair, finite_weight, pair_of

__all__ = ["Moments", "Spectrum", "decompose"]

# Added to a moment's diagonal, as a share of its mean: few samples leave a moment without full
# rank, and what they did not show must still cost something.
_DAMPING_INPUTS, _DAMPING_GRADIENTS = 1e-3, 1e-2


@dataclass(frozen=True, eq=False)
class Moments:
    """Float64 second moments of one layer; None where they were not measured.

    Attributes:
        inputs: [in, in], the mean of x xᵀ over tokens.
        gradients: [out, out], the mean of g gᵀ.
    """

    inputs: Tensor | None = None
    gradients: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A layer's weight in parts, the most important first.

    Attributes:
        energies: float64 [k], what leaving out each part costs; its sum is `total`.
        left: float32 [out, k], right: float32 [k, in]: the first r of both give the best weight of
            rank r, left[:, :r] @ right[:r].
    """

    energies: Tensor
    left: Tensor
    right: Tensor

    @property
    def total(self) -> float:
        """The cost of leaving out everything."""
        return float(self.energies.sum())

    def lost(self, rank: int) -> float:
        """Share of the energy that rank `rank` leaves out, 0 to 1."""
        return float(self.energies[rank:].sum()) / max(self.total, 1e-300)

    def pair(self, module: nn.Module, rank: int) -> LowRankPair:
        """The best pair of a rank, its product's singular values split evenly over the factors."""
        outer, upper = torch.linalg.qr(self.left[:, :rank].double())
        inner, lower = torch.linalg.qr(self.right[:rank].double().T)
        left, values, right = torch.linalg.svd(upper @ lower.T)
        root = values.sqrt()
        down = root[:, None] * (right @ inner.T)
        return pair_of(module, down.float(), (outer @ left * root).float())


def decompose(module: nn.Module, name: str, moments: Moments | None = None) -> Spectrum:
    """Singular parts of a linear layer under its moments, in float64; plain SVD without them.

    Raises:
        RegrowError: the weight or a moment is not finite.
    """
    moments = moments or Moments()
    weight = finite_weight(module, name).double()  # (out, in)
    inner = _root(moments.inputs, _DAMPING_INPUTS, name)
    outer = _root(moments.gradients, _DAMPING_GRADIENTS, name)
    white = weight if inner is None else weight @ inner
    white = white if outer is None else outer.T @ white
    left, values, right = torch.linalg.svd(white, full_matrices=False)
    left, right = left * values.sqrt(), values.sqrt()[:, None] * right
    if inner is not None:
        right = torch.linalg.solve_triangular(inner, right, upper=False, left=False)
    if outer is not None:
        left = torch.linalg.solve_triangular(outer.T, left, upper=True)
    return Spectrum(values.square(), left.float(), right.float())


def _root(moment: Tensor | None, damping: float, name: str) -> Tensor | None:
    """Lower triangular L with L Lᵀ the damped moment; None for a moment that says nothing."""
    if moment is None:
        return None
    if not torch.isfinite(moment).all():
        raise RegrowError(f"what flows through {name} must be finite, got NaN or infinity")
    size = float(moment.diagonal().mean())
    if size <= 0:
        return None
    scaled = moment / size
    eye = torch.eye(len(moment), dtype=moment.dtype)
    while True:
        factor, failed = torch.linalg.cholesky_ex(scaled + damping * eye)
        if not failed:
            root: Tensor = factor * size**0.5
            return root
        damping *= 10
