"""What machine this is, and what else it is doing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cpu", "Load", "read_cpu", "read_governor", "read_load"]

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
# They decide which kernels ONNX Runtime and torch take: x86-64's, then Arm's, as Linux has them.
_DECIDING = (
    "sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw",
    "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


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
