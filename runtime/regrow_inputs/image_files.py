"""Images from files and from arrays, before any preprocessing. Files need pillow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import no_file

from .extras import pip_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_ENDINGS", "as_images", "eight_bits", "pillow", "read_image"]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_IMAGE_ARRAYS = ("images", "image", "x")
MAX_FILE = 256 << 20
_MAX_PIXELS = 1 << 26
_MAX_16_BITS = (1 << 16) - 1


def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        RegrowError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RegrowError(f"images need pillow: {pip_line('run')}") from None
    return Image


def read_image(path: Path) -> Image:
    """Open an image with pillow, turned as its EXIF data says.

    Raises:
        UsageError: there is no such file.
        FormatError: pillow cannot read it, or it has more than 67 million pixels or 256 MiB.
    """
    if not path.is_file():
        raise UsageError(f"image must be a file, got {path}: {no_file(path)}")
    module = pillow()
    if path.stat().st_size > MAX_FILE:
        raise FormatError(f"{path} must be at most {MAX_FILE} bytes for an image, got more")
    from PIL.ImageOps import exif_transpose

    try:
        with module.open(path) as image:
            _check_size(path, image.size)
            image.load()
            found: Image = exif_transpose(image)
    except FormatError:
        raise
    except Exception as error:  # pillow raises many kinds on hostile files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} must be an image, got something else: {reason}") from None
    return found


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Before anything is decoded: a file of kilobytes may unpack to gigabytes."""
    if size[0] * size[1] > _MAX_PIXELS:
        raise FormatError(
            f"{path} must have at most {_MAX_PIXELS} pixels, got {size[0]} x {size[1]}"
        )


def eight_bits(image: Image) -> Image:
    """Images of 16 bits scaled to 8: pillow's own conversion would clip them to white.

    Raises:
        UsageError: the image has 32 bits or floats, whose range nobody knows.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > _MAX_16_BITS:
        raise UsageError(
            f"an image must have 8 or 16 bits a channel, got 32 (mode {image.mode}): save it with 8"
        )
    eight: Image = pillow().fromarray((levels // 257).astype(np.uint8))
    return eight


def as_images(
    arrays: Mapping[str, NDArray[Any]],
    path: Path,
    preprocessor: Callable[[], Callable[[Sequence[Any]], NDArray[np.float32]]],
) -> NDArray[np.float32]:
    """float32 [n, channels, height, width] from ready `pixel_values`, or from images.

    Images are `images` (or `x`), uint8 from 0 to 255 or floats from 0 to 1, [n, height, width]
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
    name = next((n for n in _IMAGE_ARRAYS if n in arrays), None)
    if name is None:
        raise UsageError(
            f"{path} must have an array `images` or `pixel_values`, got {sorted(arrays)}"
        )
    return preprocessor()(list(_as_bytes(arrays[name], f"{path}: {name}")))


def _as_bytes(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if images.ndim not in (3, 4):
        raise UsageError(f"{where} must be [n, height, width(, channels)], got {images.shape}")
    if not len(images):
        raise UsageError(f"{where} must be at least one image, got none")
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
