"""Weights rounded for int8 and int4 are those that ONNX Runtime's own quantisers write."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regrow_export.quantization.schemes import (
    INT4_BLOCK,
    INT4_SYMMETRIC,
    PRECISIONS,
    half,
    int4_blocks,
    int8_channels,
    round_weight,
)
from regrow_format.errors import RegrowError, UsageError

Weight = NDArray[np.float32]

# One block, several, a block that is not full, odd widths, a single row and column.
_SHAPES = [(32, 8), (96, 5), (50, 7), (33, 4), (8, 3), (1, 6), (64, 1)]


def _weight(shape: tuple[int, int]) -> Weight:
    """With a channel of zeros, one of small numbers, and ties between codes."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.05, shape).astype(np.float32)
    weight[:, -1] = 0
    if shape[1] > 2:
        weight[:, 0] = rng.normal(0, 1e-30, shape[0]).astype(np.float32)
        weight[:, 1] = np.linspace(-1, 1, shape[0], dtype=np.float32)
    if shape[1] > 3:
        weight[:, 2] = np.round(weight[:, 2] * 2000) / 2  # halves of whole numbers
        weight[0, 2] = 127
    return weight


def _model(weight: Weight) -> onnx.ModelProto:
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def _initializers(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def _product(model: onnx.ModelProto, rows: int) -> Weight:
    """What the model multiplies by: its outputs for the unit vectors.

    As it stands: ONNX Runtime turns the QDQ form into a product that rounds its inputs as well.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    found: Weight = session.run(None, {"x": np.eye(rows, dtype=np.float32)})[0]
    return found


# -- int8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", _SHAPES)
def test_int8_is_quantize_dynamic(
    shape: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    caplog.set_level(logging.ERROR)
    weight = _weight(shape)
    out = tmp_path / "int8.onnx"
    quantize_dynamic(
        _model(weight), out, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
    )
    parts = _initializers(onnx.load(out))
    assert parts["w_quantized"].dtype == np.int8
    assert not parts["w_zero_point"].any()

    codes, scale = int8_channels(weight)
    assert np.array_equal(codes, parts["w_quantized"])
    assert scale.tobytes() == parts["w_scale"].tobytes()
    dense = parts["w_quantized"].astype(np.float32) * parts["w_scale"]
    assert round_weight(weight, "int8").tobytes() == dense.tobytes()


def test_int8_uses_the_range() -> None:
    weight = _weight((50, 7))
    codes, scale = int8_channels(weight)
    assert set(np.abs(codes).max(axis=0)[:-1]) == {64}
    assert scale.shape == (7,)
    assert scale[-1] == 1  # of zeros
    assert (np.abs(round_weight(weight, "int8") - weight) <= 0.5001 * scale).all()


def test_int8_of_numbers_too_small_for_a_scale() -> None:
    """As ONNX Runtime does, a scale below the smallest normal number is 1."""
    codes, scale = int8_channels(np.full((4, 1), 1e-39, dtype=np.float32))
    assert not codes.any()
    assert scale.tolist() == [1]


# -- int4 ----------------------------------------------------------------------------------------


def _matmul_nbits(weight: Weight) -> onnx.ModelProto:
    rows, columns = weight.shape
    packed, scales = int4_blocks(weight)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=rows, N=columns, bits=4, block_size=INT4_BLOCK,
    )  # fmt: skip
    model = _model(weight)
    model.graph.node[0].CopyFrom(node)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        [numpy_helper.from_array(packed, "codes"), numpy_helper.from_array(scales, "scales")]
    )
    return model


def _dequantize_linear(weight: Weight) -> onnx.ModelProto:
    """The QDQ form: int4 [in, out] with scales [blocks, out], in standard operators."""
    rows, columns = weight.shape
    packed, scales = int4_blocks(weight)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(columns, -1)[:, :rows].T
    low = codes.astype(np.int16).ravel() - 8 & 15
    low = np.append(low, np.zeros(len(low) % 2, dtype=low.dtype)).astype(np.uint8)
    raw = (low[0::2] | low[1::2] << 4).tobytes()
    model = _model(weight)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        [
            helper.make_tensor("codes", TensorProto.INT4, weight.shape, raw, raw=True),
            numpy_helper.from_array(np.ascontiguousarray(scales.T), "scales"),
        ]
    )
    node = helper.make_node(
        "DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=INT4_BLOCK
    )
    model.graph.node.insert(0, node)
    return model


@pytest.mark.parametrize("shape", _SHAPES)
def test_int4_is_what_onnx_runtime_multiplies_by(shape: tuple[int, int]) -> None:
    """In both forms, the operator MatMulNBits and DequantizeLinear."""
    weight = _weight(shape)
    rounded = round_weight(weight, "int4")
    assert rounded.shape == weight.shape
    assert np.array_equal(_product(_dequantize_linear(weight), shape[0]), rounded)
    assert np.array_equal(_product(_matmul_nbits(weight), shape[0]), rounded)


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_int4_is_the_matmul_nbits_quantizer(form: str, shape: tuple[int, int]) -> None:
    pytest.importorskip("onnx_ir", reason="ONNX Runtime's quantizer needs it")
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.quant_utils import QuantFormat

    # Of ties between two codes the QDQ form takes the other one: here there are none.
    weight = np.random.default_rng(1).normal(0, 0.05, shape).astype(np.float32)
    quantizer = MatMulNBitsQuantizer(
        _model(weight), block_size=INT4_BLOCK, is_symmetric=INT4_SYMMETRIC,
        quant_format=QuantFormat[form],
    )  # fmt: skip
    quantizer.process()
    parts = _initializers(quantizer.model.model)
    packed, scales = int4_blocks(weight)
    if form == "QOperator":
        assert np.array_equal(parts["w_Q4"], packed)
        assert np.array_equal(parts["w_scales"], scales)
    else:
        dense = np.repeat(parts["w_DQ_scales"], INT4_BLOCK, axis=0)[: shape[0]]
        dense = parts["w_DQ_Q4"].astype(np.float32) * dense
        assert np.array_equal(dense, round_weight(weight, "int4"))


def test_int4_maps_the_largest_entry_to_code_minus_eight() -> None:
    weight = np.zeros((INT4_BLOCK, 2), dtype=np.float32)
    weight[3] = [4, -4]
    weight[4] = [-3.875, 2]
    packed, scales = int4_blocks(weight)
    assert scales[:, 0].tolist() == [-0.5, 0.5]
    assert packed[0, 0, 1] >> 4 == 0  # entry 3, in the high half of byte 1
    rounded = round_weight(weight, "int4")
    assert rounded[3].tolist() == [4, -4]
    assert rounded[4].tolist() == [-3.5, 2]  # 8 steps do not fit on the other side


# -- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounding_is_of_columns(precision: str) -> None:
    """An output's weights do not depend on the other outputs."""
    weight = _weight((50, 7))
    alone = [round_weight(weight[:, i : i + 1], precision)[:, 0] for i in range(7)]
    assert np.array_equal(np.stack(alone, axis=1), round_weight(weight, precision))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_any_order_in_memory(precision: str) -> None:
    weight = _weight((50, 7))
    turned = np.asfortranarray(weight)
    assert np.array_equal(round_weight(turned, precision), round_weight(weight, precision))
    before = weight.copy()
    round_weight(weight, precision)
    assert np.array_equal(weight, before)


def test_fp32_changes_nothing() -> None:
    weight = _weight((8, 3))
    assert np.array_equal(round_weight(weight, "fp32"), weight)


def test_fp16_is_the_nearest() -> None:
    weight = _weight((50, 7))
    assert np.array_equal(round_weight(weight, "fp16"), weight.astype(np.float16))
    assert half(np.full((1, 1), 65519.99, np.float32)) == 65504
    with pytest.raises(RegrowError, match="weight must be below 65520 for fp16, got 65520"):
        half(np.full((1, 1), -65520, np.float32))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(precision: str, value: float) -> None:
    weight = _weight((8, 3))
    weight[2, 1] = value
    with pytest.raises(RegrowError, match="weight must be finite to be rounded"):
        round_weight(weight, precision)


def test_unknown_precisions_are_refused() -> None:
    assert PRECISIONS == ("fp32", "fp16", "int8", "int4")
    with pytest.raises(UsageError, match="must be one of fp32, fp16, int8, int4, got 'int2'"):
        round_weight(_weight((8, 3)), "int2")
