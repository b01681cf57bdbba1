"""IA³ of PEFT, made by hand: which layers are feed-forward ones, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expansions import flat

from regrow_format.methods import get_method
from regrow_runtime import Adapter, BasisCache
from regrow_toolchain.interop import import_peft

Room = Any  # see conftest.py
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"


def _imported(room: Room, base: str = "bundle", **options: Any) -> Adapter:
    return Adapter.from_bytes(
        import_peft(room.path / "peft", room.path / base, **options).to_bytes()
    )


@pytest.mark.parametrize("base", ["bundle", "backbone"])
def test_what_is_multiplied_is_pefts(ia3_room: Room, base: str) -> None:
    found = _imported(ia3_room, base)
    assert (found.method, dict(found.config), found.seed) == ("ia3", {"feedforward": ["k"]}, 0)
    assert found.user == {"imported": "PEFT IA3"}
    assert found.head is not None
    expanded = flat(get_method("ia3").expand(found, BasisCache()))
    s, t = ia3_room.tensors[f"{Q}.ia3_l"][:, 0], ia3_room.tensors[f"{K}.ia3_l"][0]
    np.testing.assert_array_equal(expanded["blocks.0.q"]["s"], [s - 1])
    np.testing.assert_array_equal(expanded["blocks.0.k"]["t"], [t - 1])


@pytest.mark.parametrize(
    ("modules", "endings"),
    [
        (["k"], ["k"]),
        (["s.0.k"], ["k"]),  # PEFT asks for no dot
        ("k", None),  # an expression fits whole
        (r".*\.k", ["k"]),
        (r".*\.(q|k)", None),
        ([], None),
        (None, None),
    ],
)
def test_feedforward_modules(ia3_room: Room, modules: Any, endings: list[str] | None) -> None:
    """As PEFT reads them; where the shapes say something else, PEFT would not load it either."""
    ia3_room.write({"feedforward_modules": modules})
    if endings:
        assert _imported(ia3_room).config == {"feedforward": endings}
        return
    refusal = ia3_room.refusal()
    other = ("q", "[1, 8], as a feed-forward layer, got [6, 1]")
    plain = ("k", "[4, 1], as no feed-forward layer, got [1, 8]")
    layer, words = other if modules == r".*\.(q|k)" else plain
    assert f"blocks.0.{layer} must have ia3_l {words}" in refusal


def test_transposed_weights_of_a_backbone(ia3_room: Room) -> None:
    """k lies in the file as [4, 8]: with l of 4 inputs it is a Conv1D of 4 -> 8."""
    ia3_room.write(tensors={f"{K}.ia3_l": np.ones((1, 4), "f4")})
    found = _imported(ia3_room, "backbone")
    assert [(t.in_features, t.out_features) for t in found.targets] == [(4, 8), (8, 6)]
    assert "must have ia3_l [1, 8], as a feed-forward layer, got [1, 4]" in ia3_room.refusal()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"feedforward_modules": "(a+)+k"}, "without repeated groups"),
        ({"feedforward_modules": "(k"}, "a pattern must be a regular expression"),
        ({"feedforward_modules": [1]}, "feedforward_modules must be a list of strings, got [1]"),
        ({"feedforward_modules": 3}, "feedforward_modules must be of type list, got 3"),
        ({"r": 8}, "fields that are set must be those of PEFT 0.21, got 'r'"),
    ],
)
def test_configs_that_are_refused(ia3_room: Room, fields: dict[str, Any], words: str) -> None:
    ia3_room.write(config=fields)
    assert words in ia3_room.refusal()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{p}.ia3_l": None for p in (Q, K)}, "must have ia3_l of a layer, got none"),
        ({f"{Q}.ia3_l": np.ones((6, 1, 1, 1), "f4")}, "must have ia3_l [6, 1], as no feed-forw"),
        ({f"{Q}.ia3_l": np.full((6, 1), np.nan, "f4")}, "ia3_l must be finite, got NaN"),
        ({"base_model.model.blocks.7.q.ia3_l": np.ones((6, 1), "f4")},
         "blocks.7.q must be a scale or input_scale slot of the bundle, got none: export it with "
         "--for ia3"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(ia3_room: Room, changes: dict[str, Any], words: str) -> None:
    ia3_room.write(tensors=changes)
    assert words in ia3_room.refusal()
