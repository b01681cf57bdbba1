"""Sums of codes where a bit is 1, exactly: an integer matrix product by ONNX Runtime.

NumPy has no fast product of integers. ONNX Runtime has one on every CPU, `MatMulInteger`, for which
a model of one node is enough; it is written out here, byte by byte, because a device has no `onnx`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["integer_product"]

_UINT8, _INT8, _INT32 = 2, 3, 6  # of onnx.TensorProto.DataType


def integer_product(
    codes: NDArray[np.int8],
) -> Callable[[NDArray[np.uint8]], NDArray[np.int32]] | None:
    """What multiplies ones and zeros with `codes`: uint8 [entries, k] to int32 [entries, targets].

    Args:
        codes: int8 [targets, k].

    Returns:
        A function, or None where ONNX Runtime was built without this operator.
    """
    session = _session()
    if session is None:
        return None
    columns = np.ascontiguousarray(codes.T)

    def product(ones: NDArray[np.uint8]) -> NDArray[np.int32]:
        found: NDArray[np.int32] = session.run(None, {"a": ones, "b": columns})[0]
        return found

    return product


@cache
def _session() -> Any:
    """One for the process, made at first use; any number of threads may run it."""
    import onnxruntime as ort  # not above: whoever imports this module sets its telemetry first

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    try:
        return ort.InferenceSession(_model(), options, providers=["CPUExecutionProvider"])
    except Exception:  # its errors have no common class; NumPy gives the same bits, more slowly
        return None


def _model() -> bytes:
    """ModelProto: IR version 5, opset 10, y = MatMulInteger(a, b)."""
    node = _field(1, b"a"), _field(1, b"b"), _field(2, b"y"), _field(4, b"MatMulInteger")
    graph = (
        _field(1, *node),
        _field(2, b"g"),
        _field(11, *_matrix(b"a", _UINT8)),
        _field(11, *_matrix(b"b", _INT8)),
        _field(12, *_matrix(b"y", _INT32)),
    )
    return _number(1, 5) + _field(7, *graph) + _field(8, _number(2, 10))


def _matrix(name: bytes, dtype: int) -> tuple[bytes, bytes]:
    """ValueInfoProto of a tensor of two dimensions that are not known."""
    shape = _field(2, _field(1), _field(1))
    return _field(1, name), _field(2, _field(1, _number(1, dtype), shape))


def _field(number: int, *parts: bytes) -> bytes:
    """A field of a protobuf message that is text or a message of less than 128 bytes."""
    data = b"".join(parts)
    return bytes([number << 3 | 2, len(data)]) + data


def _number(number: int, value: int) -> bytes:
    """A field that is a number below 128."""
    return bytes([number << 3, value])
