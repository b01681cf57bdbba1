"""Click options made from config dataclasses, and those that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from regrow_toolchain.data import DATA, LABEL_WORDS

from .app import printable

__all__ = [
    "carried_options",
    "check_data",
    "check_npz",
    "config_options",
    "data_options",
    "emit",
    "force_option",
    "json_option",
    "layers_options",
    "out_option",
    "parse_pairs",
    "path_argument",
    "resumable",
    "targets_option",
]

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document."
)
force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
targets_option = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="Layer to adapt: an ending such as `query`, a shell pattern such as `*.layer.0.*`, or a "
    "set: `@qv` (query and value, or the layer that fuses them), `@attention`, `@mlp`, `@all` "
    "(every linear layer of the blocks, the default), `all-linear` (those outside of the blocks "
    "too, but not the head); repeatable.",
)


def layers_options(function: F) -> F:
    """--only and --keep-dense: which layers compression factors."""
    for option in (
        click.option(
            "--keep-dense", multiple=True, metavar="NAME",
            help="Layer that stays dense, named as for --only; repeatable.",
        ),
        click.option(
            "--only", multiple=True, metavar="NAME",
            help="Layer to factor, and no others: an ending such as `query`, a shell pattern such "
            "as `*.layer.0.*`, or a set, `@attention` or `@mlp`; repeatable.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def out_option(what: str, *, required: bool = True) -> Callable[[F], F]:
    """-o/--out with `what` in its help."""
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=required, help=what
    )


def path_argument(name: str) -> Callable[[F], F]:
    """A path whose existence the command checks, to say what it should have been."""
    return click.argument(name, type=click.Path(path_type=Path))


class _FiniteRange(click.FloatRange):
    """Of finite numbers: click lets NaN through every range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def check_data(path: Path) -> None:
    """Raise `UsageError` if no data is at `path`: at once, before packages take seconds to load."""
    from regrow_format.errors import UsageError

    if not path.exists():
        raise UsageError(f"data must be {DATA}; got {path}: no such file")


def check_npz(out: Path) -> None:
    """Raise `click.UsageError` for an output of arrays of another ending."""
    if out.suffix != ".npz":
        raise click.UsageError(f"--out must end in .npz, got {out}: such as {out}.npz")


def data_options(what: str, *, required: bool = False) -> Callable[[F], F]:
    """--data with `what` in its help, and how to read it: --text, --label and --max-length."""

    def decorate(function: F) -> F:
        for option in (
            click.option(
                "--max-length", type=click.IntRange(2), default=128, show_default=True,
                help="Tokens per text at most; the model may take fewer.",
            ),
            click.option(
                "--label", metavar="NAME",
                help=f"Column or array with the labels; by default {LABEL_WORDS}.",
            ),
            click.option(
                "--text", metavar="NAME",
                help="Column with the text, or two with a comma between for pairs; by default "
                "`text`, or the only one of words.",
            ),
            click.option(
                "--data", type=click.Path(path_type=Path), required=required,
                help=f"{what}: {DATA}.",
            ),
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


@contextmanager
def resumable(state: Path) -> Iterator[None]:
    """Let an interrupt say where the work goes on, if its `state` was written."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not state.exists():
            raise
        raise KeyboardInterrupt(
            f"{state} has what was done: the same command with --resume goes on with it"
        ) from error


def carried_options(function: F) -> F:
    """--preprocessor and --labels: what a model's directory or function lacks."""
    for option in (
        click.option(
            "--labels", "label_file", type=click.Path(path_type=Path),
            help="Class names in the order of the outputs, a line each or a JSON list, for a model "
            "that does not say them.",
        ),
        click.option(
            "--preprocessor", type=click.Path(path_type=Path),
            help="A preprocessor_config.json, or a folder with one or a tokenizer: how images, "
            "sounds or texts become inputs, for a model that has none.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def config_options(kind: type) -> Callable[[F], F]:
    """An option per field of a config dataclass; help and defaults stand there alone."""

    def decorate(function: F) -> F:
        for item in reversed(fields(kind)):
            if item.default is MISSING:
                continue
            choices = item.metadata["choices"]
            value_type: Any = click.Choice(choices) if choices else type(item.default)
            if not choices and type(item.default) in (int, float):
                low = item.metadata["low"]
                whole = type(item.default) is int
                high = item.metadata["high"]
                value_type = click.IntRange(int(low)) if whole else _FiniteRange(low, high)
            function = click.option(
                f"--{item.name.replace('_', '-')}",
                item.name,
                type=value_type,
                default=item.default,
                show_default=item.metadata["shown"] or item.default != "",
                help=item.metadata["help"],
            )(function)
        return function

    return decorate


def parse_pairs(pairs: tuple[str, ...], option: str) -> dict[str, str]:
    """{"k": "64"} from ("k=64",)."""
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise click.UsageError(f"{option} must be NAME=VALUE, got {pair!r}")
        found[name] = value
    return found


def emit(result: Mapping[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print `lines`, or `result` as one line of JSON."""
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        for line in lines:
            click.echo(printable(line))
