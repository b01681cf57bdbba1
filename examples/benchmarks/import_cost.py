"""What `import regrow_runtime` costs beside numpy and onnxruntime, which it needs.

    python examples/benchmarks/import_cost.py [--small]

Fresh interpreters in turns, with bytecode as an installed package has it; medians of the wall time
and of the processor's time of the whole process, with the 10th and 90th percentile. Ends in one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from regrow_toolchain.profiling import read_environment

CASES = {
    "numpy and onnxruntime": "import numpy, onnxruntime",
    "regrow_runtime": "import regrow_runtime",
    "regrow_runtime.store": "import regrow_runtime.store",
}


def once(code: str, bytecode: str) -> tuple[float, float]:
    """Wall and processor milliseconds of one fresh interpreter; bytecode is in that folder."""
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPYCACHEPREFIX": bytecode}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    wall = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * wall, 1e3 * (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


def measure(repeat: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as bytecode:
        for number in range(repeat + 1):
            for name, code in CASES.items():
                spent = once(code, bytecode)
                if number:  # the first compiles, and finds nothing in the disk's cache
                    found[name].append(spent)
    base = np.array(found["numpy and onnxruntime"])
    result: dict[str, Any] = {"repeat": repeat}
    for name, spent in found.items():
        p10, p50, p90 = np.percentile(spent, [10, 50, 90], axis=0)
        more = np.median(np.array(spent) - base, axis=0)  # in pairs, so that load cancels
        result[name] = {
            kind: {"p10": p10[i], "p50": p50[i], "p90": p90[i], "more_p50": more[i]}
            for i, kind in enumerate(("wall_ms", "cpu_ms"))
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    result = measure(3 if parser.parse_args().small else 25)
    for name in CASES:
        wall, cpu = result[name]["wall_ms"], result[name]["cpu_ms"]
        print(
            f"{name:22} {wall['p50']:6.1f} ms ({wall['p10']:.1f} to {wall['p90']:.1f}), "
            f"cpu {cpu['p50']:6.1f} ms; over the first {wall['more_p50']:+.1f}, "
            f"cpu {cpu['more_p50']:+.1f}"
        )
    print(json.dumps({**result, "machine": read_environment()}))


if __name__ == "__main__":
    main()
