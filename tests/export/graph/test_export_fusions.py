"""A bias before a GELU: ONNX Runtime must not fuse the two, and nothing else may change."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from torch import nn

from regrow_export import ExportConfig, ExportRequest, export_bundle, kinds_for
from regrow_export.graph import keep_gelu

BIAS = "vit.encoder.layer.{}.intermediate.dense.bias"
DIMS = (1, 28, 28)


@pytest.fixture(scope="module")
def source(vit):
    """With biases that differ: tracers write equal ones once."""
    model = copy.deepcopy(vit.model)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return replace(vit, model=model)


def _fused(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime computes the graph with."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_an_export_has_no_biasgelu_and_the_same_bits(source, precision, tmp_path):
    export_bundle(
        source, tmp_path / "b", ExportRequest(ExportConfig(mode="merged", precision=precision))
    )
    model = onnx.load(tmp_path / "b" / "backbone.onnx")
    operators = _fused(model, tmp_path)
    assert operators["BiasGelu"] == 0
    assert operators["Gelu"] > 0
    feeds = {"pixel_values": np.random.default_rng(0).normal(size=(2, *DIMS)).astype(np.float32)}
    found = _run(model, feeds)
    rows = [tensor for tensor in model.graph.initializer if tensor.name == BIAS.format(0)]
    assert [list(row.dims) for row in rows] == [[1, rows[0].dims[-1]]]
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and tensor.name.endswith(".bias"):
            del tensor.dims[0]
    assert _fused(model, tmp_path)["BiasGelu"] == operators["Gelu"]
    np.testing.assert_array_equal(_run(model, feeds), found)


def test_int8_products_keep_the_bias_that_is_fused_into_them(source, tmp_path):
    export_bundle(
        source, tmp_path / "b", ExportRequest(ExportConfig(mode="merged", precision="int8"))
    )
    model = onnx.load(tmp_path / "b" / "backbone.onnx")
    assert [len(t.dims) for t in model.graph.initializer if t.name == BIAS.format(0)] == [1]
    assert _fused(model, tmp_path)["Add"] < sum(n.op_type == "Add" for n in model.graph.node)


def test_a_bias_that_may_be_fed_stays(source, tmp_path):
    target = BIAS.format(0).removesuffix(".bias")
    manifest = export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=[target], slots=kinds_for("bitfit"))),
    )
    model = onnx.load(tmp_path / "b" / "backbone.onnx")
    names = {name for slot in manifest.slots for name in slot.inputs.values()}
    fed = {value.name for value in model.graph.input}
    assert names
    assert names <= fed


TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4] b = {1, 2, 3, 4},
 float root = {1.4142135}, float one = {1}, float half = {0.5}>
{
  SAME
  p = MatMul (x, w)
  s = Add (p, BIAS)
  d = Div (s, root)
  e = Erf (d)
  f = Add (e, one)
  m = Mul (s, f)
  y0 = Mul (m, half)
  y = Add (y0, OTHER)
}
"""


@pytest.mark.parametrize(
    ("bias", "other", "names"),
    [("b", "one", {"b": 2}), ("same", "one", {"b/row": 2}), ("b", "b", {"b": 1, "b/row": 2})],
)
def test_a_bias_with_other_readers_is_copied(bias, other, names):
    same = "same = Identity (b)" if bias == "same" else ""
    text = TEXT.replace("SAME", same).replace("BIAS", bias).replace("OTHER", other)
    model = parser.parse_model(text)
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    expected = _run(model, feeds)
    assert keep_gelu(model) == 1
    found = {t.name: len(t.dims) for t in model.graph.initializer if t.name.startswith("b")}
    assert found == names
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(_run(model, feeds), expected)
    rows = [t for t in model.graph.initializer if len(t.dims) == 2 and t.name != "w"]
    np.testing.assert_array_equal(numpy_helper.to_array(rows[0]), [[1, 2, 3, 4]])


def test_a_graph_without_a_gelu_is_left_alone():
    model = parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 2] x) => (float[n, 2] y)
        <float[2, 2] w = {1,2, 3,4}, float[2] b = {1, 2}, float[2] unread = {1, 2}>
        { p = MatMul (x, w)  y = Add (p, b) }
        """
    )
    before = model.SerializeToString()
    assert keep_gelu(model) == 0
    assert model.SerializeToString() == before
