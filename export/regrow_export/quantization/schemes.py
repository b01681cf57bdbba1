"""How weights are rounded below fp32: the one home of scheme and parameters.

Weights are those of a MatMul, float32 [in, out], as they stand in the graph. Rounding is ONNX
Runtime's own, so what is trained on rounded weights is what the device computes with:

- fp16: to the nearest, ties to even.
- int8: `quantize_dynamic(per_channel=True, reduce_range=True, weight_type=QInt8)`: symmetric, codes
  -64 to 64, one scale per output channel. Processors without VNNI multiply inputs of 8 bits with
  such codes in pairs, whose sums saturate at 16 bits (`regrow_format.integers`): 255 (64 + 64) is
  the most that fits, whichever codes meet. Codes to 127 would be wrong there, in silence, and
  unsigned codes slower everywhere.
- int4: `MatMulNBitsQuantizer`, symmetric, codes -8 to 7, one scale per block of inputs and output;
  the entry of largest magnitude of a block is code -8, so a scale may be negative. The codes are
  those of the operator MatMulNBits, which opset 18 allows; ONNX Runtime's writer of int4 tensors
  (opset 21) has the same scales and decides only ties between two codes otherwise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import RegrowError, UsageError
from regrow_format.integers import SAFE_CODES
from regrow_format.rounding import Rounding

__all__ = [
    "INT4_BLOCK",
    "INT4_SYMMETRIC",
    "INT8_ROUNDING",
    "PRECISIONS",
    "check_precision",
    "half",
    "int4_blocks",
    "int8_channels",
    "round_weight",
]

PRECISIONS = ("fp32", "fp16", "int8", "int4")
INT8_ROUNDING = Rounding(scheme="symmetric", range=SAFE_CODES, axis="out")
INT4_BLOCK = 32  # inputs that share a scale: a power of two from 16 on, as MatMulNBits asks
INT4_SYMMETRIC = True

_HALF_END = 65520  # from here on the nearest is infinity
_INT4_MIDDLE = 8  # MatMulNBits stores code + 8


def check_precision(precision: str) -> None:
    """Raise `UsageError` unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def round_weight(weight: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    """`weight` [in, out] rounded and back in float32: what the deployed layer multiplies by.

    Raises:
        UsageError: `precision` is unknown.
        RegrowError: a weight is not finite, or too large for fp16.
    """
    check_precision(precision)
    if precision == "fp32":
        return weight
    if precision == "fp16":
        return half(weight).astype(np.float32)
    if precision == "int8":
        codes, scale = int8_channels(weight)
        return codes.astype(np.float32) * scale
    packed, scales = int4_blocks(weight)
    return _from_blocks(packed, scales, weight.shape[0])


def half(weight: NDArray[np.float32]) -> NDArray[np.float16]:
    """`weight` in fp16.

    Raises:
        RegrowError: a weight is not finite, or too large.
    """
    _check_finite(weight)
    if (top := float(np.abs(weight).max(initial=0))) >= _HALF_END:
        raise RegrowError(f"weight must be below {_HALF_END} for fp16, got {top:g}")
    return weight.astype(np.float16)


def int8_channels(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes int8 [in, out] and scales float32 [out] of `weight` [in, out].

    Raises:
        RegrowError: a weight is not finite.
    """
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import quantize_nparray

    _check_finite(weight)
    # Twice the largest magnitude, divided in float64: ONNX Runtime computes a scale from a range.
    low, high = INT8_ROUNDING.range
    top = np.abs(weight).max(axis=0, initial=0).astype(np.float64)
    scale = (2 * top / (high - low)).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1
    codes: NDArray[np.int8] = quantize_nparray(TensorProto.INT8, weight, scale, np.int8(0))
    return codes, scale


def int4_blocks(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The operands of MatMulNBits that stand for `weight` [in, out].

    Returns:
        Codes + 8, uint8 [out, blocks, INT4_BLOCK / 2], two to a byte, the first in the low half;
        the last block is filled with zeros. Scales, float32 [out, blocks].

    Raises:
        RegrowError: a weight is not finite.
    """
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    _check_finite(weight)
    rows, columns = weight.shape
    blocks = -(-rows // INT4_BLOCK)
    filled = np.zeros((blocks * INT4_BLOCK, columns), dtype=np.float32)
    filled[:rows] = weight
    packed = np.zeros((columns, blocks, INT4_BLOCK // 2), dtype=np.uint8)
    scales = np.zeros((columns, blocks), dtype=np.float32)
    zero_points = np.zeros((columns, -(-blocks // 2)), dtype=np.uint8)  # not used: symmetric
    quantize_matmul_4bits(
        packed, filled, scales, zero_points, INT4_BLOCK, columns, rows, INT4_SYMMETRIC
    )
    return packed, scales


def _from_blocks(
    packed: NDArray[np.uint8], scales: NDArray[np.float32], rows: int
) -> NDArray[np.float32]:
    """float32 [in, out] from what `int4_blocks` gives."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, INT4_BLOCK)
    values = (codes.astype(np.float32) - _INT4_MIDDLE) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(len(scales), -1)[:, :rows].T)


def _check_finite(weight: NDArray[np.float32]) -> None:
    if not np.isfinite(weight).all():
        raise RegrowError("weight must be finite to be rounded, got NaN or infinity")
