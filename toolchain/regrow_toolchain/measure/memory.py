"""What this process has in RAM: from /proc on Linux, else the nearest figures that there are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "read_memory"]

_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Memory:
    """Bytes; None for what the system does not tell.

    Attributes:
        rss_anon: private memory in RAM.
        rss_file: mapped files in RAM, of which other processes may use the same pages.
        pss: all of it, with shared pages divided by the processes that share them.
        peak: the most that was in RAM at once, mapped files included.
        data: private writable memory that was asked for, in RAM or not: what RLIMIT_DATA counts.
        source: which figures these are; on other systems than Linux they are the nearest.
    """

    rss_anon: int | None
    rss_file: int | None
    peak: int | None
    pss: int | None = None
    data: int | None = None
    source: str = "/proc: RssAnon, RssFile, Pss, VmHWM"


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
    from . import memory_elsewhere

    if sys.platform == "darwin":
        return memory_elsewhere.macos()
    if sys.platform == "win32":
        return memory_elsewhere.windows()
    return memory_elsewhere.peak_only(f"{status} cannot be read")
