"""Data from disk: folders of pictures, arrays, and how samples are held back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow_runtime.errors import FormatError, RegrowError, UsageError
from regrow_runtime.preprocess import ImagePreprocessor
from regrow_toolchain.backbone import load_backbone
from regrow_toolchain.data import Dataset, load_data
from regrow_toolchain.data.dataset import split

Maker = Callable[[], ImagePreprocessor]


@pytest.fixture(scope="session")
def preprocessor(vit_folder: Path) -> Maker:
    return load_backbone(vit_folder).preprocessor


def _unused() -> ImagePreprocessor:
    raise AssertionError("ready arrays need no preprocessing")


def _normal(pixels: np.ndarray) -> np.ndarray:
    return (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_of_pictures(
    class_folder: Callable[..., Path],
    pictures: Callable[..., tuple[np.ndarray, np.ndarray]],
    preprocessor: Maker,
    tmp_path: Path,
) -> None:
    class_folder(tmp_path / "data", 150, 3, names=("b", "a", "c"))
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / "readme.txt").write_text("not a class")
    (tmp_path / "data" / "a" / "notes.txt").write_text("not a picture")
    data = load_data(tmp_path / "data", preprocessor)
    assert data.names == ("a", "b", "c")
    assert data.named
    pixels, labels = pictures(150, 3)
    order = np.argsort(np.array([1, 0, 2])[labels], kind="stable")  # "b" is the second folder
    assert data.labels.tolist() == np.array([1, 0, 2])[labels][order].tolist()
    values = data.inputs["pixel_values"]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, _normal(pixels[order]), atol=1e-6)


def test_a_folder_without_classes(preprocessor: Maker, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="data must be a folder with one folder per class"):
        load_data(tmp_path, preprocessor)


def test_a_class_without_pictures(
    class_folder: Callable[..., Path], preprocessor: Maker, tmp_path: Path
) -> None:
    class_folder(tmp_path, 6, 0)
    (tmp_path / "up").mkdir()
    with pytest.raises(UsageError, match=r"up must have pictures \(.png, .*got none"):
        load_data(tmp_path, preprocessor)


def test_a_picture_that_is_none(
    class_folder: Callable[..., Path], preprocessor: Maker, tmp_path: Path
) -> None:
    class_folder(tmp_path, 6, 0)
    (tmp_path / "left" / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(FormatError, match=r"broken\.png must be a picture"):
        load_data(tmp_path, preprocessor)


# -- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "x"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_pictures_in_arrays(
    pictures: Callable[..., tuple[np.ndarray, np.ndarray]],
    preprocessor: Maker,
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    pixels, labels = pictures(7, 0)
    stored = pixels if kind == "uint8" else (pixels / 255).astype(kind)
    np.savez(tmp_path / "d.npz", labels=labels, **{name: stored})
    data = load_data(tmp_path / "d.npz", preprocessor)
    np.testing.assert_allclose(data.inputs["pixel_values"], _normal(pixels), atol=1e-6)
    assert data.inputs["pixel_values"].dtype == np.float32
    assert not data.named


def test_ready_values_are_taken_as_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 12, 12))
    np.savez(tmp_path / "d.npz", pixel_values=values, y=np.array([0, 2, 1, 2], dtype=np.uint8))
    data = load_data(tmp_path / "d.npz", _unused)
    assert np.array_equal(data.inputs["pixel_values"], values.astype(np.float32))
    assert data.labels.tolist() == [0, 2, 1, 2]
    assert data.labels.dtype == np.int64
    assert data.names == ("0", "1", "2")


def test_grey_pictures_get_the_models_channels(preprocessor: Maker, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=grey, labels=[0, 1])
    values = load_data(tmp_path / "d.npz", preprocessor).inputs["pixel_values"]
    assert values.shape == (2, 3, 12, 12)
    assert np.array_equal(values[:, 0], values[:, 2])


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_may_be_names(tmp_path: Path, kind: str) -> None:
    labels = np.array(["right", "left", "right"]).astype(kind)
    np.savez(tmp_path / "d.npz", pixel_values=np.zeros((3, 3, 2, 2)), label=labels)
    data = load_data(tmp_path / "d.npz", _unused)
    assert data.named
    assert data.names == ("left", "right")
    assert data.labels.tolist() == [1, 0, 1]


_READY = np.zeros((3, 3, 4, 4), dtype=np.float32)
_LABELS = np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pixel_values": _READY}, "must have an array `labels`, got .'pixel_values'"),
        ({"labels": _LABELS}, "must have an array `images` or `pixel_values`, got .'labels'"),
        ({"pixel_values": _READY, "labels": _LABELS[:2]}, "labels must be one per image, got 2, 3"),
        ({"pixel_values": _READY, "labels": _LABELS / 2}, "list of integers or strings, got float"),
        ({"pixel_values": _READY, "labels": _LABELS[None]}, r"got int64 of shape \(1, 3\)"),
        ({"pixel_values": _READY, "labels": _LABELS - 1}, "labels must be 0 or more, got -1"),
        ({"pixel_values": _READY, "labels": _LABELS[:0]}, "labels must be at least one, got none"),
        ({"pixel_values": _READY, "labels": _LABELS + 2**40}, "labels must be .*1099511627777"),
        ({"pixel_values": _READY[0], "labels": _LABELS}, r"pixel_values must be floats .n, chan"),
        ({"pixel_values": _READY.astype(int), "labels": _LABELS}, "pixel_values must be floats"),
        ({"images": _READY[0, 0], "labels": _LABELS}, r"images must be .n, height, width"),
        ({"images": _READY + 2, "labels": _LABELS}, r"uint8 from 0 to 255 or floats from 0 to 1"),
        ({"images": _READY.astype(int), "labels": _LABELS}, "uint8 from 0 to 255 or floats"),
        ({"images": _READY * np.nan, "labels": _LABELS}, "images must be finite"),
        ({"images": np.zeros((3, 4, 4, 5), "u1"), "labels": _LABELS}, "an image must be"),
    ],
)
def test_arrays_that_make_no_sense(
    preprocessor: Maker, tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load_data(tmp_path / "d.npz", preprocessor)


def test_python_objects_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pixel_values=_READY, labels=np.array([{}, 1, 2], dtype=object))
    with pytest.raises(FormatError, match=r"must be an \.npz of plain arrays"):
        load_data(tmp_path / "d.npz", _unused)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x04K\x01."])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(FormatError, match=r"must be an \.npz of plain arrays"):
        load_data(tmp_path / "d.npz", _unused)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"by class or an \.npz, got .*d\.csv$"):
        load_data(tmp_path / "d.csv", _unused)
    with pytest.raises(UsageError, match=r"got .*nowhere: no such file"):
        load_data(tmp_path / "nowhere", _unused)
    with pytest.raises(RegrowError, match="no such file"):
        load_data(tmp_path / "nowhere.npz", _unused)


# -- splitting -----------------------------------------------------------------------------------


def _labelled(labels: list[int]) -> Dataset:
    inputs = {"x": np.arange(len(labels), dtype=np.float32)[:, None]}
    names = tuple(map(str, range(max(labels) + 1)))
    return Dataset(inputs, np.array(labels, dtype=np.int64), names)


def _rows(data: Dataset) -> list[int]:
    return data.inputs["x"][:, 0].astype(int).tolist()


def test_every_class_is_split_alike() -> None:
    rest, held = split(_labelled([0] * 50 + [1] * 20 + [2] * 10), 0.2, 0)
    assert np.bincount(held.labels).tolist() == [10, 4, 2]
    assert np.bincount(rest.labels).tolist() == [40, 16, 8]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**64),
)
def test_a_split_shares_nothing_and_keeps_every_class(
    labels: list[int], share: float, seed: int
) -> None:
    data = _labelled(labels)
    rest, held = split(data, share, seed)
    assert sorted(_rows(rest) + _rows(held)) == list(range(len(labels)))
    assert set(rest.labels) == set(labels)
    for part in (rest, held):
        assert [labels[row] for row in _rows(part)] == part.labels.tolist()
    assert rest.names == held.names == data.names


def test_no_share_holds_nothing_back() -> None:
    rest, held = split(_labelled([0, 1, 0, 1]), 0, 0)
    assert (len(rest), len(held)) == (4, 0)


def test_the_seed_decides_the_split() -> None:
    data = _labelled([0] * 30)
    assert _rows(split(data, 0.5, 7)[1]) == _rows(split(data, 0.5, 7)[1])
    assert _rows(split(data, 0.5, 7)[1]) != _rows(split(data, 0.5, 8)[1])


@pytest.mark.parametrize("share", [-0.01, 1, 2, float("nan")])
def test_a_share_that_leaves_nothing(share: float) -> None:
    with pytest.raises(UsageError, match="holdout must be from 0 to below 1, got"):
        split(_labelled([0, 1]), share, 0)
