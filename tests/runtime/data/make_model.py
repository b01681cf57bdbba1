"""Writes `tiny.onnx` and `tiny.safetensors`, the model that the runtime's tests run.

Run once, with the [export] extra: `python tests/runtime/data/make_model.py`. The tests use the
written files, because the base install has no `onnx`.

The model is a classifier of images of 4 x 4: two tanh layers with input_scale, low_rank, delta,
scale and bias slots ("fc1" 16 -> 8, "fc2" 8 -> 8) and a head slot ("head", 8 -> 3). Slots are
inputs with defaults, as export makes them: empty or zeros for fc1 and fc2, the base's head for
"head".
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

HERE = Path(__file__).parent
FLOAT = TensorProto.FLOAT
WIDTHS = {"fc1": (16, 8), "fc2": (8, 8), "head": (8, 3)}


def weights() -> dict[str, np.ndarray]:
    """float32 `<layer>.weight` [out, in] and `<layer>.bias` [out]."""
    rng = np.random.default_rng(0)
    found = {}
    for name, (wide, high) in WIDTHS.items():
        found[f"{name}.weight"] = (rng.standard_normal((high, wide)) / wide**0.5).astype(np.float32)
        found[f"{name}.bias"] = (rng.standard_normal(high) / 4).astype(np.float32)
    return found


def slotted(name: str, x: str) -> list[onnx.NodeProto]:
    """tanh((x W + b + (x A) B + x[..., :r] D) (1 + s) + adapter_b), of x (1 + t) for x."""
    a, b, d, s, t = (f"{name}.adapter_{part}" for part in "ABDst")
    return [
        *scaled(x, t, f"{name}.x"),
        helper.make_node("MatMul", [f"{name}.x", f"{name}.W"], [f"{name}.base"]),
        helper.make_node("Add", [f"{name}.base", f"{name}.b"], [f"{name}.biased"]),
        helper.make_node("MatMul", [f"{name}.x", a], [f"{name}.down"]),
        helper.make_node("MatMul", [f"{name}.down", b], [f"{name}.up"]),
        helper.make_node("Add", [f"{name}.biased", f"{name}.up"], [f"{name}.sum"]),
        helper.make_node("Shape", [d], [f"{name}.read"], start=1, end=2),
        helper.make_node("Slice", [f"{name}.x", "zero", f"{name}.read", "last"], [f"{name}.first"]),
        helper.make_node("MatMul", [f"{name}.first", d], [f"{name}.delta"]),
        helper.make_node("Add", [f"{name}.sum", f"{name}.delta"], [f"{name}.whole"]),
        *scaled(f"{name}.whole", s, f"{name}.scaled"),
        helper.make_node("Add", [f"{name}.scaled", f"{name}.adapter_b"], [f"{name}.all"]),
        helper.make_node("Tanh", [f"{name}.all"], [f"{name}.out"]),
    ]


def scaled(value: str, scale: str, to: str) -> list[onnx.NodeProto]:
    """value + value scale."""
    return [
        helper.make_node("Mul", [value, scale], [f"{to}.change"]),
        helper.make_node("Add", [value, f"{to}.change"], [to]),
    ]


def model() -> onnx.ModelProto:
    """The graph; every slot is an input and an initializer."""
    stored = weights()
    inputs = [helper.make_tensor_value_info("pixel_values", FLOAT, ["batch", 1, 4, 4])]
    numbers = {"rows": [0, 1, 16], "token": [1], "zero": [0], "last": [2]}
    tensors = {key: np.array(value, np.int64) for key, value in numbers.items()}
    for name in ("fc1", "fc2"):
        wide, high = WIDTHS[name]
        tensors[f"{name}.W"] = np.ascontiguousarray(stored[f"{name}.weight"].T)
        tensors[f"{name}.b"] = stored[f"{name}.bias"]
        for part, empty, shape in (
            ("A", (1, wide, 0), [f"{name}.n", wide, f"{name}.rank"]),
            ("B", (1, 0, high), [f"{name}.n", f"{name}.rank", high]),
            ("D", (1, 0, high), [f"{name}.delta_n", f"{name}.delta_rank", high]),
            ("s", (1, 1, high), [f"{name}.scale_n", 1, high]),
            ("t", (1, 1, wide), [f"{name}.input_scale_n", 1, wide]),
            ("b", (1, 1, high), [f"{name}.bias_n", 1, high]),
        ):
            tensors[f"{name}.adapter_{part}"] = np.zeros(empty, np.float32)
            inputs.append(helper.make_tensor_value_info(f"{name}.adapter_{part}", FLOAT, shape))
    tensors["head.weight"] = np.ascontiguousarray(stored["head.weight"].T)[None]
    tensors["head.bias"] = stored["head.bias"][None, None]
    for part, rows in (("weight", 8), ("bias", 1)):
        shape = ["head.n", rows, "head.classes"]
        inputs.append(helper.make_tensor_value_info(f"head.{part}", FLOAT, shape))
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "rows"], ["x"]),
        *slotted("fc1", "x"),
        *slotted("fc2", "fc1.out"),
        helper.make_node("MatMul", ["fc2.out", "head.weight"], ["head.product"]),
        helper.make_node("Add", ["head.product", "head.bias"], ["head.out"]),
        helper.make_node("Squeeze", ["head.out", "token"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", FLOAT, ["batch", "classes"])]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="regrow")


if __name__ == "__main__":
    made = model()
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, str(HERE / "tiny.onnx"))
    save_file(weights(), HERE / "tiny.safetensors")
