"""What a bundle carries so that a device can check it: a probe, outputs for it, operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_export.slots import shared_copy
from regrow_export.source import ExportSource
from regrow_format.errors import RegrowError
from regrow_format.files import sha256_file
from regrow_format.manifest import MANIFEST, Checks, FileEntry, Manifest
from regrow_runtime import Bundle
from regrow_runtime.checks import EXPECTED_FILE, KEPT, PROBE_FILE

from .mobile import OPERATORS_FILE, partitions, required_operators
from .parity import ATOL, INT8_SHARE, RTOL
from .probe_inputs import MOST, completed, fingerprint, first_output, standard_inputs

__all__ = ["with_checks"]

Arrays = Mapping[str, NDArray[Any]]


def with_checks(folder: Path, manifest: Manifest, source: ExportSource, inputs: Arrays) -> Manifest:
    """Write `probe.safetensors`, `expected.safetensors` and `operators.config`; list them.

    The bundle is opened and run by the runtime, as a device will.

    Args:
        inputs: what the graph was checked with, batch first.

    Raises:
        RegrowError: the runtime and torch disagree on the probe.
    """
    from safetensors.numpy import save_file

    (folder / OPERATORS_FILE).write_text(required_operators(folder), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    bundle = Bundle.open(folder)
    rows = {name: np.ascontiguousarray(value[:2]) for name, value in inputs.items()}
    probe, known = _standard(bundle, source, inputs) or (rows, "")
    outputs = bundle.run(_row(probe, 0))
    save_file(probe, folder / PROBE_FILE)
    expected = {name: value.reshape(-1)[-KEPT:].copy() for name, value in outputs.items()}
    # The rows of an exact variant have been compared before.
    samples = (probe,) if manifest.variant == "fp32" else (probe, rows)
    spread = _spread(bundle, source, samples)
    swapped = manifest.mode == "swappable"
    if spread and known and swapped and (exact := first_output(source.model, probe)):
        expected[f"{bundle.graph.outputs[0].name}.exact"] = exact[1][-MOST:].copy()
    save_file(expected, folder / EXPECTED_FILE)
    checks = Checks(
        probe=known,
        spread=spread,
        partitions=partitions(folder / manifest.graphs[0].file, probe),
    )
    fresh = _entries(folder, OPERATORS_FILE, PROBE_FILE, EXPECTED_FILE)
    return replace(manifest, checks=checks, files=dict(sorted({**manifest.files, **fresh}.items())))


def _standard(
    bundle: Bundle, source: ExportSource, inputs: Arrays
) -> tuple[dict[str, NDArray[Any]], str] | None:
    """The probe that training makes too, with its fingerprint; None if the graph has no such."""
    standard = standard_inputs(source.model, inputs)
    probe = completed(standard, inputs) if standard else None
    known = first_output(source.model, standard) if standard and probe else None
    if standard is None or probe is None or known is None:
        return None
    try:
        bundle.run(_row(probe, 0))
    except RegrowError:  # a graph that was traced for one length only
        return None
    contiguous = {name: np.ascontiguousarray(value) for name, value in probe.items()}
    return contiguous, fingerprint(standard, known[0])


def _row(inputs: Arrays, row: int) -> dict[str, NDArray[Any]]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def _entries(folder: Path, *names: str) -> dict[str, FileEntry]:
    paths = {name: folder / name for name in names}
    return {n: FileEntry(path.stat().st_size, sha256_file(path)) for n, path in paths.items()}


def _spread(bundle: Bundle, source: ExportSource, samples: Sequence[Arrays]) -> float:
    """How far the variant is from torch in float32, as a share of the largest output.

    Raises:
        RegrowError: it is further than the tolerance, for an exact variant.
    """
    variant = bundle.manifest.variant
    if bundle.manifest.mode != "swappable":  # torch has no such model at hand; as the export allows
        return INT8_SHARE if variant in ("int8", "int4") else 0.0
    exact, worst = shared_copy(source.model), 0.0
    for inputs in samples:
        for row in range(len(next(iter(inputs.values())))):
            one = _row(inputs, row)
            if (known := first_output(exact, one)) is None:
                continue
            found = bundle.run(one)[bundle.graph.outputs[0].name].reshape(-1)
            size = float(np.abs(known[1]).max())
            distance = float(np.abs(found - known[1]).max()) if size else 0.0
            if variant == "fp32" and not distance <= ATOL * max(1.0, size) + RTOL * size:
                raise RegrowError(
                    f"probe: the bundle and torch must agree, got a difference of {distance:.3g} "
                    f"where outputs reach {size:.3g}"
                )
            worst = max(worst, distance / size if size else 0.0)
    return 0.0 if variant == "fp32" else float(f"{worst:.3g}")
