"""Tensors of a safetensors file as float32, one at a time, sizes checked before anything is read.

NumPy has no bfloat16, so `safetensors.numpy` cannot read what most language models are saved in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError
from regrow_toolchain.models import StoredTensor

__all__ = ["check_stored", "matrix_shape", "read_float32", "read_matrix"]

# Bytes of a number; each of these is a float32 without loss.
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """(rows, columns) of a matrix, or of the kernel of a convolution of size 1; None for others."""
    first, rest = shape[:2], shape[2:]
    whole = len(first) == 2 and all(size == 1 for size in rest)
    return (first[0], first[1]) if whole else None


def check_stored(tensor: StoredTensor) -> None:
    """Raise `FormatError` unless its dtype is read here and its shape gives its size."""
    width = _WIDTHS.get(tensor.dtype)
    if width is None:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name} must be {', '.join(_WIDTHS)}, "
            f"got {tensor.dtype:.20}: save it in float32"
        )
    numbers = (*tensor.shape, tensor.start, tensor.size)
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if not whole or math.prod(tensor.shape) * width != tensor.size:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name} must have as many bytes as its shape says, "
            f"got {tensor.size} for {list(tensor.shape)!r:.80}"
        )


def read_float32(tensor: StoredTensor) -> NDArray[np.float32]:
    """The tensor in its shape, every number as it is stored.

    Raises:
        FormatError: it is cut short, or holds NaN or infinity.
    """
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        data = stream.read(tensor.size)
    if len(data) != tensor.size:
        raise FormatError(f"{tensor.path}: tensor {tensor.name} is cut short")
    values = _widen(data, tensor.dtype).reshape(tensor.shape)
    if not np.isfinite(values).all():
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name} must be finite, got NaN or infinity"
        )
    return values


def read_matrix(tensor: StoredTensor) -> NDArray[np.float32]:
    """The same as a matrix, for a tensor that has a `matrix_shape`."""
    return read_float32(tensor).reshape(tensor.shape[:2])


def _widen(data: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        words = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        return words.view(np.float32)
    return np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
