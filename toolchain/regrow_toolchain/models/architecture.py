"""The class that a Hugging Face config names, and a model of it without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import parse_json
from regrow_format.files import read_bytes

from .backbone import HF_CONFIG, MAX_JSON
from .huggingface import import_transformers, quiet_transformers

__all__ = ["empty_model", "first_line", "model_class"]


def model_class(folder: Path) -> Any:
    """The transformers class that config.json names; no code of the directory is run."""
    transformers = import_transformers()
    path = folder / HF_CONFIG
    config = parse_json(read_bytes(path, limit=MAX_JSON, what="a config"), str(path))
    names = config.strings("architectures")
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UsageError(
            f"{path}: architectures must name a model class of transformers, got {list(names)}"
        )
    return found


def empty_model(folder: Path) -> nn.Module:
    """The model's structure without weights; non-persistent buffers are made as usual.

    Raises:
        UsageError, FormatError: config.json names no model, or is broken.
    """
    import_transformers()
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    architecture = model_class(folder)
    with quiet_transformers():
        try:
            # As its from_pretrained does. AutoConfig does not know every part of a model, but what
            # neither knows is none.
            kind = architecture.config_class
            if kind.get_config_dict(folder)[0].get("model_type") != kind.model_type:
                AutoConfig.from_pretrained(folder, local_files_only=True)
            config = kind.from_pretrained(folder, local_files_only=True)
            with init_empty_weights(include_buffers=False):
                model: Any = architecture(config)
            if (folder / "generation_config.json").is_file():  # such as what ends a text
                model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds on broken directories
            raise FormatError(
                f"{folder / HF_CONFIG} must describe a model: {first_line(error)}"
            ) from error
    return cast(nn.Module, model)


def first_line(error: Exception) -> str:
    """What an exception says first; with the second line where the first one ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
