"""Trainable adapter methods. A further one is one file here and one line in `METHODS`."""

from __future__ import annotations

from regrow_format.errors import UsageError

from .base import TrainableMethod
from .bitfit import Bitfit
from .fourierft import Fourierft
from .head import HeadOnly
from .ia3 import Ia3
from .lora import Lora
from .nola import Nola
from .ssf import Ssf
from .vera import Vera

__all__ = ["METHODS", "get_trainable"]

METHODS: dict[str, TrainableMethod] = {
    method.name: method
    for method in (
        Nola(),
        Vera(),
        Fourierft(),
        Lora(),
        Ia3(),
        Ssf(),
        Bitfit(),
        HeadOnly(),
    )
}


def get_trainable(name: str) -> TrainableMethod:
    """The method called `name`; `UsageError` lists those there are."""
    if name not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
