"""What a precision costs: a score of the bundle beside that of the model in torch, in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regrow_export.tracing import completed
from regrow_format.errors import RegrowError
from regrow_format.manifest import Score

if TYPE_CHECKING:
    import onnxruntime as ort

    from regrow_format.kv_cache import CacheSpec

    from .evaluation import Measure

__all__ = ["scored"]


def scored(
    session: ort.InferenceSession,
    outputs: Sequence[str],
    cache: CacheSpec | None,
    exact: nn.Module,
    measure: Measure | None,
) -> Score | None:
    """What `measure` gives for `exact`, in torch, and for the bundle; None without a measure.

    Args:
        outputs: of the graph, that torch gives too.

    Raises:
        RegrowError: the samples are not what the model takes, or a score is no finite number.
    """
    if measure is None:
        return None
    fp32, variant = measure.scores(exact, _Bundle(session, outputs, cache))
    for value in (fp32, variant):
        if not math.isfinite(value):
            raise RegrowError(
                f"{measure.metric} must be a finite number, got {value} on {measure.samples} "
                "samples: give others, or more of them"
            )
    return Score(measure.metric, measure.higher_is_better, measure.samples, fp32, variant)


class _Bundle(nn.Module):
    """A session that is called as the model is: tensors by name in, the model's outputs out."""

    def __init__(
        self, session: ort.InferenceSession, outputs: Sequence[str], cache: CacheSpec | None
    ) -> None:
        super().__init__()
        self.session, self.outputs, self.cache = session, list(outputs), cache

    def forward(self, **inputs: Tensor) -> Any:
        """A tensor, or an object with one by name, as torch's module gives it."""
        names = [value.name for value in self.session.get_inputs()]
        given = completed({name: x.numpy() for name, x in inputs.items()}, names)
        if "input_ids" in given and "token_type_ids" in names:
            given.setdefault("token_type_ids", given["input_ids"] * 0)
        past = self.cache.empty(len(next(iter(given.values())))) if self.cache else {}
        fed = {name: value for name, value in {**past, **given}.items() if name in names}
        try:
            found = self.session.run(self.outputs, fed)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RegrowError(f"samples must be what the model takes, got: {lines[0]}") from error
        tensors = dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))
        return tensors["output"] if self.outputs == ["output"] else SimpleNamespace(**tensors)
