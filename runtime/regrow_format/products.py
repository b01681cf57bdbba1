"""The integer products of an ONNX file and the range of their weights, read without onnx.

A device has no `onnx`. Of the protobuf messages this reads what leads to the weights of operators
that multiply integers, and skips the rest. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .files import read_bytes
from .record import Record

__all__ = ["IntegerProduct", "integer_products"]

# Which input is the weight, by operator.
_WEIGHTS = {"MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3}
_MAX_BYTES = 2 << 30  # of a protobuf message
_MAX_DEPTH = 32  # of graphs in graphs

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_TYPE, _TENSOR_INT32, _TENSOR_NAME, _TENSOR_RAW = 2, 5, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_INT8, _IS_EXTERNAL = 3, 1  # of TensorProto.DataType and DataLocation

_Fields = dict[int, list["int | memoryview"]]


class IntegerProduct(Record):
    """One operator.

    Attributes:
        node: name of its (last) output.
        operator: such as "MatMulInteger".
        weight: name of the weight.
        codes: the smallest and the largest; None where the weight is fed or computed, or not int8.
    """

    node: str
    operator: str
    weight: str
    codes: tuple[int, int] | None


def integer_products(path: Path) -> list[IntegerProduct]:
    """Every integer product of the graph in `path` and of graphs inside it.

    Raises:
        FormatError: it is no ONNX file, or a weight does not lie where it says.
    """
    graph = _Graph(path)
    try:
        data = memoryview(read_bytes(path, limit=_MAX_BYTES, what="a graph"))
        for model in _messages(_fields(data), _MODEL_GRAPH):
            graph.read(_fields(model), 0)
        return list(graph.products())
    except (IndexError, ValueError, TypeError, OSError) as error:
        raise FormatError(f"{path} must be an ONNX graph, got something else: {error}") from None


class _Graph:
    """What was found: names are of one scope, since inner graphs may not use an outer one's."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.nodes: list[tuple[str, str, str]] = []
        self.tensors: dict[str, memoryview] = {}

    def read(self, graph: _Fields, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"graphs lie in each other more than {_MAX_DEPTH} deep")
        for tensor in _messages(graph, _GRAPH_INITIALIZER):
            self.tensors[_text(_fields(tensor), _TENSOR_NAME)] = tensor
        for node in map(_fields, _messages(graph, _GRAPH_NODE)):
            self._read_node(node, depth)

    def _read_node(self, node: _Fields, depth: int) -> None:
        operator = _text(node, _NODE_OPERATOR)
        if operator in _WEIGHTS:
            weight = bytes(_messages(node, _NODE_INPUT)[_WEIGHTS[operator]]).decode()
            self.nodes.append((_text(node, _NODE_OUTPUT), operator, weight))
        for attribute in map(_fields, _messages(node, _NODE_ATTRIBUTE)):
            for number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                for inner in _messages(attribute, number):
                    self.read(_fields(inner), depth + 1)

    def products(self) -> Iterator[IntegerProduct]:
        for node, operator, weight in self.nodes:
            yield IntegerProduct(node, operator, weight, self._codes(weight))

    def _codes(self, name: str) -> tuple[int, int] | None:
        if name not in self.tensors:
            return None
        tensor = _fields(self.tensors[name])
        if _number(tensor, _TENSOR_TYPE) != _INT8:
            return None
        codes = self._values(tensor, name)
        return int(codes.min(initial=0)), int(codes.max(initial=0))

    def _values(self, tensor: _Fields, name: str) -> NDArray[np.signedinteger]:
        if _number(tensor, _TENSOR_LOCATION) == _IS_EXTERNAL:
            return self._external(tensor, name)
        if raw := _messages(tensor, _TENSOR_RAW):
            return np.frombuffer(raw[-1], np.int8)
        return np.array(_int32_values(tensor), dtype=np.int64)

    def _external(self, tensor: _Fields, name: str) -> NDArray[np.int8]:
        entries = map(_fields, _messages(tensor, _TENSOR_EXTERNAL))
        about = {_text(entry, _ENTRY_KEY): _text(entry, _ENTRY_VALUE) for entry in entries}
        where = PurePosixPath(about.get("location", ""))
        if not where.parts or where.is_absolute() or ".." in where.parts:
            raise ValueError(f"{name} must lie in the bundle, got {str(where)!r:.80}")
        size = (self.folder / where).stat().st_size
        offset = int(about.get("offset", "0"))
        length = int(about.get("length", str(size - offset)))
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"{name} must end within {where}, got {offset} + {length} of {size}")
        return np.fromfile(self.folder / where, np.int8, length, offset=offset)


def _int32_values(tensor: _Fields) -> list[int]:
    """Packed, or one by one; negative ones are 64 bits of two's complement."""
    found: list[int] = []
    for part in tensor.get(_TENSOR_INT32, []):
        if isinstance(part, int):
            found.append(part)
            continue
        at = 0
        while at < len(part):
            value, at = _varint(part, at)
            found.append(value)
    return [value - (1 << 64) if value >> 63 else value for value in found]


def _fields(data: memoryview) -> _Fields:
    """By number: integers as they are, messages and texts as slices; numbers of 4 and 8 bytes are
    skipped."""
    found: _Fields = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            found.setdefault(number, []).append(value)
        elif kind == 2:
            size, at = _varint(data, at)
            found.setdefault(number, []).append(data[at : at + size])
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
    if at != len(data):
        raise ValueError("it is truncated")
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The value, below 2**64, and where the next begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise ValueError("an integer of more than ten bytes")


def _messages(fields: _Fields, number: int) -> list[memoryview]:
    found = fields.get(number, [])
    if any(isinstance(part, int) for part in found):
        raise ValueError(f"field {number} must be a message")
    return [part for part in found if not isinstance(part, int)]


def _text(fields: _Fields, number: int) -> str:
    """The last one, as protobuf has it; "" if there is none."""
    found = _messages(fields, number)
    return bytes(found[-1]).decode() if found else ""


def _number(fields: _Fields, number: int) -> int:
    found = fields.get(number, [0])[-1]
    if not isinstance(found, int):
        raise TypeError(f"field {number} must be an integer")
    return found
