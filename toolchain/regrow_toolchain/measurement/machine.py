"""What machine this is, and what else it is doing: psutil, and what it does not tell."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Cpu", "Load", "available_bytes", "read_clock", "read_cpu", "read_governor", "read_load"]

# psutil tells neither the processor's name, nor its instruction sets, nor the governor.
_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# They decide which kernels ONNX Runtime and torch take: x86-64's, then Arm's, as Linux has them.
_DECIDING = (
    "sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw",
    "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_BUSY = ("user", "nice", "system", "irq", "softirq")  # of psutil.cpu_times; Windows has two of them


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        name: as it calls itself.
        cores: how many this process may use.
        flags: its instruction sets that decide which kernels are used, as Linux calls them, such
            as "avx512_vnni"; empty where the system does not tell.
    """

    name: str
    cores: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Load:
    """Load average of a minute, and seconds that the cores which this process may use were busy or
    stolen since the start of the machine; None for what the system does not tell.
    """

    average: float | None
    busy: float | None
    stolen: float | None


def read_cpu(cpuinfo: Path = _CPUINFO) -> Cpu:
    """From /proc/cpuinfo where there is one, else what Python knows."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = _first(lines, "model name") or platform.processor() or platform.machine()
    told = (_first(lines, "flags") or _first(lines, "Features")).split()
    return Cpu(name, len(_cores()), tuple(flag for flag in _DECIDING if flag in told))


def _first(lines: list[str], field: str) -> str:
    """What /proc/cpuinfo has for the first core, or ""."""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == field), "")


def _cores() -> list[int]:
    """Numbers of the cores that this process may use; all of them where none can be chosen."""
    if hasattr(os, "sched_getaffinity"):  # psutil asks the same, but not without /proc
        return sorted(os.sched_getaffinity(0))
    if hasattr(psutil.Process, "cpu_affinity"):  # Windows
        return sorted(psutil.Process().cpu_affinity())
    return list(range(psutil.cpu_count() or 1))


def available_bytes() -> int:
    """RAM that can be had without swapping; 0 where the system does not tell."""
    try:
        return int(psutil.virtual_memory().available)
    except (OSError, KeyError):
        return 0


def read_clock() -> float | None:
    """MHz of the first core, as the system tells it; None if it does not."""
    try:
        clocks = psutil.cpu_freq(percpu=True)
    except (AttributeError, OSError, NotImplementedError, RuntimeError):
        return None
    return float(clocks[0].current) if clocks else None


def read_governor(path: Path = _GOVERNOR) -> str | None:
    """How Linux sets the clock, such as "performance"; None if it does not tell."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None


def read_load() -> Load:
    """What the machine is doing now."""
    try:
        average: float | None = os.getloadavg()[0]  # psutil's is a guess on Windows, 0 at first
    except (OSError, AttributeError):
        average = None
    try:
        times = _our_times(psutil.cpu_times(percpu=True))
    except OSError:
        return Load(average, None, None)
    busy = sum(getattr(core, name, 0.0) for core in times for name in _BUSY)
    told = all(hasattr(core, "steal") for core in times)
    return Load(average, busy, sum(core.steal for core in times) if told else None)


def _our_times(every: Sequence[Any]) -> Sequence[Any]:
    """Those of the cores that may be used: what others do elsewhere costs nothing.

    psutil counts the cores that are switched on, the system numbers all of them: a number that is
    too high tells that some are off, and then the whole machine counts.
    """
    cores = _cores()
    return [every[core] for core in cores] if max(cores) < len(every) else [psutil.cpu_times()]
