"""What `regrow inspect` tells of a dense model: which layers compression would factor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regrow_toolchain.pages import table

from .tables import giga

__all__ = ["dense_lines", "inspect_dense"]


def inspect_dense(
    path: Path, ratio: float, only: Sequence[str], keep_dense: Sequence[str], tokens: int
) -> dict[str, Any]:
    """Every linear layer with the paper's rank, and the model's parameters and MACs."""
    from regrow_toolchain.extras import require_extra

    require_extra("export", "regrow inspect MODEL")
    from regrow_toolchain.compress import plan_layers, plans_of
    from regrow_toolchain.models import apply_plan, load_structure, quiet_transformers

    model = load_structure(path)
    layers = plan_layers(model, ratio, only=only, keep_dense=keep_dense)
    before = sum(p.numel() for p in model.parameters())
    with quiet_transformers():
        macs = _macs(model, tokens)
        if plans := plans_of(layers) if any(layer.rank for layer in layers) else ():
            apply_plan(model, plans, empty=True)
        after_macs = _macs(model, tokens)
    return {
        "kind": "model",
        "ratio": ratio,
        "parameters": {"dense": before, "compressed": sum(p.numel() for p in model.parameters())},
        "macs": {"dense": macs, "compressed": after_macs},
        "layers": [
            {
                "name": layer.name,
                "in": layer.in_features,
                "out": layer.out_features,
                "rank": layer.rank or None,
                "parameters": {"dense": layer.dense, "compressed": layer.after},
                "dense_because": layer.skip_reason or None,
            }
            for layer in layers
        ],
    }


def _macs(model: Any, tokens: int) -> int | None:
    from regrow_format.errors import RegrowError
    from regrow_toolchain.models import count_macs, example_inputs

    inputs = example_inputs(model, tokens)
    if not inputs:
        return None
    try:
        return count_macs(model, inputs)
    except RegrowError:
        return None


def dense_lines(result: dict[str, Any]) -> list[str]:
    """A table with alike layers of all blocks in one row."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["layers"]:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"])
        key = (pattern, row["in"], row["out"], row["rank"], row["dense_because"])
        grouped.setdefault(key, []).append(row)
    rows = []
    for (pattern, wide, high, rank, why), same in grouped.items():
        sums = (sum(row["parameters"][k] for row in same) for k in ("dense", "compressed"))
        name = f"{pattern} ×{len(same)}" if len(same) > 1 else same[0]["name"]
        counts = [f"{count:,}" for count in sums]
        rows.append([name, str(wide), str(high), str(rank or "dense"), *counts, why or ""])
    head = ["layer", "in", "out", "rank", "before", "after", "dense because"]
    dense, small = (result["parameters"][k] for k in ("dense", "compressed"))
    lines = [f"ratio {result['ratio']:g}: {dense:,} parameters become {small:,}"]
    before, after = (result["macs"][k] for k in ("dense", "compressed"))
    if before and after:
        lines.append(f"{giga(before)} GMACs become {giga(after)}, for one sample")
    return [*lines, *_left_last(head, rows)]


def _left_last(head: list[str], rows: list[list[str]]) -> list[str]:
    """`table` sets all but the first column to the right; reasons read better to the left."""
    lines = table(head[:-1], [row[:-1] for row in rows])
    return [f"{line}  {text}".rstrip() for line, text in
            zip(lines, [head[-1], "-" * len(head[-1]), *(row[-1] for row in rows)],
                strict=True)]  # fmt: skip
