"""The runtime holds models as bytes: onnx reads them and finds what was meant."""

from __future__ import annotations

import onnx
import pytest

from regrow_format.integers import PACKED_MODEL, PRODUCT_MODEL, varint

_KINDS = onnx.TensorProto


def _read(data: bytes) -> onnx.GraphProto:
    model = onnx.load_from_string(data)
    assert (model.ir_version, model.opset_import[0].version) == (5, 10)
    return model.graph


def _nodes(graph: onnx.GraphProto) -> list[tuple[str, list[str], list[str]]]:
    return [(node.op_type, list(node.input), list(node.output)) for node in graph.node]


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    types = {part.name: part.type.tensor_type for part in (*graph.input, *graph.output)}
    assert all(len(kind.shape.dim) == 2 for kind in types.values())
    return {name: kind.elem_type for name, kind in types.items()}


def test_the_model_is_a_product():
    onnx.checker.check_model(onnx.load_from_string(PRODUCT_MODEL), full_check=True)
    graph = _read(PRODUCT_MODEL)
    assert _nodes(graph) == [("MatMulInteger", ["a", "b"], ["y"])]
    assert _types(graph) == {"a": _KINDS.UINT8, "b": _KINDS.INT8, "y": _KINDS.INT32}


@pytest.mark.parametrize("shape", [(1, 1 << 20), (1000, 6144), (65_536, 127), (128, (1 << 28) - 1)])
def test_the_model_of_packed_signs_is_a_product_with_them_times_a_scale(shape):
    graph = _read(PACKED_MODEL % tuple(map(varint, shape)))
    assert _nodes(graph) == [
        ("MatMulInteger", ["a", "b", "z"], ["x"]),
        ("Cast", ["x"], ["f"]),
        ("Mul", ["f", "s"], ["y"]),
    ]
    assert [a.i for node in graph.node for a in node.attribute] == [_KINDS.FLOAT]
    assert _types(graph) == {"a": _KINDS.UINT8, "s": _KINDS.FLOAT, "y": _KINDS.FLOAT}
    point, signs = graph.initializer
    assert (point.name, point.data_type, point.raw_data) == ("z", _KINDS.UINT8, b"\x80")
    assert (signs.name, signs.data_type, tuple(signs.dims)) == ("b", _KINDS.INT8, shape)
    assert signs.data_location == onnx.TensorProto.EXTERNAL
