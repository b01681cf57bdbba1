"""int8 by the range of its weights: accuracy, and time beside stock `quantize_dynamic`.

    python examples/benchmarks/int8_weights.py DATA MODELS [--turns 30] [--threads 1] [--small]
        [--only fashion-vit|kwt1]

DATA has `fashion-mnist/train.npz`, whose last 5,000 images measure, and `fsdd/recordings.zip`;
MODELS has `fashion-vit/` and `kwt1/`, which gets a head for digits (`keyword_speakers.py`) from 400
recordings and is measured on the others. One sample a run, as on a device. Rows, of the same linear
layers:

- `fp32`, and `regrow`: int8 as it is exported, codes -64 to 64
- `-127 to 127`: the same graph by `quantize_dynamic(per_channel=True)`, which is wrong on
  processors without VNNI; `unsigned`: by `weight_type=QUInt8`, which is exact everywhere
- `stock`, `stock, reduced`: what torch.onnx writes of the model, by `quantize_dynamic` without and
  with `reduce_range`: what one would have without regrow

Latencies in turns (`timing.py`): the ratio to `stock` and to `fp32`, with the 10th and 90th
percentile. `saturates` in the line of JSON says which kernels ran: without VNNI it is true.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import keyword_speakers
import numpy as np
import onnx
import onnxruntime as ort
import pela_fashion
import torch
from common import finish, parser
from kwt1 import Kwt, Mfcc, kwt1
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from timing import Timed, save_feeds, time_in_turns

from regrow import Backbone, Dataset, ExportConfig, export
from regrow_format.integers import saturates

STOCK: Mapping[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"]}
# By row: whether regrow's own graph is rounded, and how.
ROUNDED: Mapping[str, tuple[bool, Mapping[str, Any]]] = {
    "-127 to 127": (True, {}),
    "unsigned": (
        True, {"weight_type": QuantType.QUInt8, "extra_options": {"WeightSymmetric": True}},
    ),
    "stock": (False, STOCK),
    "stock, reduced": (False, {**STOCK, "reduce_range": True}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the samples that measure it, under the name of its one input."""

    name: str
    backbone: Backbone
    eval_data: Dataset

    @property
    def input(self) -> str:
        return next(iter(self.eval_data.inputs))

    def sample(self, row: int) -> NDArray[np.float32]:
        return self.eval_data.inputs[self.input][row : row + 1]


def cases(args: Namespace, room: Path) -> Iterator[Case]:
    """Those that are asked for, with as many samples."""
    for name, make in (("fashion-vit", images), ("kwt1", digits)):
        if any(fnmatchcase(name, pattern) for pattern in args.only):
            backbone, eval_data = make(args, room)
            yield Case(name, backbone, eval_data.take(np.arange(len(eval_data))[: args.samples]))


def images(args: Namespace, room: Path) -> tuple[Backbone, Dataset]:
    if args.small:
        backbone, _, eval_data = pela_fashion.made_up(room)
    else:
        args.model, args.samples = args.models / "fashion-vit", None
        backbone, _, eval_data = pela_fashion.real(args)
    return backbone, eval_data


def digits(args: Namespace, room: Path) -> tuple[Backbone, Dataset]:
    """Its head is trained on recordings 5 to 14 of every digit and speaker; the others measure."""
    if args.small:
        model, (clips, numbers) = Kwt(layers=2).eval(), keyword_speakers.synthetic()
    else:
        model = kwt1(args.models / "kwt1")
        clips, numbers = keyword_speakers.recordings(args.data, Mfcc(args.models / "kwt1"))
    early = (numbers >= 5) & (numbers < 15)
    train, eval_data = (clips.take(np.flatnonzero(part)) for part in (early, ~early))
    x, labels = keyword_speakers.features(model, train), torch.from_numpy(train.labels)
    model.head = keyword_speakers.digit_head(x, labels, args.steps or 600)
    about = ("sha256:kwt1", "audio-classification", ("head",), keyword_speakers.NAMES, ())
    return Backbone(model.eval(), *about), eval_data


def graphs(case: Case, room: Path) -> dict[str, Path]:
    """By row, a graph with a batch of any size."""
    inputs = {case.input: case.eval_data.inputs[case.input][:2]}
    found = {}
    for row, precision in (("fp32", "fp32"), ("regrow", "int8")):
        export(
            case.backbone,
            room / row,
            ExportConfig(mode="merged", precision=precision),
            inputs=inputs,
        )
        found[row] = room / row / "backbone.onnx"
    layers = _named_layers(found["fp32"], found["regrow"], room / "named.onnx")
    plain = _torch_onnx(case, room / "plain.onnx")
    for row, (ours, how) in ROUNDED.items():
        found[row] = room / f"{row}.onnx"
        options = {"weight_type": QuantType.QInt8, "per_channel": True, **how}
        if ours:
            options["nodes_to_quantize"] = layers
        quantize_dynamic(room / "named.onnx" if ours else plain, found[row], **options)
    return found


def _named_layers(fp32: Path, int8: Path, out: Path) -> list[str]:
    """Give nodes of the graph in fp32 names; those of layers that are integer products in int8."""
    model = onnx.load(str(fp32))
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    onnx.save(model, out)
    sums = {n.output[0] for n in onnx.load(str(int8)).graph.node if n.op_type == "MatMulInteger"}
    products = {name.removesuffix("/sums").removesuffix("/product") for name in sums}
    chosen = [node.name for node in model.graph.node if node.output[0] in products]
    assert len(chosen) == len(sums)
    return chosen


def _torch_onnx(case: Case, path: Path) -> Path:
    sample = torch.from_numpy(case.sample(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Answers(case.backbone.model).eval(), (sample,), path, opset_version=18, dynamo=False,
            input_names=[case.input], output_names=["logits"],
        )  # fmt: skip
    return path


class Answers(torch.nn.Module):
    """A model that gives a tensor, whatever class it has."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.model(x)
        logits: torch.Tensor = found if isinstance(found, torch.Tensor) else found.logits
        return logits


def answers(graph: Path, case: Case) -> NDArray[np.int64]:
    """The class of every sample, one a run: rounding depends on what is run together."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    rows = range(len(case.eval_data))
    return np.array([session.run(None, {case.input: case.sample(r)})[0].argmax() for r in rows])


def measured(case: Case, room: Path, args: Namespace) -> list[dict[str, Any]]:
    made = graphs(case, room)
    found = {row: answers(graph, case) for row, graph in made.items()}
    feeds = save_feeds(room / "feeds.npz", {case.input: case.sample(0)})
    timed = {row: Timed(graph, feeds, args.threads) for row, graph in made.items()}
    time_in_turns(list(timed.values()), args.turns, args.repeat)
    return [
        {
            "model": case.name, "row": row, "samples": len(case.eval_data),
            "accuracy": float((found[row] == case.eval_data.labels).mean()),
            "as_fp32": float((found[row] == found["fp32"]).mean()),
            **timed[row].ms(),
            **{f"to {other}": timed[row].against(timed[other]) for other in ("stock", "fp32")},
        }
        for row in made
    ]  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    """Of the docs' table."""
    ratios = (row["to stock"], row["to fp32"])
    shares = (f"{100 * row[name]:.2f}" for name in ("accuracy", "as_fp32"))
    spans = (f"{r['latency']:.2f} ({r['p10']:.2f} to {r['p90']:.2f})" for r in ratios)
    cells = (f"{row['model']}, {row['row']}", *shares, f"{row['ms']:.2f}", *spans)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    options = parser(__doc__, "data", "models")
    options.add_argument("--turns", type=int, default=30)
    options.add_argument("--repeat", type=int, default=10, help="runs of a turn")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--samples", type=int, help="the first so many samples measure")
    args = options.parse_args()
    if args.small:
        args.turns, args.repeat, args.steps, args.samples = 2, 2, 3, 40
    logging.getLogger().setLevel(logging.ERROR)  # of quantize_dynamic, about preprocessing
    print("| | accuracy % | as fp32 % | ms | to stock | to fp32 |\n|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for case in cases(args, Path(name)):
            room = Path(name) / case.name
            room.mkdir()
            found = measured(case, room, args)
            print(*map(line, found), sep="\n", flush=True)
            rows += found
    finish(task="int8-weights", saturates=saturates(), threads=args.threads, rows=rows)


if __name__ == "__main__":
    main()
