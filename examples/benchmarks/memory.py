"""What a bundle takes in RAM, by precision and profile: after opening, and after runs.

    python examples/benchmarks/memory.py [--small]

A ViT of Base size (random weights), slots in query and value, a NOLA adapter k = l = 1000. Every
case in a fresh process without torch; MiB over the same process with NumPy and ONNX Runtime
imported. `private` (RssAnon) is what no other process can use. `mapped` (RssFile) are pages of the
weights' file and of ONNX Runtime's code, which the system drops when it needs room. `pss` shares
pages among the processes that map them. Peaks (VmHWM) count both. Ends in one line of JSON; Linux
only. `--small` takes a model of width 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from swap import make_adapter, make_model

from regrow_toolchain.profiling import read_environment

PRECISIONS = ("fp32", "fp16", "int8", "int4")
PROFILES = ("speed", "memory")
_FIELDS = {"RssAnon": "private", "RssFile": "mapped", "VmRSS": "resident", "VmHWM": "peak"}


def make(folder: Path, small: bool) -> None:
    from regrow import ExportConfig, export, load_backbone

    make_model(folder / "model", small)
    backbone = load_backbone(folder / "model")
    make_adapter(backbone, k=64 if small else 1000, seed=7).save(folder / "user.safetensors")
    for precision in PRECISIONS:
        export(
            backbone,
            folder / precision,
            ExportConfig(targets=["query", "value"], precision=precision),
        )


def state() -> dict[str, float]:
    """MiB of this process; the peak is counted anew from here on."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    split = [line.split() for line in lines]
    found = {_FIELDS[w[0][:-1]]: int(w[1]) / 1024 for w in split if w[0][:-1] in _FIELDS}
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    found["pss"] = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1024
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return found


def measure(folder: Path, profile: str) -> dict[str, dict[str, float]]:
    """In this process: opened, then an adapter swapped in and three runs of one image."""
    import regrow_runtime

    before = state()
    bundle = regrow_runtime.Bundle.open(folder, profile=profile, threads=1)
    opened = state()
    bundle.swap(folder.parent / "user.safetensors")
    spec = bundle.graph.inputs[0]
    image = np.zeros([1 if isinstance(d, str) else d for d in spec.shape], dtype=np.float32)
    for _ in range(3):
        bundle.run({spec.name: image})
    found = {"opened": opened, "run": state()}
    for part in found.values():
        part["peak"] -= before["resident"]
        for name in ("private", "mapped", "pss"):
            part[name] -= before[name]
        del part["resident"]
    return {"interpreter": before, **found}


def cases(folder: Path) -> list[dict[str, Any]]:
    found = []
    for precision in PRECISIONS:
        files = (folder / precision).glob("backbone.onnx*")
        weights = sum(file.stat().st_size for file in files) / 2**20
        for profile in PROFILES:
            path = str(folder / precision)
            call = [sys.executable, __file__, "--measure", path, "--as", profile]
            done = subprocess.run(call, stdout=subprocess.PIPE, check=True)
            case = {"precision": precision, "profile": profile, "weights": weights}
            found.append({**case, **json.loads(done.stdout)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--as", dest="profile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.profile)))
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.small)
        found = cases(Path(name))
    print("MiB                      opened: peak private mapped | run: peak private mapped")
    for case in found:
        parts = [[case[at][n] for n in ("peak", "private", "mapped")] for at in ("opened", "run")]
        numbers = " | ".join("".join(f"{n:8.0f}" for n in part) for part in parts)
        print(f"{case['precision']} {case['profile']:7} {case['weights']:5.0f} {numbers}")
    model = "width 64" if options.small else "ViT-Base"
    print(
        json.dumps({"model": model, "unit": "MiB", "cases": found, "machine": read_environment()})
    )


if __name__ == "__main__":
    main()
