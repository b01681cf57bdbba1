"""Which tensor of `adapter_model.safetensors` is what, from the file's header alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from regrow_runtime.errors import FormatError, UsageError
from regrow_toolchain.backbone_id import StoredTensor, stored_tensors

from .peft_config import MERGE
from .tensors import check_stored

__all__ = ["WEIGHTS", "Stored", "read_header"]

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# `….lora_A.weight`; files of older versions keep the adapter's name: `….lora_A.default.weight`.
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")
_SAVED = re.compile(r"(?P<module>.+)\.(?P<part>weight|bias)")
_REASONS = (
    (".lora_embedding_", "is an embedding's LoRA, which cannot come in: adapt linear layers only"),
    (".lora_magnitude_vector", "is DoRA's, which cannot come in: train with use_dora=False"),
    (".lora_", "is no A or B of plain LoRA"),
    (".base_layer.", "is a weight of the backbone: save with save_embedding_layers=False"),
)
_SHOWN = 5


@dataclass(frozen=True)
class Stored:
    """Tensors that are known by name, not read yet.

    Attributes:
        factors: by layer, "A" [r, in] and "B" [out, r].
        saved: by module path, "weight" and "bias" of whole modules that were trained.
    """

    factors: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)


def read_header(folder: Path) -> Stored:
    """Sort the tensors of a PEFT directory; nothing of them is read.

    Raises:
        UsageError: there is no safetensors file.
        FormatError: it is broken, or holds tensors that are neither A, B nor a module's weight or
            bias; all are listed.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = (
            "adapter_model.bin, which is pickle: save it again with safe_serialization=True"
            if pickled
            else "none"
        )
        raise UsageError(f"{folder} must have {WEIGHTS}, got {found}")
    stored, unknown = Stored(), []
    for tensor in stored_tensors(path):
        if (reason := _sort(tensor, stored)) is not None:
            unknown.append(f"{tensor.name!r:.120} {reason}")
    if unknown:
        more = f"; {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise FormatError(
            f"{path} must hold LoRA of linear layers alone, got "
            f"{'; '.join(unknown[:_SHOWN])}{more}; {MERGE}"
        )
    _check_pairs(stored, path)
    return stored


def _sort(tensor: StoredTensor, stored: Stored) -> str | None:
    """Put the tensor where it belongs; the reason if there is no such place."""
    check_stored(tensor)
    if not tensor.name.isprintable():
        return "has no printable name"
    if not tensor.name.startswith(_PREFIX):
        return f"does not begin with {_PREFIX}"
    name = tensor.name.removeprefix(_PREFIX)
    if factor := _FACTOR.fullmatch(name):
        return _put(stored.factors, factor["layer"], factor["part"], tensor)
    for part, reason in _REASONS:
        if part in f".{name}":
            return reason
    # Older files keep how PEFT wraps a module: `classifier.modules_to_save.default.weight`.
    module = _SAVED.fullmatch(re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name))
    if module is None:
        return "is neither lora_A, lora_B nor a module's weight or bias"
    return _put(stored.saved, module["module"], module["part"], tensor)


def _put(
    places: dict[str, dict[str, StoredTensor]], name: str, part: str, tensor: StoredTensor
) -> str | None:
    parts = places.setdefault(name, {})
    if part in parts:
        return f"is there twice, for {name} of two adapters: save one alone"
    parts[part] = tensor
    return None


def _check_pairs(stored: Stored, path: Path) -> None:
    if not stored.factors:
        raise FormatError(f"{path} must have lora_A and lora_B of a layer, got none")
    lost = [
        f"{layer}.lora_{part}"
        for layer, parts in stored.factors.items()
        for part in "AB"
        if part not in parts
    ]
    if lost:
        raise FormatError(f"{path} must have A and B of every layer, {', '.join(lost[:_SHOWN])} "
                          "missing: save it again")  # fmt: skip
