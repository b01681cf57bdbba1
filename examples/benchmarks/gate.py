"""Which adapters are written, by the gate and by the rule before it, and what users then get.

    python examples/benchmarks/gate.py DATA MODELS [--only writers speakers roles intents] [--small]

The users of four benchmarks (mnist_writers.py, keyword_speakers.py, story_roles.py, intents.py;
their data, models and settings) adapt with NOLA; a user whose adapter is not written keeps the base
model. The rule before: a fifth held back, a higher score on it. The gate: a paired test of losses,
in five folds where fewer than 50 samples would be held back. Scored on test samples that neither
has seen, over all users. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import intents
import keyword_speakers
import mnist_writers
import numpy as np
import story_roles
from common import Scores, Task, Variant, evaluate, finish, interval, parser

from regrow import AdaptConfig, adapt_users
from regrow_toolchain.adapters import Adapted, applied
from regrow_toolchain.data import split

HOLDOUT = 0.2


def pick(variants: Sequence[Variant], label: str) -> Variant:
    return next(variant for variant in variants if variant.label == label)


def writers(args: Any) -> tuple[list[Task], Variant]:
    task, _ = mnist_writers.make_task(args)
    return [task], pick(mnist_writers.variants(), "NOLA k=l=32 MLP")


def speakers(args: Any) -> tuple[list[Task], Variant]:
    args.all_speakers = True
    return keyword_speakers.make_tasks(args), pick(keyword_speakers.variants(), "NOLA k=l=32 MLP")


def roles(args: Any) -> tuple[list[Task], Variant]:
    return [story_roles.make_task(args)], pick(story_roles.variants(), "NOLA k=l=64 MLP")


def both_intents(args: Any) -> tuple[list[Task], Variant]:
    names = ("banking77",) if args.small else ("banking77", "clinc150")
    tasks = [intents.make_task(args, name) for name in names]
    return tasks, pick(intents.variants(), "NOLA k=l=64 QV")


MAKERS: Mapping[str, Callable[[Any], tuple[list[Task], Variant]]] = {
    "writers": writers,
    "speakers": speakers,
    "roles": roles,
    "intents": both_intents,
}


def old_rule(task: Task, config: AdaptConfig) -> dict[str, Adapted]:
    """Adapters of four fifths of the samples, with the scores on the fifth."""
    train, eval_data = split(task.adapt, HOLDOUT, config.seed)
    return adapt_users(task.backbone, train, config, eval_data=eval_data)


def new_rule(task: Task, config: AdaptConfig) -> dict[str, Adapted]:
    return adapt_users(task.backbone, task.adapt, config)


def was_better(done: Adapted) -> bool:
    sign = 1 if done.higher_is_better else -1
    return sign * done.after > sign * done.before


def tested(task: Task, done: Mapping[str, Adapted]) -> tuple[Scores, Scores]:
    """[users]: scores of the base model and of each user's adapter on the test samples."""
    model = task.backbone.model
    base, adapted = [], []
    for user in task.users:
        _, test = task.of(user)
        base.append(evaluate(model, test))
        with applied(model, done[user].adapter):
            adapted.append(evaluate(model, test))
    return np.array(base), np.array(adapted)


def one_rule(
    tasks: Sequence[Task], variant: Variant, seed: int, train: Any, decides: Any
) -> dict[str, Any]:
    """What a rule wrote, and every user's test score with it."""
    start = time.process_time()
    base, adapted, written = [], [], []
    for task in tasks:
        settings = {
            "coefficient_dtype": "int4",
            **task.settings,
            **variant.config,
            "holdout": HOLDOUT,
        }
        config = AdaptConfig(
            method=variant.method, seed=seed, targets=variant.targets,
            method_settings=variant.settings, **settings,
        )  # fmt: skip
        done = train(task, config)
        parts = tested(task, done)
        base.append(parts[0])
        adapted.append(parts[1])
        written += [decides(done[user]) for user in task.users]
    scores, without = np.concatenate(adapted), np.concatenate(base)
    kept = np.where(written, scores, without)
    return {
        "written": int(np.sum(written)), "base": without, "every": scores, "kept": kept,
        "cpu_s": round(time.process_time() - start, 1),
    }  # fmt: skip


def measure(name: str, args: Any, seed: int) -> dict[str, Any]:
    tasks, variant = MAKERS[name](args)
    old = one_rule(tasks, variant, seed, old_rule, was_better)
    new = one_rule(tasks, variant, seed, new_rule, lambda done: done.improves)
    sign = 1 if tasks[0].higher_is_better else -1
    return {
        "task": name, "seed": seed, "variant": variant.label, "users": len(old["base"]),
        "written": [old["written"], new["written"]],
        "base": float(old["base"].mean()),
        "every": [float(old["every"].mean()), float(new["every"].mean())],
        "kept": [float(old["kept"].mean()), float(new["kept"].mean())],
        "gain": interval(sign * (new["kept"] - old["kept"])),
        "cpu_s": [old["cpu_s"], new["cpu_s"]],
    }  # fmt: skip


def print_row(row: Mapping[str, Any]) -> None:
    mean, low, high = row["gain"]
    print(
        f"{row['task']:9} seed {row['seed']}: of {row['users']} users {row['written'][0]} written, "
        f"now {row['written'][1]}; base {row['base']:.4f}, all users {row['kept'][0]:.4f}, now "
        f"{row['kept'][1]:.4f} (better by {mean:+.4f}, 95 % {low:+.4f} to {high:+.4f}); "
        f"every adapter {row['every'][0]:.4f}, now {row['every'][1]:.4f}; "
        f"CPU {row['cpu_s'][0]} s, now {row['cpu_s'][1]} s",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", "data", "models")
    options.add_argument("--short-base", action="store_true", help="as mnist_writers.py")
    options.add_argument("--model", type=Path, help="as intents.py")
    return options.parse_args()


def main() -> None:
    args = arguments()
    names = [name for name in MAKERS if args.only == ["*"] or name in args.only]
    rows = []
    for name in names:
        for seed in args.seeds:
            rows.append(measure(name, args, seed))
            print_row(rows[-1])
    finish(task="gate", rows=rows)


if __name__ == "__main__":
    main()
