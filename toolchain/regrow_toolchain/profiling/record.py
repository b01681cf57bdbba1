"""Everything that is measured of a bundle, in order, as one record (docs/profile.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regrow_toolchain.measurement import available_bytes

from .environment import NoiseMeter, read_environment
from .fit import measure_fit
from .processes import Outcome, run_case
from .settings import Cell, Settings
from .summary import (
    cold_start,
    language_row,
    latency_rows,
    memory_stages,
    resident_rows,
    swap_rows,
)

__all__ = ["FORMAT", "measure_bundle"]

FORMAT = 1
Tell = Callable[[str], None]
Adapters = Sequence[tuple[str, str]]


class _Run:
    """One bundle's cases: what is common to them, and the words that say how far it is.

    Attributes:
        failed: by case, why it gave nothing; the rest of the report is made without it.
    """

    def __init__(self, bundle: Path, settings: Settings, tell: Tell) -> None:
        self.settings, self.tell = settings, tell
        self.common = {"bundle": str(bundle), "profile": settings.profile}
        self.failed: dict[str, str] = {}

    def case(self, name: str, cell: Cell, adapters: Adapters, **more: Any) -> Outcome:
        self.tell(f"{name}, {_cell_words(cell)}{more.pop('note', '')}")
        case = {**self.common, **asdict(cell), "case": name, "adapters": list(adapters), **more}
        return run_case(case, progress=self._progress)

    def part(self, name: str, adapters: Adapters, **more: Any) -> Outcome | None:
        """A case that the report can do without; None, and why in `failed`, if it fails."""
        if name in self.failed:
            return None
        # Asked here, not in the worker: psutil would be in its memory.
        about = {"available": available_bytes(), **more}
        outcome = self.case(name, self.settings.first, adapters[:1], **about)
        if outcome.result is None:
            told = str((outcome.failed or {}).get("message", "it ended early"))
            self.failed[name] = " ".join(told.split())
            return None
        return outcome

    def _progress(self, said: Mapping[str, Any]) -> None:
        if said["event"] == "progress":
            self.tell(f"sustained, {said['seconds']:.0f} of {said['of']:.0f} s")


def _cell_words(cell: Cell) -> str:
    length = f", length {cell.length}" if cell.length else ""
    return f"batch {cell.batch}{length}, threads {cell.threads}"


def measure_bundle(
    bundle: Path, adapters: Adapters, settings: Settings, tell: Tell
) -> dict[str, Any]:
    """The record.

    Args:
        adapters: names and paths; those that do not fit are named in the record.
        tell: called with what is being done.

    Raises:
        RegrowError: the bundle does not open or run.
    """
    began, noise = time.monotonic(), NoiseMeter()
    run = _Run(bundle, settings, tell)
    checked = _check(run, adapters)
    good = [(a["name"], a["file"]) for a in checked["adapters"] if a["reason"] is None]
    each = {a["name"]: a.get("resident_bytes") for a in checked["adapters"]}
    language = checked["bundle"]["task"].startswith("text-generation")
    rounds = _rounds(run, good, each.get(good[0][0], 0) if good else 0, language)
    record = {
        "kind": "regrow-profile",
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {**asdict(settings), "cells": [asdict(cell) for cell in settings.cells]},
        "environment": read_environment(),
        "bundle": {"path": str(bundle), **checked["bundle"], "length": checked["length"]},
        "adapters": checked["adapters"],
        "latency": latency_rows(rounds["latency"], settings.cells),
        "cold_start": cold_start(rounds["stages"]),
        "memory": memory_stages(rounds["stages"]),
        "swap": swap_rows(rounds["swaps"]),
        "language": language_row(rounds["language"]) if rounds["language"] else None,
        "calibration_ms": _calibration(rounds),
        **_once(run, good, each, rounds),
    }
    failed = [{"part": name, "reason": reason} for name, reason in run.failed.items()]
    told = {"failed": failed, "noise": noise.read(), "seconds": time.monotonic() - began}
    return record | told


def _check(run: _Run, adapters: Adapters) -> dict[str, Any]:
    settings = run.settings
    cells = [asdict(cell) for cell in settings.cells]
    return run.case("check", settings.first, adapters, cells=cells, note="").check()


def _rounds(run: _Run, good: Adapters, each: int, language: bool) -> dict[str, list[Any]]:
    """The cases that are repeated in fresh processes, in turns, so that drift meets all alike."""
    settings = run.settings
    found: dict[str, list[Any]] = {"latency": [], "stages": [], "swaps": [], "language": []}
    share = {
        "runs": -(-settings.runs // settings.rounds),
        "seconds": settings.seconds / settings.rounds,
    }
    for number in range(settings.rounds):
        note = f", round {number + 1} of {settings.rounds}"
        stages = run.case("stages", settings.first, good[:1], note=note)
        stages.check()
        found["stages"].append(stages.stages)
        cells = []
        for cell in settings.cells:
            subjects = good if cell is settings.first else good[:1]
            cells.append(run.case("latency", cell, subjects, **share, note=note).check())
        found["latency"].append(cells)
        if good and (swaps := run.part("swaps", good, residents=_few(settings, number),
                                       runs=share["runs"], each=each, note=note)):  # fmt: skip
            found["swaps"].append(swaps.check())
        if language and (told := run.part("language", good, tokens=settings.tokens, note=note)):
            found["language"].append(told.check())
    return found


def _few(settings: Settings, number: int) -> list[int]:
    """The largest number of adapters takes longest: once is enough."""
    small = [count for count in settings.residents if count <= 100] or [settings.residents[0]]
    return list(settings.residents) if number == 0 else small


def _calibration(rounds: Mapping[str, list[Any]]) -> list[float]:
    return [min(cell["calibration_ms"] for cell in cells) for cells in rounds["latency"]]


def _once(
    run: _Run, good: Adapters, each: Mapping[str, int | None], rounds: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """What one process tells well enough."""
    settings = run.settings
    found: dict[str, Any] = dict.fromkeys(("residents", "operators", "sustained", "fit"))
    if good and (residents := run.part("residents", good, residents=list(settings.residents),
                                       each=each[good[0][0]])):  # fmt: skip
        found["residents"] = resident_rows(residents.stages)
    if operators := run.part("operators", good):
        found["operators"] = operators.result
    if settings.sustained and (case := run.part("sustained", good, sustained=settings.sustained)):
        found["sustained"] = case.result
    if settings.memory_limit:
        found["fit"] = _fit(run, good, rounds)
    return found


def _fit(run: _Run, good: Adapters, rounds: Mapping[str, list[Any]]) -> dict[str, Any]:
    run.tell("does it fit")
    case = {**run.common, **asdict(run.settings.first), "case": "stages", "adapters": good[:1]}
    return measure_fit(case, run.settings.memory_limit or 0, rounds["stages"][0])
