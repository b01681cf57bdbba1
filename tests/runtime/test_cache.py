"""The manifest's `cache`: read again as it was written, and one error for what does not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from regrow_format.kv_cache import positions
from regrow_format.manifest import Manifest
from regrow_runtime import Bundle, FormatError


@pytest.fixture
def changed(lm_folder, tmp_path):
    """changed(change): a copy of the bundle whose manifest's cache is changed."""

    def call(change):
        folder = tmp_path / "lm"
        shutil.copytree(lm_folder, folder, dirs_exist_ok=True)
        data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        change(data["cache"])
        (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
        return folder

    return call


def test_what_is_written_is_read_again(lm_folder, changed):
    text = (lm_folder / "manifest.json").read_text(encoding="utf-8")
    assert Manifest.load(lm_folder).to_json() == text
    bare = Manifest.load(changed(lambda cache: (cache.pop("context"), cache.pop("stop")))).cache
    assert (bare.context, bare.stop) == (None, ())


def _tensor(**fields):
    return lambda cache: cache["tensors"][0].update(fields)


def _set(**fields):
    return lambda cache: cache.update(fields)


TENSOR = {"past": "past.0.value", "present": "present.0.value", "heads": 2, "head_dim": 4}
OTHER = {"past": "past.1.value", "present": "present.1.value", "heads": 2, "head_dim": 4}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_tensor(heads=0), r"cache: tensors\[0\]: heads must be from 1 to 16777216, got 0"),
        (_tensor(head_dim=2**40), "head_dim must be from 1 to"),
        (_tensor(heads=True), "heads must be of type int, got True"),
        (_tensor(past=None), "past must be of type str, got nothing"),
        (_tensor(more=1), r"tensors\[0\]: unknown fields more"),
        (_tensor(past="input_ids"), "tensors must have names of their own"),
        (_tensor(present="logits"), "tensors must have names of their own"),
        (_set(tensors=[]), "tensors must have names of their own, got"),
        (_set(tensors=[TENSOR, TENSOR]), "tensors must have names of their own"),
        (_set(tensors=3), "tensors must be of type list, got 3"),
        (_set(dtype="object"), "dtype must be one of float32, float16, got 'object'"),
        (_set(context=0), "context must be from 1 to"),
        (_set(stop=["a"]), "stop must be token ids, got"),
        (_set(logits="scores"), "logits must be an output, got 'scores'"),
        (_set(inputs={"input_ids": "input_ids"}), "inputs must name each of"),
        (_set(inputs={"input_ids": 3}), "inputs must name each of"),
        (_set(inputs={"a": "input_ids", "b": "attention_mask", "c": "position_ids"}),
         "inputs must be"),
        (_set(more=1), "cache: unknown fields more"),
    ],
)  # fmt: skip
def test_a_broken_cache_is_one_error(changed, change, match):
    with pytest.raises(FormatError, match=match) as caught:
        Manifest.load(changed(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set(tensors=[TENSOR, OTHER]),
         "past.1.value is no input of the graph; present.1.value is no output"),
        (_set(tensors=[OTHER]), "past.0.value is not in the manifest; past.1.value is no input"),
        (_tensor(present="nothing"), "nothing is no output"),
        (_tensor(heads=4), r"past.0.value is \['batch', 2, 'past', 4\], not of 4 heads of 4"),
        (_tensor(head_dim=1 << 24), "not of 2 heads of 16777216"),
    ],
)  # fmt: skip
def test_a_cache_that_the_graph_does_not_have_is_one_error(changed, change, match):
    with pytest.raises(FormatError, match=match) as caught:
        Bundle.open(changed(change))
    assert "\n" not in str(caught.value)
    assert "must have the manifest's key-value cache, got another" in str(caught.value)


def test_positions_count_what_is_no_padding():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1]])
    wanted = [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 1]]
    np.testing.assert_array_equal(positions(mask), wanted)
