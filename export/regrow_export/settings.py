"""Fields of configs: default, help text and limits in one place, and the check of their values.

A config is a frozen dataclass whose fields are `setting`s and whose `__post_init__` calls
`check_settings`, so that no config is ever wrong, whoever makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from numbers import Integral, Real
from typing import Any

__all__ = ["check_settings", "default_of", "setting"]


def setting(
    default: Any,
    text: str,
    *,
    choices: Collection[str] = (),
    low: float | None = 0.0,
    high: float | None = None,
    **shown: Any,
) -> Any:
    """A config field with its help text, its choices, and the values that make sense.

    Args:
        default: the default; a tuple for names, any number of them; `dict` for NAME=VALUE pairs;
            None for a whole number that need not be given.
        choices: what the value, or each of several, must be among.
        low, high: ends of the values of a number.
        shown: `default`, what the help says in the place of a default that stands for something
            else; `option`, the name on the command line, if it is not the field's; `metavar`; and
            `decides=False` where a training may go on with another value.
    """
    metadata = {"help": text, "choices": choices, "low": low, "high": high, "decides": True}
    if default is dict:
        return field(default_factory=dict, metadata=metadata | shown)
    return field(default=default, metadata=metadata | shown)


def default_of(item: Field[Any]) -> Any:
    """The default of a config's field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def check_settings(config: Any) -> None:
    """Raise `SettingError` for the first field of a config that has a value which makes no sense.

    Lists of names become tuples, so that a config cannot change after it was checked.
    """
    for item in fields(config):
        value, default = getattr(config, item.name), default_of(item)
        if isinstance(default, tuple):
            _check_names(item, value)
            object.__setattr__(config, item.name, tuple(value))
        elif not (default is None and value is None):
            _check_of(default)(item, value)


def _check_of(default: Any) -> Callable[[Field[Any], Any], None]:
    if isinstance(default, bool):
        return _check_flag
    if isinstance(default, Mapping):
        return _check_pairs
    return _check_text if isinstance(default, str) else _check_number


def _check_names(item: Field[Any], value: Any) -> None:
    if isinstance(value, str):
        raise _refusal("{%s} must be a list of names, got the string {0!r}", item, value)
    choices = item.metadata["choices"]
    for index, name in enumerate(value):
        if not isinstance(name, str):
            raise _refusal("{%s} must be a list of names, got {0!r} in it", item, name)
        if choices and name not in choices:
            raise _refusal("{%s} must be among {1}, got {0!r}", item, name, ", ".join(choices))
        if choices and name in value[:index]:
            raise _refusal("{%s} must be named once, got {0!r} twice", item, name)


def _check_text(item: Field[Any], value: Any) -> None:
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise _refusal("{%s} must be one of {1}, got {0!r}", item, value, ", ".join(choices))
    if not isinstance(value, str):
        raise _refusal("{%s} must be a text, got {0!r}", item, value)


def _check_flag(item: Field[Any], value: Any) -> None:
    if not isinstance(value, bool):
        raise _refusal("{%s} must be True or False, got {0!r}", item, value)


def _check_pairs(item: Field[Any], value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _refusal("{%s} must be a mapping of names to values, got {0!r}", item, value)


def _check_number(item: Field[Any], value: Any) -> None:
    low, high = item.metadata["low"], item.metadata["high"]
    whole = not isinstance(item.default, float)
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        kind = "whole" if whole else "finite"
        raise _refusal("{%s} must be a {1} number, got {0!r}", item, value, kind)
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise _refusal("{%s} must be {1}, got {0}", item, value, wanted)


def _refusal(text: str, item: Field[Any], *values: Any) -> Exception:
    from regrow_format.errors import SettingError  # not above: it loads numpy

    return SettingError(text % item.name, *values)
