"""What this process has in RAM: from /proc on Linux, else the nearest figures that there are."""

from __future__ import annotations

import sys
from pathlib import Path

from .memory_record import Memory

__all__ = ["read_memory"]

_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")


def read_memory(status: Path = _STATUS, rollup: Path = _ROLLUP) -> Memory:
    """RssAnon, RssFile, VmHWM, Pss and VmData of this process, or what comes nearest."""
    found = _fields(status)
    if not found:
        return _elsewhere(status)
    wanted = ("RssAnon", "RssFile", "VmHWM", "Pss", "VmData")
    found = _fields(rollup) | found
    anon, file, peak, pss, data = (_bytes(found.get(name)) for name in wanted)
    return Memory(anon, file, peak, pss, data)


def _fields(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _bytes(text: str | None) -> int | None:
    """ "  1234 kB" as 1263616."""
    parts = (text or "").split()
    return int(parts[0]) * 1024 if len(parts) == 2 and parts[1] == "kB" else None


def _elsewhere(status: Path) -> Memory:
    from . import memory_other_systems

    if sys.platform == "darwin":
        return memory_other_systems.macos()
    if sys.platform == "win32":
        return memory_other_systems.windows()
    return memory_other_systems.peak_only(f"{status} cannot be read")
