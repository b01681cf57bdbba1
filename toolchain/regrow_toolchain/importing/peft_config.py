"""`adapter_config.json` of a PEFT LoRA: what is read, what changes nothing, what is refused.

Meanings are those of PEFT 0.21 (`peft.tuners.lora`). A field that is set and not known here is an
error: an adapter that computes something else must not come in as if it did not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from regrow_runtime.errors import FormatError, UsageError
from regrow_runtime.fields import Fields, parse_json
from regrow_runtime.files import read_bytes

__all__ = ["CONFIG", "MERGE", "PeftLora", "read_config"]

T = TypeVar("T")

CONFIG = "adapter_config.json"
MERGE = "or merge it into the model with PEFT's merge_and_unload"

_MAX_JSON = 16 << 20
_MAX_RANK = 1 << 12
_MAX_PATTERNS = 1 << 12
_MAX_PATTERN = 500
_MAX_REPEATS = 4  # and groups

# They say which layers there are, which the tensors say too, or belong to training alone.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA also scales whole columns of the weights",
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
class PeftLora:
    """What the config says about a layer's rank and scale.

    Attributes:
        ranks, alphas: patterns over module paths, in the file's order; the first that fits counts.
        saved: the names in `modules_to_save`.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    saved: tuple[str, ...]

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its module path."""
        return next((r for pattern, r in self.ranks if pattern.match(layer)), self.rank)

    def scaling_of(self, layer: str) -> float:
        """alpha / r of a layer, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        alpha = next((a for pattern, a in self.alphas if pattern.match(layer)), self.alpha)
        rank = self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, layer: str) -> bool:
        """Whether `modules_to_save` names the layer, or a module that it lies in, by its end.

        PEFT looks at the end alone: its `classifier` saves `pre_classifier` too.
        """
        parts = layer.split(".")
        inside = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(path.endswith(name) for path in inside for name in self.saved)


def read_config(folder: Path) -> PeftLora:
    """Read and check the config of a PEFT directory.

    Raises:
        UsageError: there is none.
        FormatError: it is broken, of another method, or asks for what regrow cannot do.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"PEFT directory must have {CONFIG}, got {folder}: {_found(folder)}")
    fields = parse_json(read_bytes(path, limit=_MAX_JSON, what="a PEFT config"), str(path))
    _check_method(fields)
    _check_refused(fields)
    _check_start(fields)
    config = PeftLora(
        rank=fields.number("r", 1, _MAX_RANK, 8),
        alpha=fields.take("lora_alpha", float, 8.0),
        rslora=_flag(fields, "use_rslora"),
        ranks=_patterns(fields, "rank_pattern", lambda p, n: p.number(n, 1, _MAX_RANK)),
        alphas=_patterns(fields, "alpha_pattern", lambda p, n: p.take(n, float)),
        saved=fields.strings("modules_to_save") if fields.has("modules_to_save") else (),
    )
    _check_rest(fields)
    return config


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "no such folder"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"give one of its folders, {', '.join(inner[:5])}" if inner else "it has none"


def _check_method(fields: Fields) -> None:
    method = fields.take("peft_type", str)
    if method != "LORA":
        raise FormatError(
            f"{fields.where}: peft_type must be LORA, got {method!r:.40}: import reads LoRA so "
            f"far; train one, {MERGE}"
        )


def _check_refused(fields: Fields) -> None:
    for name, reason in _REFUSED.items():
        if _is_set(value := _take(fields, name)):
            raise FormatError(
                f"{fields.where}: {name} must not be set, got {value!r:.60}: {reason}; train "
                f"without it, {MERGE}"
            )
    if (bias := _take(fields, "bias")) not in (None, "none"):
        raise FormatError(
            f"{fields.where}: bias must be 'none', got {bias!r:.40}: an adapter cannot change the "
            f"backbone's biases yet; train without it, {MERGE}"
        )


def _check_start(fields: Fields) -> None:
    start = _take(fields, "init_lora_weights")
    if start is not None and not any(start is s or start == s for s in _STARTS):
        raise FormatError(
            f"{fields.where}: init_lora_weights must be one that leaves the base's weights as they "
            f"are, got {start!r:.40}: save it with PEFT's save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...), {MERGE}"
        )


def _check_rest(fields: Fields) -> None:
    left = [n for n in fields.names() if n not in _NEUTRAL and _is_set(_take(fields, n))]
    if left:
        raise FormatError(
            f"{fields.where}: fields that are set must be those of PEFT 0.21, got "
            f"{', '.join(sorted(left))!r:.200}: save it with that version, {MERGE}"
        )


def _is_set(value: object) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


def _take(fields: Fields, name: str) -> Any:
    """The field whatever its type; None if it is not there."""
    for kind in (bool, int, float, str, list, dict):
        if fields.holds(name, kind):
            return fields.take(name, kind)
    return None


def _flag(fields: Fields, name: str) -> bool:
    return fields.take(name, bool) if fields.has(name) else False


def _patterns(
    fields: Fields, name: str, take: Callable[[Fields, str], T]
) -> tuple[tuple[re.Pattern[str], T], ...]:
    part = fields.optional(name)
    names = part.names() if part else ()
    if part is None or not names:
        return ()
    if len(names) > _MAX_PATTERNS:
        raise FormatError(f"{part.where}: must have at most {_MAX_PATTERNS} patterns")
    return tuple((_pattern(text, part.where), take(part, text)) for text in names)


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """PEFT's own rule (`peft.utils.other.get_pattern_key`): the end of a path, as an expression.

    Expressions that may take for ever are refused: the file comes from a stranger.
    """
    most = max(len(re.findall(r"[*+{]|(?<!\()\?", text)), text.count("("))
    if len(text) > _MAX_PATTERN or most > _MAX_REPEATS or re.search(r"\)[*+{]", text):
        raise FormatError(
            f"{where}: a pattern must be a name or a short expression without repeated groups, "
            f"got {text!r:.80}: name the layers"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(
            f"{where}: a pattern must be a regular expression, got {text!r:.80}: {error}"
        ) from None
