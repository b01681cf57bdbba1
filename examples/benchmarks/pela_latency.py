"""How much faster a factored ViT-Base is in ONNX Runtime, in fp32 and in int8.

    python examples/benchmarks/pela_latency.py [--threads 2] [--turns 30] [--keep FOLDER] [--small]
        [--only PATTERN ...]

ViT-Base's sizes with random weights, 197 tokens, batch 1. Variants: dense; factored at ratio 2 and
3 with the paper's ranks and with ranks that suit kernels; dense and ratio 2 in int8, there also
with attention dense and the MLP's ranks lower, as many parameters together; and some with a slot at
every layer, to which nothing is fed. Beside the dense models that regrow exports stands what
torch.onnx writes of the same model, and that in int8 by `quantize_dynamic`: what one would have
without regrow.

Every model is exported once and timed in a process of its own, in turns (`timing.py`, which says
what `--without-amx` does): `latency` is the median over turns of the ratio, with the 10th and 90th
percentile, and `least` the ratio of the two least medians of a turn. `--only` takes patterns of
rows' names. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish
from timing import Timed, save_feeds, time_in_turns
from transformers import ViTConfig, ViTForImageClassification

from regrow import Backbone, CompressConfig, ExportConfig, compress, load_backbone, save_backbone
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.measurement import read_cpu
from regrow_toolchain.models import quiet_transformers

SMALL = {"image_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128}  # fmt: skip
# Name, ratio, ranks, precision, and whether every layer has a slot.
VARIANTS = (
    ("dense", 1.0, "", "fp32", False),
    ("dense, torch.onnx", 1.0, "", "torch", False),
    ("2, paper's ranks", 2.0, "paper", "fp32", False),
    ("2, kernels", 2.0, "kernels", "fp32", False),
    ("3, paper's ranks", 3.0, "paper", "fp32", False),
    ("3, kernels", 3.0, "kernels", "fp32", False),
    ("dense, int8", 1.0, "", "int8", False),
    ("2, kernels, int8", 2.0, "kernels", "int8", False),
    ("2, attention dense, int8", 3.84, "mlp", "int8", False),
    ("dense, quantize_dynamic", 1.0, "", "stock", False),
    ("2, kernels, quantize_dynamic", 2.0, "kernels", "stock", False),
    ("dense, slots", 1.0, "", "fp32", True),
    ("2, paper's ranks, slots", 2.0, "paper", "fp32", True),
    ("dense, int8, slots", 1.0, "", "int8", True),
    ("2, kernels, int8, slots", 2.0, "kernels", "int8", True),
)

KINDS = ("torch.onnx", "int8", "quantize_dynamic", "slots")
OTHERS = {
    "dense": "dense, torch.onnx",
    "2, paper's ranks": "dense, torch.onnx",
    "2, kernels": "dense, torch.onnx",
    "3, paper's ranks": "dense, torch.onnx",
    "3, kernels": "dense, torch.onnx",
    "dense, int8": "dense, quantize_dynamic",
    "2, kernels, int8": "dense, quantize_dynamic",
    "2, attention dense, int8": "dense, quantize_dynamic",
}


def write_dense(folder: Path, small: bool) -> Path:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000, **(SMALL if small else {})))
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def export(backbone: Backbone, out: Path, precision: str, side: int, slots: bool) -> Path:
    """The graph, made once; `quantize_dynamic` fails on empty slots, and its graph has none."""
    if precision not in ("stock", "torch"):
        if not out.exists():
            mode = "swappable" if slots else "merged"
            export_backbone(backbone, out, ExportConfig(precision=precision, mode=mode))
        return out / "backbone.onnx"
    plain, graph = out / "plain.onnx", out / "stock.onnx"
    wanted = graph if precision == "stock" else plain
    if wanted.is_file():
        return wanted
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(backbone.model).eval(), (torch.zeros(1, 3, side, side),), plain,
            opset_version=18,
            input_names=["pixel_values"], output_names=["logits"], dynamo=False,
        )  # fmt: skip
    if precision == "stock":
        kinds = ["MatMul", "Gemm"]
        quantize_dynamic(
            plain, graph, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=kinds
        )
    return wanted


class Logits(torch.nn.Module):
    """A model of transformers that gives a tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--small", action="store_true", help="a tiny model, seconds")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeat", type=int, default=4, help="runs of a turn")
    options.add_argument("--turns", type=int, default=30)
    options.add_argument("--without-amx", action="store_true", help="products of smaller machines")
    options.add_argument("--keep", type=Path, help="where exported models are, or will be")
    options.add_argument("--only", nargs="+", default=["*"], help="patterns of rows' names")
    options.add_argument("--side", type=int, default=224, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.small:
        args.repeat, args.turns, args.side = 3, 2, 32
    with tempfile.TemporaryDirectory() as room:
        timed = compare(args, args.keep or Path(room))
    rows = []
    for row, model in timed:
        rows.append(row | model.ms() | model.memory)
        print(rows[-1])
    found = ratios({row["row"]: (row, model) for row, model in timed})
    for ratio in found:
        print(ratio)
    amx = "amx_int8" in read_cpu().flags and not args.without_amx
    finish(task="latency", threads=args.threads, amx=amx, rows=rows, ratios=found)


def compare(args: argparse.Namespace, room: Path) -> list[tuple[dict[str, Any], Timed]]:
    dense = load_backbone(write_dense(room / "dense", args.small))
    made: dict[tuple[float, str], Backbone] = {(1.0, ""): dense}
    rows, graphs = [], []
    for number, (name, ratio, ranks, precision, slots) in enumerate(VARIANTS):
        if not any(fnmatchcase(name, pattern) for pattern in args.only):
            continue
        if (ratio, ranks) not in made:
            made[ratio, ranks] = factored(dense, room / f"{ratio:g}-{ranks}", ratio, ranks)
        backbone = made[ratio, ranks]
        graph = export(backbone, room / str(number), precision, args.side, slots)
        files = [graph, graph.with_name(f"{graph.name}.data")]
        size = sum(f.stat().st_size for f in files if f.is_file())
        graphs.append(graph)
        found = sorted({plan.rank for plan in backbone.layers})
        rows.append({"row": name, "parameters": backbone.parameters, "ranks": found, "bytes": size})
    pixels = np.zeros((1, 3, args.side, args.side), np.float32)
    feeds = save_feeds(room / "feeds.npz", {"pixel_values": pixels})
    models = [Timed(graph, feeds, args.threads, args.without_amx) for graph in graphs]
    time_in_turns(models, args.turns, args.repeat)
    return list(zip(rows, models, strict=True))


def factored(dense: Backbone, folder: Path, ratio: float, ranks: str) -> Backbone:
    if not folder.exists():
        mlp = {"keep_dense": ("@attention",)}
        config = CompressConfig(ratio=ratio, **(mlp if ranks == "mlp" else {"ranks": ranks}))
        save_backbone(compress(dense, config=config).backbone, folder)
    return load_backbone(folder)


def ratios(timed: dict[str, tuple[dict[str, Any], Timed]]) -> list[dict[str, Any]]:
    """Each against the dense model of its kind, and against what one would have without regrow."""
    found = []
    for name, (row, model) in timed.items():
        endings = [part for part in KINDS if part in name]
        for against in (", ".join(["dense", *endings]), OTHERS.get(name, name)):
            if against != name and against in timed:
                base, other = timed[against]
                found.append({
                    "row": name, "against": against, **model.against(other),
                    **{part: round(row[part] / base[part], 3) for part in ("bytes", "parameters")},
                })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
