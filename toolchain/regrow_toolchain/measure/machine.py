"""What machine this is, and what else it is doing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cpu", "Load", "read_cpu", "read_governor", "read_load"]

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class Cpu:
    """Name of the processor, and how many cores this process may use."""

    name: str
    cores: int


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
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, "") or platform.processor() or platform.machine()
    return Cpu(name, len(_cores()))


def _cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def read_governor(path: Path = _GOVERNOR) -> str | None:
    """How Linux sets the clock, such as "performance"; None if it does not tell."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None


def read_load(stat: Path = _STAT) -> Load:
    """What the machine is doing now, from getloadavg and /proc/stat."""
    try:
        average: float | None = os.getloadavg()[0]
    except (OSError, AttributeError):
        average = None
    try:
        lines = stat.read_text(encoding="ascii", errors="replace").splitlines()
        rows = {name: parts for name, *parts in map(str.split, lines) if name.startswith("cpu")}
        ours = [rows[f"cpu{core}"] for core in _cores() if f"cpu{core}" in rows] or [rows["cpu"]]
        # user, nice, system, idle, iowait, irq, softirq, steal: what others do elsewhere costs none
        user, nice, system, _, _, irq, soft, steal = (
            sum(map(int, column)) for column in zip(*(row[:8] for row in ours), strict=True)
        )
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, KeyError, AttributeError):
        return Load(average, None, None)
    return Load(average, (user + nice + system + irq + soft) / tick, steal / tick)
