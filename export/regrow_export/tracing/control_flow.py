"""Decisions that a model takes by its inputs' values: a trace keeps one way of them for good."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from regrow_format.errors import RegrowError

__all__ = ["check_flow"]

_TORCH = str(Path(torch.__file__).parent)

Arrays = Mapping[str, NDArray[Any]]


class _Numbers(TorchDispatchMode):
    """Notes every number that an operator gives to Python, such as `item`, and where."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, bool | int | float):
            self.seen.append((_caller(), repr(result)))
        return result


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_TORCH) and frame.filename != __file__:
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "it"


def check_flow(run: Callable[[Arrays], object], inputs: Arrays) -> None:
    """Raise `RegrowError` if numbers that Python takes out of tensors depend on the inputs.

    Such is `if x.mean() > 0:`, while `if self.scale.item() > 1:` is a constant of the model. It
    runs the model on other inputs too; those that it refuses say nothing.
    """
    with _Numbers() as numbers:
        run(inputs)
    for size in (-0.7, 1.9):
        others = {name: _other(name, value, size) for name, value in inputs.items()}
        with _Numbers() as again:
            try:
                run(others)
            except Exception:  # the model refuses these inputs
                continue
        if again.seen != numbers.seen:
            pairs = zip_longest(numbers.seen, again.seen)
            where = next((one or two)[0] for one, two in pairs if one != two)
            raise RegrowError(
                "model must not decide by its inputs' values, since a trace keeps one way for "
                f"good, got a number taken out of a tensor at {where}: compute both ways and "
                "choose with torch.where"
            )


def _other(name: str, value: NDArray[Any], size: float) -> NDArray[Any]:
    """Other values of the same kind, in reverse order.

    Floats are multiplied by `size`; where it is above 1, integers but those of masks are halved:
    smaller ones are tokens and counts too.
    """
    transposed = np.ascontiguousarray(np.flip(value))
    if value.dtype.kind == "f":
        return (size * transposed).astype(value.dtype)
    halved = value.dtype.kind in "iu" and size > 1 and "mask" not in name
    return transposed // 2 if halved else transposed
