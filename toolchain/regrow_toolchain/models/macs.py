"""How much a model multiplies, without doing it: torch's counter over weights without numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from regrow_format.errors import RegrowError

from .huggingface import quiet_if_loaded

__all__ = ["count_macs", "example_inputs"]

_WORDS = ("input_ids", "decoder_input_ids")


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers 1 where a model asks for a number: it asks whether a mask is all ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def count_macs(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Multiply-adds of one forward pass: linear layers, convolutions and attention's products.

    Args:
        inputs: of any device; only their shapes count. Nothing is computed.

    Raises:
        RegrowError: the model does something on its way that needs numbers.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), torch.no_grad():
        weights = {name: _empty(value) for name, value in _owned(model)}
        feeds = {name: _empty(value) for name, value in inputs.items()}
        try:
            with (
                quiet_if_loaded(),
                sdpa_kernel(SDPBackend.MATH),
                FlopCounterMode(display=False) as counter,
                _NoNumbers(),  # type: ignore[no-untyped-call]
            ):
                functional_call(model, weights, kwargs=feeds, tie_weights=False)
        except Exception as error:  # whatever a model does with a number that is not there
            raise RegrowError(
                f"multiplications could not be counted for {type(model).__name__}: "
                f"{type(error).__name__}"
            ) from error
    return int(counter.get_total_flops()) // 2


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones of every module that has one.

    A module that stands in two places (T5's embeddings) is there once: `functional_call` would put
    what it swapped in first back last, and leave the model without numbers.
    """
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for part in (module.named_parameters, module.named_buffers):
            for name, value in part(recurse=False, remove_duplicate=False):
                yield start + name, value


def _empty(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype)


def example_inputs(model: nn.Module, tokens: int = 128) -> dict[str, Tensor]:
    """One made-up sample on "meta" for a model of transformers; empty for one that is not known.

    Args:
        tokens: of a text; images have the config's size, audio one second at 16 kHz.
    """
    config = getattr(model, "config", None)
    if config is None:
        return {}
    found = {}
    vision = getattr(config, "vision_config", config)
    size: Any = getattr(vision, "image_size", None)
    main = getattr(model, "main_input_name", "")
    if isinstance(size, int | tuple | list) and (
        main == "pixel_values" or hasattr(config, "vision_config")
    ):
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        found["pixel_values"] = torch.zeros(1, channels, *sides, device="meta")
    if main in _WORDS or hasattr(config, "text_config"):
        text = getattr(config, "text_config", config)
        length = min(tokens, getattr(text, "max_position_embeddings", tokens))
        found["input_ids"] = torch.zeros(1, length, dtype=torch.int64, device="meta")
    if main == "input_values":
        found["input_values"] = torch.zeros(1, 16_000, device="meta")
    return found
