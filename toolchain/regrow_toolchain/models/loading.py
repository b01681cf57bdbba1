"""Open a backbone, whatever it is: the way from a path, a name or a function to its loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from regrow_format.errors import UsageError
from regrow_format.manifest import MANIFEST

from .architecture import empty_model
from .backbone import HF_CONFIG, Backbone
from .compressed import load_compressed
from .compressed_config import CONFIG
from .dense import HUB_NAME, fetch, load_module, load_pretrained
from .module_factory import FUNCTION, made_by

__all__ = ["load_backbone", "load_structure"]


def load_structure(path: str | Path) -> nn.Module:
    """A dense model for looking at its shapes: of a Hugging Face directory, whose weights need not
    be there and are not read, or of `package.module:function`.

    Raises:
        UsageError: there is no such directory or function, or it is a compressed one.
        FormatError: its config is broken.
    """
    folder = Path(path)
    if not folder.exists() and (match := FUNCTION.fullmatch(str(path))) and not match["folder"]:
        return made_by(match["function"])
    if not (folder / HF_CONFIG).is_file() or (folder / CONFIG).is_file():
        raise UsageError(f"model must be a folder with {HF_CONFIG}, or a function, got {path}")
    model: Any = empty_model(folder).eval()
    model.tie_weights()  # each shared weight is counted once
    return cast(nn.Module, model)


def load_backbone(path: str | Path) -> Backbone:
    """Load a Hugging Face directory, what a function returns, or what `regrow compress` wrote.

    A name such as `google/vit-base-patch16-224` that is no folder here is fetched from the hub.
    `package.module:function` is imported (from the current directory too) and called; it returns
    an `nn.Module`, which may say what it is by attributes `labels` (class names), `head` (module
    paths of its head's linear layers) and `task`. What was compressed from such a module is
    `package.module:function@FOLDER`: its folder names the function, but a file's word is not
    enough to run code. Nothing is unpickled, and the dense weights of a compressed Hugging Face
    model are never made.

    Raises:
        UsageError: there is no such directory or function, or it is no model.
        FormatError: files are broken.
        RegrowError: the hub did not give the model, the function failed, or weights are not finite.
    """
    folder = Path(path)
    if not folder.exists() and (match := FUNCTION.fullmatch(str(path))):
        if match["folder"] is None:
            return load_module(match["function"])
        folder = Path(match["folder"])
        if not (folder / CONFIG).is_file():
            raise UsageError(f"backbone must be a folder with {CONFIG} after @, got {folder}")
        return load_compressed(folder, match["function"])
    if not folder.parent.exists() and HUB_NAME.fullmatch(str(path)):
        folder = fetch(str(path))
    if not folder.is_dir():
        found = "it is a file" if folder.is_file() else "no such folder"
        raise UsageError(f"backbone must be a model's folder, got {folder}: {found}")
    if (folder / CONFIG).is_file():
        return load_compressed(folder, "")
    if (folder / MANIFEST).is_file():
        raise UsageError(f"backbone must be a model's folder, got {folder}: it is a bundle")
    if not (folder / HF_CONFIG).is_file():
        raise UsageError(f"backbone must be a model's folder, got {folder}: it has no config.json")
    return load_pretrained(folder)
