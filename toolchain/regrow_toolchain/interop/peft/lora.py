"""LoRA as PEFT saves it.

PEFT computes W x + s B (A x) with A [r, in], B [out, r] and s = alpha / r, or alpha / sqrt(r) with
rsLoRA (`peft.tuners.lora.layer.LoraLayer.update_layer`); `rank_pattern` and `alpha_pattern` give
layers their own r and alpha. A and B are the same way round for Conv1D (`fan_in_fan_out`). Here A
and B come in number by number, s goes into the scales of B's rows, and ranks are padded to the
largest with rows of zeros, which change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from regrow_format.adapter import Target
from regrow_format.errors import FormatError
from regrow_format.fields import Fields

from .base_model import Base, Widths
from .config import MERGE, Patterns, flag, patterns, take_any
from .method import Parts, PeftKind, Row
from .tensors import read_float32

__all__ = ["PeftLora"]

FACTORS = ("lora_A", "lora_B")

_MAX_RANK = 1 << 12
_REFUSED = {
    "lora_bias": "a bias of lora_B has no place in an adapter yet",
    "target_parameters": "parameters that belong to no linear layer cannot be changed",
    "trainable_token_indices": "embeddings of tokens cannot be changed",
    "layer_replication": "the layers are not those of the backbone",
    "alora_invocation_tokens": "aLoRA switches on at a token",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA's factors are blocks of a diagonal",
    "arrow_config": "Arrow chooses among several adapters",
    "kasa_config": "KaSA has a diagonal between A and B, and changes the base's weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA's layers are not plain LoRA",
    "megatron_config": "Megatron's layers are parallel ones",
    "enable_lora": "layers of PEFT before 0.3 that adapt parts of a weight",
}
_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


@dataclass(frozen=True)
class PeftLora(PeftKind):
    """What the config says about a layer's rank and scale."""

    peft_type = "LORA"
    title = "LoRA"
    method = "lora"
    parts: ClassVar[tuple[str, ...]] = FACTORS
    ending = ".weight"
    neutral = frozenset({
        "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_core", "merge_weights", "qalora_group_size", "runtime_config",
    })  # fmt: skip
    refused = _REFUSED
    reasons = (
        (".lora_embedding_", "is an embedding's LoRA, which cannot come in: adapt linear layers"),
        (".lora_magnitude_vector", "is DoRA's, where use_dora is not set: set it to true"),
        (".lora_", "is no A or B of plain LoRA"),
    )

    saved: tuple[str, ...]
    rank: int
    alpha: float
    rslora: bool
    ranks: Patterns[int]
    alphas: Patterns[float]

    @classmethod
    def read(cls, fields: Fields, saved: tuple[str, ...]) -> Self:
        """r, lora_alpha, use_rslora, use_dora, rank_pattern, alpha_pattern."""
        _check_start(fields)
        flag(fields, "use_dora")  # of `PeftDora` where it is true
        return cls(
            saved,
            rank=fields.number("r", 1, _MAX_RANK, 8),
            alpha=fields.take("lora_alpha", float, 8.0),
            rslora=flag(fields, "use_rslora"),
            ranks=patterns(fields, "rank_pattern", lambda p, n: p.number(n, 1, _MAX_RANK)),
            alphas=patterns(fields, "alpha_pattern", lambda p, n: p.take(n, float)),
        )

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its module path."""
        return next((r for pattern, r in self.ranks if pattern.match(layer)), self.rank)

    def scaling_of(self, layer: str) -> float:
        """alpha / r of a layer, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        alpha = next((a for pattern, a in self.alphas if pattern.match(layer)), self.alpha)
        rank = self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def widths(self, layer: str, parts: Parts, base: Base) -> Widths | str:
        """Those of A [r, in] and B [out, r]."""
        a, b = (parts[part].shape for part in FACTORS)
        if len(a) != 2 or len(b) != 2:
            return f"{layer} must be a linear layer, got factors {list(a)} and {list(b)}"
        rank = self.rank_of(layer)
        if (a[0], b[1]) != (rank, rank):
            return (
                f"{layer} must have factors [{rank}, in] and [out, {rank}], as its config says, "
                f"got {list(a)} and {list(b)}"
            )
        return a[1], b[0]

    def settings(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The largest rank; what differs between layers stands in the scales alone."""
        rank = max(self.rank_of(target.name) for target in targets)
        return {"rank": rank, "alpha": self.alpha, "rslora": self.rslora}

    def rows(self, target: Target, parts: Parts, settings: Mapping[str, Any]) -> Iterator[Row]:
        """A [rank, in] and B [rank, out]."""
        a, b = (read_float32(parts[part]) for part in FACTORS)
        more = ((0, settings["rank"] - len(a)), (0, 0))
        yield f"A.{target.in_features}", np.pad(a, more), 1.0
        yield f"B.{target.out_features}", np.pad(b.T, more), self.scaling_of(target.name)


def _check_start(fields: Fields) -> None:
    start = take_any(fields, "init_lora_weights")
    if start is not None and not any(start is s or start == s for s in _STARTS):
        raise FormatError(
            f"{fields.where}: init_lora_weights must be one that leaves the base's weights as they "
            f"are, got {start!r:.40}: save it with PEFT's save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...), {MERGE}"
        )
