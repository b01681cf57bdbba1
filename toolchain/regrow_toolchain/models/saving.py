"""Write a compressed backbone."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow_format.errors import UsageError
from regrow_format.files import new_folder

from .backbone import HF_CONFIG, Backbone
from .compressed_config import CONFIG, CompressedConfig
from .identity import backbone_id
from .pooling import write_pooling
from .weights import WEIGHTS, save_weights

__all__ = ["save_backbone"]


def save_backbone(
    backbone: Backbone,
    out: str | Path,
    *,
    force: bool = False,
    beside: Callable[[Path], None] = lambda _folder: None,
) -> Backbone:
    """Write a compressed backbone atomically; returns it with its `backbone_id` and its files.

    Args:
        beside: writes further files into the folder, before it gets its name.

    Raises:
        UsageError: `out` exists and `force` is off, or it could not be loaded again: the model is
            neither from a Hugging Face directory nor from a function.
    """
    out = Path(out)
    if not backbone.function and not any(file.name == HF_CONFIG for file in backbone.files):
        raise UsageError(
            f"backbone must come from load_backbone to be saved, got one without {HF_CONFIG} "
            "and without a function"
        )
    with new_folder(out, marker=CONFIG, force=force) as folder:
        save_weights(backbone.model, folder / WEIGHTS)
        identity = backbone_id([folder / WEIGHTS], backbone.head)
        for file in backbone.files:
            shutil.copyfile(file, folder / file.name)
        write_pooling(backbone.model, folder)
        backbone.report = _still_true(backbone, folder / WEIGHTS)
        CompressedConfig(
            identity,
            backbone.head,
            backbone.layers,
            backbone.report,
            backbone.function,
            backbone.labels,
        ).save(folder)
        beside(folder)
    backbone.backbone_id = identity
    backbone.files = tuple(out / file.name for file in backbone.files)
    return backbone


def _still_true(backbone: Backbone, weights: Path) -> dict[str, Any]:
    """The report, without scores if the weights are no more those that were loaded.

    What was just compressed has no id yet, and was scored as it is. The id leaves out the head.
    """
    before = [file.parent / WEIGHTS for file in backbone.files[:1]]
    same = all(path.is_file() and filecmp.cmp(path, weights, shallow=False) for path in before)
    same = not backbone.backbone_id or (bool(before) and same)
    scored = () if same else ("metric", "scores", "samples")
    return {name: value for name, value in backbone.report.items() if name not in scored}
