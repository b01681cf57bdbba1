"""Writing a graph: weights beside it in one file, small tensors inside."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from regrow_format.errors import RegrowError

__all__ = ["DATA_FILE", "GRAPH_FILE", "place_of", "save_graph"]

GRAPH_FILE = "backbone.onnx"
DATA_FILE = "backbone.onnx.data"

_INLINE_BYTES = 1024
# Large tensors begin where any system can map them (64 KiB on Windows); smaller ones, for which
# the gaps would cost more than they bring, at a cache line.
_LARGE_BYTES, _LARGE_ALIGNMENT, _SMALL_ALIGNMENT = 1 << 20, 1 << 16, 64


def save_graph(
    model: onnx.ModelProto,
    folder: Path,
    inline: Collection[str] = (),
    outside: Collection[str] = (),
) -> onnx.ModelProto:
    """Write `backbone.onnx` and `backbone.onnx.data` into `folder` and check them.

    Args:
        inline: initializers that stay in the graph whatever their size (defaults of inputs).
        outside: those that do not, whatever their size (weights that the manifest names).

    Returns:
        The graph with references to the file in the place of large tensors. Forget `model`, whose
        memory is kept as long as any part of it.

    Raises:
        RegrowError: ONNX's checker refuses the result.
    """
    blank: list[
        tuple[TensorProto, int]
    ] = []  # of zeros, as slots' defaults are: they share a place
    with (folder / DATA_FILE).open("wb") as stream:
        for tensor in model.graph.initializer:
            if tensor.name in inline:
                continue
            data = _bytes(tensor)
            if len(data) < _INLINE_BYTES and tensor.name not in outside:
                continue
            if data.count(0) == len(data) and tensor.name not in outside:
                blank.append((tensor, len(data)))
                continue
            _refer(tensor, _append(stream, data), len(data))
        if blank:
            offset = _append(stream, bytes(max(size for _, size in blank)))
            for tensor, size in blank:
                _refer(tensor, offset, size)
        used = stream.tell() > 0
    if not used:
        (folder / DATA_FILE).unlink()
    onnx.save(model, str(folder / GRAPH_FILE))
    try:
        onnx.checker.check_model(str(folder / GRAPH_FILE), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RegrowError(f"the traced graph must pass ONNX's checker, got: {error}") from error
    return onnx.load(str(folder / GRAPH_FILE), load_external_data=False)


def _append(stream: BinaryIO, data: bytes) -> int:
    """Write at the next place that is aligned; returns it."""
    alignment = _LARGE_ALIGNMENT if len(data) >= _LARGE_BYTES else _SMALL_ALIGNMENT
    stream.write(bytes(-stream.tell() % alignment))
    offset = stream.tell()
    stream.write(data)
    return offset


def place_of(tensor: TensorProto) -> tuple[str, int]:
    """File and offset of a tensor that `save_graph` has put beside the graph."""
    stored = {entry.key: entry.value for entry in tensor.external_data}
    return stored["location"], int(stored["offset"])


def _bytes(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return numpy_helper.to_array(tensor).tobytes()


def _refer(tensor: TensorProto, offset: int, length: int) -> None:
    """Replace a tensor's data by its place in the data file."""
    tensor.raw_data = b""  # `set_external_data` refuses tensors without the field
    set_external_data(tensor, DATA_FILE, offset=offset, length=length)
    for field in (
        "raw_data",
        "float_data",
        "int32_data",
        "int64_data",
        "double_data",
        "uint64_data",
    ):
        tensor.ClearField(field)
