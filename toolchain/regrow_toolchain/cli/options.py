"""Options that several commands share, and what commands do with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from .app import printable

__all__ = [
    "check_npz",
    "check_state",
    "emit",
    "force_option",
    "json_option",
    "out_option",
    "path_argument",
    "resumable",
    "resume_option",
]

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document."
)
resume_option = click.option(
    "--resume", is_flag=True, help="Go on with a training that was interrupted (OUT.resume)."
)
force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def out_option(what: str, *, required: bool = True) -> Callable[[F], F]:
    """-o/--out with `what` in its help."""
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=required, help=what
    )


def path_argument(name: str) -> Callable[[F], F]:
    """A path whose existence the command checks, to say what it should have been."""
    return click.argument(name, type=click.Path(path_type=Path))


def check_npz(out: Path) -> None:
    """Raise `click.UsageError` for an output of arrays of another ending."""
    if out.suffix != ".npz":
        raise click.UsageError(f"--out must end in .npz, got {out}: such as {out}.npz")


def check_state(state: Path, resume: bool) -> None:
    """Raise `UsageError` if a state lies there that nobody asked to go on with."""
    from regrow_format.errors import UsageError

    if state.exists() and not resume:
        raise UsageError(
            f"an interrupted training left {state}: --resume goes on with it, or remove it"
        )
    if resume and not state.exists():
        click.echo(f"regrow: nothing to resume at {state}: it starts anew", err=True)


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


def emit(result: Mapping[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print `lines`, or `result` as one line of JSON."""
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        for line in lines:
            click.echo(printable(line))
