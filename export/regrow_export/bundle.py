"""`export_bundle`: check, trace, write, run against torch, and only then keep it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regrow_export.config import ExportRequest
from regrow_export.environment import deterministic_export, quiet, require_export
from regrow_export.quantization import INT8_ROUNDING
from regrow_export.source import ExportSource
from regrow_format.files import check_output, new_folder, sha256_file
from regrow_format.manifest import MANIFEST, FileEntry, GraphSpec, Manifest

if TYPE_CHECKING:
    from regrow_export.modes import Draft, Job

__all__ = ["export_bundle"]


def export_bundle(
    source: ExportSource,
    out: str | Path,
    request: ExportRequest | None = None,
    *,
    force: bool = False,
) -> Manifest:
    """Write a bundle and check it against torch; nothing is left behind if any of it fails.

    Args:
        out: a new folder; `force` replaces an old one.
        request: the settings, and the adapters and arrays that go with them. Targets are module
            paths here; with bias slots, norms can be targets, and a target gets every kind of slot
            that its layer takes.

    Raises:
        UsageError: the request makes no sense for this backbone: unknown targets, or layers.
        MismatchError: the adapter belongs to another model.
        RegrowError: tracing failed, or the bundle and torch disagree, or a slot has no effect, or
            the model has no weights to store in the precision.
    """
    out, request = Path(out), request or ExportRequest()
    check_output(out.absolute(), force=force, marker=MANIFEST)
    require_export()
    from regrow_export.modes import MODES, Job
    from regrow_export.slots import check_adapter

    source.check()
    if request.adapter is not None:
        check_adapter(source, request.adapter)
    MODES[request.config.mode].check(source, request)
    with (
        quiet(),
        deterministic_export(source.model),
        new_folder(out, marker=MANIFEST, force=force) as folder,
    ):
        return _export(Job(source, request, folder))


def _export(job: Job) -> Manifest:
    from regrow_export.modes import MODES, write_expanders
    from regrow_export.validation import with_checks

    source, request, folder = job.source, job.request, job.folder
    draft = MODES[job.config.mode].draft(job)
    for path in source.files:
        shutil.copyfile(path, folder / path.name)
    if job.built_in and job.built_in.head:
        _rename_labels(folder, job.built_in.head.labels)
    manifest = _manifest(job, draft)
    if request.expanders:
        expanders = write_expanders(folder, request.expanders, manifest)
        manifest = replace(manifest, expanders=expanders, files=_files(folder))
    manifest = with_checks(folder, manifest, source, draft.inputs)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


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


def _manifest(job: Job, draft: Draft) -> Manifest:
    source, adapter, precision = job.source, job.built_in, job.config.precision
    own_head = adapter.head if adapter else None
    return Manifest(
        mode=job.config.mode,
        task=source.task,
        backbone_id=source.backbone_id,
        opset=draft.opset,
        ir_version=draft.ir_version,
        graphs=(GraphSpec("model", draft.file, draft.input_specs, draft.output_specs),),
        slots=draft.slots,
        labels=own_head.labels if own_head else source.labels,
        files=_files(job.folder),
        variant=precision,
        rounding=INT8_ROUNDING if precision == "int8" else None,
        adapter=adapter.digest() if adapter else None,
        seeded=draft.seeded,
        cache=draft.cache,
        parity=draft.parity,
        score=draft.score,
    )
