"""Which tensor of `adapter_model.safetensors` is what, from the file's header alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from regrow_format.errors import FormatError, UsageError
from regrow_toolchain.models import StoredTensor, stored_tensors

from .config import MERGE
from .method import PeftKind
from .tensors import check_stored

__all__ = ["WEIGHTS", "Stored", "read_header"]

WEIGHTS = "adapter_model.safetensors"

_BASE, _PREFIX = "base_model.", "base_model.model."
_SAVED = re.compile(r"(?P<module>.+)\.(?P<part>weight|bias)")
_REASONS = ((".base_layer.", "is a weight of the backbone: save with save_embedding_layers=False"),)
_SHOWN = 5


@dataclass(frozen=True)
class Stored:
    """Tensors that are known by name, not read yet.

    Attributes:
        layers: by layer and part.
        shared: those of the whole adapter, by name.
        saved: by module path, "weight" and "bias" of whole modules that were trained.
    """

    layers: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    saved: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)


def read_header(folder: Path, kind: PeftKind) -> Stored:
    """Sort the tensors of a PEFT directory; nothing of them is read.

    Raises:
        UsageError: there is no safetensors file.
        FormatError: it is broken, or holds tensors that are neither the method's nor a module's
            weight or bias; all are listed.
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
        if (reason := _sort(tensor, stored, kind)) is not None:
            unknown.append(f"{tensor.name!r:.120} {reason}")
    if unknown:
        more = f"; {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise FormatError(
            f"{path} must hold {kind.title} of linear layers alone, got "
            f"{'; '.join(unknown[:_SHOWN])}{more}; {MERGE}"
        )
    _check_parts(stored, path, kind)
    return stored


def _named(parts: tuple[str, ...]) -> str:
    """Files of older versions keep the adapter's name: `….lora_A.default.weight`."""
    return rf"(?P<part>{'|'.join(parts)})(\.[^.]+)?"


def _of_layer(name: str, kind: PeftKind) -> re.Match[str] | None:
    """The groups `layer` and `part` of a tensor of the method, None if it is none."""
    ended = tuple(part for part in kind.parts if part not in kind.bare)
    for parts, ending in ((ended, re.escape(kind.ending)), (kind.bare, "")):
        own = rf"(?P<layer>.+)\.{_named(parts)}{ending}"
        if parts and (found := re.fullmatch(own, name)):
            return found
    return None


def _sort(tensor: StoredTensor, stored: Stored, kind: PeftKind) -> str | None:
    """Put the tensor where it belongs; the reason if there is no such place."""
    check_stored(tensor)
    if not tensor.name.isprintable():
        return "has no printable name"
    if kind.shared and (found := re.fullmatch(_BASE + _named(kind.shared), tensor.name)):
        return _put(stored.shared, found["part"], tensor, "the adapter")
    if not tensor.name.startswith(_PREFIX):
        return f"does not begin with {_PREFIX}"
    name = tensor.name.removeprefix(_PREFIX)
    if found := _of_layer(name, kind):
        layer = found["layer"]
        return _put(stored.layers.setdefault(layer, {}), found["part"], tensor, layer)
    for part, reason in (*kind.reasons, *_REASONS):
        if part in f".{name}":
            return reason
    # Older files keep how PEFT wraps a module: `classifier.modules_to_save.default.weight`.
    module = _SAVED.fullmatch(re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name))
    if module is None:
        return f"is neither {', '.join(kind.parts)} nor a module's weight or bias"
    path = module["module"]
    return _put(stored.saved.setdefault(path, {}), module["part"], tensor, path)


def _put(parts: dict[str, StoredTensor], part: str, tensor: StoredTensor, of: str) -> str | None:
    if part in parts:
        return f"is there twice, for {of} of two adapters: save one alone"
    parts[part] = tensor
    return None


def _check_parts(stored: Stored, path: Path, kind: PeftKind) -> None:
    names = " and ".join(kind.parts)
    if not stored.layers:
        raise FormatError(f"{path} must have {names} of a layer, got none")
    lost = [
        f"{layer}.{part}"
        for layer, parts in stored.layers.items()
        for part in kind.parts
        if part not in parts
    ]
    if lost:
        raise FormatError(f"{path} must have {names} of every layer, {', '.join(lost[:_SHOWN])} "
                          "missing: save it again")  # fmt: skip
