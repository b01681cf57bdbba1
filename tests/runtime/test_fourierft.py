"""FourierFT on the device against its closed form, for every kind of places."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from expansions import flat

from regrow_format.adapter import Adapter, Target
from regrow_format.basis import BasisCache, BasisSpec, locations
from regrow_format.errors import FormatError, RegrowError
from regrow_format.methods import fourierft, get_method
from regrow_format.mt19937 import permutation_head

# Two shapes, both widths odd or even once; in file order.
TARGETS = (Target("a", 9, 6), Target("b", 8, 5), Target("c", 9, 6))


def _closed_form(values: np.ndarray, places: np.ndarray, high: int, wide: int) -> np.ndarray:
    """delta W [out, in] in float64, one coefficient after another."""
    delta = np.zeros((high, wide))
    for value, place in zip(values, places, strict=True):
        j, k = int(place) // wide, int(place) % wide
        for a in range(high):
            for b in range(wide):
                delta[a, b] += float(value) * math.cos(2 * math.pi * (a * j / high + b * k / wide))
    return delta


def _agrees(adapter: Adapter, places: dict[tuple[int, int], np.ndarray]) -> None:
    found = flat(get_method("fourierft").expand(adapter, BasisCache()))
    assert list(found) == [target.name for target in adapter.targets]
    for row, target in zip(adapter.coefficients["c"].dense(), adapter.targets, strict=True):
        grid = target.out_features, target.in_features
        delta = _closed_form(row, places[grid], *grid)
        assert found[target.name]["D"].dtype == np.float32
        assert found[target.name]["D"].flags.c_contiguous
        error = np.abs(found[target.name]["D"].T - delta).max()
        assert error <= 1e-6 * np.abs(delta).max()


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8", "int3"])
def test_places_from_the_seed(make_adapter, storage, group):
    adapter = make_adapter("fourierft", storage, targets=TARGETS, group=group)
    grids = {(6, 9), (5, 8)}
    _agrees(adapter, {grid: locations(adapter.seed, 20, *grid) for grid in grids})


def test_the_places_of_peft(make_adapter):
    adapter = make_adapter("fourierft", targets=TARGETS, seed=777)
    adapter = Adapter.from_bytes(replace(adapter, basis=BasisSpec("peft-mt19937")).to_bytes())
    _agrees(adapter, {(6, 9): permutation_head(777, 20, 54), (5, 8): permutation_head(777, 20, 40)})


def test_stored_places(make_adapter):
    rng = np.random.default_rng(0)
    places = {
        "places.6x9": rng.permutation(54)[:20].astype(np.uint32),
        "places.5x8": rng.permutation(40)[:20].astype(np.uint32),
    }
    adapter = replace(
        make_adapter("fourierft", targets=TARGETS),
        basis=BasisSpec("stored"), stored_basis=places,
    )  # fmt: skip
    read = Adapter.from_bytes(adapter.to_bytes())
    assert read.stored_basis["places.6x9"].dtype == np.uint32
    _agrees(read, {(6, 9): places["places.6x9"], (5, 8): places["places.5x8"]})


@pytest.mark.parametrize("high", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("wide", [1, 2, 3, 4, 7, 8])
def test_every_parity_of_the_widths_on_a_full_grid(monkeypatch, high, wide):
    """Every place taken: its mirror too, and those that are their own."""
    values = np.random.default_rng(1).standard_normal(high * wide).astype(np.float32)
    places = np.arange(high * wide)
    delta = _closed_form(values, places, high, wide)
    for at_once in (fourierft.NUMBERS_AT_ONCE, 2 * wide):
        monkeypatch.setattr(fourierft, "NUMBERS_AT_ONCE", at_once)
        found = fourierft.inverse_transform(values, places, wide, high)
        assert np.abs(found.T - delta).max() <= 1e-6 * np.abs(delta).max()


def test_it_is_the_papers_inverse_transform(make_adapter):
    """delta W = alpha Re(IDFT2(F)), NumPy's with 1 / (in out)."""
    config = {"n": 300, "alpha": 150.0}
    target = Target("layer", 96, 64)
    constant = get_method("fourierft").constants(config, [target])["c"]
    assert constant.tolist() == [np.float32(150 / (96 * 64))]
    adapter = make_adapter("fourierft", "fp32", targets=(target,), **config)
    spectrum = np.zeros((64, 96))
    places = locations(adapter.seed, 300, 64, 96)
    spectrum[places // 96, places % 96] = adapter.coefficients["c"].values[0]
    delta = 150 * np.fft.ifft2(spectrum).real
    found = flat(get_method("fourierft").expand(adapter, BasisCache()))["layer"]["D"].T
    assert np.abs(found - delta).max() <= 1e-6 * np.abs(delta).max()


def test_places_are_drawn_once_for_a_shape(make_adapter):
    cache = BasisCache()
    flat(get_method("fourierft").expand(make_adapter("fourierft", targets=TARGETS), cache))
    assert (cache.misses, cache.nbytes) == (2, 2 * 8 * 20)


def test_counts_are_the_papers():
    """RoBERTa-base, QV of 12 layers, n = 1000: 24,000 numbers; ViT-B 72,000 and 240,000."""
    targets = [Target(f"{i}.{part}", 768, 768) for i in range(12) for part in "qv"]
    for n, count in ((1000, 24_000), (3000, 72_000), (10_000, 240_000)):
        layout = get_method("fourierft").layout({"n": n, "alpha": 1.0}, targets)
        assert sum(rows * length for rows, length in layout.values()) == count


def test_peak_memory_is_bounded(make_adapter):
    """By the result, one target's again, and 16 MB."""
    targets = tuple(Target(f"{i}", 1024, 1024) for i in range(4))
    adapter = make_adapter("fourierft", targets=targets, n=1000)
    tracemalloc.start()
    try:
        flat(get_method("fourierft").expand(adapter, BasisCache()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * 4 * 1024 * 1024 + (16 << 20)


def test_what_does_not_fit_a_device(make_adapter):
    targets = tuple(Target(f"{i}", 2**14, 2**14) for i in range(2))
    adapter = make_adapter("fourierft", targets=targets, n=1)
    assert len(adapter.to_bytes()) < 1000
    with pytest.raises(RegrowError, match="deltas must be at most 1073741824 bytes when expanded"):
        flat(get_method("fourierft").expand(adapter, BasisCache()))


def _places(*values, **named):
    return {"places.5x8": np.array(values, np.uint32), **named}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({}, "file: tensor places.5x8 is missing"),
        (_places(1, 2), r"tensor places.5x8 must be U32 \[3\], got U32 \[2\]"),
        (_places(1, 2, 40), "file: places.5x8 must be 3 different places below 40"),
        (_places(1, 2, 2**32 - 1), "places.5x8 must be 3 different places below 40"),
        (_places(1, 2, 1), "places.5x8 must be 3 different places below 40"),
        ({"places.5x8": np.arange(3, dtype=np.float32)}, r"must be U32 \[3\], got F32 \[3\]"),
        ({"places.8x5": np.arange(3, dtype=np.uint32)}, "tensor places.5x8 is missing"),
        (_places(1, 2, 3, **{"basis.A": np.zeros(3, np.float32)}), "unknown tensors basis.A"),
    ],
)
def test_broken_places(make_adapter, edit, places, message):
    good = replace(
        make_adapter("fourierft", targets=(Target("b", 8, 5),), n=3),
        basis=BasisSpec("stored"), stored_basis=_places(0, 1, 2),
    )  # fmt: skip
    kinds = {"uint32": "U32", "float32": "F32"}

    def change(parts):
        parts[:] = [part for part in parts if part[0] != "places.5x8"]
        for name, array in places.items():
            parts.append([name, kinds[array.dtype.name], list(array.shape), array.tobytes()])

    with pytest.raises(FormatError, match=message):
        Adapter.from_bytes(edit(good.to_bytes(), tensors=change), "file")
    with pytest.raises(FormatError, match=message.removeprefix("file: ")):
        replace(good, stored_basis=places).to_bytes()


@pytest.mark.parametrize(
    ("target", "n", "message"),
    [
        (Target("x", 3, 4), 13, r"x must have from n = 13 to 2\*\*32 - 1 places, got 4 x 3"),
        (Target("x", 2**16, 2**16), 1, r"x must have from n = 1 to .* places, got 65536 x 65536"),
    ],
)
def test_grids_that_do_not_do(make_adapter, edit, target, n, message):
    good = make_adapter("fourierft", targets=(Target("x", 8, 8),), n=n)

    def change(fields):
        fields["targets"] = [[target.name, target.in_features, target.out_features]]

    with pytest.raises(FormatError, match=f"^file: {message}"):
        Adapter.from_bytes(edit(good.to_bytes(), change), "file")
