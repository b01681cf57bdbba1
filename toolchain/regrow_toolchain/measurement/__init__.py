"""Memory of this process, distributions of times, the machine."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .core_wait import CoreWait as CoreWait
    from .core_wait import Reading as Reading
    from .core_wait import own_ms as own_ms
    from .energy import EnergyMeter as EnergyMeter
    from .machine import available_bytes as available_bytes
    from .machine import read_clock as read_clock
    from .machine import read_cpu as read_cpu
    from .machine import read_governor as read_governor
    from .machine import read_load as read_load
    from .memory import read_memory as read_memory
    from .times import Times as Times
    from .times import measure_in_turns as measure_in_turns
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".core_wait": ("CoreWait", "Reading", "own_ms"),
            ".energy": ("EnergyMeter",),
            ".machine": (
                "available_bytes",
                "read_clock",
                "read_cpu",
                "read_governor",
                "read_load",
            ),
            ".memory": ("read_memory",),
            ".times": ("Times", "measure_in_turns"),
        },
    )
