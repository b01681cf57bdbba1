"""Rounding coefficients to few bits, and packing them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from regrow_format.adapter import Coefficients
from regrow_format.errors import RegrowError, UsageError
from regrow_format.quantize import pack, packed_width, quantize, unpack

SHAPES = npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=20)


@st.composite
def _codes(draw):
    bits = draw(st.integers(2, 8))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    elements = st.integers(low, high)
    return bits, draw(npst.arrays(np.int8, draw(SHAPES), elements=elements))


@given(_codes())
def test_packing_loses_nothing(drawn):
    bits, codes = drawn
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes), packed_width(codes.shape[1], bits))
    back = unpack(packed, codes.shape[1], bits)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("bits", "row", "golden"),
    [
        (4, [1, -1, 7, -8, 3], "f18703"),
        (3, [1, -1, 3, -4, 0, 2], "f90801"),
        (2, [1, -1, 0, -2, 1], "8d01"),
        (5, [-16, 15, 1], "f005"),
        (7, [-64, 63, -1], "c0df1f"),
        (8, [-128, 127, -1], "807fff"),
    ],
)
def test_golden_rows(bits, row, golden):
    packed = pack(np.array([row], dtype=np.int8), bits)
    whole = sum((code & (2**bits - 1)) << (bits * i) for i, code in enumerate(row))
    assert whole.to_bytes(packed_width(len(row), bits), "little") == packed.tobytes()
    assert packed.tobytes() == bytes.fromhex(golden)


def test_every_row_begins_on_a_byte():
    packed = pack(np.array([[1, 1, 1], [-1, -1, -1]], dtype=np.int8), 3)
    assert packed.tolist() == [[0b01001001, 0], [0b11111111, 1]]


@given(
    st.integers(2, 8),
    npst.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)
def test_a_rounded_value_is_within_half_a_step(bits, values):
    codes, scale = quantize(values, bits)
    top = 2 ** (bits - 1) - 1
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    assert np.abs(codes.astype(int)).max(initial=0) <= top
    error = np.abs(codes * scale[:, None].astype(np.float64) - values)
    largest = np.abs(values).max(axis=1, initial=0)
    # Half a step, the rounding of the scale itself, and what float32 cannot tell from zero.
    assert (error <= scale[:, None] * 0.501 + largest[:, None] * 1e-6 + 1e-43).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_value_gets_the_largest_code(bits):
    top = 2 ** (bits - 1) - 1
    codes, scale = quantize(np.array([[3.0, -3.0, 0.0]], dtype=np.float32), bits)
    assert codes.tolist() == [[top, -top, 0]]
    assert scale[0] == np.float32(3) / np.float32(top)


def test_every_row_has_its_own_scale():
    codes, scale = quantize(np.array([[127.0, 1.0], [1270.0, 10.0]], dtype=np.float32), 8)
    assert codes.tolist() == [[127, 1], [127, 1]]
    assert scale.tolist() == [1.0, 10.0]


def test_a_row_of_zeros_has_scale_1():
    codes, scale = quantize(np.zeros((2, 3), dtype=np.float32), 4)
    assert codes.tolist() == [[0, 0, 0]] * 2
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [1e-45, 3e-44, 1e-39])
def test_subnormal_rows_stay_finite(value):
    codes, scale = quantize(np.array([[value, -value, 0]], dtype=np.float32), 8)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert np.abs(codes[0, 0] * scale[0] - np.float32(value)) <= 1e-42


def test_a_row_of_no_values():
    codes, scale = quantize(np.zeros((2, 0), dtype=np.float32), 8)
    assert codes.shape == (2, 0)
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_finite_values_are_rounded(value):
    with pytest.raises(RegrowError, match="coefficients must be finite to be rounded, got NaN"):
        quantize(np.array([[1.0, value]], dtype=np.float32), 8)


@pytest.mark.parametrize("bits", [1, 9, 0, -1])
def test_bits_are_2_to_8(bits):
    values = np.zeros((1, 4), dtype=np.float32)
    with pytest.raises(UsageError, match=f"bits must be from 2 to 8, got {bits}"):
        quantize(values, bits)
    with pytest.raises(UsageError, match="bits must be"):
        pack(values.astype(np.int8), bits)
    with pytest.raises(UsageError, match="bits must be"):
        unpack(values.astype(np.uint8), 4, bits)


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8", "int5", "int2"])
def test_the_scale_includes_the_constant(storage):
    values = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    constant = np.array([0.5, 4.0], dtype=np.float32)
    plain = Coefficients.store(values, np.ones(2, dtype=np.float32), storage)
    found = Coefficients.store(values, constant, storage)
    np.testing.assert_array_equal(found.values, plain.values)
    np.testing.assert_array_equal(found.scale, plain.scale * constant)
    step = {"fp32": 1e-7, "fp16": 1e-3, "int8": 1 / 127, "int5": 1 / 15, "int2": 1.0}[storage]
    error = np.abs(found.dense() / constant[:, None] - values).max()
    assert error <= 0.51 * step * np.abs(values).max()
