"""What a thousand adapters in a store cost beside ten: look-up, activation, swapping, the disk.

    python examples/benchmarks/store.py [--small]

Adapters as a ViT of Base size has them: NOLA k = l = 1000, rank 8, query and value, int4. Both
stores are asked in turns, in one process; medians with the 10th and 90th percentile, and ratios.
Bytes on the disk are counted in blocks, as `du` does, while the store is open. Ends in one line of
JSON. `--small` takes 50 adapters of k = l = 64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from regrow import Adapter, Store
from regrow_format.methods import get_method
from regrow_runtime import Coefficients, Target
from regrow_toolchain.profiling import read_environment

FEW = 10


def make_adapter(k: int) -> Adapter:
    method, draw = get_method("nola"), np.random.default_rng(0)
    names = [
        f"vit.encoder.layer.{layer}.attention.attention.{part}"
        for layer in range(12)
        for part in ("query", "value")
    ]
    targets = tuple(Target(name, 768, 768) for name in sorted(names, key=str.encode))
    config = {"k": k, "l": k, "rank": 8, "c": 1.0, "shared": True}
    constants = method.constants(config, targets)
    coefficients = {
        name: Coefficients.store(
            draw.standard_normal(shape).astype(np.float32), constants[name], "int4"
        )
        for name, shape in method.layout(config, targets).items()
    }
    return Adapter("nola", config, 1, "sha256:" + "ab" * 32, targets, coefficients, "int4")


def fill(store: Store, data: bytes, count: int) -> float:
    """Install `count` adapters of different content; milliseconds for one."""
    start = time.perf_counter()
    for number in range(count):
        own = data[:-4] + number.to_bytes(4, "little")
        store.add(f"user-{number}", own, activate=True)
    return 1e3 * (time.perf_counter() - start) / count


def disk(folder: Path) -> dict[str, int]:
    stats = [path.lstat() for path in (folder, *folder.rglob("*"))]
    return {
        "bytes": sum(stat.st_size for stat in stats),
        "bytes_in_blocks": sum(512 * getattr(stat, "st_blocks", 0) for stat in stats),
    }


def work(store: Store, user: str) -> dict[str, float]:
    """Microseconds of each thing that a device does for a user."""
    found = {}
    for name, call in {
        "look up": lambda: store.path(user),
        "look up and read": lambda: Adapter.load(store.path(user)),
        "activate": lambda: store.activate(user),
        "open": lambda: Store(store.folder).close(),
    }.items():
        start = time.perf_counter()
        call()
        found[name] = 1e6 * (time.perf_counter() - start)
    return found


def compare(few: Store, many: Store, count: int, repeat: int) -> dict[str, Any]:
    draw = np.random.default_rng(1)
    spent: dict[str, tuple[list[float], list[float]]] = {}
    for number in range(repeat + 3):
        for index, (store, users) in enumerate(((few, FEW), (many, count))):
            for name, micros in work(store, f"user-{draw.integers(users)}").items():
                if number >= 3:
                    spent.setdefault(name, ([], []))[index].append(micros)
    result: dict[str, Any] = {}
    for name, pair in spent.items():
        spreads = [dict(zip(("p10", "p50", "p90"), np.percentile(s, [10, 50, 90]), strict=True))
                   for s in pair]  # fmt: skip
        result[name] = {
            "few_us": spreads[0],
            "many_us": spreads[1],
            "ratio": spreads[1]["p50"] / spreads[0]["p50"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    count = 50 if small else 1000
    data = make_adapter(64 if small else 1000).to_bytes()
    with (
        tempfile.TemporaryDirectory() as name,
        Store(Path(name) / "few") as few,
        Store(Path(name) / "many") as many,
    ):
        fill(few, data, FEW)
        add_ms = fill(many, data, count)
        result = {
            "adapters": count,
            "adapter_bytes": len(data),
            "add_ms": add_ms,
            "disk": disk(many.folder),
            "work": compare(few, many, count, 20 if small else 200),
            "findings": len(many.verify()),
        }
    blocks = result["disk"]["bytes_in_blocks"]
    print(f"{count} adapters of {len(data)} bytes: {blocks / 1e6:.2f} MB on the disk, "
          f"{add_ms:.1f} ms to add one")  # fmt: skip
    for what, spread in result["work"].items():
        print(
            f"{what:17} {spread['few_us']['p50']:8.0f} µs of {FEW}, "
            f"{spread['many_us']['p50']:8.0f} µs of {count}: ratio {spread['ratio']:.2f}"
        )
    print(json.dumps({**result, "machine": read_environment()}))


if __name__ == "__main__":
    main()
