"""Symmetric quantisation, one scale per vector or group, and packing of 2 to 7 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import RegrowError, UsageError

__all__ = ["pack", "packed_width", "quantize", "scale_shape", "unpack"]


# Bits are widened to bytes a block of rows at a time: a hostile file costs its codes, not 40 times.
_CODES_AT_ONCE = 1 << 16


def _check_bits(bits: int) -> None:
    if bits not in range(2, 9):
        raise UsageError(f"bits must be from 2 to 8, got {bits}")


def scale_shape(shape: tuple[int, ...], group: int | None) -> tuple[int, ...]:
    """Of the scales of values [rows, length]: [rows], or [rows, ceil(length / group)]."""
    rows, length = shape
    return (rows,) if group is None else (rows, -(-length // group))


def quantize(
    values: NDArray[np.float32], bits: int, group: int | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row to integers of `bits` bits, symmetric by its largest absolute value.

    Args:
        values: float32 [rows, n].
        bits: 2 to 8.
        group: how many values of a row share a scale, the last group what is left; all if None.

    Returns:
        int8 codes [rows, n] and float32 scales [rows], or [rows, ceil(n / group)]; values = codes
        * scale. Where all are zeros the scale is 1.

    Raises:
        RegrowError: a value is NaN or infinite, which no code stands for.
    """
    _check_bits(bits)
    if not np.isfinite(values).all():
        raise RegrowError("coefficients must be finite to be rounded, got NaN or infinity")
    if group is not None:
        group = min(group, max(values.shape[1], 1))
        rows, groups = scale_shape(values.shape, group)
        padded = np.pad(values, ((0, 0), (0, groups * group - values.shape[1])))
        codes, scale = quantize(padded.reshape(rows * groups, group), bits)
        whole = codes.reshape(rows, groups * group)
        return np.ascontiguousarray(whole[:, : values.shape[1]]), scale.reshape(rows, groups)
    top = 2 ** (bits - 1) - 1
    largest = np.abs(values).max(axis=1, initial=0.0)
    scale = np.where(largest > 0, largest / np.float32(top), np.float32(1)).astype(np.float32)
    scale[scale == 0] = 1.0  # a row of subnormals: its scale rounded to nothing
    codes = np.clip(np.rint(values / scale[:, None]), -top, top).astype(np.int8)
    return codes, scale


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes: each row begins on a byte."""
    return -(-count * bits // 8)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack int8 [rows, n] as two's complement of `bits` bits, least significant bit first.

    Returns:
        uint8 [rows, ceil(n * bits / 8)].
    """
    _check_bits(bits)
    rows, count = codes.shape
    planes = np.unpackbits(codes.view(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    flat = planes.reshape(rows, count * bits)
    return np.packbits(flat, axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int8]:
    """The inverse of `pack`: uint8 [rows, ceil(count * bits / 8)] to int8 [rows, count]."""
    _check_bits(bits)
    if bits == 4:  # the usual one, in a third of the time
        pairs = np.empty((*packed.shape, 2), dtype=np.uint8)
        np.left_shift(packed, 4, out=pairs[..., 0])
        pairs[..., 1] = packed
        signed = pairs.view(np.int8).reshape(len(packed), 2 * packed.shape[1])
        signed >>= 4  # extends signs
        return np.ascontiguousarray(signed[:, :count])
    codes = np.empty((len(packed), count), dtype=np.int8)
    groups = -(-count // 8)  # eight codes take `bits` bytes, which fit one word
    # Shifts bring a code to the top of a word and back down, which extends its sign.
    up = np.arange(64 - bits, 63 - 8 * bits, -bits, dtype=np.int64)[:, None, None]
    step = max(1, _CODES_AT_ONCE // max(count, 1))
    for start in range(0, len(packed), step):
        rows = packed[start : start + step]
        padded = np.zeros((len(rows), groups * bits), dtype=np.uint8)
        padded[:, : rows.shape[1]] = rows
        words = np.zeros((len(rows), groups, 8), dtype=np.uint8)
        words[..., :bits] = padded.reshape(len(rows), groups, bits)
        whole = (words.view("<i8")[..., 0] << up) >> np.int64(64 - bits)  # [8, rows, groups]
        whole = whole.astype(np.int8).transpose(1, 2, 0).reshape(len(rows), 8 * groups)
        codes[start : start + step] = whole[:, :count]
    return codes
