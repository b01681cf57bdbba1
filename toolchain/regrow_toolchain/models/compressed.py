"""Compressed backbones: what `regrow compress` wrote, loaded without the dense weights.

One is a folder with `regrow.json` and `regrow.safetensors`. The weights are not called
`model.safetensors` on purpose: plain `from_pretrained` would load them with random layers and no
error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from regrow_format.errors import FormatError, MismatchError, UsageError

from .architecture import empty_model
from .backbone import HF_CONFIG, Backbone, companions_in
from .compressed_config import CONFIG, CompressedConfig
from .description import describe_checkpoint, describe_module
from .identity import backbone_id
from .low_rank import Plan, apply_plan
from .module_factory import made_by
from .pooling import with_pooling
from .weights import WEIGHTS, load_tied_weights, load_weights

__all__ = ["load_compressed"]


def load_compressed(folder: Path, function: str) -> Backbone:
    """What `regrow compress` wrote.

    Args:
        function: what the user allowed to be imported and called; empty for nothing.

    Raises:
        UsageError: the folder was compressed from what another function makes.
        FormatError: files are broken, or not those that were written together.
        MismatchError: the weights are not those of the model.
    """
    config = CompressedConfig.load(folder)
    if config.function != function:
        raise UsageError(_which_function(folder, config.function, function))
    if function:
        return _of_function(folder, config)
    return _of_huggingface(folder, config)


def _of_huggingface(folder: Path, config: CompressedConfig) -> Backbone:
    model = _with_pairs(empty_model(folder), config.layers, folder, HF_CONFIG)
    load_weights(model, folder / WEIGHTS)
    _check_identity(folder, config)
    model = with_pooling(model.eval(), folder)
    backbone = describe_checkpoint(folder, model, config.backbone_id, config.head)
    return replace(backbone, layers=config.layers, report=config.report)


def _of_function(folder: Path, config: CompressedConfig) -> Backbone:
    model = _with_pairs(made_by(config.function), config.layers, folder, config.function)
    load_tied_weights(model, folder / WEIGHTS)
    _check_identity(folder, config)
    backbone = describe_module(model, config.function)
    if backbone.head != config.head:
        raise FormatError(
            f"{folder / CONFIG}: head must be the model's, {list(backbone.head)}, "
            f"got {list(config.head)}"
        )
    return replace(
        backbone,
        backbone_id=config.backbone_id,
        labels=config.labels or backbone.labels,
        files=companions_in(folder),
        layers=config.layers,
        report=config.report,
    )


def _check_identity(folder: Path, config: CompressedConfig) -> None:
    if (found := backbone_id([folder / WEIGHTS], config.head)) != config.backbone_id:
        raise FormatError(
            f"{folder / WEIGHTS} must have the backbone_id of {CONFIG} ({config.backbone_id}), "
            f"got {found}"
        )


def _which_function(folder: Path, wanted: str, given: str) -> str:
    if not wanted:
        return f"{folder} must be given without {given}@, got one of a Hugging Face directory"
    other = f", got {given}" if given else ""
    return (
        f"{folder} was compressed from a model that {wanted} makes{other}: to import and call "
        f"that, give {wanted}@{folder}"
    )


def _with_pairs(model: nn.Module, plans: tuple[Plan, ...], folder: Path, source: str) -> nn.Module:
    """The model with empty pairs in the places of the factored layers."""
    known = {name for name, _ in model.named_modules() if name}
    if lost := [plan.name for plan in plans if plan.name not in known]:
        raise MismatchError(
            f"{folder / CONFIG} does not fit {source}:",
            [f"{name!r} is no layer of the model" for name in lost],
        )
    try:
        apply_plan(model, plans, empty=True)
    except MismatchError as error:
        raise MismatchError(f"{folder / CONFIG} does not fit {source}: {error}") from None
    return model
