"""Measuring: memory of this process, and distributions of times. Needs nothing but Python."""

from __future__ import annotations

from .machine import Cpu, read_cpu
from .memory import Memory, read_memory
from .times import Times, measure_in_turns

__all__ = ["Cpu", "Memory", "Times", "measure_in_turns", "read_cpu", "read_memory"]
