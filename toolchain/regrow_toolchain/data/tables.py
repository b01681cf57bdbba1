"""Rows with named columns from `.csv`, `.tsv` and `.jsonl` files, strict and bounded."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from regrow_format.errors import FormatError, UsageError

from .columns import MAX_ROWS, Table, table_data
from .dataset import Dataset
from .source import Source
from .text import read_utf8

__all__ = ["read_csv", "read_jsonl", "read_tsv"]

MAX_FILE = 256 << 20


def read_csv(source: Source) -> Dataset:
    """Commas between, a first row of names, quotes as in RFC 4180."""
    text = read_utf8(source.path, MAX_FILE)
    return _delimited(source, csv.reader(StringIO(text, newline=""), strict=True))


def read_tsv(source: Source) -> Dataset:
    """Tabs between, a first row of names; quotes are characters like any other."""
    text = read_utf8(source.path, MAX_FILE)
    stream = StringIO(text, newline="")
    return _delimited(source, csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def _delimited(source: Source, reader: Any) -> Dataset:
    path = source.path
    header: list[str] | None = None
    columns: list[list[str]] = []
    lines: list[int] = []
    for line, row in _rows(path, reader):
        if header is None:
            header = _header(path, [name.strip() for name in row])
            columns = [[] for _ in header]
            continue
        if len(row) != len(header):
            raise FormatError(
                f"{path}, line {line}: a row must have {len(header)} columns, got {len(row)}"
            )
        _check_count(path, lines)
        lines.append(line)
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    if header is None or not lines:
        raise UsageError(f"{path} must have a row of names and rows below it, got none")
    cells = dict(zip(header, columns, strict=True))
    return table_data(source, Table(path, cells, lines, untyped=True))


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) for every row that is not blank."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FormatError(f"{path}, line {line} must be a row of cells: {error}") from None
        if row:
            yield line, row


def _header(path: Path, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        found = f"{twice[0]!r} twice" if twice else "a column without a name"
        raise FormatError(f"{path}, line 1 must have a name of its own per column, got {found}")
    return names


def read_jsonl(source: Source) -> Dataset:
    """One JSON object per line."""
    path = source.path
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, text in enumerate(read_utf8(path, MAX_FILE).split("\n"), start=1):
        if text.strip():
            _check_count(path, lines)
            rows.append(_object(text, f"{path}, line {line}"))
            lines.append(line)
    if not rows:
        raise UsageError(f"{path} must have a JSON object per line, got none")
    cells = {name: [row.get(name) for row in rows] for name in rows[0]}
    return table_data(source, Table(path, cells, lines))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=lambda _: math.nan)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} must be a JSON object, got something else: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def _check_count(path: Path, lines: list[int]) -> None:
    if len(lines) == MAX_ROWS:
        raise UsageError(f"{path} must have at most {MAX_ROWS} rows, got more")
