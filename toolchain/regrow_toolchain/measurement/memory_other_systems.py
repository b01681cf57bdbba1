"""RAM of this process where /proc does not tell: the nearest figures, named in `Memory.source`."""

from __future__ import annotations

import sys

from .memory_record import Memory

__all__ = ["from_psutil", "peak_only"]


def peak_only(reason: str) -> Memory:
    """The peak from getrusage, where nothing else is told."""
    peak = _peak()
    if peak is None:
        return Memory(None, None, None, source=f"nothing: {reason}")
    # Linux keeps the peak of the process that started this one, from before the program was loaded.
    more = ", at least that of regrow profile itself" if sys.platform == "linux" else ""
    return Memory(None, None, peak, source=f"getrusage: the peak only{more}; {reason}")


def _peak() -> int | None:
    """Bytes; psutil tells the peak on Windows alone."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def from_psutil() -> Memory:
    """The unique set size (USS: pages that no other process has) as private memory.

    psutil itself is in all figures, from the first one on, so differences of stages are free of it.
    """
    import psutil

    try:
        info = psutil.Process().memory_full_info()
        private, resident = int(info.uss), int(info.rss)
    except (psutil.Error, OSError, AttributeError):
        return peak_only("psutil tells no private memory")
    peak = getattr(info, "peak_wset", None) or _peak()
    source = "psutil: USS as private memory, the rest of the resident size as files"
    return Memory(private, max(0, resident - private), peak, source=source)
