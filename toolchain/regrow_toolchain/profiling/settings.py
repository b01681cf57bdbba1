"""What the command line asked for, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from regrow_format.errors import UsageError
from regrow_toolchain.config import ProfileConfig
from regrow_toolchain.measurement import read_cpu

__all__ = ["Cell", "Settings", "parse_settings"]

_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600}
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20,
          "GIB": 2**30}  # fmt: skip
_LEAST = 10**6  # nothing starts in less: a unit was forgotten
_QUICK: dict[str, Any] = {
    "runs": 24, "seconds": 0.4, "rounds": 4, "residents": "1,10,100", "tokens": 4
}  # fmt: skip
_MOST = {"batch": 4096, "length": 1 << 20, "threads": 1024, "residents": 100_000}


@dataclass(frozen=True)
class Cell:
    """One point of the grid; `length` is None where the model has none or its own is taken."""

    batch: int
    length: int | None
    threads: int


@dataclass(frozen=True)
class Settings:
    """`ProfileConfig`, read: numbers, seconds and bytes."""

    cells: tuple[Cell, ...]
    runs: int
    seconds: float
    rounds: int
    residents: tuple[int, ...]
    tokens: int
    sustained: float | None
    memory_limit: int | None
    profile: str

    @property
    def first(self) -> Cell:
        """The cell that everything but the grid is measured at."""
        return self.cells[0]


def parse_settings(config: ProfileConfig, *, quick: bool, told: Collection[str] = ()) -> Settings:
    """Read the config's texts.

    Args:
        quick: a tenth of the time: fewer runs, rounds and adapters.
        told: fields that the user gave, which `quick` leaves alone.

    Raises:
        UsageError: one of them is not what it must be.
    """
    if quick:
        config = replace(config, **{k: v for k, v in _QUICK.items() if k not in told})
    lengths: tuple[int | None, ...] = _numbers(config.length, "length") or (None,)
    threads = _numbers(config.threads, "threads") or (read_cpu().cores,)
    grid = product(_numbers(config.batch, "batch") or (1,), lengths, threads)
    return Settings(
        cells=tuple(Cell(*point) for point in grid),
        runs=config.runs,
        seconds=config.seconds,
        rounds=config.rounds,
        residents=tuple(sorted(_numbers(config.residents, "residents"))),
        tokens=config.tokens,
        sustained=_seconds(config.sustained) if config.sustained else None,
        memory_limit=_size(config.memory_limit) if config.memory_limit else None,
        profile=config.profile,
    )


def _numbers(text: str, name: str) -> tuple[int, ...]:
    """(1, 4) from "1,4"; each once, in the order given."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    most = _MOST[name]
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,9}", part) or not 1 <= int(part) <= most:
            raise UsageError(
                f"{name} must be numbers from 1 to {most} with commas between, got {text!r}: "
                f"such as --{name} 1,4"
            )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _with_unit(text: str, units: dict[str, int]) -> float | None:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in units:
        return None
    return float(found[1]) * units[found[2]] or None


def _seconds(text: str) -> float:
    """600.0 from "10m"."""
    found = _with_unit(text.lower(), _TIMES)
    if found is None or found > 7 * 24 * 3600:
        raise UsageError(f"sustained must be a time such as 30s, 10m or 1h, got {text!r}")
    return found


def _size(text: str) -> int:
    """128000000 from "128MB"."""
    found = _with_unit(text.upper(), _BYTES)
    if found is None or found > 2**50:
        raise UsageError(f"memory limit must be a size such as 128MB or 64MiB, got {text!r}")
    if found < _LEAST:
        raise UsageError(
            f"memory limit must be at least 1 MB, got {text!r}, which is {found:.4g} bytes: give a "
            "unit, such as 128MB or 64MiB"
        )
    return int(found)
