"""Adapters as dense tensors, for programs that do not use regrow's runtime.

What is written is what `Bundle.swap` would feed, by the bundle's input names: the basis and the
coefficients are expanded, so a file is as large as its layers' factors, not kilobytes.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import onnxruntime

from regrow_format import adapter as adapter_file
from regrow_format import manifest as manifest_file
from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import RegrowError, UsageError
from regrow_format.files import check_output, write_bytes
from regrow_format.manifest import Manifest
from regrow_runtime.fit import check_fit
from regrow_runtime.slots import Feeds, expand

__all__ = ["FORMATS", "convert", "dense_tensors"]

MAX_BYTES = 1 << 31  # of a FlatBuffer, which .onnx_adapter is


def convert(
    adapter: str | Path | Adapter,
    bundle: str | Path,
    out: str | Path,
    *,
    to: str,
    force: bool = False,
) -> Feeds:
    """Write the dense tensors of an adapter for a swappable bundle; a file in one step.

    Args:
        to: "npz" (NumPy, no pickle) or "onnx_adapter" (`LoraAdapter` of ONNX Runtime).
        force: replace `out` if it exists.

    Returns:
        What was written: float32 arrays by the name of the graph's input.

    Raises:
        UsageError: `out` cannot be written, or there is no such format or bundle.
        MismatchError: the adapter does not fit the bundle; every reason is listed.
        RegrowError: the file could not be written.
    """
    if to not in FORMATS:
        raise UsageError(f"to must be one of {', '.join(FORMATS)}, got {to!r:.40}")
    out = Path(out)
    check_output(out, force=force)
    manifest = Manifest.load(bundle)
    loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    tensors = dense_tensors(loaded, manifest, Path(bundle))
    write_bytes(out, FORMATS[to](tensors, out.absolute().parent))
    return tensors


def dense_tensors(adapter: Adapter, manifest: Manifest, folder: Path) -> Feeds:
    """What `Bundle.swap` would feed, for the bundle in `folder`; see `regrow_runtime.slots`."""
    if manifest.mode != "swappable":
        raise UsageError(
            f"bundle must be swappable to take dense tensors, got a {manifest.mode} one: "
            "export it with --mode swappable"
        )
    check_fit(adapter, manifest)
    return expand(adapter, manifest, BasisCache(0), folder)


def _npz(tensors: Feeds, _scratch: Path) -> bytes:
    """As `numpy.savez`, which takes names as arguments and so cannot take all of them."""
    data = io.BytesIO()
    with ZipFile(data, "w", ZIP_STORED) as archive:
        for name in sorted(tensors):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, tensors[name], allow_pickle=False)
    return data.getvalue()


def _onnx_adapter(tensors: Feeds, scratch: Path) -> bytes:
    size = sum(array.nbytes for array in tensors.values())
    if size >= MAX_BYTES:
        raise RegrowError(
            f"an .onnx_adapter must be less than {MAX_BYTES} bytes, got {size}: convert to npz"
        )
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(adapter_file.FORMAT)
    made.set_model_version(manifest_file.FORMAT)
    made.set_parameters(
        {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensors[name]))
            for name in sorted(tensors)
        }
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".regrow.", dir=scratch) as folder:
            path = Path(folder) / "new.onnx_adapter"
            made.export_adapter(str(path))
            return path.read_bytes()
    except Exception as error:  # ONNX Runtime has no narrower kind
        raise RegrowError(f"{scratch} must take a new .onnx_adapter, got: {error}") from error


FORMATS: dict[str, Callable[[Feeds, Path], bytes]] = {"npz": _npz, "onnx_adapter": _onnx_adapter}
