"""What a precision costs: accuracy of the bundle beside that of the model in torch, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import RegrowError, UsageError

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn

__all__ = ["Samples", "accuracies"]

_BATCH = 16


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs by argument name of `forward`, batch first, and the class of each sample.

    Raises:
        UsageError: they differ in their numbers, or there are none.
    """

    inputs: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        counts = {name: len(value) for name, value in self.inputs.items()}
        if self.labels.ndim != 1 or not len(self.labels) or set(counts.values()) != {len(self)}:
            raise UsageError(
                "samples must be one class per row of every input, got labels "
                f"{list(self.labels.shape)} for {counts}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, start: int, count: int) -> dict[str, NDArray[Any]]:
        """Some rows of the inputs."""
        return {name: value[start : start + count] for name, value in self.inputs.items()}


def accuracies(
    session: ort.InferenceSession, model: nn.Module, samples: Samples | None
) -> dict[str, float]:
    """`accuracy_fp32`, of `model` in torch, and `accuracy_variant`, of the bundle; or nothing.

    The bundle sees one sample at a time, as on a device: rounded inputs of layers depend on the
    whole batch.
    """
    if samples is None:
        return {}
    output = session.get_outputs()[0].name
    try:
        exact = _torch_logits(model, samples, output)
        found = _bundle_logits(session, samples, output)
    except Exception as error:  # models raise whatever comes up inside, sessions their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RegrowError(f"samples must be what the model takes, got: {lines[0]}") from error
    return {
        "accuracy_fp32": _accuracy(exact, samples, output),
        "accuracy_variant": _accuracy(found, samples, output),
    }


def _torch_logits(model: nn.Module, samples: Samples, output: str) -> NDArray[np.float32]:
    from .trace import run_torch

    starts = range(0, len(samples), _BATCH)
    return np.concatenate([run_torch(model, samples.rows(i, _BATCH))[output] for i in starts])


def _bundle_logits(
    session: ort.InferenceSession, samples: Samples, output: str
) -> NDArray[np.float32]:
    names = {value.name for value in session.get_inputs()}
    found = []
    for row in range(len(samples)):
        fed = {name: value for name, value in samples.rows(row, 1).items() if name in names}
        found.append(session.run([output], fed)[0])
    return np.concatenate(found)


def _accuracy(logits: NDArray[np.float32], samples: Samples, output: str) -> float:
    if logits.ndim != 2:
        raise UsageError(
            f"samples must be left out for a model that gives {output} {list(logits.shape)}, "
            "not [batch, classes]"
        )
    return float((logits.argmax(axis=-1) == samples.labels).mean())
