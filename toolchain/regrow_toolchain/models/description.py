"""What a model is by its class, its config and its own word: task, head, labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from regrow_format.errors import UsageError

from .backbone import Backbone, companions_in
from .module_factory import declared
from .structure import find_head

__all__ = ["class_count", "describe_checkpoint", "describe_module"]

_TASKS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForAudioClassification": "audio-classification",
}
_AUDIO = ("input_values", "input_features")  # what models of audio take


def describe_checkpoint(
    folder: Path, model: nn.Module, identity: str, head: Sequence[str]
) -> Backbone:
    """A model of transformers from a folder, with what its class and its config say."""
    # Heads side by side are none that an adapter could replace, but their classes have names.
    classifies = bool(head) or type(model).__name__.endswith("WithTeacher")
    labels = _names(model, class_count(model) or 0) if classifies else ()
    return Backbone(model, identity, _task(model), tuple(head), labels, companions_in(folder))


def describe_module(model: nn.Module, function: str) -> Backbone:
    """A module that a function made, with what it says of itself or else looks like; without an id.

    Raises:
        UsageError: what it says does not fit.
    """
    said = declared(model, function)
    head = find_head(model, class_count(model)) if said.head is None else said.head
    plain = "classification" if head else "feature-extraction"
    task = said.task or (_task(model) if _is_transformers(model) else plain)
    outputs = len(model.get_submodule(head[-1]).get_parameter("weight")) if head else 0
    labels = _names(model, outputs) if said.labels is None else said.labels
    if head and len(labels) != outputs:
        raise UsageError(
            f"{function}: labels must be one per output of {head[-1]}, got {len(labels)} for "
            f"{outputs}"
        )
    return Backbone(model, "", task, head, labels, function=function)


def _names(model: nn.Module, outputs: int) -> tuple[str, ...]:
    """Class names as the model's config has them, or else numbers."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names.get(i, i)) for i in range(outputs))


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "model_type")


def class_count(model: nn.Module) -> int | None:
    """How many classes the model's config says that it tells apart, if it does."""
    return getattr(getattr(model, "config", None), "num_labels", None)


def _task(model: nn.Module) -> str:
    """optimum's name of what a class of transformers does."""
    architecture = type(model).__name__
    found = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    if found == "text-classification" and getattr(model, "main_input_name", "") in _AUDIO:
        return "audio-classification"
    return found or "feature-extraction"
