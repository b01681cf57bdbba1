"""Sentence embeddings: the pooling that a sentence-transformers directory describes, in the model.

Reads `modules.json` and `1_Pooling/config.json`; the package itself is not needed.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import Fields, parse_json
from regrow_format.files import read_bytes

__all__ = ["Pooling", "read_pooling", "with_pooling", "write_pooling"]

OUTPUT = "sentence_embedding"
_MODULES = "modules.json"
_MAX_BYTES = 1 << 20
_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token",
          "max": "pooling_mode_max_tokens"}  # fmt: skip
_FOLDER = "1_Pooling"


@dataclass(frozen=True)
class Pooling:
    """How tokens become one vector; `normalize` scales it to length 1."""

    mode: str
    normalize: bool

    def __call__(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, length, d] and a mask [batch, length], 0 for padding, to [batch, d]."""
        kept = (torch.ones_like(tokens[..., 0]) if mask is None else mask).unsqueeze(-1)
        kept = kept.to(tokens.dtype)
        if self.mode == "mean":
            found = (tokens * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        elif self.mode == "max":
            found = tokens.masked_fill(kept == 0, torch.finfo(tokens.dtype).min).amax(1)
        else:
            found = tokens[:, 0]
        return functional.normalize(found, dim=-1) if self.normalize else found


def read_pooling(folder: Path) -> Pooling | None:
    """The directory's pooling, or None if it describes none.

    Raises:
        UsageError: it has modules beside pooling and normalising, or another pooling.
        FormatError: its files are broken.
    """
    if not (folder / _MODULES).is_file():
        return None
    text = read_bytes(folder / _MODULES, limit=_MAX_BYTES, what="a list of modules").decode()
    parts = parse_json(f'{{"modules": {text}}}', str(folder / _MODULES)).objects("modules")
    kinds = {part.take("type", str).rpartition(".")[2]: part.take("path", str) for part in parts}
    odd = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if odd:
        raise UsageError(
            f"{folder / _MODULES} must list Transformer, Pooling and Normalize, got {odd[0]}: give "
            "the model as package.module:function"
        )
    if "Pooling" not in kinds:
        return None
    path = folder / kinds["Pooling"] / "config.json"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FormatError(f"{folder / _MODULES}: a path must lie in the folder, got {path}")
    config = parse_json(read_bytes(path, limit=_MAX_BYTES, what="a pooling"), str(path))
    return Pooling(_mode(config), "Normalize" in kinds)


def _mode(config: Fields) -> str:
    chosen = [n for n in config.names() if n.startswith("pooling_mode_") and config.plain(n, bool)]
    found = [mode for mode, name in _MODES.items() if chosen == [name]]
    if not found:
        raise UsageError(
            f"{config.where}: pooling must be {', '.join(_MODES.values())}, got {chosen}: give "
            "the model as package.module:function"
        )
    return found[0]


def write_pooling(model: nn.Module, folder: Path) -> None:
    """Describe the model's pooling, if it has one, as sentence-transformers does."""
    pooling: Pooling | None = getattr(model, "pooling", None)
    if not isinstance(pooling, Pooling):
        return
    kinds = {"Transformer": "", "Pooling": _FOLDER} | (
        {"Normalize": "2_Normalize"} if pooling.normalize else {}
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (folder / _MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (folder / _FOLDER).mkdir()
    config = {name: mode == pooling.mode for mode, name in _MODES.items()}
    text = json.dumps(config, indent=2) + "\n"
    (folder / _FOLDER / "config.json").write_text(text, encoding="utf-8")


def with_pooling(model: nn.Module, folder: Path) -> nn.Module:
    """The model, which gives `sentence_embedding` too if its directory describes a pooling.

    Its class becomes one of its own with the same name, so that module paths stay.
    """
    pooling = read_pooling(folder)
    if pooling is None:
        return model
    kind = type(model)
    signature = inspect.signature(kind.forward)

    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        given = signature.bind(self, *arguments, **named).arguments
        found = kind.forward(**given)
        found[OUTPUT] = pooling(found.last_hidden_state, given.get("attention_mask"))
        return found

    # Not functools.wraps: optimum calls what a forward wraps, in its place.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    # What `regrow_export.tracing` asks for: further outputs, with the names of their dynamic axes.
    own = {"forward": forward, "pooling": pooling, "extra_outputs": {OUTPUT: {0: "batch_size"}}}
    model.__class__ = type(kind.__name__, (kind,), own)
    return model
