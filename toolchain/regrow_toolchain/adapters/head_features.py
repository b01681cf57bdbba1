"""What a head sees: where nothing but a head is trained, no step needs the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow_toolchain.models import outputs_of

__all__ = ["FEATURES", "feature_reader", "gives_outputs"]

FEATURES = "features"  # a batch's input where only what a head sees is kept


@torch.no_grad()
def gives_outputs(model: nn.Module, path: str, run: Callable[[], Tensor]) -> bool:
    """Whether what the model gives is what a layer gives, untouched, and it is called once.

    Args:
        run: the model's outputs [samples, classes], the layer being called on the way.
    """
    with _calls(model, path) as calls:
        outputs = run()
    given = calls[-1][1]
    same = outputs.data_ptr() == given.data_ptr() and outputs.shape == given.shape
    return len(calls) == 1 and given.dim() == 2 and same


def feature_reader(
    model: nn.Module, path: str, accelerator: Any
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """From a batch's inputs to what a layer sees, float [samples, in], as its only input."""

    def features(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with _calls(model, path) as calls, accelerator.autocast():
            outputs_of(model, inputs)
        return {FEATURES: calls[0][0].clone()}  # not a view of every token's

    return features


@contextmanager
def _calls(model: nn.Module, path: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a layer takes and gives within the block, call by call."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: Any, named: Any, output: Tensor) -> None:
        found.append((args[0] if args else next(iter(named.values())), output))

    handle = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
