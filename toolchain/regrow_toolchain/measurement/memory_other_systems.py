"""RAM of this process where there is no /proc: the nearest figures, named in `Memory.source`."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from .memory_record import Memory

__all__ = ["macos", "peak_only", "windows"]


def peak_only(reason: str) -> Memory:
    """The peak from getrusage, where nothing else is told."""
    try:
        import resource
    except ImportError:
        return Memory(None, None, None, source=f"nothing: {reason}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # Linux keeps the peak of the process that started this one, from before the program was loaded.
    more = ", at least that of regrow profile itself" if sys.platform == "linux" else ""
    return Memory(None, None, peak, source=f"getrusage: the peak only{more}; {reason}")


def macos() -> Memory:
    """ri_phys_footprint (nearest to private memory) and ri_resident_size, from libproc."""
    peak = peak_only("libproc does not answer")
    # struct rusage_info_v0: a uuid of 16 bytes, then 64-bit numbers; resident size is the 7th of
    # them, the physical footprint the 8th.
    info = (ctypes.c_uint64 * 64)()
    try:
        library = ctypes.CDLL("/usr/lib/libproc.dylib")
        if library.proc_pid_rusage(os.getpid(), 0, ctypes.byref(info)) != 0:
            return peak
    except (OSError, AttributeError):
        return peak
    resident, footprint = int(info[8]), int(info[9])
    source = "macOS: physical footprint as private memory, the rest of the resident size as files"
    return Memory(footprint, max(0, resident - footprint), peak.peak, source=source)


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS_EX."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in (
            "PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage",
            "QuotaPagedPoolUsage", "QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage",
            "PagefileUsage", "PeakPagefileUsage", "PrivateUsage",
        )),
    )  # fmt: skip


def windows() -> Memory:
    """PrivateUsage (nearest to private memory) and the working set, from GetProcessMemoryInfo."""
    counters = _Counters(cb=ctypes.sizeof(_Counters))
    kernel: Any = vars(ctypes)["WinDLL"]("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    call = kernel.K32GetProcessMemoryInfo
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    if not call(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return peak_only("GetProcessMemoryInfo does not answer")
    private, working = int(counters.PrivateUsage), int(counters.WorkingSetSize)
    source = (
        "Windows: committed private bytes as private memory, the rest of the working set as files"
    )
    rest = max(0, working - private)
    return Memory(private, rest, int(counters.PeakWorkingSetSize), source=source)
