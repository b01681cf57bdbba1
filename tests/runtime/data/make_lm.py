"""Writes `tiny-lm.onnx` and `tiny-lm.safetensors`, the language model that the runtime's tests run.

Run once, with the [export] extra: `python tests/runtime/data/make_lm.py`. The tests use the
written files, because the base install has no `onnx`.

Every token adds a vector to a running mean over the tokens that the mask counts, [2 heads, 4 wide],
which is what the cache holds; the layer "value" (8 -> 8) that makes the vector has a low_rank slot.
13 tokens, 24 places.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

HERE = Path(__file__).parent
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
NODES = (
    ("Gather", ["embed", "input_ids"], "embedded", {}),
    ("Gather", ["place", "position_ids"], "placed", {}),
    ("Add", ["embedded", "placed"], "sum", {}),
    ("Tanh", ["sum"], "x", {}),
    ("MatMul", ["x", "value"], "base", {}),
    ("MatMul", ["x", "value.adapter_A"], "down", {}),
    ("MatMul", ["down", "value.adapter_B"], "up", {}),
    ("Add", ["base", "up"], "v", {}),
    ("Reshape", ["v", "split"], "heads", {}),
    ("Transpose", ["heads"], "new", {"perm": [0, 2, 1, 3]}),
    ("Concat", ["past.0.value", "new"], "present.0.value", {"axis": 2}),
    ("Cast", ["attention_mask"], "real", {"to": FLOAT}),
    ("Unsqueeze", ["real", "outer"], "kept", {}),
    ("Mul", ["present.0.value", "kept"], "counted", {}),
    ("CumSum", ["counted", "time"], "sums", {}),
    ("CumSum", ["kept", "time"], "counts", {}),
    ("Max", ["counts", "one"], "some", {}),
    ("Div", ["sums", "some"], "means", {}),
    ("Shape", ["past.0.value"], "start", {"start": 2, "end": 3}),
    ("Slice", ["means", "start", "far", "axis"], "here", {}),
    ("Transpose", ["here"], "turned", {"perm": [0, 2, 1, 3]}),
    ("Reshape", ["turned", "join"], "joined", {}),
    ("Add", ["joined", "x"], "both", {}),
    ("Tanh", ["both"], "h", {}),
    ("MatMul", ["h", "out"], "logits", {}),
)


def weights() -> dict[str, np.ndarray]:
    """float32 embed [13, 8], place [24, 8], value [8, 8] and out [8, 13]."""
    rng = np.random.default_rng(0)
    sizes = {"embed": (13, 8), "place": (24, 8), "value": (8, 8), "out": (8, 13)}
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def model() -> onnx.ModelProto:
    """The graph; the slot is an input and an initializer."""
    numbers = {"split": [0, 0, 2, 4], "join": [0, 0, 8], "outer": [1, 3], "far": [1 << 30],
               "axis": [2]}  # fmt: skip
    tensors = weights() | {key: np.array(value, np.int64) for key, value in numbers.items()}
    tensors |= {"time": np.array(2, np.int64), "one": np.array(1, np.float32)}
    empty = {"value.adapter_A": (1, 8, 0), "value.adapter_B": (1, 0, 8)}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in empty.items()}
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("input_ids", INT, ["batch", "length"]),
            ("attention_mask", INT, ["batch", "all"]),
            ("position_ids", INT, ["batch", "length"]),
            ("past.0.value", FLOAT, ["batch", 2, "past", 4]),
            ("value.adapter_A", FLOAT, ["n", 8, "rank"]),
            ("value.adapter_B", FLOAT, ["n", "rank", 8]),
        )
    ]
    outputs = [
        helper.make_tensor_value_info("logits", FLOAT, ["batch", "length", 13]),
        helper.make_tensor_value_info("present.0.value", FLOAT, ["batch", 2, "all", 4]),
    ]
    nodes = [helper.make_node(kind, ins, [out], **more) for kind, ins, out, more in NODES]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "tiny-lm", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="regrow")


if __name__ == "__main__":
    made = model()
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, str(HERE / "tiny-lm.onnx"))
    save_file(weights(), HERE / "tiny-lm.safetensors")
