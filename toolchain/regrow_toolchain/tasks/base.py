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
        """[N, m]: what scores and losses need of each sample, small.

        Args:
            outputs: [N, ...].
            labels: [N, ...]; a class of -1 is one that the model does not know.
        """
        ...

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        """The score of samples together; NaN without any."""
        ...

    # -- what decides whether an adapter is written: see adapters/acceptance.py ------------------

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """[N]: each sample's loss without smoothing; infinite or NaN where there is none.

        Args:
            folds: [N], equal for samples that were measured with the same adapter.
        """
        ...

    @property
    def gate_metric(self) -> str:
        """What `gate_score` is called."""
        return self.metric

    def gate_score(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> float:
        """The score that must not fall; arguments as of `sample_losses`."""
        return self.score(measured, labels)

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        """By name, [N, m] for `labels`: measured of answers that do not look at samples.

        Args:
            train: the labels that such an answer may be made from.
        """
        return {}
