"""How long this thread waited for a core that others had: what a busy machine adds to a time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["CoreWait", "Reading", "own_ms"]

_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, turns


class Reading(NamedTuple):
    """Milliseconds since a thread began: `waited` for a core, `cpu` on one."""

    waited: float
    cpu: float


def own_ms(ms: float, before: Reading, after: Reading) -> float:
    """Of `ms` by the wall clock, what is left without the waiting between two readings.

    Never less than the time on a core: the thread may also have waited while it was reading.
    """
    return min(ms, max(ms - (after.waited - before.waited), after.cpu - before.cpu))


class CoreWait:
    """Linux's run delay of the thread that makes it; `known` is False where none is told.

    A reading takes two microseconds.
    """

    def __init__(self, path: Path = _SCHEDSTAT) -> None:
        self._file: int | None = None
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return
        if not self._fields():
            self.close()

    @property
    def known(self) -> bool:
        """Whether the system tells."""
        return self._file is not None

    def read(self) -> Reading:
        """Now; nothing was waited where the system does not tell."""
        waited = int(self._fields()[1]) / 1e6 if self.known else 0.0
        return Reading(waited, time.thread_time() * 1e3)

    def close(self) -> None:
        """Let go of the file; no waiting is told from here on."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _fields(self) -> list[bytes]:
        """Three numbers, or nothing: kernels without CONFIG_SCHED_INFO."""
        parts = os.pread(self._file, 80, 0).split() if self._file is not None else []
        return parts if len(parts) == 3 and all(part.isdigit() for part in parts) else []
