"""LoRA as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors` in a folder.

PEFT computes W x + s B (A x) with A [r, in], B [out, r] and s = alpha / r, or alpha / sqrt(r) with
rsLoRA (`peft.tuners.lora.layer.LoraLayer.update_layer`); `rank_pattern` and `alpha_pattern` give
layers their own r and alpha. A and B are the same way round for Conv1D (`fan_in_fan_out`). Here A
and B come in number by number, s goes into the scales of B's rows, and ranks are padded to the
largest with rows of zeros, which change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from regrow_runtime.adapter import STORAGE, Adapter, Coefficients, Target
from regrow_runtime.errors import MismatchError, RegrowError, UsageError
from regrow_runtime.methods import get_method
from regrow_toolchain.backbone_id import StoredTensor

from .base import Base, read_base
from .peft_config import PeftLora, read_config
from .peft_head import head_findings, read_head
from .peft_tensors import Stored, read_header
from .tensors import read_float32

__all__ = ["import_peft"]

_MAX_BYTES = 1 << 30  # of an adapter file; padding must not ask for more

Factors = Mapping[str, Mapping[str, StoredTensor]]


def import_peft(folder: str | Path, backbone: str | Path, *, storage: str = "fp32") -> Adapter:
    """An adapter of method "lora" that computes what the PEFT directory `folder` does.

    Args:
        folder: what PEFT's `save_pretrained` wrote.
        backbone: the bundle, the compressed backbone or (with torch) the Hugging Face directory
            that the adapter is for: it gives the identity, the layers' widths and the labels.
        storage: a key of `STORAGE`; "fp32" keeps every number, and the head's.

    Raises:
        UsageError: there is no such folder, or no such storage.
        FormatError: the files are broken, or of a kind that is not read.
        MismatchError: layers or the head do not fit the backbone; all are listed.
    """
    if storage not in STORAGE:
        raise UsageError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    folder = Path(folder)
    config, stored, base = read_config(folder), read_header(folder), read_base(backbone)
    targets = _targets(folder, config, stored, base)
    settings = get_method("lora").check_config(_settings(config, targets), str(folder))
    _check_size(settings["rank"], targets)
    return Adapter(
        method="lora",
        config=settings,
        seed=0,
        backbone_id=base.backbone_id,
        targets=targets,
        coefficients=_coefficients(stored.factors, targets, config, storage),
        storage=storage,
        head=read_head(stored.saved, base, "fp32" if storage == "fp32" else "fp16"),
        user={"imported": "PEFT LoRA"},
    )


def _targets(folder: Path, config: PeftLora, stored: Stored, base: Base) -> tuple[Target, ...]:
    """Sorted by the UTF-8 bytes of their names, after checking that all of it fits."""
    findings: list[str] = []
    targets = []
    for layer in sorted(stored.factors, key=str.encode):
        a, b = (stored.factors[layer][part].shape for part in "AB")
        problem = _shape_finding(layer, a, b, config)
        if problem is None:
            problem = base.finding(layer, (a[1], b[0]))
            targets.append(Target(layer, a[1], b[0]))
        findings += [problem] if problem else []
    findings += head_findings(stored.saved, base, config)
    if findings:
        raise MismatchError(f"{folder} does not fit {base.where}:", findings)
    return tuple(targets)


def _shape_finding(layer: str, a: Sequence[int], b: Sequence[int], config: PeftLora) -> str | None:
    if len(a) != 2 or len(b) != 2:
        return f"{layer} must be a linear layer, got factors {list(a)} and {list(b)}"
    rank = config.rank_of(layer)
    if (a[0], b[1]) != (rank, rank):
        return (
            f"{layer} must have factors [{rank}, in] and [out, {rank}], as its config says, "
            f"got {list(a)} and {list(b)}"
        )
    return None


def _settings(config: PeftLora, targets: Sequence[Target]) -> dict[str, object]:
    """For the file's config; what differs between layers stands in the scales alone."""
    rank = max(config.rank_of(target.name) for target in targets)
    return {"rank": rank, "alpha": config.alpha, "rslora": config.rslora}


def _check_size(rank: int, targets: Sequence[Target]) -> None:
    size = 4 * rank * sum(t.in_features + t.out_features for t in targets)
    if size > _MAX_BYTES:
        raise RegrowError(
            f"adapter must take at most {_MAX_BYTES} bytes, got {size} with every layer at the "
            f"largest rank, {rank}: train with a smaller one"
        )


def _coefficients(
    factors: Factors, targets: Sequence[Target], config: PeftLora, storage: str
) -> dict[str, Coefficients]:
    """A.<in> [targets * rank, in] and B.<out> [targets * rank, out], float32, then stored."""
    method = get_method("lora")
    rank = max(config.rank_of(target.name) for target in targets)
    layout = method.layout({"rank": rank}, targets)
    values = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.items()}
    scales = {name: np.ones(rows, dtype=np.float32) for name, (rows, _) in layout.items()}
    used = dict.fromkeys(layout, 0)
    for target in targets:
        a, b = (read_float32(factors[target.name][part]) for part in "AB")  # [r, in], [out, r]
        for name, rows, scale in (
            (f"A.{target.in_features}", a, 1.0),
            (f"B.{target.out_features}", b.T, config.scaling_of(target.name)),
        ):
            start = used[name]
            values[name][start : start + len(rows)] = rows
            with np.errstate(over="ignore"):  # what becomes infinite is refused by name
                scales[name][start : start + rank] = scale
            used[name] = start + rank
    return {name: Coefficients.store(values[name], scales[name], storage) for name in layout}
