"""Writing ONNX nodes by hand: `g.op("Mul", a, b)` adds a node and gives its output's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["GraphBuilder"]

# ONNX Runtime 1.20 fuses these into nodes that it names after them: no two may be of one name.
_NAMED = ("Gather", "Slice")


class GraphBuilder:
    """Collects nodes and constants.

    Args:
        prefix: begins every name that the builder makes up, so that it clashes with no other.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def _name(self) -> str:
        # Short, and most nodes have no names: they would be most of a small graph's bytes.
        self._count += 1
        return f"{self.prefix}/{self._count}"

    def op(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """Add a node with one output, called `to` if given; returns the output's name."""
        output = to or self._name()
        if kind in _NAMED:
            attributes["name"] = output
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def split(self, value: str, count: int, axis: int) -> list[str]:
        """Cut a tensor into `count` equal parts along an axis."""
        if count == 1:
            return [value]
        return self.several(count, "Split", value, axis=axis, num_outputs=count)

    def several(self, count: int, kind: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with the first `count` of its outputs; returns their names."""
        outputs = [self._name() for _ in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def constant(self, value: NDArray[Any]) -> str:
        """A constant tensor; equal ones are kept once."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = self._name()
            self.constants.append(numpy_helper.from_array(value, self._known[key]))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """A constant int64 [len(values)]: shapes, axes and indices."""
        return self.constant(np.array(values, dtype=np.int64))

    def cast(self, value: str, dtype: str) -> str:
        """Convert to a NumPy dtype by name."""
        output = self._name()
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.nodes.append(helper.make_node("Cast", [value], [output], to=kind))
        return output
