"""How long this thread waited for a core that others had: what a busy machine adds to a time."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CoreWait"]

_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, turns


class CoreWait:
    """Linux's run delay of the thread that makes it; `known` is False where none is told.

    A reading takes a microsecond.
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

    def read(self) -> float:
        """Milliseconds since the thread began; 0 where none is told."""
        return int(self._fields()[1]) / 1e6 if self.known else 0.0

    def close(self) -> None:
        """Let go of the file; `read` gives 0 from here on."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _fields(self) -> list[bytes]:
        """Three numbers, or nothing: kernels without CONFIG_SCHED_INFO."""
        parts = os.pread(self._file, 80, 0).split() if self._file is not None else []
        return parts if len(parts) == 3 and all(part.isdigit() for part in parts) else []
