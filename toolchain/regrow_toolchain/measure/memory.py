"""What this process has in RAM, from /proc on Linux; None elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "read_memory"]

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Bytes. `rss_anon` is private memory (VmHWM's `peak` also counts mapped files)."""

    rss_anon: int | None
    rss_file: int | None
    peak: int | None


def read_memory(status: Path = _STATUS) -> Memory:
    """RssAnon, RssFile and VmHWM of this process, in bytes; None for what the system hides."""
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return Memory(
        _bytes(found.get("RssAnon")), _bytes(found.get("RssFile")), _bytes(found.get("VmHWM"))
    )


def _bytes(text: str | None) -> int | None:
    """ "  1234 kB" as 1263616."""
    parts = (text or "").split()
    return int(parts[0]) * 1024 if len(parts) == 2 and parts[1] == "kB" else None
