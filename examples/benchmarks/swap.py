"""What changing the user costs: swapping an adapter, beside what ONNX Runtime offers.

    python examples/benchmarks/swap.py [--small]

A ViT of Base size (random weights: the time does not depend on them), NOLA k = l = 1000, rank 8,
query and value, int4. `cold` makes the basis, `second` finds its bits and packs them for the swaps
after it, which are `cached`. `lora_adapter` loads the same adapter as ONNX Runtime's own
`LoraAdapter`, a file of dense tensors; `session_again` opens a session with merged weights. All in
one run, one after the other, one thread, in a process that has no torch, as a device; medians with
the 10th and 90th percentile. Ends in one line of JSON. `--small` takes a model of width 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from regrow import Adapter, Bundle, ExportConfig
from regrow_format.methods import get_method
from regrow_runtime import Coefficients
from regrow_toolchain.profiling import read_environment


def make_model(folder: Path, small: bool) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    size: dict[str, Any] = (
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "image_size": 32}
        if small
        else {}
    )
    ViTForImageClassification(ViTConfig(num_labels=10, **size)).save_pretrained(folder)


def make_adapter(backbone: Any, k: int, seed: int) -> Adapter:
    from regrow_toolchain.models import find_targets

    method = get_method("nola")
    targets = find_targets(backbone.model, ["query", "value"])
    config = {"k": k, "l": k, "rank": 8, "c": 1.0, "shared": True}
    draw = np.random.default_rng(seed)
    constants = method.constants(config, targets)
    return Adapter(
        method="nola",
        config=config,
        seed=seed,
        backbone_id=backbone.backbone_id,
        targets=targets,
        coefficients={
            name: Coefficients.store(
                draw.standard_normal(shape).astype(np.float32), constants[name], "int4"
            )
            for name, shape in method.layout(config, targets).items()
        },
        storage="int4",
    )


def times(
    call: Callable[[], object], repeat: int, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Milliseconds of `call`; what happens `before` it is not counted."""
    found = []
    for _ in range(repeat + 2):
        before()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    p10, p50, p90 = np.percentile(found[2:], [10, 50, 90])
    return {"p10": float(p10), "p50": float(p50), "p90": float(p90), "n": repeat}


def make(folder: Path, small: bool) -> None:
    from regrow import convert, export, load_backbone

    make_model(folder / "model", small)
    backbone = load_backbone(folder / "model")
    adapter = make_adapter(backbone, k=64 if small else 1000, seed=7)
    adapter.save(folder / "user.safetensors")
    export(backbone, folder / "bundle", ExportConfig(targets=["query", "value"]))
    export(backbone, folder / "merged", ExportConfig(mode="merged"), adapter=adapter)
    convert(adapter, folder / "bundle", folder / "user.onnx_adapter", to="onnx_adapter")


def measure(folder: Path, small: bool) -> dict[str, Any]:
    import onnxruntime

    bundle = Bundle.open(folder / "bundle", threads=1)
    dense = folder / "user.onnx_adapter"

    def cold() -> None:
        bundle.basis.clear()
        bundle.swap(folder / "user.safetensors")

    def second() -> None:
        bundle.swap(folder / "user.safetensors")

    def resident() -> None:
        bundle.swap(None)
        bundle.swap("user")

    repeat = 5 if small else 15
    found = {
        "cold": times(cold, repeat),
        "second": times(second, repeat, before=cold),
        "cached": times(second, repeat),
        "resident": times(resident, 20 * repeat),
        "lora_adapter": times(lambda: onnxruntime.LoraAdapter().Load(str(dense)), repeat),
        "session_again": times(lambda: Bundle.open(folder / "merged", threads=1), repeat),
    }
    again = found["session_again"]["p50"]
    ratios = {name: again / found[name]["p50"] for name in ("cold", "cached", "resident")}
    return {
        "model": "width 64" if small else "ViT-Base",
        "adapter_bytes": (folder / "user.safetensors").stat().st_size,
        "lora_adapter_bytes": dense.stat().st_size,
        "resident_bytes": bundle.residents["user"],
        "ms": found,
        "times_faster_than_session_again": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.small)))
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.small)
        again = [sys.executable, __file__, "--measure", name, *sys.argv[1:]]
        result = json.loads(subprocess.run(again, stdout=subprocess.PIPE, check=True).stdout)
    for name, spread in result["ms"].items():
        print(f"{name:14} {spread['p50']:9.3f} ms  ({spread['p10']:.3f} to {spread['p90']:.3f})")
    print(json.dumps({**result, "machine": read_environment()}))


if __name__ == "__main__":
    main()
