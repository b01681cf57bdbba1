"""What an ONNX graph of a bundle takes and gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import FormatError, UsageError
from .fields import Fields
from .record import Record

__all__ = ["GraphSpec", "TensorSpec", "parse_graph", "parse_tensor"]

_MAX_DIMENSIONS = 16
_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
           "float16", "float32", "float64")  # fmt: skip


class TensorSpec(Record):
    """A graph input or output; a dimension is a number, or a name if it is dynamic."""

    name: str
    dtype: str  # as NumPy names it, such as "float32"
    shape: tuple[int | str, ...]

    def taken(self, values: ArrayLike) -> NDArray[Any]:
        """The array in this dtype; `UsageError` if it is of another kind or shape."""
        array = np.asarray(values)
        wanted = np.dtype(self.dtype)
        if array.dtype != wanted:
            if not np.can_cast(array.dtype, wanted, casting="same_kind"):
                raise UsageError(f"{self.name} must be {wanted}, got {array.dtype}")
            array = array.astype(wanted)
        if not self._fits(array.shape):
            raise UsageError(
                f"{self.name} must be of shape {list(self.shape)}, got {list(array.shape)}"
            )
        return array

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == got
            for want, got in zip(self.shape, shape, strict=True)
        )


class GraphSpec(Record):
    """One ONNX file; `inputs` are those that a caller must feed, slots are not among them."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def parse_graph(part: Fields) -> GraphSpec:
    """Read and check one of the manifest's `graphs`."""
    spec = GraphSpec(
        name=part.take("name", str),
        file=part.take("file", str),
        inputs=tuple(parse_tensor(item) for item in part.objects("inputs")),
        outputs=tuple(parse_tensor(item) for item in part.objects("outputs")),
    )
    part.done()
    return spec


def parse_tensor(part: Fields) -> TensorSpec:
    """Read and check a graph input or output."""
    shape = part.take("shape", list)
    whole = all(isinstance(d, str) or (type(d) is int and d >= 0) for d in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{part.where}: shape must be numbers and names, got {shape!r:.80}")
    spec = TensorSpec(part.take("name", str), part.choice("dtype", _DTYPES), tuple(shape))
    part.done()
    return spec
