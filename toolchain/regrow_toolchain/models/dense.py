"""Dense backbones: of a Hugging Face directory or the hub, and what a function returns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.fields import parse_json
from regrow_format.files import read_bytes

from .architecture import first_line, model_class
from .backbone import COMPANIONS, MAX_JSON, Backbone
from .description import class_count, describe_checkpoint, describe_module
from .huggingface import quiet_transformers
from .identity import INDEX, backbone_id, memory_id
from .module_factory import check_finite, check_weights, made_by, unique_tensors
from .pooling import with_pooling
from .structure import find_head

__all__ = ["HUB_NAME", "fetch", "load_module", "load_pretrained"]

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HF_WEIGHTS = "model.safetensors"


def fetch(name: str) -> Path:
    """The model's files in the hub's own cache; only what is needed, and nothing pickled.

    Raises:
        RegrowError: the hub did not give the model.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", INDEX, *COMPANIONS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise RegrowError(
            f"model must be a folder here or a name on the hub, got {name}: it could not be "
            f"fetched ({type(error).__name__})"
        ) from error


def load_module(function: str) -> Backbone:
    """What `package.module:function` returns.

    Raises:
        UsageError: there is no such function, it returns no model, or what it says does not fit.
        RegrowError: the function failed, or weights are not finite.
    """
    model = made_by(function)
    check_weights(model, function)
    backbone = describe_module(model, function)
    backbone.backbone_id = memory_id(unique_tensors(model), backbone.head)
    return backbone


def load_pretrained(folder: Path) -> Backbone:
    """The model of a Hugging Face directory: fp32, in eval mode, with its pooling.

    Raises:
        UsageError: it has no weights that are safe to read, or names no model of transformers.
        FormatError: files are broken, or lack weights of the body.
        RegrowError: weights are not finite.
    """
    weights = _weight_files(folder)
    model, drawn = _from_pretrained(folder)
    head = find_head(model, class_count(model))
    parts = tuple(f"{layer}." for layer in head)
    missing = [name for name in drawn if not name.startswith(parts)]
    if missing:
        raise FormatError(f"{folder}: weights lack {', '.join(sorted(missing)[:5])}")
    check_finite(model, str(folder))
    model = with_pooling(model.eval(), folder)
    backbone = describe_checkpoint(folder, model, backbone_id(weights, head), head)
    if any(name.startswith(parts) for name in drawn):
        backbone.labels = ()  # the head was drawn at random: its outputs mean nothing yet
    return backbone


def _from_pretrained(folder: Path) -> tuple[Any, Sequence[str]]:
    """The model, and the parameters that its weights lack: they were drawn at random."""
    made_of = model_class(folder)
    with quiet_transformers():
        try:
            model, info = made_of.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True,
                torch_dtype=torch.float32,
            )  # fmt: skip
        except Exception as error:  # transformers raises many kinds on broken directories
            broken = "; copy or fetch it again" if isinstance(error, SafetensorError) else ""
            raise FormatError(
                f"{folder} could not be loaded: {first_line(error)}{broken}"
            ) from error
    return model, info["missing_keys"]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _HF_WEIGHTS).is_file():
        return [folder / _HF_WEIGHTS]
    if (folder / INDEX).is_file():
        index = parse_json(read_bytes(folder / INDEX, limit=MAX_JSON, what="an index"), INDEX)
        return [folder / name for name in sorted(set(index.take("weight_map", dict).values()))]
    pickled = [p.name for p in folder.glob("*.bin")]
    why = f"only {pickled[0]}, which is pickle: save it as safetensors" if pickled else "none"
    raise UsageError(f"{folder} must have {_HF_WEIGHTS}, got {why}")
