"""PELA's ablation on images: a ViT of 1.2 M parameters on Fashion-MNIST, and int8 beside it.

    python examples/benchmarks/pela_fashion.py DATA MODEL [--ratios 2 3 4 10] [--small]

DATA has `fashion-mnist/train.npz` (images, labels): the first 55,000 images train, the last 5,000
measure. MODEL is the checkpoint's folder. Rows: the dense model as it is and trained on for the
same epochs (`dense +`); for every ratio the start without training, and training from it by
the labels alone, + feature distillation, + weight perturbation, both, and both from the start that
looks at samples, with ranks from one budget. `--int8` exports dense, trained dense and the best of
ratio 2 in int8 and has ONNX Runtime measure them. `--only` takes patterns of rows' names, `--cache`
a folder where runs are kept. Ends in one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, parser
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from regrow import (
    Backbone,
    Bundle,
    CompressConfig,
    Dataset,
    ExportConfig,
    compress,
    export,
    load_backbone,
    save_backbone,
)
from regrow_toolchain.models import logits_of
from regrow_toolchain.training import accuracy, batches, cosine, deterministic, shifted

TRAIN = 55_000
SETTINGS = CompressConfig(
    epochs=1, batch_size=64, lr=1e-3, weight_decay=0.05, label_smoothing=0.1, shift=1.0,
    warmup=0.05,
)  # fmt: skip
PLAIN = {"init": "svd", "alpha": 0.0, "beta": 0.0}
FD = {"alpha": 10.0}
RWP = {"beta": 0.1}
ROWS: dict[str, Mapping[str, Any]] = {
    "svd": {**PLAIN, "epochs": 0},
    "svd, labels": PLAIN,
    "svd, + distillation": {**PLAIN, **FD},
    "svd, + perturbation": {**PLAIN, **RWP},
    "svd, both": {**PLAIN, **FD, **RWP},
    "outputs": {"epochs": 0},
    "outputs, both": {**FD, **RWP},
    "outputs, + distillation": {**FD, "beta": 0.0},
}


def real(args: Any) -> tuple[Backbone, Dataset, Dataset]:
    backbone = load_backbone(args.model)
    with np.load(args.data / "fashion-mnist" / "train.npz", allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"].astype(np.int64)
    pixels = backbone.preprocessor()(list(images[..., None]))
    data = Dataset({"pixel_values": pixels}, labels, backbone.labels)
    train = np.arange(TRAIN) if args.samples is None else np.arange(args.samples)
    return backbone, data.take(train), data.take(np.arange(TRAIN, len(data)))


def made_up(folder: Path) -> tuple[Backbone, Dataset, Dataset]:
    """Squares left or right."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=12, patch_size=4, num_channels=1, hidden_size=32, num_labels=2,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    draw = np.random.default_rng(0)
    labels = np.arange(160) % 2
    pixels = draw.normal(0, 0.3, (160, 1, 12, 12)).astype(np.float32)
    for image, label in zip(pixels, labels, strict=True):
        image[0, 3:9, 6 * label : 6 * label + 6] += 2
    data = Dataset({"pixel_values": pixels}, labels, ("LABEL_0", "LABEL_1"))
    return load_backbone(folder), data.take(np.arange(128)), data.take(np.arange(128, 160))


def train_dense(
    backbone: Backbone, train: Dataset, eval_data: Dataset, config: CompressConfig
) -> tuple[nn.Module, list[float]]:
    """The dense model for the same epochs, samples and schedule; a score after each."""
    model = backbone.model
    per_epoch = -(-len(train) // config.batch_size)
    steps = per_epoch * config.epochs
    scores = [accuracy(model, eval_data)]
    with deterministic(config.seed):
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        schedule = cosine(optimizer, steps, config.warmup)
        for step, (inputs, labels) in enumerate(batches(train, config.batch_size, steps, 0)):
            x = inputs["pixel_values"]
            x = shifted(x, (torch.rand(len(x), 2) * 2 - 1) * config.shift)
            loss = nn.functional.cross_entropy(
                logits_of(model, {"pixel_values": x}), labels,
                label_smoothing=config.label_smoothing,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % per_epoch == 0:
                scores.append(accuracy(model, eval_data))
    return model.eval().requires_grad_(False), scores


class Bench:
    """Runs rows, each once: what was run is kept in the cache."""

    def __init__(self, make: Callable[[], Any], cache: Path | None, eval_data: Dataset) -> None:
        self.make, self.cache, self.eval_data = make, cache, eval_data
        if cache:
            cache.mkdir(parents=True, exist_ok=True)

    def row(self, name: str, ratio: float, config: CompressConfig) -> dict[str, Any]:
        about = json.dumps([name, ratio, asdict(config)], sort_keys=True)
        key = hashlib.sha256(about.encode()).hexdigest()[:24]
        path = self.cache / f"{key}.json" if self.cache else None
        if path and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        start = time.process_time()
        found = self._dense(config) if name == "dense +" else self._compressed(config, key)
        row = {
            "row": name,
            "ratio": ratio,
            **found,
            "cpu_seconds": round(time.process_time() - start),
        }
        if path:
            path.write_text(json.dumps(row), encoding="utf-8")
        return row

    def _dense(self, config: CompressConfig) -> dict[str, Any]:
        backbone, train, eval_data = self.make()
        model, scores = train_dense(backbone, train, eval_data, config)
        if self.cache:
            folder = self.cache / "dense-trained"
            model.save_pretrained(folder)
            for file in backbone.files:
                if file.name != "config.json":
                    (folder / file.name).write_bytes(file.read_bytes())
        return {"parameters": backbone.parameters, "accuracy": max(scores), "epochs": scores}

    def _compressed(self, config: CompressConfig, key: str) -> dict[str, Any]:
        backbone, train, eval_data = self.make()
        state = self.cache / f"{key}.state" if self.cache else None
        done = compress(
            backbone, train, config, eval_data=eval_data, checkpoint=state, resume=bool(state)
        )
        if self.cache:
            save_backbone(done.backbone, self.cache / key, force=True)
            state.unlink(missing_ok=True)
        return {
            "parameters": done.backbone.parameters,
            "accuracy": done.score,
            "start": done.start_score,
            "epochs": [epoch.score for epoch in done.history],
            "folder": key,
        }


def answered(backbone: Backbone, eval_data: Dataset, precision: str) -> dict[str, Any]:
    """Accuracy in ONNX Runtime, and bytes of what ships."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "bundle"
        export(backbone, folder, ExportConfig(precision=precision))
        bundle = Bundle.open(folder)
        right = 0
        for start in range(0, len(eval_data), 250):
            rows = slice(start, start + 250)
            logits = bundle.run({"pixel_values": eval_data.inputs["pixel_values"][rows]})["logits"]
            right += int((logits.argmax(1) == eval_data.labels[rows]).sum())
        size = sum(f.stat().st_size for f in folder.iterdir() if ".onnx" in f.name)
    return {"accuracy": right / len(eval_data), "bytes": size}


def main() -> None:
    options = parser(__doc__, "data", "model")
    options.add_argument("--ratios", type=float, nargs="+", default=[2.0])
    options.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    options.add_argument("--samples", type=int, help="train on the first so many")
    options.add_argument("--int8", action="store_true", help="int8 of dense and compressed")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as room:
        if args.small:
            args.ratios, args.int8 = [2.0], True
            _, train, eval_data = made_up(Path(room))
        else:
            _, train, eval_data = real(args)

        def make() -> tuple[Backbone, Dataset, Dataset]:
            return load_backbone(room if args.small else args.model), train, eval_data

        finish(
            task="fashion",
            samples=len(train),
            epochs=args.epochs,
            **compared(args, make, eval_data),
        )


def compared(args: Any, make: Callable[[], Any], eval_data: Dataset) -> dict[str, Any]:
    bench = Bench(make, args.cache, eval_data)
    base = replace(SETTINGS, epochs=args.epochs, seed=args.seeds[0])
    backbone = make()[0]
    rows = [{"row": "dense", "ratio": 1.0, "parameters": backbone.parameters,
             "accuracy": accuracy(backbone.model, eval_data)}]  # fmt: skip
    print(rows[0], flush=True)
    wanted = [("dense +", 1.0, base)]
    wanted += [
        (name, ratio, replace(base, ratio=ratio, **settings))
        for ratio in args.ratios
        for name, settings in ROWS.items()
    ]
    for name, ratio, config in wanted:
        if any(fnmatchcase(name, pattern) for pattern in args.only):
            rows.append(bench.row(name, ratio, config))
            print(rows[-1], flush=True)
    return {"rows": rows, **({"int8": int8_rows(args, rows, make, eval_data)} if args.int8 else {})}


def int8_rows(
    args: Any, rows: list[dict[str, Any]], make: Callable[[], Any], eval_data: Dataset
) -> list[dict[str, Any]]:
    """Dense and compressed, each in fp32 and int8."""
    trained = [row for row in rows if row["ratio"] == 2.0 and "folder" in row]
    models = {"dense": make()[0]}
    if args.cache and (args.cache / "dense-trained").is_dir():
        models["dense +"] = load_backbone(args.cache / "dense-trained")
    if args.cache and trained:
        best = max(trained, key=lambda row: row["accuracy"])
        models[best["row"]] = load_backbone(args.cache / best["folder"])
    found = [
        {"row": name, "precision": precision, **answered(model, eval_data, precision)}
        for name, model in models.items()
        for precision in ("fp32", "int8")
    ]
    print(*found, sep="\n", flush=True)
    return found


if __name__ == "__main__":
    main()
