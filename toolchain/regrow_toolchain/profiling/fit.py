"""Does it fit? The bundle under a limit of memory, and the stage that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_format.errors import RegrowError
from regrow_toolchain.pages import GAP, size

from .limits import memory_limit
from .processes import Outcome, run_case

__all__ = ["measure_fit", "try_limit"]

_SECONDS = 300.0
_MB = 10**6
_MORE = (1.0, 1.05, 1.15, 1.3, 1.6, 2.0)  # of what the stages take without a limit
_PLATFORM = ("interpreter", "numpy", "onnxruntime", "regrow")


Stages = Sequence[Mapping[str, Any]]


def measure_fit(case: Mapping[str, Any], limit: int, free: Stages) -> dict[str, Any]:
    """Run the stages under `limit` bytes; where they fail, under more, until they do not.

    Args:
        free: the stages as they are reached without a limit, in their order.

    Returns:
        `fits`: True, False, or None if it could not be tried; `stage` that failed; `answer` in one
        line; `kind` of limit; `enough`: a limit that was tried and would do, in bytes, or None;
        the stages that were reached.
    """
    try:
        outcome, kind, peak = try_limit(case, limit)
    except RegrowError as error:
        return {"limit": limit, "fits": None, "stage": None, "kind": None, "answer": str(error)}
    failed = None if outcome.result is not None else _failed(outcome, free)
    enough = _enough(case, limit, _most(free, kind)) if failed else None
    why = _why(failed) if failed else _took(peak or _most(outcome.stages, kind))
    more = f" {enough // _MB} MB would do." if enough else ""
    return {
        "limit": limit,
        "fits": failed is None,
        "stage": failed,
        "kind": kind,
        "enough": enough,
        "answer": f"Fits in {size(limit)}: {'no' if failed else 'yes'}. {why} ({kind}).{more}"
        .replace(GAP, " "),
        "reason": outcome.failed and outcome.failed["message"],
        "stages": outcome.stages,
    }  # fmt: skip


def try_limit(case: Mapping[str, Any], limit: int) -> tuple[Outcome, str, int | None]:
    """What became of it, the kind of limit, and the most that it counted, if it tells."""
    with memory_limit(limit) as held:
        outcome = run_case(case, before_exec=held.enter, timeout=_SECONDS)
        return outcome, held.kind, held.peak()


def _enough(case: Mapping[str, Any], limit: int, free: int) -> int | None:
    """Whole megabytes above `limit` under which the stages run; `free` is what they take freely,
    0 if that is not told.
    """
    tries = (-(-int(share * (free or limit)) // _MB) * _MB for share in _MORE)
    for count in dict.fromkeys(count for count in tries if count > limit):
        if try_limit(case, count)[0].result is not None:
            return count
    return None


def _failed(outcome: Outcome, free: Stages) -> str:
    """The stage that was being worked at."""
    reached = [stage["name"] for stage in outcome.stages]
    following = [stage["name"] for stage in free if stage["name"] not in reached]
    return following[0] if following else "end"


def _why(failed: str) -> str:
    if failed == "interpreter":
        return "That is too little for Python itself, which did not start"
    if failed in _PLATFORM:
        return f"Importing {failed} fails, before any bundle is opened"
    return f"The stage that fails: {failed}"


def _took(count: int) -> str:
    return f"It took {size(count)}" if count else "The system does not tell what it took"


def _most(stages: Stages, kind: str) -> int:
    """The most that a limit of this kind counts, after any of the stages."""
    name = "data" if kind == "RLIMIT_DATA" else "rss_anon"
    return max((int(stage["memory"].get(name) or 0) for stage in stages), default=0)
