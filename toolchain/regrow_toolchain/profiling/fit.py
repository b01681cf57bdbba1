"""Does it fit? The bundle under a limit of memory, and the stage that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_format.errors import RegrowError

from ..pages.words import GAP, size
from .limits import memory_limit
from .processes import Outcome, run_case

__all__ = ["measure_fit"]

_SECONDS = 300.0
_PLATFORM = ("interpreter", "numpy", "onnxruntime", "regrow")


def measure_fit(case: Mapping[str, Any], limit: int, free: Sequence[str]) -> dict[str, Any]:
    """Run the stages under `limit` bytes.

    Args:
        free: names of the stages that are reached without a limit, in their order.

    Returns:
        `fits`: True, False, or None if it could not be tried; `stage` that failed; `answer` in one
        line; `kind` of limit; the stages that were reached.
    """
    try:
        with memory_limit(limit) as held:
            outcome = run_case(case, before_exec=held.enter, timeout=_SECONDS)
            kind = held.kind
    except RegrowError as error:
        return {"limit": limit, "fits": None, "stage": None, "kind": None, "answer": str(error)}
    failed = None if outcome.result is not None else _failed(outcome, free)
    return {
        "limit": limit,
        "fits": failed is None,
        "stage": failed,
        "kind": kind,
        "answer": _answer(outcome, limit, failed, kind).replace(GAP, " "),
        "reason": outcome.failed and outcome.failed["message"],
        "stages": outcome.stages,
    }


def _failed(outcome: Outcome, free: Sequence[str]) -> str:
    """The stage that was being worked at."""
    reached = [stage["name"] for stage in outcome.stages]
    following = [name for name in free if name not in reached]
    return following[0] if following else "end"


def _answer(outcome: Outcome, limit: int, failed: str | None, kind: str) -> str:
    told = size(limit)
    if failed is None:
        most = max((_used(stage, kind) for stage in outcome.stages), default=0)
        return f"Fits in {told}: yes. It took {size(most)} ({kind})."
    if failed == "interpreter":
        why = "That is too little for Python itself, which did not start"
        return f"Fits in {told}: no. {why} ({kind})."
    if failed in _PLATFORM:
        return (
            f"Fits in {told}: no. Importing {failed} fails, before any bundle is opened ({kind})."
        )
    return f"Fits in {told}: no. The stage that fails: {failed} ({kind})."


def _used(stage: Mapping[str, Any], kind: str) -> int:
    """What the limit counts, after a stage."""
    memory = stage["memory"]
    name = "data" if kind == "RLIMIT_DATA" else "peak"
    return int(memory.get(name) or 0)
