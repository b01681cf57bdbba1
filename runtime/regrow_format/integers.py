"""Sums of codes where a bit is 1, exactly: an integer matrix product by ONNX Runtime.

NumPy has no fast product of integers. ONNX Runtime has one on every CPU, `MatMulInteger`, for which
a model of two nodes is enough. It stands here as bytes, because a device has no `onnx`; a test
reads them with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["integer_product"]

# ModelProto: y = Transpose(MatMulInteger(a, b)) for matrices of any size.
_MODEL = (
    b"\x08\x05:c"  # IR version 5, the graph's 99 bytes
    b'\n\x18\n\x01a\n\x01b\x12\x01x"\rMatMulInteger'
    b'\n\x11\n\x01x\x12\x01y"\tTranspose\x12\x01g'
    b"Z\x0f\n\x01a\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00"  # uint8
    b"Z\x0f\n\x01b\x12\n\n\x08\x08\x03\x12\x04\n\x00\n\x00"  # int8
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x06\x12\x04\n\x00\n\x00"  # int32
    b"B\x02\x10\n"  # opset 10
)


def integer_product(
    codes: NDArray[np.int8],
) -> Callable[[NDArray[np.uint8]], NDArray[np.int32]] | None:
    """What multiplies `codes` with ones and zeros: uint8 [entries, k] to int32 [targets, entries].

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
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort  # not above: formats are read where it is not installed, too
    except ImportError:
        return None
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    try:
        return ort.InferenceSession(_MODEL, options, providers=["CPUExecutionProvider"])
    except Exception:  # its errors have no common class; NumPy gives the same bits, more slowly
        return None
