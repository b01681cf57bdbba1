"""A progress bar on stderr; where that is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "progress"]

SECONDS = 30.0  # between lines where there is no terminal


class Progress(Protocol):
    """Called once per step with what to show beside the bar."""

    def __call__(self, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show a bar of `total` steps, of which some may be `done`, while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    hidden = not sys.stderr.isatty()
    line = _Lines(title, total, done)
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def step(note: str = "") -> None:
            bar.update(task, advance=1, note=note)
            if hidden:
                line.step(note)

        yield step


class _Lines:
    """Says how far it is on stderr, every half minute."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.said = time.monotonic()

    def step(self, note: str) -> None:
        self.done += 1
        if time.monotonic() - self.said >= SECONDS:
            self.said = time.monotonic()
            shown = f"; {note}" if note else ""
            sys.stderr.write(f"regrow: {self.title}: {self.done} of {self.total}{shown}\n")
