"""What pages are made of, as data for the templates; the terminal has the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .formatting import GAP

__all__ = ["Panel", "Table", "Tile"]


@dataclass(frozen=True)
class Table:
    """Its caption, the column heads, the rows of cells."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Tile:
    """A headline figure: its name, the figure, and what to hold it against."""

    name: str
    figure: str
    note: str

    @property
    def value(self) -> str:
        """The figure without its unit."""
        return self.figure.partition(GAP)[0]

    @property
    def unit(self) -> str:
        """What stands behind the number, to be set smaller; "" where there is none."""
        return self.figure.partition(GAP)[2]

    @property
    def in_words(self) -> bool:
        """Whether there is no number in it."""
        return not any(letter.isdigit() for letter in self.value)


@dataclass(frozen=True)
class Panel:
    """A chart under the sentence that says what it shows; "" if there is nothing to draw."""

    title: str
    svg: Markup | str
