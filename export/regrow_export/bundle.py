"""`export_bundle`: check the request, trace, write, run against torch, and only then keep it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_export.environment import deterministic_export, quiet, require_export
from regrow_export.methods import check_graph
from regrow_export.modes import write_expanders
from regrow_export.quantization import INT8_ROUNDING, check_precision
from regrow_export.source import ExportSource
from regrow_export.validation import Measure
from regrow_format.adapter import Adapter
from regrow_format.errors import UsageError
from regrow_format.files import check_output, new_folder, sha256_file
from regrow_format.manifest import MANIFEST, MODES, FileEntry, GraphSpec, Manifest
from regrow_format.slot_kinds import SLOT_KINDS
from regrow_runtime.slots import HEAD_FILE

if TYPE_CHECKING:
    from regrow_export.modes import Draft
    from regrow_export.slots import SlotPlan

__all__ = ["export_bundle"]


def export_bundle(
    source: ExportSource,
    out: str | Path,
    *,
    mode: str = "swappable",
    targets: Sequence[str] = (),
    kinds: Sequence[str] = ("low_rank",),
    fixed_rank: int | None = None,
    vera: Adapter | None = None,
    expanders: Sequence[Adapter] = (),
    adapter: Adapter | None = None,
    constants: bool = False,
    precision: str = "fp32",
    inputs: Mapping[str, NDArray[Any]] | None = None,
    measure: Measure | None = None,
    force: bool = False,
) -> Manifest:
    """Write a bundle and check it against torch; nothing is left behind if any of it fails.

    Args:
        out: a new folder; `force` replaces an old one.
        mode: "swappable", "merged" or "seeded".
        targets: module paths of the layers that get slots; for "swappable" only.
        kinds: of the slots, "low_rank", "delta", "bias" (see `kinds_for`), "weight" and "vector";
            for "swappable" only. A target gets every kind that its layer takes; with "bias", norms
            can be targets.
        fixed_rank: every dimension of every slot is fixed, n is 1, and this the rank of low_rank
            ones; for "swappable" only.
        vera: the adapter whose seed and rank vector slots have.
        expanders: adapters for whose like `expand-<method>.onnx` is written; for "swappable" only.
        adapter: what is built in; for "merged", where none is the backbone as it is, and "seeded".
        constants: the seed and the coefficients are no inputs; for "seeded" only.
        precision: of the weights of linear layers in blocks: "fp32", "fp16", "int8" (which rounds
            those layers' inputs too, as it runs) or "int4"; slots and the rest are fp32.
        inputs: by argument name of `forward`, batch first: what the bundle is checked with.
            Needed for models that optimum does not know, made up for others.
        measure: how good a model is on samples, to say what `precision` costs.

    Raises:
        UsageError: the request makes no sense: unknown targets, an adapter too many or missing.
        MismatchError: the adapter belongs to another model.
        RegrowError: tracing failed, or the bundle and torch disagree, or a slot has no effect, or
            the model has no weights to store in `precision`.
    """
    require_export()
    from regrow_export.slots import SlotPlan, check_adapter, head_widths

    out = Path(out)
    check_precision(precision)
    _check_request(mode, targets, kinds, adapter)
    plan = SlotPlan(tuple(kinds), fixed_rank, vera, tuple(expanders), constants)
    plan.check(mode, precision)
    check_output(out.absolute(), force=force, marker=MANIFEST)
    source.check()
    if mode == "swappable":
        plan.target_slots(source, targets)
    elif adapter is not None:
        check_adapter(source, adapter)
        if mode == "seeded":
            check_graph(adapter)
    head_widths(source, [t.name for t in adapter.targets] if adapter else targets)
    with (
        quiet(),
        deterministic_export(source.model),
        new_folder(out, marker=MANIFEST, force=force) as folder,
    ):
        return _export(source, folder, mode, targets, plan, adapter, inputs, precision, measure)


def _check_request(
    mode: str, targets: Sequence[str], kinds: Sequence[str], adapter: Adapter | None
) -> None:
    if mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(targets, str):
        raise UsageError(f"targets must be a list of module paths, got the string {targets!r}")
    _check_kinds(kinds)
    if targets and not kinds:
        raise UsageError("kinds must name at least one for targets to have slots, got none")
    if mode == "swappable":
        if adapter is not None:
            raise UsageError("adapter must be left out for mode swappable; swap it on the device")
        return
    if adapter is None:
        if mode == "seeded":
            raise UsageError("adapter must be given for mode seeded, got none")
        if targets:
            raise UsageError(f"targets must be left out for mode {mode} without an adapter")
        return
    named = [target.name for target in adapter.targets]
    if targets and sorted(targets) != sorted(named):
        raise UsageError(f"targets must be the adapter's for mode {mode}: leave them out")


def _check_kinds(kinds: Sequence[str]) -> None:
    if isinstance(kinds, str):
        raise UsageError(f"kinds must be a list of kinds of slot, got the string {kinds!r}")
    known = [name for name, kind in SLOT_KINDS.items() if not kind.is_head]
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"kinds must be among {', '.join(known)}, got {kind!r}")
        if list(kinds).count(kind) > 1:
            raise UsageError(f"kinds must be named once, got {kind!r} twice")


def _export(
    source: ExportSource,
    folder: Path,
    mode: str,
    targets: Sequence[str],
    plan: SlotPlan,
    adapter: Adapter | None,
    inputs: Mapping[str, NDArray[Any]] | None,
    precision: str,
    measure: Measure | None,
) -> Manifest:
    from regrow_export.modes import merged, plain, seeded, swappable
    from regrow_export.validation import with_checks

    if mode == "swappable":
        draft = swappable(source, folder, targets, plan, inputs, precision, measure)
    elif adapter is None:
        draft = plain(source, folder, inputs, precision, measure)
    else:
        make = merged if mode == "merged" else partial(seeded, constants=plan.constants)
        draft = make(source, folder, adapter, inputs, precision, measure)
    if mode == "swappable" and source.head:
        _write_head(folder, source)
    for path in source.files:
        shutil.copyfile(path, folder / path.name)
    if adapter and adapter.head:
        _rename_labels(folder, adapter.head.labels)
    manifest = _manifest(source, folder, mode, adapter, draft, precision)
    if plan.expanders:
        expanders = write_expanders(folder, plan.expanders, manifest)
        manifest = replace(manifest, expanders=expanders, files=_files(folder))
    manifest = with_checks(folder, manifest, source, draft.inputs)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_head(folder: Path, source: ExportSource) -> None:
    """The backbone's head apart: a batch may mix it with heads of adapters (see the runtime)."""
    from safetensors.numpy import save_file

    from regrow_export.slots import model_head

    tensors = {}
    for layer in model_head(source.model, source.head):
        tensors[f"{layer.name}.weight"] = np.ascontiguousarray(layer.weight)
        tensors[f"{layer.name}.bias"] = layer.bias
    save_file(tensors, folder / HEAD_FILE)


def _rename_labels(folder: Path, labels: Sequence[str]) -> None:
    """A head that is built in has its own classes: say so where optimum's classes look."""
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config["id2label"] = {str(index): label for index, label in enumerate(labels)}
    config["label2id"] = {label: index for index, label in enumerate(labels)}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _manifest(
    source: ExportSource,
    folder: Path,
    mode: str,
    adapter: Adapter | None,
    draft: Draft,
    precision: str,
) -> Manifest:
    own_head = adapter.head if adapter else None
    return Manifest(
        mode=mode,
        task=source.task,
        backbone_id=source.backbone_id,
        opset=draft.opset,
        ir_version=draft.ir_version,
        graphs=(GraphSpec("model", draft.file, draft.input_specs, draft.output_specs),),
        slots=draft.slots,
        labels=own_head.labels if own_head else source.labels,
        files=_files(folder),
        variant=precision,
        rounding=INT8_ROUNDING if precision == "int8" else None,
        adapter=adapter.digest() if adapter else None,
        seeded=draft.seeded,
        cache=draft.cache,
        parity=draft.parity,
        score=draft.score,
    )
