"""What a phone's build of ONNX Runtime must have, and how its accelerators would cut a graph."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from regrow_export.graph import all_graphs
from regrow_format.errors import RegrowError

__all__ = ["OPERATORS_FILE", "partitions", "required_operators"]

OPERATORS_FILE = "operators.config"
_LOWEST_SEVERITY = 4


def required_operators(folder: Path) -> str:
    """The operators of every graph in `folder`, as ONNX Runtime's --include_ops_by_config takes."""
    found: dict[tuple[str, int], set[str]] = {}
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        opsets = {item.domain or "ai.onnx": int(item.version) for item in model.opset_import}
        for graph in all_graphs(model.graph):
            for node in graph.node:
                domain = node.domain or "ai.onnx"
                found.setdefault((domain, opsets[domain]), set()).add(node.op_type)
    lines = [f"{domain};{opset};{','.join(sorted(ops))}" for (domain, opset), ops in found.items()]
    return "\n".join(["# domain;opset;operators", *sorted(lines)]) + "\n"


def partitions(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """By accelerator, in how many pieces it would take the graph; ORT's usability checker counts.

    Inputs have the sizes of the first sample of `inputs`; slots stay as they are. Empty where this
    ONNX Runtime has no such checker.

    Raises:
        RegrowError: the disk is full.
    """
    try:
        from onnxruntime.tools.mobile_helpers import usability_checker as checker
    except ImportError:
        return {}
    model = _fixed(path, inputs)
    coreml = "coreml_supported_{}_ops.md"
    return {
        "nnapi": checker.check_nnapi_partitions(model, True).num_partitions,
        **{
            f"coreml_{kind}": checker.check_coreml_partitions(
                model, True, coreml.format(kind)
            ).num_partitions
            for kind in ("neuralnetwork", "mlprogram")
        },
    }


def _fixed(path: Path, inputs: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """The graph as the checker takes it: basic optimisations, shapes inferred, without weights."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _LOWEST_SEVERITY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for name, size in _sizes(path, inputs).items():
        options.add_free_dimension_override_by_name(name, size)
    with TemporaryDirectory(dir=path.parent) as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "basic.onnx")
        for name, value in (
            ("optimized_model_external_initializers_file_name", "basic.data"),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("disable_prepacking", "1"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            model = onnx.load(options.optimized_model_filepath, load_external_data=False)
        except Exception as error:  # it has opened the graph before: what fails is writing a copy
            raise RegrowError(
                "disk must have room for the weights once more while the graph is examined, got "
                f"{shutil.disk_usage(scratch).free} bytes free: free space, or write elsewhere"
            ) from error
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _sizes(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Of the named dimensions of the graph's inputs, with a batch of one."""
    model = onnx.load(str(path), load_external_data=False)
    return {
        dim.dim_param: int(size)
        for value in model.graph.input
        if value.name in inputs
        for dim, size in zip(
            value.type.tensor_type.shape.dim, np.shape(inputs[value.name][:1]), strict=True
        )
        if dim.dim_param
    }
