"""Sums of codes where a bit is 1, exactly: an integer matrix product by ONNX Runtime.

NumPy has no fast product of integers. ONNX Runtime has one on every CPU, `MatMulInteger`, for which
a model of one node is enough. Both stand here as bytes, because a device has no `onnx`; a test
reads them with it. The second has the signs in it: ONNX Runtime copies them into the order in which
it multiplies, which takes longer than a product, but then a product takes half as long.

Inputs are uint8 and codes int8, as the fastest instructions have them. Without VNNI, AVX2 and
AVX-512 add the products of two inputs in 16 bits, and what does not fit is cut off (vpmaddubsw in
ONNX Runtime's MLAS, `x86_64/QgemmU8S8KernelAvx2.S`). 255 (64 + 64) fits, 255 (65 + 64) does not:
see `SAFE_CODES`. Sums here never come near: signs make 255 (1 + 1), and ones and zeros 127 + 127.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RegrowError

__all__ = [
    "PACKED_MODEL",
    "PRODUCT_MODEL",
    "SAFE_CODES",
    "PackedSigns",
    "integer_product",
    "product_session",
    "saturates",
    "varint",
]

SAFE_CODES = (-64, 64)  # of weights that any uint8 are multiplied with, exact on every processor

# ModelProto: y = MatMulInteger(a, b) for matrices of any size. To transpose is left to NumPy, which
# widens to floats in the same pass.
PRODUCT_MODEL = (
    b"\x08\x05:P"  # IR version 5, the graph's 80 bytes
    b'\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01g'
    b"Z\x0f\n\x01a\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00"  # uint8
    b"Z\x0f\n\x01b\x12\n\n\x08\x08\x03\x12\x04\n\x00\n\x00"  # int8
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x06\x12\x04\n\x00\n\x00"  # int32
    b"B\x02\x10\n"  # opset 10
)
# y = Mul(Cast(MatMulInteger(a, b, z)), s), where z = 128 is the zero point of a, and b is constant.
PACKED_MODEL = (
    b"\x08\x05:\xa8\x01"  # IR version 5, the graph's 168 bytes
    b'\n\x1b\n\x01a\n\x01b\n\x01z\x12\x01x"\rMatMulInteger'
    b'\n\x17\n\x01x\x12\x01f"\x04Cast*\t\n\x02to\x18\x01\xa0\x01\x02'
    b'\n\x0e\n\x01f\n\x01s\x12\x01y"\x03Mul\x12\x01g'
    b"*\x08\x10\x02B\x01zJ\x01\x80"
    b"*\x20\x08%b\x08%b\x10\x03B\x01bj\r\n\x08location\x12\x01bp\x01"  # int8, given by the caller
    b"Z\x0f\n\x01a\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00"  # uint8
    b"Z\x0f\n\x01s\x12\n\n\x08\x08\x01\x12\x04\n\x00\n\x00"  # float32
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x00\n\x00"  # float32
    b"B\x02\x10\n"
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
    session = product_session()
    if session is None:
        return None
    targets, vectors = codes.shape
    columns = np.zeros((vectors, _whole_tiles(targets)), dtype=np.int8)
    columns[:, :targets] = codes.T

    def product(ones: NDArray[np.uint8]) -> NDArray[np.int32]:
        found: NDArray[np.int32] = session.run(None, {"a": ones, "b": columns})[0]
        return found[:, :targets].T

    return product


def _whole_tiles(columns: int) -> int:
    """At least so many, and a multiple of 16.

    On CPUs with AMX, ONNX Runtime 1.21 to 1.24 leaves every 32nd row of a last tile that is not
    full as it was in memory (its issue 26324).
    """
    return -(-columns // 16) * 16


class PackedSigns:
    """Signs in the order in which ONNX Runtime multiplies them with codes.

    Attributes:
        entries: of each vector.
        nbytes: what ONNX Runtime keeps, a byte per sign and a little more.
    """

    def __init__(self, signs: NDArray[np.int8]) -> None:
        """Of +1 and -1 [vectors, entries], which are copied; `RegrowError` where that fails."""
        vectors, self.entries = signs.shape
        missing = _whole_tiles(self.entries) - self.entries
        signs = np.pad(signs, ((0, 0), (0, missing))) if missing else signs
        self.nbytes = -(-vectors // 64) * 64 * signs.shape[1]  # it fills up its tiles
        try:
            import onnxruntime as ort

            options = _options(ort)
            # Else every product leaves holes in memory, of its sums' size, between what it gave.
            options.enable_cpu_mem_arena = True
            value = ort.OrtValue.ortvalue_from_numpy(signs)
            options.add_external_initializers(["b"], [value])
            model = PACKED_MODEL % tuple(map(varint, signs.shape))
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as below
            raise RegrowError(f"signs must be packed by ONNX Runtime, got: {error}") from None

    def combine(self, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [targets, entries] of int8 [targets, vectors]: a sum, exact, times its scale."""
        shifted = codes.view(np.uint8) ^ np.uint8(128)  # plus 128, which is the zero point
        found: NDArray[np.float32] = self._session.run(None, {"a": shifted, "s": scale[:, None]})[0]
        return found[:, : self.entries]


@cache
def saturates() -> bool:
    """Whether products with codes beyond `SAFE_CODES` are wrong here: on this processor, with the
    ONNX Runtime that is installed. False where it has no such operator: nothing is computed then.
    """
    session = product_session()
    if session is None:
        return False
    entries, columns, code = 64, 16, 127
    codes = np.full((entries, columns), code, dtype=np.int8)
    for rows in (1, 8):  # a vector has a kernel of its own
        inputs = np.full((rows, entries), 255, dtype=np.uint8)
        if (session.run(None, {"a": inputs, "b": codes})[0] != entries * 255 * code).any():
            return True
    return False


def varint(number: int) -> bytes:
    """A protobuf integer below 2**28 in four bytes, whatever its size."""
    return bytes(number >> shift & 127 | 128 for shift in (0, 7, 14)) + bytes([number >> 21])


@cache
def product_session() -> Any:
    """One for the process, made at first use; any number of threads may run it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort  # not above: formats are read where it is not installed, too
    except ImportError:
        return None
    try:
        return ort.InferenceSession(
            PRODUCT_MODEL, _options(ort), providers=["CPUExecutionProvider"]
        )
    except Exception:  # its errors have no common class; NumPy gives the same bits, more slowly
        return None


def _options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    return options
