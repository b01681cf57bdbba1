"""Images with numpy alone; tests/toolchain compares them to transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from regrow_inputs import ImagePreprocessor, as_images, read_image
from regrow_runtime import FormatError, UsageError

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
STEPS = {
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.25, 0.125],
    "image_std": [0.5, 0.25, 1.0],
}


@pytest.fixture
def read(tmp_path):
    """read(channels, **steps): a preprocessor from a folder."""

    def call(channels: int = 3, **steps: object) -> ImagePreprocessor:
        (tmp_path / "config.json").write_text(json.dumps({"num_channels": channels}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
        return ImagePreprocessor.from_folder(tmp_path)

    return call


def test_rescaled_and_normalised(read):
    found = read(**STEPS)([RGB, RGB[::-1]])
    assert found.shape == (2, 3, 6, 5)
    assert found.dtype == np.float32
    mean, std = np.array(STEPS["image_mean"]), np.array(STEPS["image_std"])
    expected = (RGB.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(found[0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], found[0][:, ::-1])


def test_without_rescaling_pixels_stay(read):
    found = read(do_rescale=False)([RGB])
    np.testing.assert_array_equal(found[0], RGB.transpose(2, 0, 1).astype(np.float32))


def test_one_mean_serves_all_channels(read):
    steps = {**STEPS, "image_mean": [0.5], "image_std": [0.5]}
    found = read(**steps)([RGB])
    np.testing.assert_allclose(found[0, 2], (RGB[..., 2] / 255 - 0.5) / 0.5, rtol=1e-5, atol=1e-6)


def test_grey_becomes_three_equal_channels(read):
    found = read(do_rescale=False)([RGB[..., 0], RGB[..., :1]])
    for image in found:
        for channel in image:
            np.testing.assert_array_equal(channel, RGB[..., 0])


@pytest.mark.parametrize(
    ("shape", "top", "left"), [((6, 5), 1, 1), ((4, 3), 0, 0), ((7, 8), 1, 2), ((5, 4), 0, 0)]
)
def test_the_centre_is_kept(read, shape, top, left):
    image = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    steps = {"do_center_crop": True, "crop_size": {"height": 4, "width": 3}, "do_rescale": False}
    found = read(1, **steps)([image])
    np.testing.assert_array_equal(found[0, 0], image[top : top + 4, left : left + 3])


def test_a_crop_beyond_the_picture_is_black(read):
    steps = {"do_center_crop": True, "crop_size": {"height": 5, "width": 4}, "do_rescale": False}
    found = read(1, **steps)([np.full((2, 2), 9, np.uint8)])[0, 0]
    assert found.shape == (5, 4)
    assert (found[2:4, 1:3] == 9).all()
    assert found.sum() == 9 * 4


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.float32), r"images must be uint8 \(0 to 255\), got float32"),
        (np.zeros((4, 4, 4), np.uint8), r"an image must be \[height, width\] or"),
        (np.zeros(4, np.uint8), r"an image must be \[height, width\] or"),
    ],
)
def test_images_that_are_none(read, image, message):
    with pytest.raises(UsageError, match=message):
        read(do_resize=False)([image])


def test_images_of_several_sizes(read):
    with pytest.raises(UsageError, match=r"images must come out at one size, got \[\(5, 6\), \(6,"):
        read(do_resize=False)([RGB, RGB.transpose(1, 0, 2)])
    with pytest.raises(UsageError, match="images must be at least one, got none"):
        read(do_resize=False)([])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"do_pad": True}, "do_pad is not supported on the device"),
        ({"do_resize": 1}, "do_resize must be of type bool, got 1"),
        ({"do_resize": True}, "size must be given, got nothing"),
        ({"do_resize": True, "size": {}}, "height must be of type int, got nothing"),
        (
            {"do_resize": True, "size": {"height": 0, "width": 4}}, "height must be from 1 to",
        ),
        (
            {"do_resize": True, "size": {"shortest_edge": 1 << 20}}, "shortest_edge must be from 1",
        ),
        ({"do_normalize": True}, "image_mean must be of type list, got nothing"),
        ({**STEPS, "image_mean": [1, 2]}, "image_mean must be 3 numbers, got [1, 2]"),
        ({**STEPS, "image_mean": ["a"] * 3}, "image_mean must be 3 numbers"),
        ({**STEPS, "image_std": [0.5, 0.0, 0.5]}, "image_std must not be 0"),
        ({"resample": 9}, "resample must be from 0 to 5, got 9"),
        ({"rescale_factor": "x"}, "rescale_factor must be of type float, got 'x'"),
    ],
)  # fmt: skip
def test_broken_steps(read, steps, message):
    with pytest.raises(FormatError) as caught:
        read(**steps)
    assert "preprocessor_config.json: " in str(caught.value)
    assert message in str(caught.value)


def test_no_steps(tmp_path):
    with pytest.raises(UsageError, match="image preprocessing must be a file, got"):
        ImagePreprocessor.from_folder(tmp_path)


def test_no_such_picture(tmp_path):
    with pytest.raises(UsageError, match=r"image must be a file, got .*: no such file"):
        read_image(tmp_path / "none.png")


def test_channels_may_stand_in_the_file(read):
    found = read(3, do_resize=False, num_channels=1)([RGB[..., 0]])
    assert found.shape == (1, 1, 6, 5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            {"image_processor_type": "EfficientNetImageProcessor"},
            "image_processor_type must be of ViT, DeiT,",
        ),
        ({"feature_extractor_type": "LevitFeatureExtractor"}, "got LevitFeatureExtractor"),
        ({"rescale_offset": True}, "rescale_offset is not supported"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "do_resize": True,
             "size": {"shortest_edge": 224}, "crop_pct": 0}, "crop_pct must be from 0.1 to 1",
        ),
    ],
)  # fmt: skip
def test_processors_that_would_do_something_else(read, steps, message):
    with pytest.raises(FormatError, match=message):
        read(**steps)


# -- arrays ----------------------------------------------------------------------------------------


def test_images_in_arrays(read, tmp_path):
    steps = read(1, do_rescale=False)
    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    for name in ("images", "image", "x"):
        found = as_images({name: images}, tmp_path, lambda: steps)
        np.testing.assert_array_equal(found[:, 0], images)
    floats = as_images({"x": images / np.float32(255)}, tmp_path, lambda: steps)
    np.testing.assert_array_equal(floats[:, 0], images)
    ready = np.zeros((1, 1, 4, 4))
    assert as_images({"pixel_values": ready}, tmp_path, lambda: steps).dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, r"must have an array `images` or `pixel_values`, got \['other'\]"),
        ({"images": np.full((1, 4, 4), 2.0)}, "must be uint8 from 0 to 255 or floats from 0 to 1"),
        ({"images": np.zeros((1, 4, 4), np.int64)}, "must be uint8 from 0 to 255"),
        ({"images": np.full((1, 4, 4), np.nan)}, "must be finite, got NaN"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "at least one image, got none"),
        ({"images": np.zeros(4, np.uint8)}, r"must be \[n, height, width"),
        ({"pixel_values": np.zeros((4, 4))}, r"pixel_values must be floats \[n, channels"),
    ],
)
def test_arrays_that_are_no_images(read, tmp_path, arrays, message):
    steps = read(1)
    with pytest.raises(UsageError, match=message):
        as_images(arrays, tmp_path, lambda: steps)
