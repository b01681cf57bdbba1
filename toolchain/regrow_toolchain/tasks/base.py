"""What a kind of training must be able to do: from outputs and labels to losses and a score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Inputs", "Task"]

Inputs = Mapping[str, Tensor]


class Task(Protocol):
    """A kind of training. `U` users stand in a batch with `S` samples each; nothing mixes users."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def metric(self) -> str:
        """What the score is called."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        ...

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """[N, ...]: what the losses and the score are made of."""
        ...

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """[U, S] from outputs [U, S, ...] and labels [U, S, ...].

        Args:
            classes: bool [U, 1, C], which outputs a user has; None if all have all.
            used: bool [U, S], False for rows that only fill up a batch, whose losses nobody reads;
                None if there are none.
        """
        ...

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, m]: what `score` needs of each sample, small; outputs [N, ...], labels [N, ...]."""
        ...

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        """The score of samples together; NaN without any."""
        ...
