"""Packages whose names are loaded when they are first used (PEP 562). Imports nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

__all__ = ["load_on_use"]


def load_on_use(
    package: str, contents: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of the package `package`.

    Args:
        contents: names by the module that has them, relative to the package.
    """
    homes = {name: module for module, names in contents.items() for name in names}

    def getter(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found: object = getattr(import_module(homes[name], package), name)
        return found  # not kept: whoever replaces the module's own is seen

    return sorted(homes), getter, lambda: sorted(homes)
