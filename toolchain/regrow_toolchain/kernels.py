"""How long ONNX Runtime takes for a layer, dense or as two factors: measured once per shape.

In the precision that will be exported: where int8 products are fast, rounding what goes into them
and widening what comes out take most of the time, and other layers are worth factoring.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = ["Latency", "Shape", "latency", "layer_ms", "slower", "suited_ranks"]

_ROUNDS = 7
_LEAST_MS = 3.0  # of one round: short runs are repeated within it
# A layer with fewer multiplications takes under a tenth of a millisecond: its time is the node's
# own, and noise would decide. For others the factors may take this share longer.
_SMALL_MACS, _SMALL_SHARE = 5_000_000, 0.05

_KEPT = (0.955, 1.01)  # of the paper's parameters, with ranks that suit kernels
# Products have 16 columns in a tile (ONNX Runtime's MLAS), and two threads share whole tiles: of
# 304 columns one has 160, which takes as long as 320.
_TILES = 32
_COMBINATIONS = 100_000

Latency = tuple[float, float]
Shape = tuple[int, int, int, int]


@cache
def layer_ms(shape: tuple[int, ...], tokens: int, precision: str = "fp32") -> float:
    """Milliseconds of products through widths `shape`, such as (768, 192, 768), on one thread."""
    return _best([_session(shape, precision)], [_tokens(shape, tokens)])[0]


@cache
def latency(
    in_features: int, out_features: int, rank: int, tokens: int, precision: str = "fp32"
) -> Latency:
    """Milliseconds (dense, factored), timed in turns so that a busy machine slows both alike."""
    shapes = ((in_features, out_features), (in_features, rank, out_features))
    feeds = [_tokens(shape, tokens) for shape in shapes]
    dense, factored = _best([_session(shape, precision) for shape in shapes], feeds)
    return dense, factored


def slower(
    in_features: int, out_features: int, rank: int, tokens: int, precision: str = "fp32"
) -> bool:
    """Whether two factors take longer than the dense layer, by more than noise.

    Where the factors need as many multiplications, or the layer is small, that alone decides.
    """
    if rank * (in_features + out_features) >= in_features * out_features:
        return True
    if tokens * in_features * out_features < _SMALL_MACS:
        return False
    dense, factored = latency(in_features, out_features, rank, tokens, precision)
    return factored > dense * (1 + _SMALL_SHARE)


def suited_ranks(
    shapes: Mapping[Shape, int], multiple: int, precision: str = "fp32"
) -> dict[Shape, int]:
    """For each shape (in, out, rank, tokens) a rank near its own that is computed faster.

    Candidates lie between 8 % below and 3 % above it: multiples of 32, two threads' tiles, or if
    there is none the rank itself and `multiple`s. Of all combinations that together keep 95.5 to
    101 % of the parameters, that of the least time.

    Args:
        shapes: how many layers have each.
    """
    options = {shape: _candidates(shape, multiple) for shape in shapes}
    while math.prod(map(len, options.values())) > _COMBINATIONS:
        widest = max(options, key=lambda shape: len(options[shape]))
        options[widest] = options[widest][:1]
    times = {
        (shape, rank): layer_ms((shape[0], rank, shape[1]), shape[3], precision) * count
        for shape, count in shapes.items()
        for rank in options[shape]
    }
    sizes = {key: key[1] * (key[0][0] + key[0][1]) * shapes[key[0]] for key in times}
    whole = sum(s[2] * (s[0] + s[1]) * count for s, count in shapes.items())
    best, least = {shape: shape[2] for shape in shapes}, math.inf
    for chosen in itertools.product(*options.values()):
        keys = list(zip(options, chosen, strict=True))
        share = sum(sizes[key] for key in keys) / whole
        # Of equal times the larger ranks.
        total = sum(times[key] for key in keys) * (1.1 - 0.1 * share)
        if _KEPT[0] <= share <= _KEPT[1] and total < least:
            best, least = dict(keys), total
    return best


def _candidates(shape: Shape, multiple: int) -> list[int]:
    rank = shape[2]
    if whole := _multiples(rank, math.lcm(multiple, _TILES)):
        return whole
    return [rank, *(found for found in _multiples(rank, multiple) if found != rank)]


def _multiples(rank: int, step: int) -> list[int]:
    """The nearest first."""
    low, high = math.ceil(0.92 * rank / step), math.floor(1.03 * rank / step)
    found = [number * step for number in range(max(low, 1), high + 1)]
    return sorted(found, key=lambda near: abs(near - rank))


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

    from regrow_export.precision import INT8_ROUNDING

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


def _best(sessions: Sequence[Any], feeds: Sequence[dict[str, Any]]) -> list[float]:
    """The least milliseconds of a run of each, in turns."""
    repeats = []
    for session, feed in zip(sessions, feeds, strict=True):
        session.run(None, feed)
        repeats.append(max(1, round(_LEAST_MS / max(_once(session, feed, 1), 1e-3))))
    best = [float("inf")] * len(sessions)
    for _ in range(_ROUNDS):
        for i, (session, feed) in enumerate(zip(sessions, feeds, strict=True)):
            best[i] = min(best[i], _once(session, feed, repeats[i]))
    return best


def _once(session: Any, feed: dict[str, Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        session.run(None, feed)
    return (time.perf_counter() - start) * 1e3 / repeats
