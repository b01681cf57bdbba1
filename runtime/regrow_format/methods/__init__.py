"""Adapter methods by name. A further method is one file here and one line in `METHODS`."""

from __future__ import annotations

from ..errors import FormatError
from .base import Method
from .bitfit import Bitfit
from .fourierft import Fourierft
from .head import HeadOnly
from .ia3 import Ia3
from .lora import Lora
from .nola import Nola
from .ssf import Ssf
from .vera import Vera

__all__ = ["METHODS", "Method", "get_method"]

METHODS: dict[str, Method] = {
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


def get_method(name: str, where: str = "method") -> Method:
    """The method called `name`; `FormatError` lists those there are."""
    if name not in METHODS:
        raise FormatError(f"{where}: method must be one of {', '.join(METHODS)}, got {name!r:.40}")
    return METHODS[name]
