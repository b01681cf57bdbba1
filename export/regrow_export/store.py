"""Writing a graph: weights beside it in one file, small tensors inside."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from regrow_runtime.errors import RegrowError

__all__ = ["DATA_FILE", "GRAPH_FILE", "save_graph"]

GRAPH_FILE = "backbone.onnx"
DATA_FILE = "backbone.onnx.data"

_INLINE_BYTES = 1024
# Large tensors begin where any system can map them (64 KiB on Windows); smaller ones, for which
# the gaps would cost more than they bring, at a cache line.
_LARGE_BYTES, _LARGE_ALIGNMENT, _SMALL_ALIGNMENT = 1 << 20, 1 << 16, 64


def save_graph(model: onnx.ModelProto, folder: Path, inline: Collection[str] = ()) -> None:
    """Write `backbone.onnx` and `backbone.onnx.data` into `folder` and check them.

    The weights leave `model`, which keeps references to the file.

    Args:
        inline: initializers that stay in the graph whatever their size (defaults of inputs).

    Raises:
        RegrowError: ONNX's checker refuses the result.
    """
    with (folder / DATA_FILE).open("wb") as stream:
        for tensor in model.graph.initializer:
            if tensor.name in inline:
                continue
            data = _bytes(tensor)
            if len(data) < _INLINE_BYTES:
                continue
            alignment = _LARGE_ALIGNMENT if len(data) >= _LARGE_BYTES else _SMALL_ALIGNMENT
            stream.write(bytes(-stream.tell() % alignment))
            offset = stream.tell()
            stream.write(data)
            _refer(tensor, offset, len(data))
        used = stream.tell() > 0
    if not used:
        (folder / DATA_FILE).unlink()
    onnx.save(model, str(folder / GRAPH_FILE))
    try:
        onnx.checker.check_model(str(folder / GRAPH_FILE), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RegrowError(f"the traced graph must pass ONNX's checker, got: {error}") from error


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
