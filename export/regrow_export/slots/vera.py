"""VeRA's two matrices as constants that all vector slots of a graph share.

y = base(x) + lambda_b * (((x A) * lambda_d) B): an adapter is its two vectors (arXiv 2310.11454,
eq. 2). A [in, rank] and B [rank, out] are the beginnings of one stream of signs each, int8, one
tensor per width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regrow_export.graph import all_graphs, remove_initializers
from regrow_format.adapter import Adapter
from regrow_format.basis import Role, sign_bits
from regrow_format.manifest import Slot

from .feeds import Feeds

__all__ = ["basis_feeds", "share_basis"]


def _matrix(vera: Adapter, part: str, width: int) -> NDArray[np.int8]:
    """A [in, rank] or B [rank, out], of 1 and -1."""
    rank = vera.config["rank"]
    shape = (rank, width) if part == "A" else (width, rank)
    role = Role.VERA_A if part == "A" else Role.VERA_B
    packed = sign_bits(vera.seed, role, *shape)
    bits = np.unpackbits(packed, axis=-1, count=shape[1], bitorder="little")
    return np.ascontiguousarray(2 * bits.T.astype(np.int8) - 1)


def _vector_slots(slots: Sequence[Slot]) -> list[tuple[str, str, int]]:
    """Target, part and width of every matrix that vector slots read."""
    return [
        (slot.target, part, width)
        for slot in slots
        if slot.kind == "vector"
        for part, width in (("A", slot.in_features), ("B", slot.out_features))
    ]


def basis_feeds(vera: Adapter, slots: Sequence[Slot]) -> Feeds:
    """By name of the torch slots' parameters, their matrices in float32."""
    return {
        f"{target}.basis_{part}": _matrix(vera, part, width).astype(np.float32)
        for target, part, width in _vector_slots(slots)
    }


def share_basis(model: onnx.ModelProto, vera: Adapter, slots: Sequence[Slot]) -> None:
    """Let every vector slot of a traced graph read the shared matrices.

    Raises:
        RegrowError: the tracer lost a target.
    """
    found = _vector_slots(slots)
    names = {f"{target}.basis_{part}": f"vera.{part}.{width}" for target, part, width in found}
    remove_initializers(model, list(names))
    for graph in all_graphs(model.graph):
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = names.get(name, name)
    casts = []
    for part, width in sorted({(part, width) for _, part, width in found}):
        name = f"vera.{part}.{width}"
        signs = numpy_helper.from_array(_matrix(vera, part, width), f"{name}.signs")
        model.graph.initializer.append(signs)
        casts.append(helper.make_node("Cast", [signs.name], [name], to=TensorProto.FLOAT))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *rest])
