"""Fresh bundles against torch: parity, probes that devices check, scores, what phones need."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .device_checks import with_checks as with_checks
    from .evaluation import Measure as Measure
    from .mobile import partitions as partitions
    from .parity import INT8_SHARE as INT8_SHARE
    from .parity import Checker as Checker
    from .parity import check_adapter as check_adapter
    from .parity import check_folded as check_folded
    from .parity import check_slots as check_slots
    from .parity import compare as compare
    from .probe_inputs import completed as completed
    from .probe_inputs import fingerprint as fingerprint
    from .probe_inputs import first_output as first_output
    from .probe_inputs import standard_inputs as standard_inputs
    from .score import scored as scored
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".mobile": ("partitions",),
            ".device_checks": ("with_checks",),
            ".evaluation": ("Measure",),
            ".parity": (
                "Checker",
                "INT8_SHARE",
                "check_adapter",
                "check_folded",
                "check_slots",
                "compare",
            ),
            ".probe_inputs": ("fingerprint", "first_output", "standard_inputs", "completed"),
            ".score": ("scored",),
        },
    )
