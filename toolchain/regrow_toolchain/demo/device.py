"""The demo's device: a fresh process in which torch cannot be imported.

Started as `python -m regrow_toolchain.demo.device FOLDER USER...`. Opens the bundle in FOLDER,
swaps through the users, and prints what it measured as one line of JSON. Nothing but Python's own
modules is imported above, so that the memory of each stage can be told apart.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow_toolchain.measurement import Times, measure_in_turns, read_memory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from regrow_runtime import Bundle

BLOCKED = ("torch", "onnx", "transformers")

_THREADS = 1  # the model is tiny: a second thread would only wait
_SWAPS = 25
_RESIDENT_SWAPS = 100
_RUNS = 300


class _Blocker(MetaPathFinder):
    """Refuses the packages that a device does not have, installed or not."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not to be had on the device")


def main(folder: Path, users: Sequence[str]) -> None:
    """Measure, and print one JSON document."""
    stages = [_stage("Python")]
    sys.meta_path.insert(0, _Blocker())
    importlib.import_module("numpy")
    importlib.import_module("onnxruntime")
    stages.append(_stage("numpy + onnxruntime"))
    print(json.dumps(_measure(folder, users, stages), allow_nan=False))  # noqa: T201


def _stage(name: str) -> dict[str, Any]:
    return {"stage": name, "rss_anon": read_memory().rss_anon}


def _torch_is_blocked() -> bool:
    try:
        importlib.import_module("torch")
    except ImportError:
        return not any(name in sys.modules for name in BLOCKED)
    return False


def _measure(folder: Path, users: Sequence[str], stages: list[dict[str, Any]]) -> dict[str, Any]:
    from regrow_runtime import Bundle

    bundle = Bundle.open(folder / "bundle", threads=_THREADS)
    stages.append(_stage("bundle open"))
    samples = {user: _samples(folder, user) for user in users}
    single = {name: array[:1] for name, array in samples[users[0]]["inputs"].items()}
    bundle.run(single)
    stages.append(_stage("first run"))
    found = {user: _user(bundle, folder, user, samples[user]) for user in users}
    stages.append(_stage(f"{len(users)} adapters resident"))
    peak = read_memory().peak
    swaps = {user: _swaps(bundle, folder, user) for user in users}
    latency = _latencies(bundle, folder, users[0], single)
    return {
        "users": {user: {**found[user], "swap_ms": _p50(swaps[user])} for user in users},
        "torch_blocked": _torch_is_blocked(),
        "blocked": list(BLOCKED),
        "threads": _THREADS,
        "swap_ms": {kind: _joined(swaps, kind) for kind in ("cold", "cached", "resident")},
        "latency_ms": latency,
        "memory": stages,
        "peak_bytes": peak,
    }


def _samples(folder: Path, user: str) -> dict[str, Any]:
    from regrow_runtime.arrays import read_arrays

    arrays = read_arrays(folder / f"{user}.reference.npz")
    return {
        "inputs": {"pixel_values": arrays["pixel_values"]},
        "labels": arrays["labels"],
        "torch": arrays["torch_logits"],
    }


def _adapter(folder: Path, user: str) -> Path:
    return folder / "adapters" / f"{user}.safetensors"


def _user(bundle: Bundle, folder: Path, user: str, samples: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy and parity of one user's adapter, and of the base on the same samples."""
    import numpy as np

    bundle.swap(None)
    base = bundle.run_all(samples["inputs"])["logits"]
    bundle.swap(_adapter(folder, user))
    own = bundle.run_all(samples["inputs"])["logits"]
    right_before = _right(base, bundle.manifest.labels, samples["labels"])
    right_after = _right(own, bundle.labels(), samples["labels"])
    gain = right_after.astype(np.float64) - right_before
    count = len(gain)
    return {
        "before": float(right_before.mean()),
        "before_se": _standard_error(right_before),
        "after": float(right_after.mean()),
        "after_se": _standard_error(right_after),
        "gain": float(gain.mean()),
        "gain_se": float(gain.std(ddof=1) / count**0.5),
        "parity_max_abs": float(np.abs(own - samples["torch"]).max()),
        "agree": float((own.argmax(axis=1) == samples["torch"].argmax(axis=1)).mean()),
    }


def _right(
    logits: NDArray[np.float32], names: Sequence[str], labels: NDArray[np.str_]
) -> NDArray[np.bool_]:
    """By name, so that a model which does not know a user's labels is never right by accident."""
    import numpy as np

    right: NDArray[np.bool_] = np.array(names)[logits.argmax(axis=1)] == labels
    return right


def _standard_error(right: NDArray[np.bool_]) -> float:
    return float(right.std(ddof=1) / len(right) ** 0.5)


def _swaps(bundle: Bundle, folder: Path, user: str) -> dict[str, list[float]]:
    """Milliseconds of single swaps, from the file (cold and cached) and to a resident adapter."""
    path = _adapter(folder, user)
    cold, cached, resident = [], [], []
    for _ in range(_SWAPS):
        bundle.basis.clear()
        cold.append(bundle.swap(path).total_ms)
    bundle.swap(path)  # the second use of a large basis makes it ready for all further ones
    for _ in range(_SWAPS):
        cached.append(bundle.swap(path).total_ms)
    for _ in range(_RESIDENT_SWAPS):
        bundle.swap(None)
        resident.append(bundle.swap(user).total_ms)
    return {"cold": cold, "cached": cached, "resident": resident}


def _p50(swaps: Mapping[str, list[float]]) -> dict[str, float]:
    return {kind: Times.of(values).p50 for kind, values in swaps.items()}


def _joined(swaps: Mapping[str, Mapping[str, list[float]]], kind: str) -> dict[str, Any]:
    return asdict(Times.of([value for user in swaps.values() for value in user[kind]]))


def _latencies(
    bundle: Bundle, folder: Path, user: str, single: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """One sample at a time; the four take turns, so that noise meets all of them alike."""
    from regrow_runtime import Bundle

    bundle.swap(user)
    base, merged, seeded = (
        Bundle.open(folder / name, threads=_THREADS) for name in ("bundle", "merged", "seeded")
    )
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: base.run(single),
        "adapter": lambda: bundle.run(single),
        "merged": lambda: merged.run(single),
        "seeded": lambda: seeded.run(single),
    }
    return {name: asdict(times) for name, times in measure_in_turns(calls, repeat=_RUNS).items()}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
