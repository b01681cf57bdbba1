"""A story teller learns to speak as Shakespeare's roles: stories260k and tinyshakespeare.

    python examples/benchmarks/story_roles.py DATA MODELS [--seeds 0 1 2] [--small]

DATA has `tinyshakespeare/input.txt`, MODELS has `stories260k/`, a Llama of 260,032 parameters. A
role with 10,000 characters or more is a user: the first 70 % of its text adapt, the last 30 % test,
in windows of 128 tokens. Scored in nats per token: lower is better. Ends in one line of JSON.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Task, Variant, choose, compare, finish, fp32, parser, print_table, smallest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regrow import Backbone, Dataset

WINDOW, START = 128, 1
LEAST = 10_000  # characters
QV, MLP = ("q_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {"steps": 60, "batch_size": 2, "shift": 0.0, "noise": 0.0}


def roles(text: str, least: int = LEAST) -> dict[str, str]:
    """What each role with enough text says: blocks that begin with `Role:`."""
    found: dict[str, list[str]] = defaultdict(list)
    for block in text.split("\n\n"):
        role, _, speech = block.partition(":\n")
        if speech and "\n" not in role:
            found[role.strip()].append(speech)
    enough = sorted(role for role, parts in found.items() if sum(map(len, parts)) >= least)
    return {role: "\n\n".join(found[role]) for role in enough}


def windows(tokens: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and labels: windows that begin with <s>; what only fills up has no loss."""
    inputs, labels = [], []
    for start in range(0, len(tokens), WINDOW - 1):
        part = [START, *tokens[start : start + WINDOW - 1]]
        empty = WINDOW - len(part)
        inputs.append(part + [START] * empty)
        labels.append(part + [-100] * empty)
    return inputs, labels


def dataset(texts: dict[str, str], encode: Callable[[str], list[int]]) -> Dataset:
    inputs, labels, users = [], [], []
    for role, text in texts.items():
        one, two = windows(encode(text))
        inputs += one
        labels += two
        users += [role] * len(one)
    return Dataset({"input_ids": np.array(inputs)}, np.array(labels), (), users=np.array(users))


def split(texts: dict[str, str], share: float = 0.7) -> tuple[dict[str, str], dict[str, str]]:
    cut = {role: round(share * len(text)) for role, text in texts.items()}
    first = {role: text[: cut[role]] for role, text in texts.items()}
    return first, {role: text[cut[role] :] for role, text in texts.items()}


def small_model() -> LlamaForCausalLM:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "max_position_embeddings": WINDOW}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **size, **heads))


def make_task(args: Any) -> Task:
    if args.small:
        torch.manual_seed(0)
        model = small_model()
        texts = {f"Role {n}": ("ab cd " if n else "xyz ") * 300 for n in range(2)}
        encode: Callable[[str], list[int]] = lambda text: [ord(c) for c in text]  # noqa: E731
    else:
        folder: Path = args.models / "stories260k"
        model = LlamaForCausalLM.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=1 << 30)
        text = (args.data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        texts = roles(text)
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    adapt, test = (dataset(part, encode) for part in split(texts))
    backbone = Backbone(model.eval(), "sha256:stories260k", "text-generation", (), (), ())
    steps = 2 if args.small else args.steps or SETTINGS["steps"]
    return Task(backbone, adapt, test, {**SETTINGS, "steps": steps}, higher_is_better=False)


def variants() -> list[Variant]:
    found = []
    for place, targets, ranks in (("QV", QV, (1, 4)), ("MLP", MLP, (1, 2, 4, 8))):
        for rank in ranks:
            lora = {"rank": rank, "alpha": float(rank)}
            found.append(Variant(f"LoRA r={rank} {place}", "lora", lora, targets, {"lr": 1e-2}))
    for k, rate in ((64, 5e-2), (256, 2e-2)):
        nola = {"k": k, "l": k, "rank": 4, "c": 4.0}
        found.append(Variant(f"NOLA k=l={k} MLP", "nola", nola, MLP, {"lr": rate}))
    found.append(Variant("VeRA r=64 MLP", "vera", {"rank": 64}, MLP, {"lr": 3e-2}))
    for n, rate in ((128, 4e-2), (512, 3e-2)):
        fourier = {"n": n, "alpha": 64.0}
        found.append(Variant(f"FourierFT n={n} MLP", "fourierft", fourier, MLP, {"lr": rate}))
    chosen = ("LoRA r=4 MLP", "NOLA k=l=64 MLP", "FourierFT n=128 MLP")
    found += [fp32(variant) for variant in found if variant.label in chosen]
    return [*found, Variant("full fine-tuning", "full", config={"lr": 1e-3})]


def main() -> None:
    args = parser(__doc__, "data", "models").parse_args()
    chosen = choose(variants(), args.only)
    if args.small:
        chosen = choose(chosen, ["LoRA r=1 QV", "NOLA k=l=64 MLP", "full*"])
    rows = compare([make_task(args)], chosen, args.seeds, args.cache)
    print_table(rows, percent=False)
    finish(task="story-roles", smallest=smallest(rows, higher_is_better=False), rows=rows)


if __name__ == "__main__":
    main()
