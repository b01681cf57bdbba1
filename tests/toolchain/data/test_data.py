"""Data from disk: folders of images, arrays, users, and how samples are held back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_toolchain.data import (
    LABEL_WORDS,
    Dataset,
    by_user,
    check_samples,
    load_data,
    load_inputs,
    split,
)
from regrow_toolchain.models import Backbone, load_backbone, logits_of


@pytest.fixture(scope="session")
def vit(vit_folder: Path) -> Backbone:
    return load_backbone(vit_folder)


@pytest.fixture(scope="session")
def bare(vit: Backbone) -> Backbone:
    """The same without its files: ready arrays need no preprocessing."""
    return replace(vit, files=())


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Backbone:
    return load_backbone(gpt2_folder)


class _Plain(nn.Module):
    """Takes features, a mask and steps; gives 2 classes."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        return self.head(x)


def _plain(outputs: int = 2, task: str = "classification") -> Backbone:
    names = tuple(str(i) for i in range(outputs))
    return Backbone(_Plain(outputs).eval(), "sha256:plain", task, ("head",), names)


def _normal(pixels: np.ndarray) -> np.ndarray:
    return (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_of_images(
    class_folder: Callable[..., Path],
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
    vit: Backbone,
    tmp_path: Path,
) -> None:
    class_folder(tmp_path / "data", 150, 3, names=("b", "a", "c"))
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / "readme.txt").write_text("not a class")
    (tmp_path / "data" / "a" / "notes.txt").write_text("not an image")
    data = load_data(tmp_path / "data", vit)
    assert data.names == ("a", "b", "c")
    assert data.named
    pixels, labels = images(150, 3)
    order = np.argsort(np.array([1, 0, 2])[labels], kind="stable")  # "b" is the second folder
    assert data.labels.tolist() == np.array([1, 0, 2])[labels][order].tolist()
    values = data.inputs["pixel_values"]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, _normal(pixels[order]), atol=1e-6)


def test_a_folder_without_classes(vit: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="data must be a folder with one folder per class"):
        load_data(tmp_path, vit)


def test_a_class_without_images(
    class_folder: Callable[..., Path], vit: Backbone, tmp_path: Path
) -> None:
    class_folder(tmp_path, 6, 0)
    (tmp_path / "up").mkdir()
    with pytest.raises(UsageError, match=r"up must have images or audio \(.png, .*got none"):
        load_data(tmp_path, vit)


def test_a_picture_that_is_none(
    class_folder: Callable[..., Path], vit: Backbone, tmp_path: Path
) -> None:
    class_folder(tmp_path, 6, 0)
    (tmp_path / "left" / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(FormatError, match=r"broken\.png must be an image"):
        load_data(tmp_path, vit)


# -- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "x"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_images_in_arrays(
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
    vit: Backbone,
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    pixels, labels = images(7, 0)
    stored = pixels if kind == "uint8" else (pixels / 255).astype(kind)
    np.savez(tmp_path / "d.npz", labels=labels, **{name: stored})
    data = load_data(tmp_path / "d.npz", vit)
    np.testing.assert_allclose(data.inputs["pixel_values"], _normal(pixels), atol=1e-6)
    assert data.inputs["pixel_values"].dtype == np.float32
    assert not data.named


def test_ready_values_are_taken_as_they_are(bare: Backbone, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 12, 12))
    np.savez(tmp_path / "d.npz", pixel_values=values, y=np.array([0, 2, 1, 2], dtype=np.uint8))
    data = load_data(tmp_path / "d.npz", bare)
    assert np.array_equal(data.inputs["pixel_values"], values.astype(np.float32))
    assert data.labels.tolist() == [0, 2, 1, 2]
    assert data.labels.dtype == np.int64
    assert data.names == ("0", "1", "2")


def test_grey_images_get_the_models_channels(vit: Backbone, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=grey, labels=[0, 1])
    values = load_data(tmp_path / "d.npz", vit).inputs["pixel_values"]
    assert values.shape == (2, 3, 12, 12)
    assert np.array_equal(values[:, 0], values[:, 2])


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_may_be_names(bare: Backbone, tmp_path: Path, kind: str) -> None:
    labels = np.array(["right", "left", "right"]).astype(kind)
    np.savez(tmp_path / "d.npz", pixel_values=np.zeros((3, 3, 2, 2)), label=labels)
    data = load_data(tmp_path / "d.npz", bare)
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
        ({"pixel_values": _READY, "labels": _LABELS[:2]}, "must be one per label, got 3 for 2"),
        ({"pixel_values": _READY, "labels": _LABELS > 0}, r"got bool of shape \(3,\)"),
        ({"pixel_values": _READY, "labels": _LABELS[None]}, "must be one per label, got 3 for 1"),
        ({"pixel_values": _READY, "labels": _LABELS[None, None]}, r"got int64 of shape \(1, 1, 3"),
        ({"pixel_values": _READY, "labels": _LABELS * np.nan}, "labels must be finite, got NaN"),
        ({"pixel_values": _READY, "labels": _LABELS * 1e300}, "labels must be finite, got NaN"),
        ({"pixel_values": _READY, "labels": _LABELS[:, None] - 7}, "must be -100, or 0 or more"),
        ({"pixel_values": _READY, "labels": _LABELS[:, None] * 0 - 100}, "must have a token other"),
        ({"pixel_values": _READY, "labels": np.array(["a", "", "b"])}, "must not be empty, got ''"),
        ({"pixel_values": _READY * np.nan, "labels": _LABELS}, "pixel_values must be finite"),
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
    vit: Backbone, tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load_data(tmp_path / "d.npz", vit)


def test_names_that_are_no_text(bare: Backbone, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pixel_values=_READY, labels=np.array([b"a", b"\xff", b"b"]))
    with pytest.raises(FormatError, match="labels must be UTF-8"):
        load_data(tmp_path / "d.npz", bare)


def test_python_objects_are_not_read(bare: Backbone, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pixel_values=_READY, labels=np.array([{}, 1, 2], dtype=object))
    with pytest.raises(FormatError, match=r"must be an \.npz of plain arrays"):
        load_data(tmp_path / "d.npz", bare)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x04K\x01."])
def test_a_file_that_is_no_archive(bare: Backbone, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(FormatError, match=r"must be an \.npz of plain arrays"):
        load_data(tmp_path / "d.npz", bare)


def test_paths_that_are_no_data(bare: Backbone, tmp_path: Path) -> None:
    (tmp_path / "d.xlsx").write_text("1,2")
    with pytest.raises(UsageError, match=r"data must be a folder with one .*got .*d\.xlsx$"):
        load_data(tmp_path / "d.xlsx", bare)
    with pytest.raises(UsageError, match=r"got .*nowhere: no such file"):
        load_data(tmp_path / "nowhere", bare)
    with pytest.raises(RegrowError, match="no such file"):
        load_data(tmp_path / "nowhere.npz", bare)


# -- arrays by the names of arguments ------------------------------------------------------------

_X = np.arange(24, dtype=np.float64).reshape(6, 4)
_Y = np.array([0, 1, 0, 1, 1, 0], dtype=np.uint8)


def test_arrays_of_a_plain_module(tmp_path: Path) -> None:
    mask, steps = np.ones((6, 4), bool), np.arange(6, dtype=np.int32)
    np.savez(tmp_path / "d.npz", x=_X, mask=mask, steps=steps, other=_Y, label=_Y)
    data = load_data(tmp_path / "d.npz", _plain())
    kinds = {name: array.dtype.name for name, array in data.inputs.items()}
    assert kinds == {"x": "float32", "mask": "bool", "steps": "int64"}
    assert np.array_equal(data.inputs["x"], _X)
    assert (data.kind, data.names, data.named) == ("classes", ("0", "1"), False)
    loss = logits_of(_plain().model, {n: torch.from_numpy(a) for n, a in data.inputs.items()})
    assert loss.shape == (6, 2)


def test_a_model_that_takes_anything(tmp_path: Path) -> None:
    class Any_(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return inputs["a"]

    np.savez(tmp_path / "d.npz", a=_X, b=_X, y=_Y)
    data = load_data(tmp_path / "d.npz", Backbone(Any_(), "sha256:x", "other", (), ()))
    assert sorted(data.inputs) == ["a", "b"]


def test_labels_of_a_regression_and_of_a_teacher(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=_X, labels=_Y / 2)
    data = load_data(tmp_path / "d.npz", _plain())
    assert (data.kind, data.names, data.labels.dtype) == ("values", (), np.float32)
    assert data.labels.tolist() == [0, 0.5, 0, 0.5, 0.5, 0]
    np.savez(tmp_path / "d.npz", x=_X, labels=_X.astype(np.float16))
    data = load_data(tmp_path / "d.npz", _plain())
    assert (data.kind, data.labels.shape) == ("values", (6, 4))


def test_integers_for_a_model_of_one_output_are_values(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=_X, labels=_Y.astype(np.int64) - 3)
    data = load_data(tmp_path / "d.npz", _plain(1))
    assert data.kind == "values"
    assert data.labels.tolist() == [-3, -2, -3, -2, -2, -3]


def test_labels_by_another_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=_X, labels=_Y, digit=1 - _Y)
    assert load_data(tmp_path / "d.npz", _plain(), label="digit").labels.tolist() == [
        1, 0, 1, 0, 0, 1,
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"label must name an array, got 'digits' of .'digit'"):
        load_data(tmp_path / "d.npz", _plain(), label="digits")
    with pytest.raises(UsageError, match="must have an array `labels`"):
        load_data(tmp_path / "d.npz", _plain(), label="")
    with pytest.raises(UsageError, match=r"text must be left out for .*d\.npz"):
        load_data(tmp_path / "d.npz", _plain(), text="x")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"z": _X, "labels": _Y},
            r"names of forward's arguments \(x, mask, steps\), got .'labels'",
        ),
        ({"x": _X[:5], "labels": _Y}, "x must be one per label, got 5 for 6 labels"),
        ({"x": _X, "mask": _X[:5], "labels": _Y}, "mask must be one per label, got 5 for 6"),
        ({"x": _X + np.inf, "labels": _Y}, "x must be finite"),
        ({"x": _X * 1e300, "labels": _Y}, "x must be finite"),
        ({"x": _X.astype(str), "labels": _Y}, "x must be numbers, samples first"),
        ({"x": _X * 1j, "labels": _Y}, "x must be numbers, samples first"),
        ({"x": np.float32(1), "labels": _Y}, "x must be numbers, samples first"),
        ({"x": np.full(6, 2**64 - 1, np.uint64), "labels": _Y}, r"x must be below 2\*\*63"),
        ({"x": _X, "labels": np.full(6, 2**64 - 1, np.uint64)}, "labels must be below"),
    ],
)
def test_plain_arrays_that_make_no_sense(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load_data(tmp_path / "d.npz", _plain())


def test_tokens_are_their_own_labels(gpt2: Backbone, tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.savez(tmp_path / "d.npz", input_ids=ids)
    data = load_data(tmp_path / "d.npz", gpt2)
    assert data.kind == "tokens"
    assert data.labels.tolist() == ids.tolist()
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask)
    data = load_data(tmp_path / "d.npz", gpt2)
    assert data.labels.tolist() == [[0, 1, 2, 3, -100, -100], ids[1].tolist()]
    assert {a.dtype.name for a in data.inputs.values()} == {"int64"}
    given = np.array([[-100, 1, 2, -100, -100, -100], [-100, -100, -100, -100, 4, 5]])
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask, labels=given)
    assert load_data(tmp_path / "d.npz", gpt2).labels.tolist() == given.tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"inputs_embeds": np.zeros((2, 6, 32))}, "must have input_ids, integers"),
        ({"input_ids": np.zeros((2, 6))}, "must have input_ids, integers"),
        ({"input_ids": np.zeros((2, 6), int), "attention_mask": np.ones((2, 5), int)}, "shape of"),
        ({"input_ids": np.zeros((2, 6), int), "labels": np.zeros((2, 5), int)}, "labels of tokens"),
        ({"input_ids": np.zeros((2, 1), int)}, "two tokens or more, got fewer in sample 0"),
        (
            {"input_ids": np.zeros((2, 3), int), "attention_mask": np.array([[1] * 3, [1, 0, 0]])},
            "two tokens or more, got fewer in sample 1",
        ),
        (
            {"input_ids": np.zeros((2, 6), int), "labels": np.full((2, 6), 2**40)},
            "got 1099511627776",
        ),
    ],
)
def test_tokens_that_make_no_sense(
    gpt2: Backbone, tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load_data(tmp_path / "d.npz", gpt2)


def test_inputs_alone(vit: Backbone, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=_X, other=_Y)
    assert sorted(load_inputs(tmp_path / "x.npz", _plain())) == ["x"]
    np.savez(tmp_path / "p.npz", images=np.zeros((2, 12, 12, 3), np.uint8))
    assert load_inputs(tmp_path / "p.npz", vit)["pixel_values"].shape == (2, 3, 12, 12)
    np.savez(tmp_path / "two.npz", x=_X, mask=_X[:2])
    with pytest.raises(UsageError, match=r"as many samples each, got .'x': 6, 'mask': 2"):
        load_inputs(tmp_path / "two.npz", _plain())
    with pytest.raises(UsageError, match=r"inputs must be an \.npz with arrays, got .*d\.csv"):
        load_inputs(tmp_path / "d.csv", _plain())


# -- users ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[3, 1, 3, 1, 2, 2], ["3", "1", "3", "1", "2", "2"]])
@pytest.mark.parametrize("kind", ["u1", "i8", "U", "S"])
def test_users_in_arrays(tmp_path: Path, ids: list, kind: str) -> None:
    np.savez(tmp_path / "d.npz", x=_X, labels=_Y, writer=np.array(ids).astype(kind))
    data = load_data(tmp_path / "d.npz", _plain(), users="writer")
    assert data.users.tolist() == ["3", "1", "3", "1", "2", "2"]
    parts = by_user(data)
    assert list(parts) == ["1", "2", "3"]
    assert [part.inputs["x"][:, 0].tolist() for part in parts.values()] == [
        [4, 12], [16, 20], [0, 8],
    ]  # fmt: skip
    assert all(part.users is None for part in parts.values())


@pytest.mark.parametrize(
    ("users", "ids", "words"),
    [
        ("writers", _Y, "users must name an array, got 'writers'"),
        ("writer", _Y[:5], "users must be one per label, got 5 for 6"),
        ("writer", _Y / 2, "writer must be integers or strings, one per sample, got float64"),
        ("writer", _Y[:, None], r"writer must be integers or strings.*\(6, 1\)"),
        (
            "writer",
            np.array(["a", "", "b", "c", "d", "e"]),
            "writer must not be empty, got '' at 1",
        ),
    ],
)
def test_users_that_make_no_sense(tmp_path: Path, users: str, ids: np.ndarray, words: str) -> None:
    np.savez(tmp_path / "d.npz", x=_X, labels=_Y, writer=ids)
    with pytest.raises(UsageError, match=words):
        load_data(tmp_path / "d.npz", _plain(), users=users)


def test_a_folder_per_user(
    class_folder: Callable[..., Path], vit: Backbone, tmp_path: Path
) -> None:
    class_folder(tmp_path / "bob", 9, 0, names=("left", "middle", "right"))
    class_folder(tmp_path / "ann", 4, 1, names=("left", "up", "down"))
    data = load_data(tmp_path, vit, users="folder")
    assert data.names == ("down", "left", "middle", "right", "up")
    assert {user: len(part) for user, part in by_user(data).items()} == {"ann": 4, "bob": 9}
    ann = by_user(data)["ann"]
    assert [ann.names[i] for i in ann.labels] == ["down", "left", "left", "up"]
    with pytest.raises(UsageError, match="users must be `folder` for a folder of files"):
        load_data(tmp_path, vit, users="writer")
    with pytest.raises(UsageError, match=r"label must be left out for .*got 'digit'"):
        load_data(tmp_path, vit, label="digit")
    (tmp_path / "cid").mkdir()
    with pytest.raises(UsageError, match=r"USER/CLASS/file .*: cid has no folders per class in it"):
        load_data(tmp_path, vit, users="folder")
    with pytest.raises(UsageError, match=r"of one user: leave out --users"):
        load_data(tmp_path / "bob", vit, users="folder")


def test_names_of_labels_are_told_as_they_are(cli: Callable[..., Any]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"By default {LABEL_WORDS}" in page
    for command in ("adapt", "compress", "export"):
        assert LABEL_WORDS in " ".join(cli(command, "--help").out.split())


def test_data_without_users_has_none() -> None:
    with pytest.raises(UsageError, match="data must say whose each sample is, got no users"):
        by_user(_labelled([0, 1]))


def test_users_with_too_little() -> None:
    users = np.array(["ann", "bob", "bob", "cid", "cid", "cid"])
    data = replace(_labelled([0, 0, 1, 1, 1, 1]), users=users, names=("yes", "no"))
    with pytest.raises(UsageError) as error:
        check_samples(data)
    assert "two samples or more, of two classes" in str(error.value)
    assert str(error.value).endswith("got ann: 1 sample; cid: 3 samples of one class, no")
    check_samples(data.take(np.array([1, 2])))
    values = Dataset(data.inputs, np.zeros(6, np.float32), users=users)
    with pytest.raises(UsageError, match=r"two samples or more; got ann: 1 sample$"):
        check_samples(values)
    many = replace(_labelled([0] * 8), users=np.arange(8).astype(str))
    with pytest.raises(UsageError, match="4: 1 sample; and 3 users more"):
        check_samples(many)


def test_one_user_with_too_little() -> None:
    with pytest.raises(UsageError, match="data must have two samples or more, of two classes; "
                                         "got 3 samples of one class, 1"):  # fmt: skip
        check_samples(_labelled([1, 1, 1]))
    with pytest.raises(UsageError, match="got 0 samples"):
        check_samples(_labelled([1, 0]).take(np.array([], dtype=np.int64)))
    check_samples(_labelled([1, 0]))


# -- datasets in memory --------------------------------------------------------------------------


def test_arrays_become_what_torch_takes() -> None:
    data = Dataset(
        {"a": np.zeros((2, 3)), "b": np.zeros(2, np.uint8), "c": np.ones(2, bool)},
        np.array([0, 1], np.int32), ("x", "y"),
    )  # fmt: skip
    assert [data.inputs[n].dtype.name for n in "abc"] == ["float32", "int64", "bool"]
    assert data.labels.dtype == np.int64
    assert data.kind == "classes"


@pytest.mark.parametrize(
    ("inputs", "labels", "users", "words"),
    [
        (_X[:5], _Y, None, r"x must be one per label, got \[5, 4\] for 6"),
        (np.float32(1), _Y, None, r"x must be one per label, got \[\] for 6"),
        (_X, _Y, np.array(["a"]), r"users must be one per label, got \[1\] for 6"),
        (_X, _Y.astype(str), None, "labels must be classes, values or tokens, got <U"),
        (_X, _Y[:, None, None], None, r"labels must be classes, .*\(6, 1, 1\)"),
    ],
)
def test_a_dataset_that_does_not_fit(
    inputs: np.ndarray, labels: np.ndarray, users: np.ndarray | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Dataset({"x": np.asarray(inputs)}, labels, ("a", "b"), users=users)


# -- splitting -----------------------------------------------------------------------------------


def _labelled(labels: list[int]) -> Dataset:
    inputs = {"x": np.arange(len(labels), dtype=np.float32)[:, None]}
    names = tuple(map(str, range(max(labels) + 1)))
    return Dataset(inputs, np.array(labels, dtype=np.int64), names)


def _rows(data: Dataset) -> list[int]:
    return data.inputs["x"][:, 0].astype(int).tolist()


def test_every_class_is_split_alike() -> None:
    rest, eval_data = split(_labelled([0] * 50 + [1] * 20 + [2] * 10), 0.2, 0)
    assert np.bincount(eval_data.labels).tolist() == [10, 4, 2]
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
    rest, eval_data = split(data, share, seed)
    assert sorted(_rows(rest) + _rows(eval_data)) == list(range(len(labels)))
    counts = np.bincount(labels)
    of_classes = sum(min(round(share * n), n - 1) for n in counts.tolist() if n)
    if of_classes or len(labels) < 2 or not share:
        assert len(eval_data) == of_classes
        assert set(rest.labels) == set(labels)
    else:  # too few of every class: some of all
        assert len(eval_data) == max(1, round(share * len(labels)))
    for part in (rest, eval_data):
        assert [labels[row] for row in _rows(part)] == part.labels.tolist()
    assert rest.names == eval_data.names == data.names


def test_no_share_holds_nothing_back() -> None:
    rest, eval_data = split(_labelled([0, 1, 0, 1]), 0, 0)
    assert (len(rest), len(eval_data)) == (4, 0)


def test_the_seed_decides_the_split() -> None:
    data = _labelled([0] * 30)
    assert _rows(split(data, 0.5, 7)[1]) == _rows(split(data, 0.5, 7)[1])
    assert _rows(split(data, 0.5, 7)[1]) != _rows(split(data, 0.5, 8)[1])


def test_values_are_split_as_one() -> None:
    values = np.linspace(0, 1, 20, dtype=np.float32)
    data = Dataset({"x": np.arange(20.0)[:, None]}, values)
    rest, eval_data = split(data, 0.3, 0)
    assert (len(rest), len(eval_data)) == (14, 6)
    assert sorted(_rows(rest) + _rows(eval_data)) == list(range(20))
    assert eval_data.labels.tolist() == values[_rows(eval_data)].tolist()
    tokens = Dataset({"x": np.arange(1.0)[:, None]}, np.zeros((1, 5), np.int64))
    assert [len(part) for part in split(tokens, 0.9, 0)] == [1, 0]


def test_every_user_is_split_as_if_alone() -> None:
    rng = np.random.default_rng(0)
    users = rng.choice(["c", "a", "b"], 60)
    data = replace(_labelled(rng.integers(0, 3, 60).tolist()), users=users)
    rest, eval_data = split(data, 0.25, 5)
    assert sorted(_rows(rest) + _rows(eval_data)) == list(range(60))
    for user, part in by_user(data).items():
        alone = split(part, 0.25, 5)
        assert _rows(by_user(rest)[user]) == _rows(alone[0])
        assert _rows(by_user(eval_data)[user]) == _rows(alone[1])


@pytest.mark.parametrize("share", [-0.01, 1, 2, float("nan")])
def test_a_share_that_leaves_nothing(share: float) -> None:
    with pytest.raises(UsageError, match="holdout must be from 0 to below 1, got"):
        split(_labelled([0, 1]), share, 0)
