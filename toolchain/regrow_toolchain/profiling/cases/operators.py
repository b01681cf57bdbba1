"""Where a run's time goes: ONNX Runtime's own profile, grouped by module path and by operator."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from regrow_runtime import Bundle
from regrow_runtime.sessions import session_options

from ..worker import Reporter
from .common import Case, feeds_of, timed

__all__ = ["group", "module_of", "run"]

_WARM, _RUNS = 3, 20


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """`modules` and `types`: microseconds a run; `arena`: what ONNX Runtime's allocator tells."""
    scratch = Path(case["room"])
    times = _runs(case, report, scratch / "ort")
    (path,) = scratch.glob("ort*.json")
    events = json.loads(path.read_text(encoding="utf-8"))
    return group(events, _WARM + _RUNS, warm=_WARM) | {"run_ms": sorted(times)[len(times) // 2]}


def _runs(case: Case, report: Reporter, prefix: Path) -> list[float]:
    """Times of the runs; the profile is whole when the session is gone, so when this returns."""
    options = session_options(case["profile"], case["threads"])
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    report.stage = "open"
    bundle = Bundle.open(case["bundle"], profile=case["profile"], session_options=options)
    feeds = feeds_of(case, bundle.manifest)
    if case["adapters"]:
        bundle.swap(case["adapters"][0][1])
    report.stage = "runs"
    return [timed(lambda: bundle.run(feeds)) for _ in range(_WARM + _RUNS)][_WARM:]


def group(events: Iterable[Mapping[str, Any]], runs: int, *, warm: int = 0) -> dict[str, Any]:
    """Sum up the medians of a profile's kernels over all of its `runs` but the first `warm`.

    Returns:
        Per run: `modules` and `types` as [name, microseconds, kernels], longest first;
        `kernels_us`, their sum; `arena`: bytes by name, the most of any kernel, where told.
    """
    kernels = [e for e in events if e.get("cat") == "Node" and _is_kernel(e)]
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in kernels:
        times[event["name"], event["args"]["op_name"]].append(event["dur"])
    left = max(1, runs - warm)
    modules: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    types: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (name, kind), all_times in times.items():
        each = len(all_times) / runs  # nodes of one name are more than one kernel
        for sums, key in ((modules, module_of(name, kind)), (types, kind)):
            sums[key][0] += median(all_times[round(warm * each) :]) * each
            sums[key][1] += each
    return {
        "runs": left,
        "modules": _ordered(modules),
        "types": _ordered(types),
        "kernels_us": sum(us for us, _ in types.values()),
        "arena": _arena(kernels),
    }


def _is_kernel(event: Mapping[str, Any]) -> bool:
    name, args = event.get("name", ""), event.get("args", {})
    return name.endswith("_kernel_time") and "op_name" in args and "dur" in event


def _ordered(sums: Mapping[str, list[float]]) -> list[list[Any]]:
    rows = [[name, us, round(kernels)] for name, (us, kernels) in sums.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def module_of(name: str, kind: str) -> str:
    """The module that a kernel belongs to, from its node's name; layers by number are one.

    "/vit/encoder/layer.3/output/dense/base/up/MatMul_kernel_time" is of
    "vit.encoder.layer.*.output.dense". Kernels into which ONNX Runtime fused several nodes have
    lost their names; they go by their operator.
    """
    parts = name.removesuffix("_kernel_time").strip("/").split("/")
    if len(parts) == 1:
        return f"(fused {kind})"
    path = ".".join(parts[:-1])
    path = re.sub(r"\.(base|down|up|MatMulScaleFusion)(?=\.|$)", "", f".{path}").lstrip(".")
    path = re.sub(r"\.(MatMul|Mul|Div|Add|Softmax|Where)(_\d+)?(?=\.|$)", "", path)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) or f"(fused {kind})"


def _arena(kernels: Iterable[Mapping[str, Any]]) -> dict[str, int] | None:
    """The most that the arena held, and that was in use, as kernels report it (1.2x and later)."""
    names = {"held": "mem_arena_held", "in_use_peak": "mem_in_use_peak"}
    found: dict[str, int] = {}
    for event in kernels:
        for key, name in names.items():
            text = str(event["args"].get(name, ""))
            if text.isdigit():
                found[key] = max(found.get(key, 0), int(text))
    return found or None
