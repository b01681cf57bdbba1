"""The runtime holds a model as bytes: onnx reads it and finds what was meant."""

from __future__ import annotations

import onnx

from regrow_format.integers import _MODEL


def test_the_model_is_a_transposed_product():
    model = onnx.load_from_string(_MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (5, 10)
    nodes = [(node.op_type, list(node.input), list(node.output)) for node in model.graph.node]
    assert nodes == [("MatMulInteger", ["a", "b"], ["x"]), ("Transpose", ["x"], ["y"])]
    types = {part.name: part.type.tensor_type for part in (*model.graph.input, *model.graph.output)}
    kinds = onnx.TensorProto
    assert {name: kind.elem_type for name, kind in types.items()} == {
        "a": kinds.UINT8, "b": kinds.INT8, "y": kinds.INT32,
    }  # fmt: skip
    assert all(len(kind.shape.dim) == 2 for kind in types.values())
