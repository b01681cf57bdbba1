"""A loss of the user's own, over whatever the model gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_format.errors import UsageError
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, outputs_of

from .base import Fitted, Inputs, Task
from .regression import numbered

__all__ = ["Custom", "Loss"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Custom(Task):
    """`loss(outputs, labels)` gives a loss per sample [N], or one number for all.

    One number serves a single user alone: it cannot be told apart by user. `outputs` is the model's
    tensor, or the first of what it gives. The score is the mean loss. See `Task`.
    """

    loss: Loss
    name = "custom"
    label_words = "what the loss takes"
    metric = "loss"
    higher_is_better = False
    heads = ("tune",)

    @classmethod
    def takes(cls, data: Dataset) -> bool:
        return True

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        """The outputs are the backbone's, whatever the loss makes of them."""
        width, names = _width(backbone), backbone.labels
        return Fitted(data, eval_data, names if len(names) == width else numbered(width))

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        result = outputs_of(model, inputs)
        if isinstance(result, Mapping):
            result = tuple(result.values())
        found: Tensor = result if isinstance(result, Tensor) else result[0]
        return found

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        users, samples = labels.shape[:2]
        found = self._found(outputs.flatten(0, 1), labels.flatten(0, 1))
        if found.dim():
            return found.view(users, samples)
        if users > 1:
            raise UsageError(
                "loss must give one number per sample to train several users at once, got one "
                "for all: return it before its mean is taken"
            )
        return found.expand(1, samples)

    def _found(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[N], or one number for all."""
        found = self.loss(outputs, labels)
        if found.dim() and len(found) != len(labels):
            raise UsageError(
                "loss must give one number per sample, or one for all, "
                f"got {list(found.shape)} for {len(labels)} samples"
            )
        return found.flatten(1).mean(-1) if found.dim() > 1 else found

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, 1]: the loss, of each sample by itself where the function gives one for all."""
        found = self._found(outputs, labels)
        if not found.dim():
            rows = range(len(labels))
            found = torch.stack([self._found(outputs[i : i + 1], labels[i : i + 1]) for i in rows])
        return found.float().unsqueeze(-1).cpu().numpy()


def _width(backbone: Backbone) -> int:
    """How many outputs the backbone's own head has."""
    last = backbone.model.get_submodule(backbone.head[-1]) if backbone.head else None
    return int(getattr(last, "out_features", len(backbone.labels)))
