"""Images come out as transformers' slow image processors have them; hostile files do not."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    MobileNetV2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from regrow_inputs import ImagePreprocessor, read_image
from regrow_runtime import FormatError, UsageError

SIZES = [(31, 47), (47, 31), (32, 32), (5, 90), (224, 3), (1, 1), (64, 33)]  # width, height
PROCESSORS = {
    "ViT": ViTImageProcessor(size={"height": 24, "width": 20}),
    "ViT bicubic, no normalisation": ViTImageProcessor(
        size={"height": 30, "width": 30}, resample=3, do_normalize=False
    ),
    "DeiT": DeiTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 24, "width": 24}
    ),
    "DeiT, crop larger than the image": DeiTImageProcessor(
        size={"height": 21, "width": 17}, crop_size={"height": 24, "width": 24}
    ),
    "CLIP": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    "CLIP odd": CLIPImageProcessor(
        size={"shortest_edge": 25}, crop_size={"height": 24, "width": 21}, resample=2
    ),
    "ConvNext": ConvNextImageProcessor(size={"shortest_edge": 28}, crop_pct=0.875),
    "ConvNext, warped": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "Swin's (ViT), bicubic": ViTImageProcessor(size={"height": 28, "width": 28}, resample=3),
    "DINOv2's (Bit)": BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    ),
    "Siglip": SiglipImageProcessor(size={"height": 24, "width": 24}),
    "MobileNetV2": MobileNetV2ImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    ),
}


def _picture(size: tuple[int, int], mode: str, draw: int) -> Image.Image:
    width, height = size
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(draw).integers(0, 256, shape).astype(np.uint8)
    return Image.fromarray(pixels)


def _theirs(processor, images) -> np.ndarray:
    # Without the hint, transformers takes a side of 1 or 3 pixels for the channels.
    found = processor(images, return_tensors="np", input_data_format="channels_last")
    return found["pixel_values"]


def _ours(folder, processor, channels: int) -> ImagePreprocessor:
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"num_channels": channels}), encoding="utf-8")
    return ImagePreprocessor.from_folder(folder)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_images_in_colour(tmp_path, name, size):
    processor, image = PROCESSORS[name], _picture(size, "RGB", size[0])
    expected = _theirs(processor, image)
    found = _ours(tmp_path, processor, 3)([image])
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_grey_images_are_converted_as_clip_does(tmp_path, size):
    processor, image = PROCESSORS["CLIP"], _picture(size, "L", size[1])
    expected = _theirs(processor, image)
    found = _ours(tmp_path, processor, 3)([image])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_models_of_one_channel(tmp_path, size):
    processor = ViTImageProcessor(
        size={"height": 14, "width": 16}, image_mean=[0.3], image_std=[0.2]
    )
    image = _picture(size, "L", 7)
    grey = np.asarray(image)[..., None]
    expected = _theirs(processor, grey)
    found = _ours(tmp_path, processor, 1)([image])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "LA", "CMYK", "L"])
def test_every_mode_is_converted_as_pillow_does(tmp_path, mode):
    processor, image = PROCESSORS["CLIP"], _picture((33, 40), "RGB", 3).convert(mode)
    expected = _theirs(processor, image)
    found = _ours(tmp_path, processor, 3)([image])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_a_batch_is_its_images(tmp_path):
    processor = PROCESSORS["CLIP"]
    images = [_picture(size, "RGB", i) for i, size in enumerate(SIZES)]
    ours = _ours(tmp_path, processor, 3)
    found = ours(images)
    expected = _theirs(processor, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(found, np.concatenate([ours([p]) for p in images]))


@pytest.mark.parametrize(
    ("kind", "target"), [("DeiTFeatureExtractor", (30, 30)), ("CLIPFeatureExtractor", (30, 60))]
)
def test_older_files_give_sizes_as_one_number(tmp_path, kind, target):
    config = {"feature_extractor_type": kind, "do_resize": True, "size": 30, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = ImagePreprocessor.from_folder(tmp_path)
    assert ours([_picture((80, 40), "RGB", 1)]).shape == (1, 3, *target)


def test_a_thread_of_a_picture_is_refused_before_it_takes_gigabytes(tmp_path):
    config = {"do_resize": True, "size": {"shortest_edge": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match="must not be this narrow, got 1 x 9000 pixels"):
        ImagePreprocessor.from_folder(tmp_path)([_picture((1, 9000), "RGB", 1)])


_GREY = {"image_mean": [0.5], "image_std": [0.5]}


def test_images_of_16_bits_are_scaled_not_clipped(tmp_path):
    ours = _ours(tmp_path, ViTImageProcessor(size={"height": 8, "width": 8}, **_GREY), 1)
    eight = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "x.png")
    found = ours([read_image(tmp_path / "x.png")])
    np.testing.assert_array_equal(found, ours([eight]))


@pytest.mark.parametrize("levels", [np.ones((8, 8), "f4"), np.full((8, 8), 1 << 20, "i4")])
def test_images_whose_range_nobody_knows_are_refused(tmp_path, levels):
    ours = _ours(tmp_path, ViTImageProcessor(size={"height": 8, "width": 8}, **_GREY), 1)
    Image.fromarray(levels).save(tmp_path / "x.tiff")
    with pytest.raises(UsageError, match="must have 8 or 16 bits a channel, got 32"):
        ours([read_image(tmp_path / "x.tiff")])


def test_exif_turns_a_picture(tmp_path):
    image = _picture((6, 4), "RGB", 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png").size == (4, 6)


def _png(width: int, height: int) -> bytes:
    """A small file that says it is large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(9000, 9000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_would_unpack_to_gigabytes(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png(*size))
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"bomb\.png must .*(pixels|got something else)"):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"no image", _png(8, 8)[:44], b"GIF89a" + bytes(40)]
)
def test_files_that_are_no_picture(tmp_path, data):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"x\.png must be an image, got something else") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("regrow_inputs.image_files.MAX_FILE", 100)
    _picture((64, 64), "RGB", 1).save(tmp_path / "x.png")
    with pytest.raises(FormatError, match="must be at most 100 bytes for an image"):
        read_image(tmp_path / "x.png")
