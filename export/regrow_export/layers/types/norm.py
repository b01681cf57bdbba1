"""A norm over the last dimension: what it scales and shifts, adapters can too."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LayerType, replace_parameter

__all__ = ["NORM"]

# Their weight and bias lie along another dimension than the last.
_OTHERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class NormType(LayerType):
    """Known by `normalized_shape`, or by a weight and a bias of one shape [width]."""

    is_linear = False

    def matches(self, module: nn.Module) -> bool:
        """See the class."""
        return _width(module) is not None

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """Its width twice."""
        width = _width(module) or 0
        return width, width

    def with_bias(self, module: nn.Module, bias: Tensor) -> nn.Module | None:
        """A LayerNorm without a bias takes one; other norms might not read it."""
        if self.bias(module) is None and not isinstance(module, nn.LayerNorm):
            return None
        replace_parameter(module, "bias", bias)
        return module

    def with_output_scale(self, module: nn.Module, factor: Tensor) -> nn.Module | None:
        """In the weight and the bias of its own."""
        weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
        if weight is None:
            return None
        replace_parameter(module, "weight", weight * factor)
        if bias is not None:
            replace_parameter(module, "bias", bias * factor)
        return module


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return found.detach().double() if isinstance(found, Tensor) else None


def _width(module: nn.Module) -> int | None:
    first = getattr(module, "data_format", None) == "channels_first"  # ConvNeXt's
    if first or isinstance(module, _OTHERS):
        return None
    match getattr(module, "normalized_shape", None):
        case (int(width),):
            return width
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter):
        return len(bias) if weight.shape == bias.shape and bias.dim() == 1 else None
    return None


NORM = NormType()
