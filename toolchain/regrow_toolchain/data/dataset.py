"""Labelled samples, ready for the model, and how to split them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regrow_runtime.errors import UsageError

__all__ = ["Dataset", "split"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Model inputs with labels.

    Attributes:
        inputs: arrays by the name of the model's argument, samples first.
        labels: int64 [samples], indices into `names`.
        names: class names. `named` is False where they are only numbers from an array, which then
            mean the backbone's own outputs.
    """

    inputs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    named: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Dataset:
        """The samples at `rows`."""
        inputs = {name: array[rows] for name, array in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[rows])


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `share` of every class: (the rest, the part split off).

    A class keeps at least one sample in the rest. With `share` 0 the second part is empty.

    Raises:
        UsageError: `share` is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UsageError(f"holdout must be from 0 to below 1, got {share}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(data))
    held: list[int] = []
    for label in np.unique(data.labels):
        rows = order[data.labels[order] == label]
        held += rows[: min(round(share * len(rows)), len(rows) - 1)].tolist()
    mask = np.zeros(len(data), dtype=bool)
    mask[held] = True
    return data.take(np.flatnonzero(~mask)), data.take(np.flatnonzero(mask))
