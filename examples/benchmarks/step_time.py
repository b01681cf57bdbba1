"""What a training step costs: NOLA, VeRA and FourierFT beside LoRA, at equal rank.

    python examples/benchmarks/step_time.py [--threads 1] [--repeat 7] [--small]

Random weights: the time does not depend on them. Two sizes: ViT-B's width (768, 197 tokens) with
four of its twelve layers, batch 8; and the demo's (width 64, 17 tokens, four layers), batch 64.
Query and value; a shared basis with k = l = 1000, or 64. A step is forward, backward and Adam, as
the trainer does them. Methods take turns in one process; the ratio is the median of the ratios
within a turn. One thread is measured in its CPU time, which other work on the machine hardly
changes, more threads in wall time. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from regrow_toolchain.adapters import Hooks, get_trainable
from regrow_toolchain.models import find_targets
from regrow_toolchain.profiling import read_environment


@dataclass(frozen=True)
class Size:
    """A model, a batch, and the methods' settings."""

    width: int
    hidden: int
    layers: int
    image: int
    patch: int
    batch: int
    rank: int
    k: int
    n: int


SIZES = {
    "ViT-B width, 4 layers": Size(768, 3072, 4, 224, 16, 8, 8, 1000, 1000),
    "demo": Size(64, 128, 4, 8, 2, 64, 8, 64, 128),
}
SMALL = {"small": Size(32, 64, 2, 8, 2, 4, 2, 8, 8)}


def settings(size: Size) -> dict[str, tuple[str, dict[str, Any]]]:
    nola = {"k": size.k, "l": size.k, "rank": size.rank, "c": 1.0, "shared": True}
    return {
        "LoRA": ("lora", {"rank": size.rank, "alpha": float(size.rank)}),
        "NOLA, shared basis": ("nola", nola),
        "NOLA, a basis per layer": ("nola", {**nola, "shared": False}),
        "VeRA": ("vera", {"rank": size.rank}),
        "FourierFT": ("fourierft", {"n": size.n}),
    }


def make_model(size: Size) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
        image_size=size.image,
        patch_size=size.patch,
        num_labels=10,
    )
    return ViTForImageClassification(config).eval().requires_grad_(False)


class Step:
    """One method's training step over a model that all methods share."""

    def __init__(self, model: nn.Module, size: Size, method: str, given: Mapping[str, Any]) -> None:
        self.model = model
        self.targets = find_targets(model, ["query", "value"])
        self.trained = get_trainable(method).init(self.targets, given, 0, model=model)
        self.optimizer = torch.optim.Adam(self.trained.parameters())
        self.x = torch.randn(size.batch, 3, size.image, size.image)
        self.y = torch.arange(size.batch) % 10

    def __call__(self) -> None:
        hooks = Hooks(self.model)
        hooks.changes = self.trained.changes()
        hooks.attach([target.name for target in self.targets])
        loss = nn.functional.cross_entropy(self.model(self.x).logits, self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        hooks.detach()


def measure(size: Size, repeat: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """By method: median and quartiles in ms, and the ratio to LoRA."""
    model = make_model(size)
    steps = {name: Step(model, size, *given) for name, given in settings(size).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if turn >= 2:
                times[name].append((clock() - start) * 1e3)
    lora = np.array(times["LoRA"])
    return {name: _spread(np.array(found), lora) for name, found in times.items()}


def _spread(found: np.ndarray, lora: np.ndarray) -> dict[str, float]:
    p25, p50, p75 = np.percentile(found, [25, 50, 75])
    low, ratio, high = np.percentile(found / lora, [25, 50, 75])
    named = {"ms": p50, "p25": p25, "p75": p75, "ratio": ratio, "ratio_p25": low, "ratio_p75": high}
    return {name: round(float(value), 3) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    found = {}
    for name, size in (SMALL if args.small else SIZES).items():
        small = size.width <= 64
        found[name] = measure(size, 3 if args.small else args.repeat * (10 if small else 1), clock)
        print(f"{name}, {args.threads} threads")
        for method, row in found[name].items():
            print(
                f"  {method:24} {row['ms']:9.2f} ms ({row['p25']:.2f} to {row['p75']:.2f}), "
                f"{row['ratio']:.3f} of LoRA ({row['ratio_p25']:.3f} to {row['ratio_p75']:.3f})"
            )
    print(json.dumps({"threads": args.threads, "sizes": found, "machine": read_environment()}))


if __name__ == "__main__":
    main()
