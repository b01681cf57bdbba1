"""What PELA puts in the place of a linear layer (arXiv 2310.10700, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LowRankLinear", "LowRankPair"]


class LowRankPair(nn.Module):
    """`up(down(x))`, in_features -> rank -> out_features; the bias is on `up`.

    Both parts are ordinary linear layers of one type: an adapter may target one of them, or the
    pair.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        """`down` has no bias; `up` gives its features wherever `down` does."""
        super().__init__()
        self.down, self.up = down, up
        self.rank, self.in_features = down.get_parameter("weight").shape[:2]
        self.out_features = len(up.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for."""
        result: Tensor = self.up(self.down(x))
        return result

    @property
    def weight(self) -> Tensor:
        """V Uᵀ [out_features, in_features], the weight that the pair stands for.

        With gradients; some models read it of a layer (T5 asks for its dtype).
        """
        up, down = (self.get_parameter(f"{part}.weight").flatten(1) for part in ("up", "down"))
        return up @ down


class LowRankLinear(LowRankPair):
    """Two `nn.Linear`: [..., in_features] to [..., out_features]."""

    down: nn.Linear
    up: nn.Linear

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, device: str = "cpu"
    ) -> None:
        super().__init__(
            nn.Linear(in_features, rank, bias=False, device=device),
            nn.Linear(rank, out_features, bias=bias, device=device),
        )
