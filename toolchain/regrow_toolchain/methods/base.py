"""What a method must be able to do in training, and the settings all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_runtime.adapter import STORAGE, Target
from regrow_runtime.errors import FormatError, UsageError
from regrow_runtime.methods import get_method

__all__ = ["Factors", "TrainableMethod", "Trained", "fake_quantize", "parse_settings"]

# By target: A [in, r] and B [r, out]; the layer's output gains (x A) B.
Factors = dict[str, tuple[Tensor, Tensor]]


class Trained(nn.Module, ABC):
    """One adapter in training: its coefficients are the parameters.

    Attributes:
        config: what goes into the adapter file's config.
        targets: the layers that it changes, in the file's order.
        storage: how coefficients will be stored; `rounded` trains on them as stored.
    """

    config: dict[str, Any]
    targets: tuple[Target, ...]

    def __init__(self) -> None:
        super().__init__()
        self.storage = "fp32"
        self.rounded = False

    @abstractmethod
    def factors(self) -> Factors:
        """The factors of every target, with gradients; called once a step."""

    @abstractmethod
    def values(self) -> dict[str, NDArray[np.float32]]:
        """By tensor name of the file, [rows, length]: coefficients without any constant."""

    def stored(self, values: Tensor) -> Tensor:
        """`values` [rows, length] as the file will hold them, gradients straight through."""
        return fake_quantize(values, self.storage) if self.rounded else values


class TrainableMethod(Protocol):
    """A method. Its settings are a dataclass with defaults; instances hold no state."""

    @property
    def name(self) -> str:
        """As on the command line and in adapter files."""
        ...

    @property
    def default_lr(self) -> float:
        """The peak learning rate that suits the method (Adam)."""
        ...

    @property
    def settings(self) -> type:
        """The dataclass of the method's own settings."""
        ...

    def start(self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int) -> Trained:
        """A fresh adapter: delta W is 0 and its gradient is not.

        Raises:
            UsageError: a setting is unknown or makes no sense.
        """
        ...


def fake_quantize(values: Tensor, storage: str) -> Tensor:
    """Round rows as `regrow_runtime.quantize` does; the gradient passes straight through."""
    bits = STORAGE[storage]
    if bits == 32:
        return values
    with torch.no_grad():
        if bits == 16:
            rounded = values.half().to(values.dtype)
        else:
            top = 2 ** (bits - 1) - 1
            scale = values.abs().amax(dim=1, keepdim=True) / top
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            rounded = (values / scale).round().clamp(-top, top) * scale
    return values + (rounded - values).detach()


def parse_settings(kind: type, given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings dataclass `kind` with `given` in it, as a dict; strings are converted.

    Raises:
        UsageError: a name is unknown (all names are listed), a value has the wrong type, or one
            that the device would not read.
    """
    known = {f.name: f.default for f in fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in known:
            listed = ", ".join(f"{n}={d}" for n, d in known.items())
            raise UsageError(f"settings of {method} must be among {listed}, got {name!r}")
        values[name] = _convert(value, type(known[name]), f"{method}'s {name}")
    config = asdict(kind(**values))
    try:
        return get_method(method).check_config(config, method)
    except FormatError as error:
        raise UsageError(str(error)) from None


def _convert(value: Any, kind: type, what: str) -> Any:
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        converted = kind(value)
    except (TypeError, ValueError):
        converted = None
    exact = isinstance(value, str) or converted == value
    if converted is None or not exact or (kind is bool and not isinstance(value, bool)):
        raise UsageError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return converted
