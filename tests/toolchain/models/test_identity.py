"""The identity of a backbone: its golden value, and what changes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from regrow_format.errors import FormatError
from regrow_toolchain.models import stored_tensors
from regrow_toolchain.models.identity import backbone_id

# As in docs/backbone-id.md.
TENSORS = {
    "body.weight": np.array([[1, 2, 3], [4, 5, 6]], dtype="<f4"),
    "body.bias": np.array([0.5, -0.5], dtype="<f2"),
    "steps": np.array(7, dtype="<i8"),
    "head.weight": np.array([[9, 9]], dtype="<f4"),
}
GOLDEN = "sha256:712f271e0d9cfa5de34fbe710de197ff957cddb064938525769324df4b915811"


@pytest.fixture
def save(tmp_path):
    def call(tensors, name="model.safetensors"):
        save_file(tensors, tmp_path / name, {"format": "pt"})
        return tmp_path / name

    return call


def test_golden(save):
    assert backbone_id([save(TENSORS)], ["head"]) == GOLDEN


def test_the_golden_value_is_the_documents():
    page = Path(__file__).parents[3] / "docs" / "backbone-id.md"
    assert GOLDEN in page.read_text(encoding="utf-8")


def test_the_preimage(save):
    preimage = (
        b"body.bias\tF16\t2\n" + bytes.fromhex("003800b8")
        + b"body.weight\tF32\t2,3\n" + bytes.fromhex(
            "0000803f" "00000040" "00004040" "00008040" "0000a040" "0000c040"
        )
        + b"steps\tI64\t\n" + bytes.fromhex("0700000000000000")
    )  # fmt: skip
    assert f"sha256:{hashlib.sha256(preimage).hexdigest()}" == GOLDEN
    assert backbone_id([save(TENSORS)], ["head"]) == GOLDEN


def test_neither_order_nor_shards_matter(save):
    one = save({k: TENSORS[k] for k in ("steps", "head.weight")}, "b.safetensors")
    two = save({k: TENSORS[k] for k in ("body.weight", "body.bias")}, "a.safetensors")
    assert backbone_id([one, two], ["head"]) == backbone_id([two, one], ["head"]) == GOLDEN


def test_the_head_does_not_matter(save):
    changed = {**TENSORS, "head.weight": np.zeros((4, 2), "<f4"), "head.bias": np.zeros(4, "<f4")}
    assert backbone_id([save(changed)], ["head"]) == GOLDEN
    near = {**TENSORS, "header.weight": np.zeros(1, "<f4")}
    assert backbone_id([save(near)], ["head"]) != GOLDEN
    assert backbone_id([save(TENSORS)], []) != GOLDEN


@pytest.mark.parametrize(
    "change",
    [
        {"body.weight": np.array([[1, 2, 3], [4, 5, 7]], "<f4")},
        {"body.weight": np.array([[1, 2], [3, 4], [5, 6]], "<f4")},
        {"body.weight": np.array([[1, 2, 3], [4, 5, 6]], "<f8")},
        {"more": np.zeros(1, "<f4")},
        {"steps": np.array([7], "<i8")},
    ],
)
def test_everything_else_matters(save, change):
    assert backbone_id([save({**TENSORS, **change})], ["head"]) != GOLDEN


def test_large_tensors_are_read_in_pieces(save):
    value = np.arange(700_001, dtype="<f4")  # 2.8 MB, no multiple of a piece
    preimage = b"x\tF32\t700001\n" + value.tobytes()
    found = backbone_id([save({"x": value})], [])
    assert found == f"sha256:{hashlib.sha256(preimage).hexdigest()}"


def test_broken_files(save):
    path = save(TENSORS)
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"safetensors file|cut short"):
            backbone_id([path], [])
    path.write_bytes(data)
    assert [t.name for t in stored_tensors(path)]
