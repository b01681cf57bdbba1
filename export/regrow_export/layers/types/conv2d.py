"""`nn.Conv2d` with a kernel of 1 x 1: a linear layer over the channels of every pixel."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LayerType, replace_parameter
from .low_rank_pair import LowRankPair

__all__ = ["CONV2D", "LowRankConv2d"]


class LowRankConv2d(LowRankPair):
    """Two convolutions of 1 x 1, the first one with the stride; [n, in, h, w] to [n, out, h', w'].

    Attributes:
        kernel_size, stride, padding, dilation: those of the convolution that it stands for, which
            models read to pad what they give it (MobileNet's `apply_tf_padding`).
    """

    def __init__(self, down: nn.Conv2d, up: nn.Conv2d) -> None:
        super().__init__(down, up)
        self.kernel_size, self.stride = down.kernel_size, down.stride
        self.padding, self.dilation = down.padding, down.dilation


class Conv2dType(LayerType):
    """Of one group, without padding, with any stride; and what inherits from it, unless it computes
    something else (BiT's standardises its weight).
    """

    title = "Conv2d of 1 x 1"
    has_one_weight = True

    def matches(self, module: nn.Module) -> bool:
        """See the class."""
        return (
            isinstance(module, nn.Conv2d)
            and type(module).forward is nn.Conv2d.forward
            and type(module)._conv_forward is nn.Conv2d._conv_forward
            and module.kernel_size == (1, 1)
            and module.groups == 1
            and module.padding in ((0, 0), "same", "valid")  # by name: of 1 x 1 it is none
        )

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """(in_channels, out_channels)."""
        return _convolution(module).in_channels, _convolution(module).out_channels

    def weight(self, module: nn.Module) -> Tensor:
        """The parameter [out, in, 1, 1] as [out, in]."""
        return _convolution(module).weight.detach().flatten(1)

    def features_last(self, module: nn.Module, value: Tensor) -> Tensor:
        """[n, channels, h, w] as [n, h, w, channels]."""
        dims = value.dim()  # torch.onnx writes a negative one as it is, which ONNX does not know
        return value.movedim(dims - 3, dims - 1)

    def features_back(self, module: nn.Module, value: Tensor) -> Tensor:
        """[n, h, w, channels] as [n, channels, h, w]."""
        return value.movedim(value.dim() - 1, value.dim() - 3)

    def seen(self, module: nn.Module, x: Tensor) -> Tensor:
        """Every pixel, or those on the stride's grid."""
        down, right = _stride(module)
        return x if (down, right) == (1, 1) else x[..., ::down, ::right]

    def is_convolution(self, module: nn.Module) -> bool:
        """Always."""
        return True

    def with_weight(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """See `LayerType`."""
        replace_parameter(module, "weight", weight[:, :, None, None])
        return module

    def with_bias(self, module: nn.Module, bias: Tensor) -> nn.Module:
        """Also where it has none."""
        replace_parameter(module, "bias", bias)
        return module

    def pair(self, module: nn.Module, rank: int, device: str = "cpu") -> LowRankConv2d:
        """Two convolutions."""
        wide, high = self.sizes(module)
        down = nn.Conv2d(wide, rank, 1, _stride(module), bias=False, device=device)
        biased = self.bias(module) is not None
        return LowRankConv2d(down, nn.Conv2d(rank, high, 1, bias=biased, device=device))

    def with_outputs(self, module: nn.Module, count: int, *, bias: bool) -> nn.Module:
        """With the layer's stride."""
        return nn.Conv2d(self.sizes(module)[0], count, 1, _stride(module), bias=bias)


def _convolution(module: nn.Module) -> nn.Conv2d:
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"layer must be nn.Conv2d, got {type(module).__name__}")
    return module


def _stride(module: nn.Module) -> tuple[int, int]:
    down, right = _convolution(module).stride
    return down, right


CONV2D = Conv2dType()
