"""Reading JSON from strangers: every field is named, typed and bounded, or the file is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from .errors import FormatError

__all__ = ["Fields", "dump_json", "parse_json"]

T = TypeVar("T")


def dump_json(value: object, *, indent: int | None = None) -> str:
    """JSON with sorted keys and no spare spaces: the same object is the same bytes."""
    separators = (",", ":") if indent is None else None
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, indent=indent, separators=separators,
        allow_nan=False,
    )  # fmt: skip


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def parse_json(text: str | bytes, where: str, way_out: str = "") -> Fields:
    """Parse a JSON object; `where` names the file in every message, `way_out` ends that of text
    that is no JSON.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=_refuse)
        if "\\ud" in text.lower():  # half of a surrogate pair is no text: it cannot be written
            dump_json(value).encode()
    except (ValueError, RecursionError) as error:
        more = f"; {way_out}" if way_out else ""
        raise FormatError(f"{where} must be JSON, got something else: {error}{more}") from None
    return Fields(value, where)


def _finite(value: float, where: str) -> float:
    """Of a JSON number; 1e999 is read as infinity, and 400 digits are too many for a float."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FormatError(f"{where} must be a finite number, got {value!r:.80}")
    return number


class Fields:
    """One JSON object. Each `take` removes a field; `done` refuses what nobody asked for."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} must be an object, got {type(value).__name__}")
        self._left: dict[str, Any] = dict(value)
        self.where = where

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The field `name`, of exactly the JSON type `kind`.

        An int also serves as a float; a float is finite.
        """
        value = self._left.pop(name, default)
        if kind is float and type(value) in (int, float):
            value = _finite(value, f"{self.where}: {name}")
        if type(value) is not kind:
            found = "nothing" if value is None else f"{value!r:.80}"
            raise FormatError(f"{self.where}: {name} must be of type {kind.__name__}, got {found}")
        return value

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer field from `low` to `high`."""
        value = self.take(name, int, default)
        if not low <= value <= high:
            raise FormatError(f"{self.where}: {name} must be from {low} to {high}, got {value}")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """A string field, one of `choices`."""
        value = self.take(name, str)
        if value not in choices:
            raise FormatError(
                f"{self.where}: {name} must be one of {', '.join(choices)}, got {value!r:.40}"
            )
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        items = self.take(name, list, [])
        return [Fields(item, f"{self.where}: {name}[{i}]") for i, item in enumerate(items)]

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty if the field is not there."""
        items = self.take(name, list, [])
        if not all(isinstance(item, str) for item in items):
            raise FormatError(f"{self.where}: {name} must be a list of strings, got {items!r:.80}")
        return tuple(items)

    def optional(self, name: str) -> Fields | None:
        """An object, or None if the field is null or not there."""
        value = self._left.pop(name, None)
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def names(self) -> tuple[str, ...]:
        """The fields not taken yet."""
        return tuple(self._left)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null; a null one counts as taken."""
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return False
        return True

    def holds(self, name: str, kind: type) -> bool:
        """Whether the field is there and of type `kind`; it is not taken."""
        return type(self._left.get(name)) is kind

    def plain(self, name: str, kind: type[T]) -> T | None:
        """The field if it is of type `kind`, else None: for files in which others write freely."""
        value = self._left.pop(name, None)
        return value if type(value) is kind else None

    def rest(self) -> dict[str, Any]:
        """All fields not taken yet, as they are."""
        return dict(self._left)

    def done(self) -> None:
        """Raise `FormatError` if a field is left that this version does not know."""
        if self._left:
            raise FormatError(f"{self.where}: unknown fields {', '.join(sorted(self._left))}")
