"""What a backbone is: a model with its identity, task, head, labels and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from regrow_format.errors import UsageError
from regrow_inputs import PREPROCESSOR, ImagePreprocessor

from .low_rank import Plan

__all__ = ["COMPANIONS", "HF_CONFIG", "MAX_JSON", "Backbone", "companions_in"]

HF_CONFIG = "config.json"
MAX_JSON = 64 << 20  # bytes of a JSON file among its files

# The files that travel from a model's directory to the backbone and on to the bundle.
COMPANIONS = (
    HF_CONFIG,
    PREPROCESSOR,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


@dataclass(eq=False)
class Backbone:
    """A model with what is known of it.

    Attributes:
        model: in eval mode, fp32, on the CPU.
        task: optimum's name of the task, such as "image-classification".
        head: module paths of the head's linear layers, first to last.
        labels: class names in the order of the outputs; empty if it is no classifier, or if the
            checkpoint has no head.
        layers: the layers that are factored; empty for a dense model.
        files: config, preprocessing and tokenizer files that go with it.
        report: what compression measured; kept in `regrow.json`.
        function: `package.module:function` where a function made the model, else empty.
    """

    model: nn.Module
    backbone_id: str
    task: str
    head: tuple[str, ...]
    labels: tuple[str, ...]
    files: tuple[Path, ...] = ()
    layers: tuple[Plan, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    function: str = ""

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def folder(self) -> Path | None:
        """Where its files lie, all of them in one place; None without any."""
        return self.files[0].parent if self.files else None

    def preprocessor(self) -> ImagePreprocessor:
        """The image preprocessing that training and the device share.

        Raises:
            UsageError: the directory has no preprocessor_config.json.
        """
        folder = next((f.parent for f in self.files if f.name == PREPROCESSOR), None)
        if folder is None:
            raise UsageError(
                f"model must have {PREPROCESSOR} to take images, got none: save its image "
                "processor beside it, or give ready pixel_values in an .npz"
            )
        return ImagePreprocessor.from_folder(folder)


def companions_in(folder: Path) -> tuple[Path, ...]:
    """Those of `COMPANIONS` that a folder has."""
    return tuple(folder / name for name in COMPANIONS if (folder / name).is_file())
