"""Measuring: memory of this process, distributions of times, the machine. Needs only Python."""

from __future__ import annotations

from .energy import EnergyMeter
from .machine import Cpu, Load, read_cpu, read_governor, read_load
from .memory import Memory, read_memory
from .times import Times, measure_in_turns
from .waiting import CoreWait, own_ms

__all__ = [
    "CoreWait",
    "Cpu",
    "EnergyMeter",
    "Load",
    "Memory",
    "Times",
    "measure_in_turns",
    "own_ms",
    "read_cpu",
    "read_governor",
    "read_load",
    "read_memory",
]
