"""Targets as an adapter file names them: layers that differ by their number share a row.

`[name, in, out]` is one target. `[pattern, in, out, first, last]` is one for every number from
first to last, in the place of the pattern's `*`: so a file of few numbers is not mostly names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeGuard

from .errors import FormatError
from .record import Record

__all__ = ["MAX_FEATURES", "Target", "target_rows", "targets_of"]

# Far above real adapters: they bound what a small hostile file makes a reader allocate.
MAX_FEATURES = 1 << 24
MAX_TARGETS = 100_000
_MAX_CHARACTERS = 1 << 24

Row = list[str | int]


class Target(Record):
    """A layer that the adapter changes, or a norm (in = out): its module path and its widths."""

    name: str
    in_features: int
    out_features: int


def target_rows(targets: Sequence[Target]) -> list[Row]:
    """Rows for `targets`, sorted; the same targets always give the same rows.

    Patterns that cover most targets come first, then by their UTF-8 bytes.
    """
    groups: dict[tuple[str, int, int], dict[int, Target]] = defaultdict(dict)
    for target in targets:
        for pattern, number in _patterns(target.name):
            groups[pattern, target.in_features, target.out_features][number] = target
    left = set(targets)
    rows: list[Row] = []
    order = sorted(groups.items(), key=lambda g: (-len(g[1]), g[0][0].encode(), g[0][1:]))
    for shared, members in order:
        for run in _runs([n for n, target in sorted(members.items()) if target in left]):
            if len(run) > 1:
                rows.append([*shared, run[0], run[-1]])
                left -= {members[number] for number in run}
    rows += [[t.name, t.in_features, t.out_features] for t in left]
    return sorted(rows, key=lambda row: (str(row[0]).encode(), *row[3:4]))


def _patterns(name: str) -> Iterator[tuple[str, int]]:
    """`name` with one of its numbers replaced by `*`, for each of them, and that number."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if "*" not in name and part.isascii() and part.isdigit() and part == str(int(part[:9])):
            yield ".".join([*parts[:place], "*", *parts[place + 1 :]]), int(part)


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Numbers without a gap between them, in one list each."""
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        yield [number for _, number in run]


def targets_of(rows: Sequence[object], where: str) -> tuple[Target, ...]:
    """The targets that `rows` stand for, sorted by the UTF-8 bytes of their names.

    Raises:
        FormatError: a row is none, a name comes twice or does not print, or they are too many.
    """
    targets: list[Target] = []
    order: list[tuple[bytes, int]] = []
    characters = 0
    for row in rows:
        name, wide, high, numbers = _row(row, where)
        order.append((name.encode(), numbers.start if numbers else -1))
        characters += (len(name) + 8) * max(1, len(numbers))
        if len(targets) + len(numbers) >= MAX_TARGETS or characters > _MAX_CHARACTERS:
            raise FormatError(
                f"{where}: targets must be at most {MAX_TARGETS}, of {_MAX_CHARACTERS} characters"
            )
        names = [name.replace("*", str(n)) for n in numbers] or [name]
        targets += [Target(name, wide, high) for name in names]
    targets.sort(key=lambda target: target.name.encode())
    names = [target.name for target in targets]
    once = order == sorted(order) and len(set(names)) == len(names)
    if not once or not all(name.isprintable() for name in names):
        raise FormatError(
            f"{where}: targets must be sorted, each named once, in characters that print"
        )
    return tuple(targets)


def _row(row: object, where: str) -> tuple[str, int, int, range]:
    """Name or pattern, widths, and the numbers that go into a pattern."""
    match row:
        case [str(name), wide, high] if _width(wide) and _width(high):
            return name, wide, high, range(0)
        case [str(name), wide, high, first, last] if (
            _width(wide)
            and _width(high)
            and name.count("*") == 1
            and type(first) is type(last) is int
            and 0 <= first < last < first + MAX_TARGETS < 2**53
        ):
            return name, wide, high, range(first, last + 1)
    raise FormatError(
        f"{where}: a target must be [name, in, out], or [pattern with one *, in, out, first, last] "
        f"with first < last, got {row!r:.80}"
    )


def _width(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= MAX_FEATURES  # not bool
