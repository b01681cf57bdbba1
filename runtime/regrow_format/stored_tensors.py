"""The tensors of a stranger's safetensors file, taken one by one as they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from .errors import FormatError

__all__ = ["StoredTensors"]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "U32": "<u4"}


class StoredTensors:
    """The tensors of a safetensors file; each is taken once, with the dtype and shape it must have.

    Raises:
        FormatError: the bytes are no whole safetensors file.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            self._left: dict[str, dict[str, Any]] = dict(deserialize(data))  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            if len(data) > 8 and data[8:9] != b"{":  # where the header of every such file begins
                raise FormatError(
                    f"{where} must be a whole safetensors file, got another kind of file, which is "
                    "no regrow adapter: give what regrow adapt or import wrote"
                ) from None
            raise FormatError(
                f"{where} must be a whole safetensors file, got a broken one: copy it again "
                f"({error})"
            ) from None

    def take(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        """The array, a view of the file's bytes; `FormatError` unless it is finite and as asked."""
        dtype, found = self._entry(name)["dtype"], tuple(self._entry(name)["shape"])
        if dtype not in dtypes or found != shape:
            raise FormatError(
                f"{self.where}: tensor {name} must be {'/'.join(dtypes)} {list(shape)}, "
                f"got {dtype} {list(found)}"
            )
        entry = self._left.pop(name)
        values = np.frombuffer(entry["data"], dtype=_DTYPES[dtype]).reshape(shape)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FormatError(f"{self.where}: tensor {name} must be finite, got NaN or infinity")
        return values

    def shape(self, name: str, dimensions: range) -> tuple[int, ...]:
        """Of a tensor that has so many dimensions."""
        shape = tuple(self._entry(name)["shape"])
        if len(shape) not in dimensions:
            least = "" if len(dimensions) == 1 else "at most "
            raise FormatError(
                f"{self.where}: dimensions of tensor {name} must be {least}{dimensions[-1]}, "
                f"got {len(shape)}"
            )
        return shape

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._left:
            raise FormatError(f"{self.where}: tensor {name} is missing")
        return self._left[name]

    def holds(self, name: str, dtype: str) -> bool:
        """Whether there is such a tensor of this dtype."""
        entry = self._left.get(name)
        return entry is not None and entry["dtype"] == dtype

    def done(self) -> None:
        """Raise `FormatError` if a tensor was not taken."""
        if self._left:
            raise FormatError(f"{self.where}: unknown tensors {', '.join(sorted(self._left))}")
