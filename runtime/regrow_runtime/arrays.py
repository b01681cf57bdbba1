"""Reading `.npz` files, without pickle, and the pictures in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UsageError
from .preprocess import ImagePreprocessor

__all__ = ["as_pictures", "read_arrays"]

_MAX_BYTES = 16 << 30
_PICTURES = ("images", "image", "x")


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz`, by name.

    Raises:
        UsageError: there is no such file.
        FormatError: it is no `.npz`, holds Python objects, or unpacks to more than 16 GiB.
    """
    if not path.is_file():
        raise UsageError(f"input must be an .npz file, got {path}: no such file")
    try:
        with ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MAX_BYTES:
            raise FormatError(f"{path} must unpack to at most {_MAX_BYTES} bytes, got {unpacked}")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (BadZipFile, ValueError, OSError, EOFError, KeyError, MemoryError) as error:
        if "allow_pickle" in str(error):
            error = ValueError("it holds Python objects; save text with astype(str)")
        raise FormatError(
            f"{path} must be an .npz of plain arrays (numpy.savez writes one), got another: {error}"
        ) from None


def as_pictures(
    arrays: Mapping[str, NDArray[Any]], path: Path, preprocessor: Callable[[], ImagePreprocessor]
) -> NDArray[np.float32]:
    """float32 [n, channels, height, width] from ready `pixel_values`, or from pictures.

    Pictures are `images` (or `x`), uint8 from 0 to 255 or floats from 0 to 1, [n, height, width]
    or [n, height, width, channels]; they go through the model's own preprocessing.
    """
    if "pixel_values" in arrays:
        ready = arrays["pixel_values"]
        if ready.ndim != 4 or ready.dtype.kind != "f":
            raise UsageError(
                f"{path}: pixel_values must be floats [n, channels, height, width], "
                f"got {ready.dtype} {list(ready.shape)}"
            )
        return ready.astype(np.float32)
    name = next((n for n in _PICTURES if n in arrays), None)
    if name is None:
        raise UsageError(
            f"{path} must have an array `images` or `pixel_values`, got {sorted(arrays)}"
        )
    return preprocessor()(list(_as_bytes(arrays[name], f"{path}: {name}")))


def _as_bytes(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if images.ndim not in (3, 4):
        raise UsageError(f"{where} must be [n, height, width(, channels)], got {images.shape}")
    if not len(images):
        raise UsageError(f"{where} must be at least one picture, got none")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise UsageError(f"{where} must be finite, got NaN or infinity")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1:
        pixels: NDArray[np.uint8] = np.rint(images * 255).astype(np.uint8)
        return pixels
    raise UsageError(
        f"{where} must be uint8 from 0 to 255 or floats from 0 to 1, got {images.dtype} "
        f"from {images.min()} to {images.max()}"
    )
