"""FourierFT of PEFT, made by hand: places, scales, patterns, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expansions import flat

from regrow_format.methods import get_method
from regrow_format.mt19937 import permutation_head
from regrow_runtime import Adapter, BasisCache
from regrow_toolchain.interop import import_peft

Room = Any  # see conftest.py
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"
SPECTRUM = "fourierft_spectrum"


def _imported(room: Room, base: str = "bundle", **options: Any) -> Adapter:
    return Adapter.from_bytes(
        import_peft(room.path / "peft", room.path / base, **options).to_bytes()
    )


def _wanted(values: np.ndarray, wide: int, high: int, seed: int = 777) -> np.ndarray:
    """PEFT's delta W, transposed."""
    spectrum = np.zeros(wide * high)
    spectrum[permutation_head(seed, values.size, wide * high)] = values
    return np.asarray(np.fft.ifft2(spectrum.reshape(high, wide)).real.T * 12.0)


def _check(room: Room, adapter: Adapter) -> None:
    expanded = flat(get_method("fourierft").expand(adapter, BasisCache()))
    for layer, path, high in (("blocks.0.q", Q, 6), ("blocks.0.k", K, 4)):
        wanted = _wanted(room.tensors[f"{path}.{SPECTRUM}"], 8, high)
        np.testing.assert_allclose(expanded[layer]["D"], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", ["bundle", "backbone"])
def test_changes_are_pefts(fourierft_room: Room, base: str) -> None:
    found = _imported(fourierft_room, base)
    assert (found.method, dict(found.config)) == ("fourierft", {"n": 9, "alpha": 12.0})
    assert (found.seed, found.basis.kind, dict(found.basis.fields)) == (777, "peft-mt19937", {})
    assert found.user == {"imported": "PEFT FourierFT"}
    assert found.head is not None
    assert found.coefficients["c"].values[0, 7:].tolist() == [0, 0]  # k has fewer
    _check(fourierft_room, found)


def test_places_of_large_layers_are_stored(
    fourierft_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a device need not draw hundreds of millions of words."""
    monkeypatch.setattr("regrow_toolchain.interop.peft.fourierft.LONG", 48)
    found = _imported(fourierft_room)
    assert found.basis.kind == "stored"
    assert {name: array.tolist() for name, array in found.stored_basis.items()} == {
        "places.6x8": permutation_head(777, 9, 48).tolist(),
        "places.4x8": permutation_head(777, 9, 32).tolist(),
    }
    _check(fourierft_room, found)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("k", True),
        ("blocks.0.k", True),  # as a whole
        ("0.k", True),
        ("[a-k]", True),
        (r"\d+\.k", True),
        ("locks.0.k", False),
        ("blocks.0", False),
    ],
)
def test_patterns(fourierft_room: Room, pattern: str, fits: bool) -> None:
    fourierft_room.write({"n_frequency_pattern": {pattern: 7}})
    if fits:
        _check(fourierft_room, _imported(fourierft_room))
    else:
        assert f"blocks.0.k must have {SPECTRUM} [9]" in fourierft_room.refusal()


def test_transposed_weights_of_a_backbone(fourierft_room: Room) -> None:
    """k lies in the file as [4, 8]: with fan_in_fan_out it is a Conv1D of 4 -> 8."""
    fourierft_room.write({"fan_in_fan_out": True})
    found = _imported(fourierft_room, "backbone")
    assert [(t.in_features, t.out_features) for t in found.targets] == [(4, 8), (8, 6)]
    found = _imported(fourierft_room, "bundle")  # which says it itself
    assert [(t.in_features, t.out_features) for t in found.targets] == [(8, 4), (8, 6)]


_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"bias": "fourier_only"}, "bias must be 'none', got 'fourier_only'"),
    ({"n_frequency": 0}, "n_frequency must be from 1 to 65536, got 0"),
    ({"n_frequency": 10**12}, "n_frequency must be from 1 to 65536"),
    ({"n_frequency": 10}, f"blocks.0.q must have {SPECTRUM} [10], as its config says, got [9]"),
    ({"n_frequency_pattern": {"k": 7.5}}, "n_frequency_pattern: k must be of type int"),
    ({"n_frequency_pattern": {"(a+)+k": 7}}, "without repeated groups"),
    ({"n_frequency_pattern": {"(k": 7}}, "a pattern must be a regular expression"),
    ({"random_loc_seed": None}, "random_loc_seed must be of type int, got nothing"),
    ({"random_loc_seed": 2**70}, "random_loc_seed must be from"),
    ({"scaling": "much"}, "scaling must be of type float"),
    ({"scaling": 1e300}, "must be finite, got NaN or infinity"),
    ({"ifft2_norm": "ortho"}, "fields that are set must be those of PEFT 0.21, got 'ifft2_norm'"),
]


@pytest.mark.parametrize(("fields", "words"), _FIELDS, ids=[str(f[0])[:40] for f in _FIELDS])
def test_configs_that_are_refused(fourierft_room: Room, fields: dict[str, Any], words: str) -> None:
    fourierft_room.write(config=fields)
    assert words in fourierft_room.refusal()


_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({f"{p}.{SPECTRUM}": None for p in (Q, K)}, f"must have {SPECTRUM} of a layer, got none"),
    ({f"{Q}.{SPECTRUM}": np.ones((3, 3), "f4")}, "as its config says, got [3, 3]"),
    ({f"{Q}.{SPECTRUM}": np.full(9, np.nan, "f4")}, f"{SPECTRUM} must be finite, got NaN"),
    ({f"{Q}.{SPECTRUM}": np.ones(9, "i8")}, "must be F32, F16, BF16, got I64"),
    ({f"{Q}.{SPECTRUM}.default": np.ones(9, "f4")}, "is there twice, for blocks.0.q of two"),
    ({f"base_model.model.blocks.7.q.{SPECTRUM}": np.ones(9, "f4")},
     "blocks.7.q must be a delta slot of the bundle, got none: export it with --for fourierft"),
    ({"base_model.model.norm.weight": np.ones(6, "f4")}, "must be the head (head), got norm"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), _TENSORS, ids=[t[1][:50] for t in _TENSORS])
def test_tensors_that_are_refused(
    fourierft_room: Room, changes: dict[str, Any], words: str
) -> None:
    fourierft_room.write(tensors=changes)
    assert words in fourierft_room.refusal()


def test_more_frequencies_than_a_layer_has_weights(fourierft_room: Room) -> None:
    """They are stored with as many coefficients for all, so every layer must have the places."""
    fourierft_room.write(
        {"n_frequency_pattern": {"q": 40, "k": 7}},
        {f"{Q}.{SPECTRUM}": np.ones(40, "f4")},
    )
    words = fourierft_room.refusal()
    assert "blocks.0.k must have from 40 to 1073741824 weights" in words


def test_a_bundle_with_low_rank_slots_alone(fourierft_room: Room) -> None:
    fourierft_room.bundle("low")
    words = fourierft_room.refusal("low")
    assert "blocks.0.k must be a delta slot of the bundle, got none" in words
