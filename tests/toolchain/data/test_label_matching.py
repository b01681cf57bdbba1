"""Whose classes a user's labels are: the backbone's, or the user's own."""

from __future__ import annotations

import numpy as np
import pytest

from regrow_format.errors import UsageError
from regrow_toolchain.data import Dataset, fit_labels

_OURS = ("left", "middle", "right")


def _data(labels: list[int], names: tuple[str, ...], *, named: bool = True) -> Dataset:
    inputs = {"pixel_values": np.zeros((len(labels), 1, 2, 2), dtype=np.float32)}
    return Dataset(inputs, np.array(labels, dtype=np.int64), names, named=named)


def _numbers(*labels: int) -> Dataset:
    return _data(list(labels), tuple(map(str, range(max(labels) + 1))), named=False)


@pytest.mark.parametrize("head", ["keep", "auto"])
def test_names_are_looked_up_in_the_backbone(head: str) -> None:
    data, new = fit_labels(_data([0, 1, 1], ("right", "left")), _OURS, head)
    assert not new
    assert data.labels.tolist() == [2, 0, 0]
    assert data.labels.dtype == np.int64
    assert data.names == _OURS


@pytest.mark.parametrize("head", ["keep", "auto"])
def test_numbers_are_the_backbones_outputs(head: str) -> None:
    data, new = fit_labels(_numbers(2, 0, 2), _OURS, head)
    assert not new
    assert data.labels.tolist() == [2, 0, 2]
    assert data.names == _OURS


@pytest.mark.parametrize("head", ["keep", "auto"])
def test_numbers_beyond_the_backbones_outputs(head: str) -> None:
    with pytest.raises(UsageError, match="labels must be from 0 to 2 as in the backbone, got 3"):
        fit_labels(_numbers(0, 3), _OURS, head)


def test_unknown_names_get_a_head_of_their_own() -> None:
    data, new = fit_labels(_data([1, 0, 1], ("cat", "dog")), _OURS, "auto")
    assert new
    assert data.names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, 1]


def test_unknown_names_do_not_fit_a_head_that_stays() -> None:
    with pytest.raises(
        UsageError, match=r"backbone's \(left, middle, right\), got cat, dog: --head"
    ):
        fit_labels(_data([1, 0], ("cat", "dog")), _OURS, "keep")


@pytest.mark.parametrize("head", ["keep", "auto"])
def test_some_unknown_names_are_a_mistake(head: str) -> None:
    with pytest.raises(UsageError, match="got up: --head new"):
        fit_labels(_data([0, 1], ("left", "up")), _OURS, head)


def test_long_lists_are_cut() -> None:
    names = tuple(f"class {i}" for i in range(30))
    with pytest.raises(UsageError, match=r"class 0, .*class 4, … 25 more\), got up:"):
        fit_labels(_data([0, 1], ("class 7", "up")), names, "auto")


def test_a_new_head_has_the_classes_that_occur() -> None:
    data, new = fit_labels(_data([3, 1, 3], ("a", "b", "c", "d")), _OURS, "new")
    assert new
    assert data.names == ("b", "d")
    assert data.labels.tolist() == [1, 0, 1]
    assert data.labels.dtype == np.int64


def test_a_new_head_for_numbers_and_for_known_names() -> None:
    assert fit_labels(_numbers(7, 4), _OURS, "new")[0].names == ("4", "7")
    assert fit_labels(_data([0, 1], ("right", "left")), _OURS, "new")[0].names == ("right", "left")


@pytest.mark.parametrize("head", ["new", "auto"])
def test_a_new_head_of_one_class_is_refused(head: str) -> None:
    with pytest.raises(UsageError, match="two classes or more for a new head, got 1"):
        fit_labels(_data([1, 1], ("cat", "dog")), _OURS, head)


def test_the_data_given_stays() -> None:
    data = _data([0, 1], ("right", "left"))
    fit_labels(data, _OURS, "keep")
    assert data.labels.tolist() == [0, 1]
    assert data.names == ("right", "left")
