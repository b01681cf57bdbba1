"""Click options made from the settings of config dataclasses, and errors in the options' names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import wraps
from typing import Any, TypeVar

import click

from regrow_export import default_of

__all__ = ["config_options", "setting_options"]

F = TypeVar("F", bound=Callable[..., Any])


def config_options(kind: type) -> Callable[[F], Callable[..., Any]]:
    """An option per setting of a config dataclass, whose object the command takes as `config`."""
    names = [item.name for item in fields(kind)]

    def decorate(function: F) -> Callable[..., Any]:
        @wraps(function)
        def command(**given: Any) -> Any:
            settings = {name: given.pop(name) for name in names}
            with _options_named():
                return function(config=kind(**settings), **given)

        return setting_options(kind)(command)

    return decorate


def setting_options(kind: type, only: Collection[str] = ()) -> Callable[[F], F]:
    """An option per setting; help, defaults and limits stand in the dataclass alone."""

    def decorate(function: F) -> F:
        for item in reversed(fields(kind)):
            if not only or item.name in only:
                function = _option(item)(function)
        return function

    return decorate


def _option(item: Field[Any]) -> Callable[[F], F]:
    about, default = item.metadata, default_of(item)
    told = about.get("shown") or (type(default) in (int, float, str) and default != "")
    return click.option(
        about.get("option", f"--{item.name.replace('_', '-')}"),
        item.name,
        help=about["help"],
        show_default=told,
        metavar=about.get("metavar"),
        **_parsing(item, default),
    )


def _parsing(item: Field[Any], default: Any) -> dict[str, Any]:
    """What click is to do with the option's text; whether it makes sense the config says."""
    if isinstance(default, bool):
        return {"is_flag": True, "flag_value": not default, "default": default}
    if isinstance(default, dict):
        return {"multiple": True, "callback": _pairs}
    if isinstance(default, tuple):
        return {"multiple": True, "type": _Choice(item) if item.metadata["choices"] else str}
    if isinstance(default, str):
        return {"default": default, "type": _Choice(item) if item.metadata["choices"] else str}
    return {"default": default, "type": _Float(item) if isinstance(default, float) else _Int(item)}


class _Choice(click.Choice[str]):
    def __init__(self, item: Field[Any]) -> None:
        super().__init__(item.metadata["choices"])

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


class _Float(click.FloatRange):
    def __init__(self, item: Field[Any]) -> None:
        super().__init__(item.metadata["low"], item.metadata["high"])

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return click.FLOAT.convert(value, param, ctx)


class _Int(click.IntRange):
    def __init__(self, item: Field[Any]) -> None:
        low = item.metadata["low"]
        super().__init__(None if low is None else int(low))

    def _describe_range(self) -> str:
        return "" if self.min is None else super()._describe_range()

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return click.INT.convert(value, param, ctx)


def _pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """{"k": "64"} from ("k=64",)."""
    found = {}
    for pair in given:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise click.UsageError(f"{param.opts[0]} must be NAME=VALUE, got {pair!r}", ctx)
        found[name] = value
    return found


@contextmanager
def _options_named() -> Iterator[None]:
    """Let errors about settings say the options' names."""
    try:
        yield
    except Exception as error:
        from regrow_format.errors import SettingError  # not above: importing it takes a while

        if not isinstance(error, SettingError):
            raise
        options = click.get_current_context().command.params
        names = {str(option.name): max(option.opts, key=len) for option in options}
        raise click.UsageError(error.named(names)) from error
