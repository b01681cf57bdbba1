"""What a bundle has done and holds, for an application to report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from regrow_format.basis import BasisCache
from regrow_format.errors import RegrowError
from regrow_format.manifest import Manifest
from regrow_format.record import Record

from .sessions import VERSION
from .slots import LoadedAdapter

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["History", "SwapStats", "recorded", "report"]


class SwapStats(Record):
    """What a swap cost, in milliseconds and bytes.

    `kind` is "base" (no adapter), "resident" (only a pointer changed), "cached" (expanded with a
    basis that was in RAM, or without one), "cold" (the basis was rebuilt, or a large one was used
    for the second time and made ready for further swaps) or "blend" (made of residents).
    """

    kind: str
    name: str | None
    total_ms: float
    read_ms: float = 0.0
    check_ms: float = 0.0
    expand_ms: float = 0.0
    resident_bytes: int = 0


class History:
    """What a bundle has done so far."""

    def __init__(self) -> None:
        self.swaps: Counter[str] = Counter()
        self.failures, self.last_failure = 0, ""
        self.lock = Lock()


class Observed(Protocol):
    """What a report needs of a bundle."""

    history: History
    manifest: Manifest
    basis: BasisCache

    @property
    def active(self) -> str | None:
        """Name of the active adapter, None for the base."""


P = ParamSpec("P")
B = TypeVar("B", bound=Observed)


def recorded(
    swap: Callable[Concatenate[B, P], SwapStats],
) -> Callable[Concatenate[B, P], SwapStats]:
    """A method that swaps or loads, with its failures counted, and the kinds of its swaps."""

    @wraps(swap)
    def counting(self: B, /, *args: P.args, **named: P.kwargs) -> SwapStats:
        past = self.history
        try:
            cost = swap(self, *args, **named)
        except RegrowError as error:
            with past.lock:
                past.failures, past.last_failure = past.failures + 1, str(error)
            raise
        if swap.__name__ == "swap":
            with past.lock:
                past.swaps[cost.kind] += 1
        return cost

    return counting


def report(
    bundle: Observed,
    residents: Mapping[str, LoadedAdapter],
    session: ort.InferenceSession,
    profile: str,
) -> dict[str, Any]:
    """See `Bundle.health`."""
    now, past = time.time(), bundle.history
    return {
        "active": bundle.active,
        "residents": {
            name: {"bytes": resident.nbytes, "idle_s": max(0.0, now - resident.last_use)}
            for name, resident in residents.items()
        },
        "swaps": dict(past.swaps),
        "failures": past.failures,
        "last_failure": past.last_failure,
        "file_bytes": sum(entry.size for entry in bundle.manifest.files.values()),
        "basis_bytes": bundle.basis.nbytes,
        "onnxruntime": VERSION,
        "profile": profile,
        "threads": session.get_session_options().intra_op_num_threads,
        "providers": session.get_providers(),
    }
