"""MNIST by writer: a base model for everybody, then a few hundred numbers for each of 80 writers.

    python examples/benchmarks/mnist_writers.py DATA [--cache FOLDER] [--seeds 0 1 2] [--small]

DATA has `mnist-writers/` with base_train, base_val and dev_writers as .npz: `images` uint8,
`labels`, `writer`, rows sorted by writer. The base is a small ViT trained on the writers of
base_train; the first 30 digits of a dev writer adapt, the rest test. Every method, all writers in
one pass; ends in one line of JSON. `--small` takes synthetic strokes instead of DATA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Task,
    Variant,
    cached,
    choose,
    compare,
    evaluate,
    finish,
    fp32,
    parser,
    print_table,
    smallest,
)
from numpy.typing import NDArray
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from regrow import Backbone, Dataset

ADAPT = 30  # digits of a writer that adapt
NAMES = tuple(str(digit) for digit in range(10))
QV, MLP = ("query", "value"), ("intermediate.dense", "output.dense")  # MLP: attention's too
SETTINGS = {"steps": 60, "batch_size": 30, "shift": 1.0, "noise": 0.0, "label_smoothing": 0.0}
# Peak learning rates, chosen on these writers: docs/tuning.md.
RATES = {"lora": 3e-3, "nola": 1e-2, "vera": 3e-2, "fourierft": 3e-2, "bitfit": 3e-3,
         "ia3": 3e-2, "ssf": 3e-3}  # fmt: skip


def new_model() -> ViTForImageClassification:
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    patches = {"image_size": 28, "patch_size": 7, "num_channels": 1}
    return ViTForImageClassification(
        ViTConfig(intermediate_size=128, num_labels=10, **size, **patches)
    ).eval()


def train_base(data: Dataset, epochs: int, shift: int) -> nn.Module:
    """Batches of 128, one-cycle to 3e-3; `shift` moves batches by up to so many pixels."""
    torch.manual_seed(0)
    model = new_model()
    images, labels = torch.from_numpy(data.inputs["pixel_values"]), torch.from_numpy(data.labels)
    steps = len(data) // 128
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * steps, pct_start=0.1
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(data))[: steps * 128].view(steps, 128):
            move = torch.randint(-shift, shift + 1, (2,)).tolist()
            logits = model(images[rows].roll(move, (2, 3))).logits
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return model


def dataset(images: NDArray[Any], labels: NDArray[Any], writers: NDArray[Any]) -> Dataset:
    pixels = ((images.astype(np.float32) / 255 - 0.1307) / 0.3081)[:, None]
    users = np.array([f"{writer:04}" for writer in writers])
    return Dataset({"pixel_values": pixels}, labels.astype(np.int64), NAMES, users=users)


def read(folder: Path, name: str) -> Dataset:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
        return dataset(stored["images"], stored["labels"], stored["writer"])


def strokes(writers: int, each: int, slant: float) -> Dataset:
    """Ten synthetic classes: bars at ten angles, turned by a writer's own slant."""
    draw = np.random.default_rng(writers)
    labels = np.tile(np.arange(each) % 10, writers)
    writer = np.repeat(np.arange(writers), each)
    angle = labels * np.pi / 10 + slant * (writer / writers - 0.5)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    far = x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None]
    images = 255 * np.clip(np.exp(-20 * far**2) + 0.1 * draw.standard_normal(far.shape), 0, 1)
    return dataset(images.astype(np.uint8), labels, writer)


def first_rows(data: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """The first `count` rows of every user, and the others."""
    order = np.zeros(len(data), int)
    for user in np.unique(data.users):
        rows = np.flatnonzero(data.users == user)
        order[rows] = np.arange(len(rows))
    return data.take(np.flatnonzero(order < count)), data.take(np.flatnonzero(order >= count))


def make_task(args: Any) -> tuple[Task, float]:
    """The task, and the base's accuracy on writers of the kind that it was trained on."""
    if args.small:
        base, held = strokes(8, 64, 0.0), strokes(4, 20, 0.0)
        adapt, test = first_rows(strokes(3, 50, 0.6), ADAPT)
    else:
        folder = args.data / "mnist-writers"
        base, held = read(folder, "base_train"), read(folder, "base_val")
        adapt, test = first_rows(read(folder, "dev_writers"), ADAPT)
    shift = 0 if args.short_base else 1
    epochs = 1 if args.small else 8 if args.short_base else 24
    model = new_model()
    name = f"mnist-{epochs}-{shift}"
    cached(args.cache, name, lambda: train_base(base, epochs, shift), model)
    backbone = Backbone(model, f"sha256:{name}", "image-classification", ("classifier",), NAMES, ())
    steps = 2 if args.small else args.steps or SETTINGS["steps"]
    return Task(backbone, adapt, test, {**SETTINGS, "steps": steps}), evaluate(model, held)


def variants() -> list[Variant]:
    found = [Variant("head only", "head", config={"head": "tune"}), variant("BitFit", "bitfit", ())]
    found += [variant("IA3 all", "ia3", ()), variant("SSF all", "ssf", ())]
    for place, targets in (("QV", QV), ("MLP", MLP)):
        for rank in (1, 2, 4, 8):
            settings = {"rank": rank, "alpha": float(rank)}
            found.append(variant(f"LoRA r={rank} {place}", "lora", targets, **settings))
    for k in (8, 16, 32, 64):
        found.append(variant(f"NOLA k=l={k} MLP", "nola", MLP, k=k, l=k, rank=4, c=4.0))
    found.append(variant("NOLA k=l=16 all", "nola", (), k=16, l=16, rank=4, c=4.0))
    for rank, place, targets in ((32, "QV", QV), (64, "QV", QV), (64, "MLP", MLP)):
        found.append(variant(f"VeRA r={rank} {place}", "vera", targets, rank=rank))
    for n in (16, 32, 64, 128):
        found.append(variant(f"FourierFT n={n} MLP", "fourierft", MLP, n=n))
    chosen = ("LoRA r=4 MLP", "NOLA k=l=32 MLP", "FourierFT n=64 MLP")
    found += [fp32(one) for one in found if one.label in chosen]
    return [*found, Variant("full fine-tuning", "full", config={"lr": 3e-4})]


def variant(label: str, method: str, targets: tuple[str, ...], **settings: Any) -> Variant:
    return Variant(label, method, settings, targets, {"lr": RATES[method]})


def main() -> None:
    options = parser(__doc__, "data")
    options.add_argument("--short-base", action="store_true", help="8 epochs, no shifted images")
    args = options.parse_args()
    task, base = make_task(args)
    print(f"base: {base:.4f} on writers of its own series")
    chosen = choose(variants(), args.only)
    if args.small:
        chosen = choose(chosen, ["head only", "LoRA r=1 QV", "NOLA k=l=8 MLP", "full*"])
    rows = compare([task], chosen, args.seeds, args.cache)
    print_table(rows)
    finish(task="mnist-writers", base=base, smallest=smallest(rows), rows=rows)


if __name__ == "__main__":
    main()
