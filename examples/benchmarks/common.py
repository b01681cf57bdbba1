"""What the benchmarks share: variants of adapters, scores per user, statistics, tables.

A task is a backbone with users' samples to adapt on and to test on. A variant is a way to adapt.
`compare(task, variants, seeds)` runs them all and returns rows for a table and for JSON.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn

from regrow import AdaptConfig, Backbone, Dataset, adapt_users
from regrow_toolchain.adapters import applied
from regrow_toolchain.profiling import read_environment
from regrow_toolchain.training import augment, batches, cosine, deterministic

Scores = NDArray[np.float64]  # one per user


@dataclass(frozen=True)
class Task:
    """A backbone, its users' samples, and the settings that all variants share."""

    backbone: Backbone
    adapt: Dataset
    test: Dataset
    settings: Mapping[str, Any] = field(default_factory=dict)
    higher_is_better: bool = True

    @property
    def users(self) -> list[str]:
        return sorted(set(self.test.users.tolist()))

    def of(self, user: str) -> tuple[Dataset, Dataset]:
        parts = (self.adapt, self.test)
        adapt, test = (part.take(np.flatnonzero(part.users == user)) for part in parts)
        return adapt, test


@dataclass(frozen=True)
class Variant:
    """A method at one size. `settings` are the method's own, `config` AdaptConfig's fields."""

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What one variant with one seed gave; `units`: scores of users, or of one user's samples."""

    before: Scores
    after: Scores
    units: Scores
    numbers: int
    bytes: int
    seconds: float


def fp32(variant: Variant) -> Variant:
    return replace(
        variant,
        label=f"{variant.label}, fp32",
        config={**variant.config, "coefficient_dtype": "fp32"},
    )


def run(tasks: Sequence[Task], variant: Variant, seed: int, cache: Path | None = None) -> Result:
    """Train an adapter for every user of every task, a task's users in one pass, and score them.

    With a cache a run that is there already is not repeated: empty it when the code changes.
    """
    if cache is None:
        return _run(tasks, variant, seed)
    path, about = run_file(tasks, variant, seed, cache)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))["result"]
        return Result(**{k: np.array(v) if isinstance(v, list) else v for k, v in stored.items()})
    found = _run(tasks, variant, seed)
    kept = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(found).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": about, "result": kept}), encoding="utf-8")
    return found


def run_file(
    tasks: Sequence[Task], variant: Variant, seed: int, cache: Path
) -> tuple[Path, list[Any]]:
    """Where a run is kept, named by all that it depends on, the code excepted; and that."""
    base = [[t.backbone.backbone_id, len(t.adapt), len(t.test), dict(t.settings)] for t in tasks]
    about = [base, {k: v for k, v in asdict(variant).items() if k != "label"}, seed]
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return cache / "runs" / f"{name}.json", about


def _run(tasks: Sequence[Task], variant: Variant, seed: int) -> Result:
    start = time.perf_counter()
    one = full_fine_tuning if variant.method == "full" else _adapters
    parts = [one(task, variant, seed) for task in tasks]
    before, after = (np.concatenate([part[i] for part in parts]) for i in range(2))
    units = after if len(after) > 1 else parts[0][2]
    numbers, size = parts[0][3:]
    return Result(before, after, units, numbers, size, time.perf_counter() - start)


def _adapters(task: Task, variant: Variant, seed: int) -> tuple[Any, ...]:
    settings = {"coefficient_dtype": "int4", **task.settings, **variant.config}
    config = AdaptConfig(
        method=variant.method,
        seed=seed,
        targets=variant.targets,
        method_settings=variant.settings,
        **settings,
    )
    done = adapt_users(task.backbone, task.adapt, config, eval_data=task.test)
    found = [done[user] for user in task.users]
    before, after = (np.array([getattr(x, part) for x in found]) for part in ("before", "after"))
    units = after
    if len(found) == 1:
        with applied(task.backbone.model, found[0].adapter):
            units = per_sample(task.backbone.model, task.test)
    size = round(np.mean([len(x.adapter.to_bytes()) for x in found]))
    return before, after, units, _numbers(found[0].adapter), size


def _numbers(adapter: Any) -> int:
    layers = adapter.head.layers if adapter.head else ()
    head = sum(layer.weight.size + layer.bias.size for layer in layers)
    return head + sum(part.values.size for part in adapter.coefficients.values())


# -- full fine-tuning, the upper bound: a copy of the model for every user --------------------


def full_fine_tuning(task: Task, variant: Variant, seed: int) -> tuple[Any, ...]:
    """Every weight is trained; `users` in the config takes only so many, the others keep NaN."""
    config = {"lr": 5e-4, "users": None, **task.settings, **variant.config}
    lr, count = config.pop("lr"), config.pop("users")
    settings = AdaptConfig(method="lora", **config)
    before, after = (np.full(len(task.users), np.nan) for _ in range(2))
    for row, user in enumerate(task.users[:count]):
        adapt, test = task.of(user)
        before[row] = evaluate(task.backbone.model, test)
        with deterministic(seed):
            model = copy.deepcopy(task.backbone.model)
            fresh = task.backbone.head if "head_lr" in task.settings else ()
            train_all(model, adapt, settings, lr, seed, fresh)
        units = per_sample(model, test)
        after[row] = units.mean()
    numbers = sum(p.numel() for p in task.backbone.model.parameters())
    return before, after, units, numbers, 4 * numbers


def train_all(
    model: nn.Module,
    data: Dataset,
    config: AdaptConfig,
    lr: float,
    seed: int,
    fresh: Sequence[str] = (),
) -> None:
    """Adam with a cosine, on every weight; the layers `fresh` have the head's rate."""
    groups: dict[float, list[nn.Parameter]] = {lr: [], config.head_lr: []}
    for name, parameter in model.named_parameters():
        rate = config.head_lr if name.rpartition(".")[0] in fresh else lr
        groups[rate].append(parameter.requires_grad_(True))
    optimizer = torch.optim.Adam([{"params": p, "lr": rate} for rate, p in groups.items() if p])
    schedule = cosine(optimizer, config.steps)
    model.eval()
    for inputs, labels in batches(data, config.batch_size, config.steps, seed):
        outputs = outputs_of(model, augment(inputs, config.shift, config.noise))
        loss = losses(outputs, labels, config.label_smoothing).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def losses(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """One loss per sample; per token where labels are tokens (-100 has none)."""
    if labels.dim() == 2:
        outputs, labels = outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        outputs, labels, smoothing = outputs[labels >= 0], labels[labels >= 0], 0.0
    return nn.functional.cross_entropy(outputs, labels, label_smoothing=smoothing, reduction="none")


@torch.no_grad()
def per_sample(model: nn.Module, data: Dataset, size: int = 128) -> NDArray[np.float64]:
    """1 or 0 for each sample that is right or wrong; nats of each token where labels are tokens."""
    model.eval()
    found = []
    for start in range(0, len(data), size):
        part = data.take(np.arange(start, min(start + size, len(data))))
        inputs = {name: torch.from_numpy(array) for name, array in part.inputs.items()}
        outputs, labels = outputs_of(model, inputs), torch.from_numpy(part.labels)
        if labels.dim() == 2:
            found.append(losses(outputs, labels))
        else:
            found.append(outputs.argmax(1) == labels)
    return torch.cat(found).double().numpy()


def evaluate(model: nn.Module, data: Dataset) -> float:
    """Accuracy, or nats per token."""
    return float(per_sample(model, data).mean())


# -- statistics and tables -----------------------------------------------------------------------


def interval(differences: Sequence[float] | Scores) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t; NaN bounds for a single value."""
    values = np.asarray(differences, float)
    values = values[~np.isnan(values)]
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def compare(
    tasks: Sequence[Task],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows of a table: every variant over all seeds, each user's scores averaged over them.

    Differences to the best LoRA in int4 are paired by user, or by sample where there is one user.
    """
    higher = tasks[0].higher_is_better
    runs = {}
    for variant in variants:
        runs[variant.label] = [run(tasks, variant, seed, cache) for seed in seeds]
        print(_line(summary(variant.label, runs[variant.label], higher)), flush=True)
    rows = [summary(label, found, higher) for label, found in runs.items()]
    loras = [row for row in rows if row["label"].startswith("LoRA") and "fp32" not in row["label"]]
    if loras:
        sign = 1 if higher else -1
        best = max(loras, key=lambda row: sign * row["mean"])
        for row in rows:
            row["against"] = best["label"]
            row["difference"] = interval(_units(runs[row["label"]]) - _units(runs[best["label"]]))
    return rows


def _units(runs: Sequence[Result]) -> Scores:
    return np.mean([one.units for one in runs], axis=0)


def summary(label: str, runs: Sequence[Result], higher_is_better: bool) -> dict[str, Any]:
    """One row; the tenth percentile is that of the worse end, averaged over seeds."""
    sign = 1 if higher_is_better else -1
    after = np.array([one.after for one in runs])
    before = np.array([one.before for one in runs])
    worse = [sign * np.nanpercentile(sign * row, 10) for row in after]
    return {
        "label": label,
        "numbers": runs[0].numbers,
        "bytes": runs[0].bytes,
        "before": float(np.nanmean(before)),
        "mean": float(np.nanmean(after)),
        "mean_of_seeds": [float(np.nanmean(row)) for row in after],
        "p10": float(np.mean(worse)),
        "p10_before": float(sign * np.nanpercentile(sign * before[0], 10)),
        "harmed": float(np.mean((sign * (after - before) < 0).sum(axis=1))),
        "users": int((~np.isnan(after[0])).sum()),
        "seconds": round(float(np.mean([one.seconds for one in runs])), 1),
    }


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['label']:34} {row['numbers']:8} numbers {row['bytes']:8} bytes  "
        f"{row['before']:.4f} -> {row['mean']:.4f}  p10 {row['p10']:.4f}  "
        f"harmed {row['harmed']:.1f}/{row['users']}  {row['seconds']} s"
    )


def print_table(rows: Sequence[Mapping[str, Any]], percent: bool = True) -> None:
    """Markdown, ready for the docs."""
    times, unit = (100, " %") if percent else (1, "")
    against = rows[0].get("against", "")
    print(f"\n| | numbers | bytes | mean{unit} | 10th percentile | harmed | minus {against} |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        mean, low, high = (times * value for value in row.get("difference", [np.nan] * 3))
        digits = 1 if percent else 3
        print(
            f"| {row['label']} | {row['numbers']:,} | {row['bytes']:,} "
            f"| {times * row['mean']:.{digits}f} | {times * row['p10']:.{digits}f} "
            f"| {row['harmed']:.1f} of {row['users']} "
            f"| {mean:+.{digits + 1}f} ({low:+.{digits + 1}f} to {high:+.{digits + 1}f}) |"
        )


def smallest(rows: Sequence[Mapping[str, Any]], higher_is_better: bool = True) -> dict[str, Any]:
    """The smallest int4 adapters that are as accurate as the best LoRA, and their bytes.

    Two readings: `mean`, the mean is at least as good; `interval`, the 95 % interval of the
    difference per user does not lie wholly on the worse side.
    """
    sign = 1 if higher_is_better else -1
    rows = [row for row in rows if "fp32" not in row["label"]]
    loras = [row for row in rows if row["label"].startswith("LoRA")]
    others = [row for row in rows if row["label"].startswith(("NOLA", "FourierFT"))]
    if not loras or not others:
        return {}
    best = max(sign * row["mean"] for row in loras)

    def level(row: Mapping[str, Any]) -> bool:
        _, low, high = row["difference"]
        return bool((high if sign > 0 else -low) >= 0)

    readings = {"mean": lambda row: sign * row["mean"] >= best, "interval": level}
    found: dict[str, Any] = {}
    for name, holds in readings.items():
        lora = min((row for row in loras if holds(row)), key=lambda row: row["bytes"])
        other = min((r for r in others if holds(r)), key=lambda row: row["bytes"], default=None)
        found[name] = {
            "lora": [lora["label"], lora["bytes"]],
            "smallest": other and [other["label"], other["bytes"]],
            "ratio": other and round(other["bytes"] / lora["bytes"], 3),
        }
    return found


# -- command line --------------------------------------------------------------------------------


def parser(doc: str, *folders: str) -> argparse.ArgumentParser:
    """DATA and other folders, --small, --seeds, --only and --cache."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name in folders:
        made.add_argument(name, type=Path, nargs="?", help="not needed with --small")
    made.add_argument("--small", action="store_true", help="synthetic data, seconds")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--only", nargs="+", default=["*"], help="patterns of the variants' labels")
    made.add_argument("--cache", type=Path, help="keep base models and runs here")
    made.add_argument("--steps", type=int, help="training steps of every adapter")
    return made


def choose(variants: Sequence[Variant], patterns: Sequence[str]) -> list[Variant]:
    return [v for v in variants if any(fnmatchcase(v.label, p) for p in patterns)]


def cached(folder: Path | None, name: str, make: Callable[[], nn.Module], empty: nn.Module) -> None:
    """Load `empty`'s weights from the cache, or those that `make` trains, which are kept."""
    from safetensors.torch import load_file, save_file

    path = folder / f"{name}.safetensors" if folder else None
    if path and path.is_file():
        empty.load_state_dict(load_file(path))
        return
    state = {key: value.contiguous() for key, value in make().state_dict().items()}
    empty.load_state_dict(state)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)


def finish(**result: Any) -> None:
    """The last line: one JSON document, with the machine and the processor's flags."""
    print(json.dumps(_plain({**result, "machine": read_environment()})))


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
