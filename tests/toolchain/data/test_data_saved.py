"""Folders of the datasets library: the library where it is installed, and one that stands in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_toolchain.data import Dataset, load_data
from regrow_toolchain.models import Backbone

_Rows = dict[str, list[Any]]


class _Stored:
    """What is used of `datasets.Dataset`."""

    def __init__(self, rows: _Rows, features: dict[str, Any], *, numpy: bool = False) -> None:
        self.rows, self.features, self.numpy = rows, features, numpy
        self.column_names = list(rows)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values()), []))

    def __getitem__(self, key: Any) -> dict[str, Any]:
        part = {name: values[key] for name, values in self.rows.items()}
        return {name: _array(values) for name, values in part.items()} if self.numpy else part

    def select_columns(self, names: list[str]) -> _Stored:
        return _Stored({n: self.rows[n] for n in names}, self.features)

    def with_format(self, kind: str, columns: list[str]) -> _Stored:
        assert kind == "numpy"
        return _Stored({n: self.rows[n] for n in columns}, self.features, numpy=True)


def _array(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values)
    except ValueError:
        return np.array(values, dtype=object)


Save = Callable[..., Path]


@pytest.fixture(params=["stand-in", "library"])
def save(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Save:
    """save(rows, classes={"label": ["no", "yes"]}) -> folder"""
    path = tmp_path / "saved"
    if request.param == "library":
        datasets = pytest.importorskip("datasets")

    def by_library(rows: _Rows, classes: dict[str, list[str]] | None = None) -> Path:
        made = datasets.Dataset.from_dict(rows)
        for name, names in (classes or {}).items():
            made = made.cast_column(name, datasets.ClassLabel(names=names))
        made.save_to_disk(str(path))
        return path

    def by_stand_in(rows: _Rows, classes: dict[str, list[str]] | None = None) -> Path:
        features = {name: SimpleNamespace(names=(classes or {}).get(name)) for name in rows}
        module = ModuleType("datasets")
        module.__spec__ = ModuleSpec("datasets", None)
        module.load_from_disk = lambda _: _Stored(rows, features)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        path.mkdir()
        for name in ("dataset_info.json", "state.json"):
            (path / name).write_text("{}")
        return path

    return by_library if request.param == "library" else by_stand_in


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.fixture
def plain() -> Backbone:
    return Backbone(_Plain().eval(), "sha256:x", "classification", ("head",), ("0", "1"))


_X = [[0.5, 1.0, 2.0], [1.0, 2.0, 3.0]]


def test_arrays_by_name(save: Save, plain: Backbone) -> None:
    rows = {"x": _X, "label": [1, 0], "who": ["b", "a"], "note": ["unused", "words"]}
    data = load_data(save(rows), plain, users="who")
    assert data.inputs["x"].tolist() == _X
    assert (data.labels.tolist(), data.named) == ([1, 0], False)
    assert data.users.tolist() == ["b", "a"]


def test_classes_have_names(save: Save, plain: Backbone) -> None:
    data = load_data(save({"x": _X, "label": [1, 0]}, {"label": ["no", "yes"]}), plain)
    assert (data.names, data.labels.tolist(), data.named) == (("no", "yes"), [1, 0], True)


def test_values_and_features(save: Save, plain: Backbone) -> None:
    data = load_data(save({"x": _X, "labels": [[0.5, 1], [1, 2.5]]}), plain)
    assert (data.kind, data.labels.tolist()) == ("values", [[0.5, 1], [1, 2.5]])


def test_images(save: Save, backbone: Backbone) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 12, 12, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [0, 1] * 35}
    data = load_data(save(rows, {"label": ["left", "right"]}), backbone)
    wanted = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(data.inputs["pixel_values"], wanted, atol=1e-6)
    assert data.names == ("left", "right")


def test_text(save: Save, bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a table: only what is read of the rows is tested here."""
    seen = {}

    def look(source: Any, table: Any) -> Dataset:
        seen.update(vars(table))
        return Dataset({"x": np.zeros((2, 1))}, np.zeros(2, np.int64), ("a",))

    from regrow_toolchain.data import saved
    from regrow_toolchain.models import load_backbone

    monkeypatch.setattr(saved, "table_data", look)
    rows = {"text": ["red", "blue"], "intent": [1, 0], "tokens": [["red"], ["blue"]]}
    load_data(save(rows, {"intent": ["no", "yes"]}), load_backbone(bert_folder))
    assert {name: list(cells) for name, cells in seen["cells"].items()} == {
        "text": ["red", "blue"], "intent": [1, 0],
    }  # fmt: skip
    assert seen["classes"] == {"intent": ["no", "yes"]}
    assert (seen["unit"], list(seen["rows"])) == ("row", [1, 2])


@pytest.mark.parametrize(
    ("rows", "classes", "kind", "words"),
    [
        ({"x": [[1.0], [1.0, 2.0]], "label": [0, 1]}, {}, FormatError, "x must be numbers or str"),
        ({"x": _X, "label": [[0], [1, 2]]}, {}, FormatError, "label must be numbers or strings"),
        (
            {"x": _X, "label": [0, -1]},
            {"label": ["a", "b"]},
            FormatError,
            "label must be from 0 to",
        ),
        ({"x": _X, "kind": [0, 1]}, {}, UsageError, "must have an array `labels`, got .'x'"),
        ({"z": _X, "label": [0, 1]}, {}, UsageError, "one of words besides labels and users"),
        ({"x": [], "label": []}, {}, UsageError, "must have from 1 to 1048576 rows, got 0"),
    ],
)
def test_rows_that_do_not_serve(
    save: Save, plain: Backbone, rows: _Rows, classes: dict, kind: type, words: str
) -> None:
    with pytest.raises(kind, match=words):
        load_data(save(rows, classes), plain)


def test_images_that_are_none(save: Save, backbone: Backbone) -> None:
    with pytest.raises(FormatError, match="image must be images in every row"):
        load_data(save({"image": ["a.png", "b.png"], "label": [0, 1]}), backbone)


def test_options_that_do_not_serve(save: Save, plain: Backbone) -> None:
    path = save({"x": _X, "label": [0, 1]})
    with pytest.raises(UsageError, match="text must be left out for"):
        load_data(path, plain, text="x")
    with pytest.raises(UsageError, match="users must name an array, got 'who'"):
        load_data(path, plain, users="who")


def test_several_splits(plain: Backbone, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UsageError, match=r"must be one split, got .* with test, train: name one"):
        load_data(tmp_path, plain)


def test_without_the_library(
    plain: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("regrow_toolchain.data.saved.find_spec", lambda _: None)
    with pytest.raises(RegrowError, match=r"needs the datasets library: pip install datasets$"):
        load_data(tmp_path, plain)


@pytest.mark.skipif(find_spec("datasets") is None, reason="the datasets library is not installed")
def test_a_broken_folder(plain: Backbone, tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(FormatError, match="must be a whole datasets folder"):
        load_data(tmp_path, plain)


def test_its_inputs_run(save: Save, plain: Backbone) -> None:
    data = load_data(save({"x": _X, "label": [1, 0]}), plain)
    assert plain.model(torch.from_numpy(data.inputs["x"])).shape == (2, 2)
