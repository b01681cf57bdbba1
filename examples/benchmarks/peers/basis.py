"""How fast a basis is rebuilt: NumPy and ONNX Runtime, against the memory's own speed.

    python examples/benchmarks/peers/basis.py [--small]

Signs for 1,000 vectors of 6,144 entries (ViT-Base, rank 8, one role), and the whole expansion of 24
layers from them; one thread. Bandwidth is measured in the same run: copying 128 MB, bytes read and
written. The limit is what a sign must at least cost: one byte written. Ends in one line of JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from models import arguments, finish, in_own_process, machine, spread, times


def bandwidth(count: int) -> dict[str, Any]:
    source = np.ones(count, dtype=np.uint8)
    target = np.empty_like(source)
    row = times(lambda: np.copyto(target, source), 15)
    return {**row, "gb_per_s": 2 * count / row["p50"] / 1e6}


def signs_in_numpy(vectors: int, entries: int, repeat: int) -> dict[str, float]:
    """A byte per sign, as they are multiplied."""
    from regrow_format.basis import sign_rows

    return times(lambda: sum(map(len, sign_rows(7, 0, vectors, entries))), repeat)


def signs_in_onnx(vectors: int, entries: int, repeat: int) -> dict[str, float]:
    from onnx import TensorProto, helper

    from regrow_export.graph import IR_VERSION, OPSET, GraphBuilder
    from regrow_export.methods import round_keys, sign_bits

    g = GraphBuilder("signs")
    bits = sign_bits(g, round_keys(g, "seed"), 0, [0], vectors, entries)
    seed = helper.make_tensor_value_info("seed", TensorProto.UINT32, [2])
    found = helper.make_tensor_value_info(bits, TensorProto.UINT8, [1, entries, vectors])
    graph = helper.make_graph(g.nodes, "signs", [seed], [found], g.constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    session = one_thread(model.SerializeToString())
    return times(lambda: session.run(None, {"seed": np.array([7, 0], np.uint32)}), repeat)


def expansion_in_numpy(vectors: int, layers: int, width: int, repeat: int) -> dict[str, float]:
    from regrow_format.basis import BasisCache
    from regrow_format.methods import get_method

    adapter = _adapter(vectors, layers, width)
    return times(lambda: get_method("nola").expand(adapter, BasisCache(0)), repeat)


def expansion_in_onnx(vectors: int, layers: int, width: int, repeat: int) -> dict[str, float]:
    from regrow_export import build_expander
    from regrow_export.methods import adapter_inputs

    adapter = _adapter(vectors, layers, width)
    model = build_expander(adapter.config, adapter.targets, adapter.storage)
    session, feeds = one_thread(model.SerializeToString()), adapter_inputs(adapter)
    return times(lambda: session.run(None, feeds), repeat)


def one_thread(model: bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _adapter(vectors: int, layers: int, width: int) -> Any:
    from regrow import Adapter
    from regrow_format.methods import get_method
    from regrow_runtime import Coefficients, Target

    targets = tuple(Target(f"layer.{number:02}", width, width) for number in range(layers))
    config = {"k": vectors, "l": vectors, "rank": 8, "c": 1.0, "shared": True}
    method, draw = get_method("nola"), np.random.default_rng(0)
    constants = method.constants(config, targets)
    values = {
        name: Coefficients.store(
            draw.standard_normal(shape).astype(np.float32), constants[name], "int8"
        )
        for name, shape in method.layout(config, targets).items()
    }
    return Adapter("nola", config, 7, "sha256:0", targets, values, "int8")


def main() -> None:
    with arguments(__doc__) as (given, room):
        if not given.case:  # NumPy takes its threads when it is imported: a process of its own
            found = in_own_process(sys.argv[0], "all", room)
            print("\n".join(found.pop("lines")))
            return finish(**found)
        vectors, layers, width = (50, 2, 64) if given.small else (1000, 24, 768)
        repeat, entries = (3, 512) if given.small else (15, 6144)
        copied = bandwidth(1 << (20 if given.small else 27))
        limit = vectors * entries / (copied["gb_per_s"] * 1e6)
        rows = {
            "signs, NumPy": signs_in_numpy(vectors, entries, repeat),
            "signs, ONNX": signs_in_onnx(vectors, entries, repeat),
            "whole expansion, NumPy": expansion_in_numpy(vectors, layers, width, repeat),
            "whole expansion, ONNX": expansion_in_onnx(vectors, layers, width, repeat),
        }
        lines = [
            f"{'memory':24} {copied['gb_per_s']:.1f} GB/s; writing {vectors * entries:,} bytes "
            f"takes {limit:.3f} ms at least"
        ]
        for name, row in rows.items():
            roles = 1 if name.startswith("signs") else 2
            row["ns_per_sign"] = 1e6 * row["p50"] / (vectors * entries * roles)
            row["of_the_limit"] = row["p50"] / (limit * roles)
            lines.append(
                f"{name:24} {spread(row)}  {row['ns_per_sign']:.2f} ns a sign, "
                f"{row['of_the_limit']:.0f} times the limit"
            )
        finish(
            task="basis", vectors=vectors, entries=entries, bandwidth=copied, limit_ms=limit,
            rows=rows, machine=machine(), lines=lines,
        )  # fmt: skip


if __name__ == "__main__":
    main()
