"""From a table's columns to a dataset: which column is what, and what its cells must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, UsageError

from .dataset import Dataset
from .formats import LABEL_NAMES
from .labels import Labels, labels_of_cells, no_labels
from .source import Source
from .text import Encoder, next_tokens

__all__ = ["MAX_ROWS", "Table", "table_data"]

MAX_ROWS = 1 << 20
_TEXT = "text"
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MAX_USER = 200  # characters of a user's id


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        cells: by column: str, int, float, or None where a row has no such cell.
        untyped: every cell is a string, and labels that look like numbers are numbers.
        rows: the number of each row, as `unit`s of the file.
        classes: names of a column's classes, where its numbers stand for such.
    """

    path: Path
    cells: Mapping[str, Sequence[Any]]
    rows: Sequence[int]
    unit: str = "line"
    untyped: bool = False
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def where(self, index: int, column: str) -> str:
        """The place of a cell, for errors."""
        return f"{self.path}, {self.unit} {self.rows[index]}: {column}"

    def has_words(self, column: str) -> bool:
        """Whether a column holds words, and not numbers or something else."""
        if self.untyped:
            return any(isinstance(_number(cell), str) for cell in self.cells[column])
        return isinstance(self.cells[column][0], str)


def table_data(source: Source, table: Table) -> Dataset:
    """A dataset from a table.

    Raises:
        UsageError: a column is missing, or it is not clear which is meant.
        FormatError: a cell is empty or of another kind than it must be; one error names its line.
    """
    if source.backbone.task == "token-classification":
        raise UsageError(
            "a backbone for token-classification takes ready input_ids and labels "
            f"[samples, tokens] in an .npz, got {table.path}"
        )
    label = _label(source, table)
    texts = _texts(source, table, label)
    users = _users(source, table)
    labels = None if label is None else table_labels(source, table, label)
    encoder = Encoder(source.backbone, source.max_length)
    inputs, lengths = encoder(*(_words(table, name) for name in texts))
    if labels is None and not source.language_model:
        labels = no_labels(len(lengths))
    if labels is None:
        if lengths[short := int(lengths.argmin())] < 2:
            raise FormatError(
                f"{table.where(short, texts[0])} must have two tokens or more for a language "
                f"model, got {lengths[short]}"
            )
        labels = Labels(next_tokens(inputs["input_ids"], lengths))
    return Dataset(
        encoder.taken(inputs, source.arguments()), labels.values, labels.names, labels.named, users
    )


def table_labels(source: Source, table: Table, column: str) -> Labels:
    """Labels from a column's cells."""
    if (names := table.classes.get(column)) is not None:
        return _known_classes(table, column, names)
    plain = _number if table.untyped else _stripped
    cells = [plain(cell) for cell in table.cells[column]]
    return labels_of_cells(
        cells, lambda index: table.where(index, column), one_value=source.one_value
    )


def _known_classes(table: Table, column: str, names: Sequence[str]) -> Labels:
    cells = table.cells[column]
    for index, cell in enumerate(cells):
        if not isinstance(cell, int) or not 0 <= cell < len(names):
            raise FormatError(
                f"{table.where(index, column)} must be from 0 to {len(names) - 1}, got {cell!r}"
            )
    return Labels(np.array(cells, dtype=np.int64), tuple(names))


def _stripped(cell: Any) -> Any:
    return cell.strip() if isinstance(cell, str) else cell


def _number(cell: str) -> int | float | str:
    """The number that a cell is, or its text without the spaces around it."""
    cell = cell.strip()
    if _WHOLE.fullmatch(cell):
        return int(cell)
    return float(cell) if _NUMBER.fullmatch(cell) else cell


def _label(source: Source, table: Table) -> str | None:
    """The column with labels; None for a language model, whose labels are its text."""
    if source.language_model:
        if source.label:
            raise UsageError(
                "label must be left out for a language model, which learns the text itself, "
                f"got {source.label!r}"
            )
        return None
    if source.label:
        return _named(table, "label", source.label)
    if source.labels == "none":
        return None
    found = [name for name in LABEL_NAMES if name in table.cells]
    if not found and source.labels == "optional":
        return None
    if not found or source.label == "":
        raise UsageError(
            f"{table.path} must have a column of labels ({', '.join(LABEL_NAMES)}), "
            f"got {_columns(table)}: name one with --label"
        )
    return found[0]


def _texts(source: Source, table: Table, label: str | None) -> tuple[str, ...]:
    """The text column, or two of them."""
    if source.text is not None:
        names = (source.text,) if source.text in table.cells else tuple(source.text.split(","))
        names = tuple(_named(table, _TEXT, name.strip()) for name in names)
        if len(names) > 2 or (len(names) == 2 and source.language_model):
            most = "one column for a language model" if source.language_model else "at most two"
            raise UsageError(f"text must be {most}, got {source.text!r}")
        return names
    if _TEXT in table.cells:
        return (_TEXT,)
    others = {label, source.users, *(() if label else LABEL_NAMES)}
    found = [name for name in table.cells if name not in others and table.has_words(name)]
    if len(found) != 1:
        raise UsageError(
            f"{table.path} must have a column `text`, or one of words besides labels and users, "
            f"got {_columns(table)}: name one with --text, or two with a comma between"
        )
    return (found[0],)


def _named(table: Table, option: str, name: str) -> str:
    if name not in table.cells:
        raise UsageError(f"{option} must name a column of {_columns(table)}, got {name!r}")
    return name


def _columns(table: Table) -> str:
    return ", ".join(table.cells)


def _words(table: Table, column: str) -> list[str]:
    for index, cell in enumerate(table.cells[column]):
        if not isinstance(cell, str) or not cell.strip() or not _is_unicode(cell):
            raise FormatError(
                f"{table.where(index, column)} must be a text that is not empty, got {cell!r:.80}"
            )
    return list(table.cells[column])


def _is_unicode(text: str) -> bool:
    """Whether it can be written: half of a surrogate pair, which JSON can say, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _users(source: Source, table: Table) -> NDArray[np.str_] | None:
    if source.users is None:
        return None
    column = _named(table, "users", source.users)
    ids = [_stripped(cell) for cell in table.cells[column]]
    for index, user in enumerate(ids):
        if isinstance(user, bool) or not isinstance(user, str | int) or not _fits(str(user)):
            raise FormatError(
                f"{table.where(index, column)} must be a user's id, a string of at most "
                f"{_MAX_USER} characters or an integer, got {user!r:.80}"
            )
    return np.array([str(user) for user in ids], dtype=np.str_)


def _fits(user: str) -> bool:
    """Whether it can be an id: something, not long, and without NUL, which arrays would drop."""
    return 0 < len(user) <= _MAX_USER and "\0" not in user and _is_unicode(user)
