"""What PELA puts in the place of a linear layer (arXiv 2310.10700, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    """`up(down(x))`, in_features -> rank -> out_features; the bias is on `up`.

    Both parts are ordinary linear layers: an adapter may target one of them, or the pair.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        result: Tensor = self.up(self.down(x))
        return result

    @property
    def weight(self) -> Tensor:
        """V Uᵀ [out_features, in_features], the weight that the pair stands for.

        With gradients; some models read it of a layer (T5 asks for its dtype).
        """
        return self.up.weight @ self.down.weight
