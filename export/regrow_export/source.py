"""What is exported: a model in memory, and what its bundle says about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regrow_format.errors import UsageError
from regrow_format.files import no_file
from regrow_format.manifest import MANIFEST
from regrow_runtime.checks import EXPECTED_FILE, PROBE_FILE
from regrow_runtime.slots import HEAD_FILE

if TYPE_CHECKING:
    import torch

__all__ = ["ExportSource"]


@dataclass(frozen=True)
class ExportSource:
    """A backbone to export; the export never changes it.

    Attributes:
        model: in eval mode, float32, on the CPU; a Hugging Face model or any `nn.Module`.
        task: optimum's name of it, such as "image-classification".
        backbone_id: as `regrow.json` of the backbone has it, "sha256:…".
        head: module paths of the linear layers of the task head, in forward order; may be empty.
        labels: names of the head's classes; may be empty.
        files: configuration, tokenizer and the like, copied to the root of the bundle.
    """

    model: torch.nn.Module
    task: str
    backbone_id: str
    head: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def check(self) -> None:
        """Raise `UsageError` unless the model is in eval mode, float32 and on the CPU."""
        if self.model.training:
            raise UsageError("model must be in eval mode, got training mode; call model.eval()")
        for name, value in self.model.state_dict().items():
            kind = str(value.dtype).removeprefix("torch.")
            if value.is_floating_point() and kind != "float32":
                raise UsageError(f"model must be float32, got {name} in {kind}; call model.float()")
            if value.device.type != "cpu":
                raise UsageError(f"model must be on the CPU, got {name} on {value.device}")
        self._check_files()

    def _check_files(self) -> None:
        names = [path.name for path in self.files]
        taken = {MANIFEST, HEAD_FILE, PROBE_FILE, EXPECTED_FILE, "operators.config"}
        taken |= {"backbone.onnx", "backbone.onnx.data"}
        for path in self.files:
            if not path.is_file():
                raise UsageError(f"files must be files, got {path}: {no_file(path)}")
            if path.name in taken or names.count(path.name) > 1:
                raise UsageError(f"files must have names of their own in a bundle, got {path.name}")
