"""From images to a graph's `pixel_values`, as the bundle's preprocessor_config.json says.

The same code serves training and the device, and its results equal those of transformers' slow
image processors (tested). Resizing needs pillow, which the extra `run` brings; arrays that already
have the model's size need nothing but numpy. Processors that would do something else with the same
fields are refused by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import Fields, parse_json
from regrow_format.files import read_bytes

from .image_files import eight_bits, pillow

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PREPROCESSOR", "ImagePreprocessor"]

PREPROCESSOR = "preprocessor_config.json"
_MAX_BYTES = 1 << 20
_MAX_CONFIG = 64 << 20
_MAX_SIDE = 1 << 14
_BILINEAR = 2
_KINDS = (
    "ViT", "DeiT", "CLIP", "Bit", "Beit", "Siglip", "ConvNext", "MobileNetV1", "MobileNetV2",
)  # fmt: skip
_SUFFIXES = ("ImageProcessorFast", "ImageProcessor", "FeatureExtractor")
_WARPED = 384  # ConvNext: from this size on images are resized whole, without a crop


@dataclass(frozen=True)
class ImagePreprocessor:
    """Resize, crop, rescale and normalise.

    Attributes:
        channels: 1 or 3; images are converted to grey or RGB.
        size: (height, width) to resize to, or None.
        shortest_edge: resize so that the shorter side has this length, or None.
        crop: (height, width) of the centre to keep, or None.
        factor: what pixels are multiplied with, such as 1 / 255.
        mean, std: per channel, or None for no normalisation.
        resample: pillow's number of the filter.
        expected: (height, width) that the model takes, where nothing above makes it so.
    """

    channels: int
    size: tuple[int, int] | None
    shortest_edge: int | None
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resample: int
    expected: tuple[int, int] | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> ImagePreprocessor:
        """Read `folder`/preprocessor_config.json, and channels and size from its config.json.

        Raises:
            UsageError: there is no such file.
            FormatError: it asks for a step that is not known here.
        """
        path = folder / PREPROCESSOR
        data = read_bytes(path, limit=_MAX_BYTES, what="image preprocessing")
        channels, side = _from_config(folder / "config.json")
        fields = parse_json(data, str(path))
        found = _parse(fields, fields.number("num_channels", 1, 3, channels))
        if found.size is None and found.shortest_edge is None and found.crop is None and side:
            return replace(found, expected=(side, side))
        return found

    def __call__(self, images: Sequence[NDArray[Any] | Image]) -> NDArray[np.float32]:
        """float32 [batch, channels, height, width] from uint8 arrays or pillow images.

        Arrays are [height, width] or [height, width, channels].
        """
        if not len(images):
            raise UsageError("images must be at least one, got none")
        arrays = [self._one(image) for image in images]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            raise UsageError(
                f"images must come out at one size, got {sorted(s[1:] for s in shapes)}: "
                "set do_resize or crop in preprocessor_config.json"
            )
        return np.stack(arrays)

    def _one(self, image: NDArray[Any] | Image) -> NDArray[np.float32]:
        pixels = self._crop(self._resize(self._channels(image)))
        if self.expected and pixels.shape[:2] != self.expected:
            high, wide = self.expected
            raise UsageError(
                f"an image must be {wide} x {high} pixels for this model, "
                f"got {pixels.shape[1]} x {pixels.shape[0]}: resize it, or set do_resize and size "
                f"in {PREPROCESSOR}"
            )
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) * np.float32(self.factor)
        if self.mean is None or self.std is None:
            return scaled
        mean = np.array(self.mean, dtype=np.float32)[:, None, None]
        std = np.array(self.std, dtype=np.float32)[:, None, None]
        normal: NDArray[np.float32] = (scaled - mean) / std
        return normal

    def _channels(self, image: NDArray[Any] | Image) -> NDArray[np.uint8]:
        """uint8 [height, width, channels]."""
        if not isinstance(image, np.ndarray):
            image = eight_bits(image)
            image = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
        if image.dtype != np.uint8:
            raise UsageError(f"images must be uint8 (0 to 255), got {image.dtype}")
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[2] not in (1, 3):
            raise UsageError(
                f"an image must be [height, width] or [height, width, 1 or 3], got {image.shape}"
            )
        if image.shape[2] == self.channels:
            return image
        if self.channels == 3:
            return image.repeat(3, axis=2)
        grey = pillow().fromarray(image).convert("L")
        return np.asarray(grey)[..., None]

    def _resize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        target = self.size
        if self.shortest_edge is not None:
            # Integer arithmetic as in torchvision and transformers: the longer side rounds down.
            edge, long = self.shortest_edge, max(height, width)
            longer = int(edge * long / min(height, width))
            target = (edge, longer) if height <= width else (longer, edge)
        if target is None or target == (height, width):
            return pixels
        if max(target) > _MAX_SIDE:
            raise UsageError(
                f"an image must not be this narrow, got {width} x {height} pixels: it would be "
                f"resized to {target[1]} x {target[0]}"
            )
        single = pixels[..., 0] if self.channels == 1 else pixels
        resized = pillow().fromarray(single).resize((target[1], target[0]), self.resample)
        return np.asarray(resized).reshape(*target, self.channels)

    def _crop(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.crop is None:
            return pixels
        height, width = pixels.shape[:2]
        high, wide = self.crop
        if high > height or wide > width:
            pad_y, pad_x = max(high - height, 0), max(wide - width, 0)
            pads = ((-(-pad_y // 2), pad_y // 2), (-(-pad_x // 2), pad_x // 2), (0, 0))
            pixels = np.pad(pixels, pads)
            height, width = pixels.shape[:2]
        top, left = (height - high) // 2, (width - wide) // 2
        return pixels[top : top + high, left : left + wide]


def _parse(fields: Fields, channels: int) -> ImagePreprocessor:
    on = {name: _flag(fields, name) for name in fields.names() if name.startswith("do_")}
    known = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
    unknown = sorted(name for name, value in on.items() if value and name not in known)
    if unknown:
        raise FormatError(f"{fields.where}: {', '.join(unknown)} is not supported on the device")
    if fields.plain("rescale_offset", bool):
        raise FormatError(f"{fields.where}: rescale_offset is not supported on the device")
    kind = _kind(fields)
    # Older files have one number: CLIP's means the shorter side, all others' a square.
    size, edge = _size(fields, "size", kind == "CLIP") if on.get("do_resize") else (None, None)
    crop, _ = _size(fields, "crop_size") if on.get("do_center_crop") else (None, None)
    if kind == "ConvNext" and (side := edge or (size or (0,))[0]):
        size, edge, crop = _convnext(fields, side)
    normalize = bool(on.get("do_normalize"))
    mean = _per_channel(fields, "image_mean", channels) if normalize else None
    std = _per_channel(fields, "image_std", channels) if normalize else None
    if std and 0 in std:
        raise FormatError(f"{fields.where}: image_std must not be 0")
    return ImagePreprocessor(
        channels=channels,
        size=size,
        shortest_edge=edge,
        crop=crop,
        factor=fields.take("rescale_factor", float, 1 / 255) if on.get("do_rescale", True) else 1.0,
        mean=mean,
        std=std,
        resample=fields.number("resample", 0, 5, _BILINEAR),
    )


def _kind(fields: Fields) -> str:
    """Such as "ViT"; empty where the file names no processor.

    Raises:
        FormatError: it is a processor whose steps are not those of this module.
    """
    name = fields.plain("image_processor_type", str) or fields.plain("feature_extractor_type", str)
    if not name:
        return ""
    kind = next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)
    if kind not in _KINDS:
        raise FormatError(
            f"{fields.where}: image_processor_type must be of {', '.join(_KINDS)}, got {name:.60}"
        )
    return kind


def _convnext(
    fields: Fields, side: int
) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """(size, shortest edge, crop): small ones are cut out of a larger image."""
    if side >= _WARPED:
        return (side, side), None, None
    share = fields.take("crop_pct", float, 224 / 256)
    if not 0.1 <= share <= 1:
        raise FormatError(f"{fields.where}: crop_pct must be from 0.1 to 1, got {share}")
    return None, int(side / share), (side, side)


def _from_config(path: Path) -> tuple[int, int | None]:
    """(channels, side of a square image or None) as a model's config.json has them."""
    if not path.is_file():
        return 3, None
    fields = parse_json(read_bytes(path, limit=_MAX_CONFIG, what="a config"), str(path))
    channels = fields.number("num_channels", 1, 3) if fields.has("num_channels") else 3
    return channels, fields.plain("image_size", int)


def _flag(fields: Fields, name: str) -> bool:
    return fields.take(name, bool) if fields.has(name) else False


def _size(
    fields: Fields, name: str, by_edge: bool = False
) -> tuple[tuple[int, int] | None, int | None]:
    """((height, width), None), or (None, shortest edge)."""
    if fields.holds(name, int):
        side = fields.number(name, 1, _MAX_SIDE)
        return (None, side) if by_edge else ((side, side), None)
    part = fields.optional(name)
    if part is None:
        raise FormatError(f"{fields.where}: {name} must be given, got nothing")
    if part.has("shortest_edge"):
        return None, part.number("shortest_edge", 1, _MAX_SIDE)
    return (part.number("height", 1, _MAX_SIDE), part.number("width", 1, _MAX_SIDE)), None


def _per_channel(fields: Fields, name: str, channels: int) -> tuple[float, ...]:
    values = fields.take(name, list)
    if len(values) not in (1, channels) or not all(isinstance(v, int | float) for v in values):
        raise FormatError(f"{fields.where}: {name} must be {channels} numbers, got {values!r:.80}")
    return tuple(float(v) for v in (values * channels if len(values) == 1 else values))
