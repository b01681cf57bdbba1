"""What was measured where, and what else the machine was doing meanwhile."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from regrow_toolchain.measurement import read_cpu, read_governor, read_load

from .significance import LOUD

__all__ = ["NoiseMeter", "note_of", "read_environment"]

_PACKAGES = ("regrow", "numpy", "onnxruntime")


def read_environment() -> dict[str, Any]:
    """Processor, its instruction sets, cores, governor, system, versions."""
    cpu = read_cpu()
    return {
        "cpu": cpu.name,
        "cpu_flags": list(cpu.flags) or None,
        "cores": cpu.cores,
        "governor": read_governor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "blas_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class NoiseMeter:
    """From its making to `read`: how many cores other programs kept busy."""

    def __init__(self) -> None:
        self._start, self._load, self._own = time.monotonic(), read_load(), _own_cpu()

    def read(self) -> dict[str, Any]:
        """Load averages before and after, `others`: mean number of cores that others used, and
        `stolen`: that the machine below gave to other machines; None where the system is silent.
        """
        elapsed = max(time.monotonic() - self._start, 1e-3)
        before, after, own = self._load, read_load(), _own_cpu() - self._own
        busy, stolen = _between(before.busy, after.busy), _between(before.stolen, after.stolen)
        others = None if busy is None else max(0.0, (busy - own) / elapsed)
        return {
            "load_before": before.average,
            "load_after": after.average,
            "others": others,
            "stolen": None if stolen is None else stolen / elapsed,
            "note": note_of(others, stolen and stolen / elapsed, before.average),
        }


def _between(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _own_cpu() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def note_of(others: float | None, stolen: float | None, load: float | None) -> str:
    """What to know of the noise: cores' worth of others' work, the stolen share, load average."""
    if others is None:
        told = f"load average {load:.1f} at the start" if load is not None else "not told"
        return f"what other programs did meanwhile: {told}"
    if others > LOUD or (stolen or 0.0) > LOUD:
        more = f", other machines {stolen:.1f}" if stolen and stolen > 0.05 else ""
        return (
            f"the machine was not quiet: other programs kept {others:.1f} cores busy{more}; "
            "times may be too long"
        )
    return f"the machine was quiet: other programs kept {others:.2f} cores busy"
