"""Adapters as PEFT's `save_pretrained` writes them: a config and a safetensors file in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from regrow_format.adapter import STORAGE, Adapter, Coefficients, Target
from regrow_format.errors import MismatchError, RegrowError, UsageError
from regrow_format.methods import get_method
from regrow_format.methods.base import Layout
from regrow_format.mt19937 import DTYPES

from .base_model import Base, read_base
from .checkpoint import Stored, read_header
from .config import read_config
from .fourierft import PeftFourierft
from .head import head_findings, read_head
from .ia3 import PeftIa3
from .lora import PeftLora
from .method import PeftKind, Row
from .probe import with_probe
from .vera import PeftVera

__all__ = ["KINDS", "import_peft"]

KINDS: dict[str, type[PeftKind]] = {
    kind.peft_type: kind for kind in (PeftLora, PeftVera, PeftFourierft, PeftIa3)
}

_MAX_BYTES = 1 << 30  # of an adapter file; padding must not ask for more


def import_peft(
    folder: str | Path,
    backbone: str | Path,
    *,
    storage: str = "fp32",
    base_dtype: str = "float32",
) -> Adapter:
    """An adapter that computes what the PEFT directory `folder` does.

    Args:
        folder: what PEFT's `save_pretrained` wrote, of a method in `KINDS`.
        backbone: the bundle, the compressed backbone or (with torch) the Hugging Face directory
            that the adapter is for: it gives the identity, the layers' widths and the labels.
        storage: a key of `STORAGE`; "fp32" keeps every number, and the head's.
        base_dtype: what the base was loaded in; PEFT rounds what VeRA draws, and did not save, to
            it.

    Raises:
        UsageError: there is no such folder, storage or dtype.
        FormatError: the files are broken, or of a kind that is not read.
        MismatchError: layers or the head do not fit the backbone; all are listed.
    """
    for name, value, choices in (
        ("storage", storage, tuple(STORAGE)),
        ("base_dtype", base_dtype, DTYPES),
    ):
        if value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    folder = Path(folder)
    kind = read_config(folder, KINDS)
    method = get_method(kind.method)
    stored, base = read_header(folder, kind), read_base(backbone, kind.method)
    targets = _targets(folder, kind, stored, base)
    config = method.check_config(kind.settings(targets), str(folder))
    layout = method.layout(config, targets)
    _check_size(layout)
    seed, basis, tensors = kind.basis(stored.shared, targets, base_dtype)
    rows = (row for t in targets for row in kind.rows(t, stored.layers[t.name], config))
    adapter = Adapter(
        method=kind.method,
        config=config,
        seed=seed,
        basis=basis,
        backbone_id=base.backbone_id,
        targets=targets,
        coefficients=_coefficients(layout, rows, storage),
        storage=storage,
        stored_basis=tensors,
        head=read_head(stored.saved, base, "fp32" if storage == "fp32" else "fp16"),
        user={"imported": f"PEFT {kind.title}"},
    )
    return with_probe(adapter, Path(backbone), base)


def _targets(folder: Path, kind: PeftKind, stored: Stored, base: Base) -> tuple[Target, ...]:
    """Sorted by the UTF-8 bytes of their names, after checking that all of it fits."""
    _check_model(folder, stored, base)
    findings: list[str] = []
    targets = []
    for layer in sorted(stored.layers, key=str.encode):
        found = kind.widths(layer, stored.layers[layer], base)
        if isinstance(found, str):
            findings.append(found)
            continue
        targets.append(Target(layer, *found))
        if (problem := base.finding(layer, found)) is not None:
            findings.append(problem)
    if targets:
        findings += kind.findings(stored.shared, targets)
    findings += head_findings(stored.saved, base, kind.saved)
    if findings:
        raise MismatchError(f"{folder} does not fit {base.where}:", findings)
    return tuple(targets)


def _check_model(folder: Path, stored: Stored, base: Base) -> None:
    """Raise if no layer at all is the backbone's, of which there are some."""
    known = base.layers.keys() | base.head.keys()
    if base.layers and stored.layers and not known & stored.layers.keys():
        count, first = len(stored.layers), min(stored.layers)
        slots = "slot" in base.change  # of a bundle
        hint = ", or the bundle was exported for other layers (--target)" if slots else ""
        raise MismatchError(
            f"{folder} must be of {base.where} to fit, got none of its {count} layers there, such "
            f"as {first}: it was trained on another model{hint}"
        )


def _check_size(layout: Layout) -> None:
    size = sum(4 * rows * length for rows, length in layout.values())
    if size > _MAX_BYTES:
        raise RegrowError(
            f"adapter must take at most {_MAX_BYTES} bytes, got {size} with every layer at the "
            "largest rank of one: train with a smaller one"
        )


def _coefficients(layout: Layout, rows: Iterable[Row], storage: str) -> dict[str, Coefficients]:
    """Every tensor [rows, length] in float32, filled in the order of the targets, then stored."""
    values = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.items()}
    scales = {name: np.zeros(count, dtype=np.float32) for name, (count, _) in layout.items()}
    used = dict.fromkeys(layout, 0)
    for name, block, scale in rows:
        part = slice(used[name], used[name] + len(block))
        values[name][part] = block
        with np.errstate(over="ignore"):  # what becomes infinite is refused by name
            scales[name][part] = scale
        used[name] = part.stop
    return {name: Coefficients.store(values[name], scales[name], storage) for name in layout}
