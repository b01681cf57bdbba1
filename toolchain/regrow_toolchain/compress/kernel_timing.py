"""How long ONNX Runtime takes for a layer, dense or as two factors.

In the precision that will be exported: where int8 products are fast, rounding what goes into them
and widening what comes out take most of the time, and other layers are worth factoring. What
follows from the times is decided in `layer_times`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Times", "Widths", "interleaved", "latency", "timed"]

ROUNDS = 15
_LEAST_MS = 3.0  # of one turn: short runs are repeated within it

Widths = tuple[int, ...]  # of a layer (768, 3072), or of two factors (768, 304, 3072)
Times = NDArray[np.float64]  # [rounds, candidates], milliseconds of a run


@cache
def timed(candidates: tuple[Widths, ...], tokens: int, precision: str = "fp32") -> Times:
    """Milliseconds [rounds, candidates] of products through each one's widths, on one thread.

    Args:
        tokens: rows of what is multiplied.
    """
    sessions = [_session(widths, precision) for widths in candidates]
    feeds = [_tokens(widths, tokens) for widths in candidates]
    return interleaved(
        [partial(session.run, None, feed) for session, feed in zip(sessions, feeds, strict=True)]
    )


def latency(
    in_features: int, out_features: int, rank: int, tokens: int, precision: str = "fp32"
) -> tuple[float, float]:
    """Milliseconds (dense, factored): medians of interleaved repeats."""
    both = ((in_features, out_features), (in_features, rank, out_features))
    dense, factored = np.median(timed(both, tokens, precision), axis=0).tolist()
    return dense, factored


def interleaved(
    runs: Sequence[Callable[[], object]],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Milliseconds [rounds, candidates] of a run of each, taken in turns.

    Within a round all run within milliseconds of each other, forwards and backwards by turns: what
    else the machine does slows them alike, so their ratios by rounds hold on a busy one.

    Args:
        clock: gives seconds.
    """
    repeats = []
    for run in runs:
        run()
        repeats.append(max(1, round(_LEAST_MS / max(_once(run, 1, clock), 1e-3))))
    found = np.empty((ROUNDS, len(runs)))
    for number, row in enumerate(found):
        order = range(len(runs))
        for index in order if number % 2 == 0 else reversed(order):
            row[index] = _once(runs[index], repeats[index], clock)
    return found


def _once(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) * 1e3 / repeats


def _tokens(shape: Sequence[int], tokens: int) -> dict[str, Any]:
    draw = np.random.Generator(np.random.PCG64(0))
    return {"x": draw.standard_normal((tokens, shape[0]), dtype=np.float32)}


def _session(shape: Sequence[int], precision: str) -> Any:
    """x [tokens, shape[0]] times weights, one after the other."""
    import onnxruntime
    from onnx import TensorProto, helper

    pairs = list(itertools.pairwise(shape))
    names = ["x", *(f"y{i}" for i in range(len(pairs)))]
    product = _rounded_product if precision == "int8" else _product
    parts = [product(names[i], names[i + 1], *pair) for i, pair in enumerate(pairs)]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])
        for name, width in (("x", shape[0]), (names[-1], shape[-1]))
    ]
    nodes, weights = ([item for part in parts for item in part[kind]] for kind in (0, 1))
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _product(x: str, y: str, wide: int, high: int) -> tuple[list[Any], list[Any]]:
    """Nodes and initializers of y = x W with W [wide, high]."""
    from onnx import helper, numpy_helper

    weight = np.random.Generator(np.random.PCG64(0)).standard_normal((wide, high), dtype=np.float32)
    node = helper.make_node("MatMul", [x, f"{y}.w"], [y])
    return [node], [numpy_helper.from_array(weight, f"{y}.w")]


def _rounded_product(x: str, y: str, wide: int, high: int) -> tuple[list[Any], list[Any]]:
    """The same in int8, as export writes it: ONNX Runtime makes one operator of it."""
    from onnx import TensorProto, helper, numpy_helper

    from regrow_export.quantization import INT8_ROUNDING

    draw = np.random.Generator(np.random.PCG64(0))
    least, most = INT8_ROUNDING.range
    tensors: dict[str, np.ndarray] = {
        "w": draw.integers(least, most + 1, (wide, high), dtype=np.int8),
        "scale": np.full(high, 0.01, np.float32),
        "zeros": np.zeros(high, np.int8),
    }
    w, scale, zeros, codes, step, zero, sums, floats, both = (
        f"{y}.{part}" for part in (*tensors, "codes", "step", "zero", "sums", "floats", "both")
    )
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [x], [codes, step, zero]),
        helper.make_node("MatMulInteger", [codes, w, zero, zeros], [sums]),
        helper.make_node("Cast", [sums], [floats], to=TensorProto.FLOAT),
        helper.make_node("Mul", [step, scale], [both]),
        helper.make_node("Mul", [floats, both], [y]),
    ]
    return nodes, [numpy_helper.from_array(t, f"{y}.{name}") for name, t in tensors.items()]
