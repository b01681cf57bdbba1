"""Labels from arrays and from the cells of a column: classes, values or tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, UsageError

__all__ = ["IGNORED", "Labels", "as_words", "labels_of_array", "labels_of_cells", "no_labels"]

IGNORED = -100  # a token that counts for no loss, as transformers and torch have it
_LARGEST = float(np.finfo(np.float32).max)  # values are kept in float32
_MAX_CLASSES = 1 << 20  # as in the adapter file; a stray number must not cost gigabytes


@dataclass(frozen=True)
class Labels:
    """As in a `Dataset`."""

    values: NDArray[Any]
    names: tuple[str, ...] = ()
    named: bool = True


def no_labels(count: int) -> Labels:
    """Of samples that have none."""
    return Labels(np.full(count, -1, dtype=np.int64), named=False)


def labels_of_array(array: NDArray[Any], where: str, *, one_value: bool) -> Labels:
    """Classes from integers or strings [n], values from floats [n(, m)], tokens from int [n, t].

    Args:
        where: the file, for errors.
        one_value: integers [n] are values too: the backbone gives one number.
    """
    if array.size == 0:
        raise UsageError(f"{where}: labels must be at least one, got none")
    kind, dims = array.dtype.kind, array.ndim
    if kind in "US" and dims == 1:
        return _words(as_words(array, f"{where}: labels"))
    if (kind == "f" and dims in (1, 2)) or (kind in "iu" and dims == 1 and one_value):
        return _values(array, where)
    if kind in "iu" and dims == 1:
        _check_classes(int(array.min()), int(array.max()), where)
        return _numbers(array.astype(np.int64))
    if kind in "iu" and dims == 2:
        return _tokens(array, where)
    raise UsageError(
        f"{where}: labels must be integers, strings or floats, one per sample, or [samples, "
        f"values], or [samples, tokens]; got {array.dtype} of shape {array.shape}"
    )


def labels_of_cells(
    cells: Sequence[object], where: Callable[[int], str], *, one_value: bool
) -> Labels:
    """Classes from integers or strings, values from floats; all cells must be of one kind.

    Args:
        where: tells the place of the cell with a given index.
    """
    first = _kind(cells[0], where(0))
    for index, cell in enumerate(cells):
        if (found := _kind(cell, where(index))) != first:
            raise FormatError(
                f"{where(index)} must be a {first}, like those before it, got the {found} {cell!r}"
            )
    if first == "name":
        # No array of strings here: one long name would make every row as wide.
        index_of = {name: index for index, name in enumerate(sorted(set(map(str, cells))))}
        return Labels(np.array([index_of[str(cell)] for cell in cells]), tuple(index_of))
    if not one_value and all(isinstance(cell, int) for cell in cells):
        for index, cell in enumerate(cells):
            assert isinstance(cell, int)
            _check_classes(cell, cell, where(index))
        return _numbers(np.array(cells, dtype=np.int64))
    return Labels(np.array(cells, dtype=np.float64).astype(np.float32))


def _kind(cell: object, where: str) -> str:
    """ "name" or "number"; what is neither, empty or not finite is an error."""
    if isinstance(cell, str) and cell:
        return "name"
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        if not abs(cell) <= _LARGEST:  # so that NaN is refused too
            raise FormatError(f"{where} must be a finite number, got {cell!r:.80}")
        return "number"
    raise FormatError(f"{where} must be a name or a number, got {cell!r:.80}")


def as_words(array: NDArray[Any], where: str) -> NDArray[np.str_]:
    """Strings from an array of strings or of UTF-8 bytes; none may be empty."""
    try:
        words = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} must be UTF-8, got {error.object!r:.80}") from None
    found: NDArray[np.str_] = words.astype(np.str_)
    if (found == "").any():
        raise UsageError(f"{where} must not be empty, got '' at {int((found == '').argmax())}")
    return found


def _words(words: NDArray[np.str_]) -> Labels:
    names, index = np.unique(words, return_inverse=True)
    return Labels(index.astype(np.int64), tuple(str(name) for name in names))


def _numbers(numbers: NDArray[np.int64]) -> Labels:
    names = tuple(str(n) for n in range(int(numbers.max()) + 1))
    return Labels(numbers, names, named=False)


def _values(array: NDArray[Any], where: str) -> Labels:
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise UsageError(f"{where}: labels must be finite, got NaN or infinity")
    return Labels(values)


def _tokens(array: NDArray[Any], where: str) -> Labels:
    known = (array >= 0) | (array == IGNORED) if array.dtype.kind == "i" else array >= 0
    if not known.all() or int(array.max()) >= 1 << 31:
        wrong = int(array.max()) if known.all() else int(array[~known][0])
        raise UsageError(f"{where}: labels of tokens must be {IGNORED}, or 0 or more, got {wrong}")
    tokens = array.astype(np.int64)
    if (empty := (tokens == IGNORED).all(axis=1)).any():
        raise UsageError(
            f"{where}: labels must have a token other than {IGNORED} in every sample, "
            f"got none in sample {int(empty.argmax())}"
        )
    return Labels(tokens)


def _check_classes(low: int, high: int, where: str) -> None:
    if low < 0:
        raise UsageError(f"{where}: labels must be 0 or more, got {low}")
    if high >= _MAX_CLASSES:
        raise UsageError(f"{where}: labels must be below {_MAX_CLASSES}, got {high}")
