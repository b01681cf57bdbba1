"""What training many users in one pass saves over training them one after another.

    python examples/benchmarks/many_users.py [--small] [--counts 1 8 32 100 1000] [--steps 20]

The demo's backbone (ViT of width 64, 4 layers, compressed by 2), 8 samples per user, NOLA with the
defaults, in one process: `loops` is the time of 32 calls of `adapt`, `together` that of one call of
`adapt_users` for the same users; both with everything that a call does. Then the time per user
for growing numbers of users; fewer `--steps` than the default take less of it. Ends in one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from regrow import AdaptConfig, Backbone, Dataset, adapt, adapt_users
from regrow_toolchain.compress import factored_layers
from regrow_toolchain.demo import new_model
from regrow_toolchain.models import apply_plan
from regrow_toolchain.profiling import read_environment

SAMPLES = 8


def make_backbone() -> Backbone:
    """With random weights: the time does not depend on them."""
    model = new_model(0).eval()
    apply_plan(model, factored_layers(model, 2.0))
    labels = tuple(str(digit) for digit in range(10))
    identity = "sha256:" + "0" * 64
    return Backbone(model.eval(), identity, "image-classification", ("classifier",), labels)


def make_users(count: int) -> Dataset:
    draw = np.random.default_rng(0)
    pixels = draw.normal(size=(count * SAMPLES, 1, 8, 8)).astype(np.float32)
    labels = np.tile(np.arange(SAMPLES), count)
    users = np.repeat([f"user-{i:04d}" for i in range(count)], SAMPLES)
    names = tuple(str(digit) for digit in range(10))
    return Dataset({"pixel_values": pixels}, labels, names, users=users)


def seconds_alone(backbone: Backbone, data: Dataset, config: AdaptConfig) -> list[float]:
    found = []
    for user in np.unique(data.users):
        start = time.perf_counter()
        adapt(backbone, data.take(np.flatnonzero(data.users == user)), config)
        found.append(time.perf_counter() - start)
    return found


def seconds_together(backbone: Backbone, count: int, config: AdaptConfig) -> float:
    data = make_users(count)
    start = time.perf_counter()
    assert len(adapt_users(backbone, data, config)) == count
    return time.perf_counter() - start


def measure(loop: int, counts: Sequence[int], config: AdaptConfig) -> dict[str, Any]:
    backbone = make_backbone()
    adapt(backbone, make_users(1), AdaptConfig(steps=3, holdout=0.0))  # what is only done once
    alone = seconds_alone(backbone, make_users(loop), config)
    together = [seconds_together(backbone, loop, config) for _ in range(3)]
    return {
        "users": loop,
        "samples_per_user": SAMPLES,
        "steps": config.steps,
        "threads": torch.get_num_threads(),
        "loops_s": sum(alone),
        "together_s": float(np.median(together)),
        "together_spread_s": [min(together), max(together)],
        "ratio": float(np.median(together)) / sum(alone),
        "ms_per_user": {str(n): seconds_together(backbone, n, config) / n * 1e3 for n in counts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32, 100, 1000])
    parser.add_argument("--steps", type=int, default=AdaptConfig().steps)
    arguments = parser.parse_args()
    if arguments.small:
        result = measure(4, [1, 4], AdaptConfig(steps=10, holdout=0.0))
    else:
        result = measure(32, arguments.counts, AdaptConfig(steps=arguments.steps, holdout=0.0))
    print(
        f"{result['users']} users: {result['loops_s']:.2f} s one by one, "
        f"{result['together_s']:.2f} s together, ratio {result['ratio']:.2f}"
    )
    for count, each in result["ms_per_user"].items():
        print(f"{count:>6} users: {each:8.1f} ms per user")
    print(json.dumps({**result, "machine": read_environment()}))


if __name__ == "__main__":
    main()
