"""Frozen dataclasses whose methods are written once.

`dataclass` writes and compiles an `__init__`, a `__setattr__`, a `__repr__` and more for every
class: half of what it took to import the runtime. `fields`, `replace` and `asdict` of the standard
library take these as they take those.
"""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from typing import Any, ClassVar, dataclass_transform

__all__ = ["Frozen", "Record"]


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(field,))
class Frozen:
    """Base of classes that have fields and nothing is assigned to; equal if they are one object."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False)(cls)
        cls._names = tuple(cls.__dataclass_fields__)

    def __init__(self, *values: Any, **named: Any) -> None:
        """By place or by name, as the class lists its fields.

        Raises:
            TypeError: too many values, a field twice, unknown or missing.
        """
        if named or len(values) != len(self._names):
            values = _completed(self, values, named)
        self.__dict__.update(zip(self._names, values, strict=True))

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __repr__(self) -> str:
        parts = zip(self._names, _values(self), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in parts)})"


class Record(Frozen):
    """Equal by their fields, and hashed by them."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))


def _values(record: Any) -> tuple[Any, ...]:
    return tuple(map(record.__dict__.__getitem__, record._names))


def _completed(record: Frozen, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """One value for each field, with defaults for those that are not given."""
    kind, names = type(record).__name__, record._names
    if len(values) > len(names):
        raise TypeError(f"{kind} must have at most {len(names)} values, got {len(values)}")
    given = dict(zip(names, values, strict=False))
    if odd := [name for name in named if name in given or name not in names]:
        raise TypeError(f"{kind} must have the fields {', '.join(names)} once, got {odd[0]!r} too")
    given |= named
    for name, spec in record.__dataclass_fields__.items():
        if name not in given:
            if spec.default is MISSING and spec.default_factory is MISSING:
                raise TypeError(f"{kind} must have {name!r}, got none")
            made = spec.default_factory is not MISSING
            given[name] = spec.default_factory() if made else spec.default
    return tuple(given[name] for name in names)
