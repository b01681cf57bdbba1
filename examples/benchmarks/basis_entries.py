"""Does it matter that the basis is of signs? Signs, uniform and Gaussian entries on two real tasks.

    python examples/benchmarks/basis_entries.py DATA MODELS [--seeds 0 1 2 3 4] [--small]

NOLA and VeRA, MNIST by writer and keyword speakers (the tasks of `mnist_writers.py` and
`keyword_speakers.py`). All entries have mean 0 and variance 1; a seed draws the basis, the start
and the order of samples. Only the entries differ: the loop here is the trainer's, with the basis
of the methods replaced. Coefficients are trained and scored as int4. Ends in one line of JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import keyword_speakers
import mnist_writers
import numpy as np
import torch
from common import Task, finish, interval, losses, outputs_of, parser
from torch import Tensor

from regrow_toolchain.adapters import Hooks, TrainableAdapter, get_trainable
from regrow_toolchain.models import find_targets
from regrow_toolchain.training import Augmentation, MultiUserBatches, cosine, deterministic, frozen

KINDS = ("signs", "uniform", "gaussian")
TOGETHER = 8  # users in one pass


def entries(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Mean 0, variance 1."""
    if kind == "uniform":
        return (2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(3)
    return torch.randn(shape, generator=generator)


def replace_basis(trained: TrainableAdapter, kind: str, seed: int) -> None:
    """Other entries in place of NOLA's or VeRA's signs."""
    if kind == "signs":
        return
    generator = torch.Generator().manual_seed(seed)
    for name in ("shared_a", "shared_b"):  # VeRA
        if hasattr(trained, name):
            old = trained.get_buffer(name)
            old.copy_(entries(kind, tuple(old.shape), generator))
    kept: dict[Any, Tensor] = {}

    def basis(role: int, vectors: int, count: int, *_: Any) -> Tensor:
        if role not in kept:
            kept[role] = entries(kind, (vectors, count), generator)
        return kept[role]

    trained._basis = basis  # NOLA asks it for [vectors, count] of floats or packed bits


def train(task: Task, given: Mapping[str, Any], kind: str, seed: int, users: list[str]) -> Any:
    """Accuracy of each user after training them in one pass."""
    config = {"shift": 0.0, "noise": 0.0, **task.settings}
    model = task.backbone.model
    adapt, test = zip(*(task.of(user) for user in users), strict=True)
    augmentation = Augmentation(config["shift"], config["noise"])
    batches = MultiUserBatches(
        adapt, size=config["batch_size"], seed=seed, augmentation=augmentation
    )
    targets = find_targets(model, given["targets"])
    trained = get_trainable(given["method"]).init(
        targets, given["settings"], seed, len(users), model=model
    )
    trained.storage = "int4"
    replace_basis(trained, kind, seed)
    optimizer = torch.optim.Adam(trained.parameters(), lr=given["lr"])
    schedule = cosine(optimizer, config["steps"])
    hooks = Hooks(model, users=len(users))
    hooks.attach([target.name for target in targets])
    with deterministic(seed), frozen(model):
        for step in range(config["steps"]):
            trained.rounded = 2 * step >= config["steps"]
            hooks.changes = trained.changes()
            batch = batches.batch(step)
            outputs = outputs_of(model, batch.inputs)
            each = losses(outputs, batch.labels.flatten(), config["label_smoothing"])
            optimizer.zero_grad()
            (each.view_as(batch.weights) * batch.weights).sum().backward()
            optimizer.step()
            schedule.step()
        found = scores(model, hooks, trained, test)
    hooks.detach()
    return found


@torch.no_grad()
def scores(model: Any, hooks: Hooks, trained: TrainableAdapter, test: Any) -> list[float]:
    trained.rounded = True
    hooks.changes = trained.changes()
    batch = MultiUserBatches(test, size=max(map(len, test)), seed=0).batch(0)
    right = outputs_of(model, batch.inputs).argmax(1).view_as(batch.labels) == batch.labels
    return [float(row[: len(part)].double().mean()) for row, part in zip(right, test, strict=True)]


def accuracy(task: Task, given: Mapping[str, Any], kind: str, seed: int) -> float:
    """Mean over all users."""
    found: list[float] = []
    for start in range(0, len(task.users), TOGETHER):
        found += train(task, given, kind, seed, task.users[start : start + TOGETHER])
    return float(np.mean(found))


def make_tasks(args: Any) -> dict[str, Task]:
    more = SimpleNamespace(**vars(args), short_base=True, all_speakers=False)
    writers, _ = mnist_writers.make_task(more)
    chosen = writers.users[: args.writers]
    adapt, test = (
        part.take(np.flatnonzero(np.isin(part.users, chosen)))
        for part in (writers.adapt, writers.test)
    )
    (speaker,) = keyword_speakers.make_tasks(more)
    return {"MNIST writers": replace(writers, adapt=adapt, test=test), "speaker": speaker}


def methods() -> dict[str, dict[str, dict[str, Any]]]:
    """By task and name, what to train; learning rates are those of the tasks' own scripts."""
    nola = {"method": "nola", "settings": {"k": 32, "l": 32, "rank": 4, "c": 4.0}}
    vera = {"method": "vera", "settings": {"rank": 64}}
    one, two = mnist_writers, keyword_speakers
    return {
        "MNIST writers": {
            "NOLA": {**nola, "targets": one.MLP, "lr": one.RATES["nola"]},
            "VeRA": {**vera, "targets": one.QV, "lr": one.RATES["vera"]},
        },
        "speaker": {
            "NOLA": {**nola, "targets": two.MLP, "lr": two.RATES["nola"]},
            "VeRA": {**vera, "targets": two.MLP, "lr": two.RATES["vera"]},
        },
    }


def _print(row: Mapping[str, Any], difference: tuple[float, float, float]) -> None:
    values = 100 * np.array(row["accuracies"])
    spread = values.std(ddof=1) if len(values) > 1 else math.nan
    mean, low, high = (100 * value for value in difference)
    name = f"{row['task']:14} {row['method']:5} {row['entries']:9}"
    print(
        f"{name} {values.mean():.2f} % ± {spread:.2f}"
        f"   minus signs {mean:+.2f} ({low:+.2f} to {high:+.2f})"
    )


def main() -> None:
    options = parser(__doc__, "data", "models")
    options.set_defaults(seeds=[0, 1, 2, 3, 4])
    options.add_argument("--writers", type=int, default=40)
    args = options.parse_args()
    if args.small:
        args.seeds = [0]
    rows = []
    for place, task in make_tasks(args).items():
        for name, given in methods()[place].items():
            found = {k: [accuracy(task, given, k, s) for s in args.seeds] for k in KINDS}
            for kind, values in found.items():
                difference = interval(np.array(values) - np.array(found["signs"]))
                row = {"task": place, "method": name, "entries": kind, "accuracies": values}
                rows.append({**row, "minus_signs": difference})
                _print(row, difference)
    finish(task="basis-entries", rows=rows)


if __name__ == "__main__":
    main()
