"""Latency, load time, RAM and file size of every export mode, beside the merged model.

    python examples/benchmarks/export_modes.py            # ViT-Base and a Llama form, some minutes
    python examples/benchmarks/export_modes.py --small    # seconds

Two random models: a ViT of 197 tokens, and one token through a Llama form. Each bundle is exported
and each is measured in a process of its own, with one thread, in rounds; a ratio is taken within a
round, and its median and range over the rounds are reported, of time on the clock and of CPU time,
which a busy machine disturbs less. RAM is private memory (RssAnon) after
a run, less what it was before the bundle was opened. The adapter is NOLA's of rank 8 on query and
value, and the same in all modes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regrow_toolchain.profiling import read_environment

BACKBONE = "sha256:" + "00" * 32
# By form: settings of `ExportConfig`. The first is what the others are compared to.
FORMS: dict[str, dict[str, Any]] = {
    "merged": {"mode": "merged"},
    "swappable": {},
    "fixed-rank": {"fixed_rank": 8},
    "weight": {"slots": ("weight",)},
    "seeded": {"mode": "seeded"},
    "seeded constants": {"mode": "seeded", "constants": True},
}
FED = ("swappable", "fixed-rank", "weight")  # forms that are measured with the adapter swapped in


def source(model: str, small: bool) -> Any:
    """A random model, and the names of its targets."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    from regrow_export import ExportSource, find_linears

    torch.manual_seed(0)
    width, layers = (64, 2) if small else (768, 12)
    sizes = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": layers,
        "intermediate_size": 4 * width,
    }  # fmt: skip
    if model == "vit":
        built = ViTForImageClassification(ViTConfig(num_labels=10, **sizes)).eval()
        found = ExportSource(built, "image-classification", BACKBONE, ("classifier",))
        leaves = ("query", "value")
    else:
        config = LlamaConfig(num_key_value_heads=layers, vocab_size=2000, **sizes)
        found = ExportSource(LlamaForCausalLM(config).eval(), "text-generation", BACKBONE)
        leaves = ("q_proj", "v_proj")
    return found, [name for name in find_linears(found.model) if name.endswith(leaves)]


def make_adapter(found: Any, names: list[str], small: bool) -> Any:
    """NOLA's, with random numbers, in int4."""
    from regrow import Adapter
    from regrow_export import slot_targets
    from regrow_format.methods import get_method
    from regrow_runtime import Coefficients

    method, targets, draw = get_method("nola"), slot_targets(found.model, names), 7
    k = 64 if small else 1000
    config = {"k": k, "l": k, "rank": 8, "c": 1.0, "shared": True}
    constants, random = method.constants(config, targets), np.random.default_rng(draw)
    values = {
        name: Coefficients.store(
            random.standard_normal(shape).astype(np.float32), constants[name], "int4"
        )
        for name, shape in method.layout(config, targets).items()
    }
    return Adapter("nola", config, draw, BACKBONE, targets, values, "int4")


def export(folder: Path, model: str, form: str, precision: str, small: bool) -> dict[str, Any]:
    """Export one bundle; its bytes, and what it took."""
    from regrow_export import ExportConfig, ExportRequest, export_bundle

    found, names = source(model, small)
    adapter = make_adapter(found, names, small)
    slotted = "mode" not in FORMS[form]
    config = ExportConfig(precision=precision, targets=names if slotted else (), **FORMS[form])
    request = ExportRequest(config, None if slotted else adapter)
    start, cpu = time.perf_counter(), time.process_time()
    manifest = export_bundle(found, folder, request)
    adapter.save(folder.with_suffix(".safetensors"))
    return {
        "bytes": sum(manifest.files[name].size for name in manifest.files if "backbone" in name),
        "weights": 4 * sum(parameter.numel() for parameter in found.model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_bytes": _memory("VmHWM"),
    }


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def measure(folder: Path, form: str, repeat: int) -> dict[str, float]:
    """Open, swap and run one bundle: ms, and bytes of private memory."""
    from regrow import Bundle

    before, start = _memory("RssAnon"), time.perf_counter()
    bundle = Bundle.open(folder, threads=1)
    load = time.perf_counter() - start
    if form in FED:
        bundle.swap(folder.with_suffix(".safetensors"))
    inputs = {spec.name: _input(spec) for spec in bundle.graph.inputs}
    times = []
    for _ in range(repeat + 3):
        start, cpu = time.perf_counter(), time.process_time()
        bundle.run(inputs)
        times.append([time.perf_counter() - start, time.process_time() - cpu])
    ram = _memory("RssAnon") - before
    run, cpu = 1e3 * np.median(times[3:], axis=0)
    return {"load_ms": 1e3 * load, "run_ms": float(run), "cpu_ms": float(cpu), "ram": ram}


def _input(spec: Any) -> np.ndarray:
    """Of one sample, and of one token."""
    shape = [size if isinstance(size, int) else 1 for size in spec.shape]
    shape = [1, 3, 224, 224] if len(shape) == 4 else shape
    random = np.random.default_rng(0).standard_normal(shape)
    return random.astype(spec.dtype) if spec.dtype == "float32" else np.ones(shape, spec.dtype)


def child(*arguments: object) -> dict[str, Any]:
    """What this script prints with these arguments, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def exported(folder: Path, model: str, form: str, precision: str, small: bool) -> dict[str, Any]:
    """As `export`; small models in this process, since importing takes longer than they do."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if small:
        return export(folder, model, form, precision, small)
    return child("--export", folder, model, form, precision)


def spread(values: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [float(f(values)) for f in (np.median, np.min, np.max)]


def compare(
    room: Path, model: str, small: bool, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every form of one model: medians and ranges of ratios to the merged one, and of RAM."""
    made = {}
    for form in FORMS:
        made[form] = exported(room / model / form, model, form, "fp32", small)
        say(f"{model}, {form}: exported in {made[form]['cpu_seconds']} s of CPU time")
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    repeat = 5 if small else 15 if model == "vit" else 100
    for _ in range(rounds):
        for form in FORMS:
            runs[form].append(child("--measure", room / model / form, form, repeat))
    found = {}
    for form, own in runs.items():
        pairs = list(zip(own, runs["merged"], strict=True))
        found[form] = {
            "ratio": spread([one["run_ms"] / merged["run_ms"] for one, merged in pairs]),
            "cpu_ratio": spread([one["cpu_ms"] / merged["cpu_ms"] for one, merged in pairs]),
            "run_ms": spread([one["run_ms"] for one in own]),
            "load_ms": spread([one["load_ms"] for one in own]),
            "ram_mb": spread([one["ram"] / 2**20 for one in own]),
            "export": made[form],
        }
        say(_line(model, form, found[form]))
    return found


def _line(model: str, form: str, row: dict[str, Any]) -> str:
    low, high = row["ratio"][1:]
    return (
        f"{model:6} {form:17} ratio {row['ratio'][0]:6.3f} ({low:.3f} to {high:.3f}), of CPU time "
        f"{row['cpu_ratio'][0]:6.3f}  {row['run_ms'][0]:8.2f} ms  load {row['load_ms'][0]:6.0f} ms"
        f"  RAM {row['ram_mb'][0]:6.1f} MB  file {row['export']['bytes'] / 2**20:6.1f} MB"
    )


def sizes(
    room: Path, small: bool, precisions: list[str], say: Callable[[str], None]
) -> dict[str, dict[str, int]]:
    """Bytes of graph and weights of the ViT, by form and precision below fp32."""
    found: dict[str, dict[str, int]] = {}
    for precision in precisions:
        for form in FORMS:
            if form != "weight":  # weight slots are float32
                made = exported(room / precision / form, "vit", form, precision, small)
                found.setdefault(precision, {})[form] = made["bytes"]
                say(f"{precision} {form:17} {made['bytes'] / 2**20:6.1f} MB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small models, seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["vit", "llama"])
    parser.add_argument("--precisions", nargs="*", default=["fp16", "int8", "int4"])
    parser.add_argument("--export", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.export:
        folder, *what = given.export
        print(json.dumps(export(Path(folder), *what, given.small)))
        return
    if given.measure:
        folder, form, repeat = given.measure
        print(json.dumps(measure(Path(folder), form, int(repeat))))
        return
    rounds, precisions = (2, ["int8"]) if given.small else (given.rounds, given.precisions)
    say = partial(print, flush=True)
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        found: dict[str, Any] = {
            model: compare(room, model, given.small, rounds, say) for model in given.models
        }
        found["bytes"] = sizes(room, given.small, precisions, say)
    print(json.dumps({**found, "machine": read_environment()}))


if __name__ == "__main__":
    main()
