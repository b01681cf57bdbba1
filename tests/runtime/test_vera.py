"""VeRA on the device against its formula, entry by entry, for every kind of basis."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from expansions import flat

from regrow_format.adapter import Adapter, Coefficients, Target
from regrow_format.basis import BasisCache, BasisSpec, signs
from regrow_format.errors import FormatError, RegrowError
from regrow_format.methods import get_method, vera
from regrow_format.mt19937 import uniform_kaiming

# Widths that differ both ways, none a multiple of 8; in file order.
TARGETS = (Target("a", 13, 9), Target("b", 10, 21), Target("c", 30, 9))
PEFT = BasisSpec("peft-mt19937", 1, {"in": 33, "out": 21, "dtype": "float32"})


@pytest.fixture
def adapter(make_adapter) -> Adapter:
    return make_adapter("vera", "int5", targets=TARGETS, rank=7)


def _rows(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """By target: the row of `d`, and the row of its `b.<out>`."""
    return {"a": (0, 0), "b": (1, 0), "c": (2, 1)}


def _lambdas(adapter: Adapter, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """lambda_d [rank] and lambda_b [out], float32, one multiply each."""
    d_row, b_row = _rows(adapter)[target.name]
    d, b = adapter.coefficients["d"], adapter.coefficients[f"b.{target.out_features}"]
    return (
        d.values[d_row].astype(np.float32) * d.scale[d_row],
        b.values[b_row].astype(np.float32) * b.scale[b_row],
    )


def _by_hand(adapter: Adapter, a: np.ndarray, b: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """A' [in, r] and B' [r, out] from A [r, in or more] and B [out or more, r]."""
    found = {}
    for target in adapter.targets:
        lambda_d, lambda_b = _lambdas(adapter, target)
        scaled_a = np.zeros((target.in_features, len(lambda_d)), np.float32)
        scaled_b = np.zeros((len(lambda_d), target.out_features), np.float32)
        for i in range(len(lambda_d)):
            for p in range(target.in_features):
                scaled_a[p, i] = np.float32(a[i, p]) * lambda_d[i]
            for o in range(target.out_features):
                scaled_b[i, o] = np.float32(b[o, i]) * lambda_b[o]
        found[target.name] = {"A": scaled_a, "B": scaled_b}
    return found


def _same_bytes(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        for part, values in parts.items():
            assert found[name][part].dtype == np.float32
            assert found[name][part].shape == values.shape
            assert found[name][part].tobytes() == values.tobytes(), (name, part)
            assert found[name][part].flags.c_contiguous


def _sign_matrices(adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    rank = adapter.config["rank"]
    a = np.stack([signs(adapter.seed, 2, i, 30) for i in range(rank)])
    return a, np.stack([signs(adapter.seed, 3, o, rank) for o in range(21)])


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8", "int4", "int2"])
def test_signs_times_one_product(make_adapter, storage):
    adapter = make_adapter("vera", storage, targets=TARGETS, rank=7)
    found = flat(get_method("vera").expand(adapter, BasisCache()))
    _same_bytes(found, _by_hand(adapter, *_sign_matrices(adapter)))


def test_blocks_of_the_basis_meet_without_a_seam(adapter, monkeypatch):
    whole = flat(get_method("vera").expand(adapter, BasisCache()))
    monkeypatch.setattr(vera, "FLOATS_AT_ONCE", 61)  # two rows of A, eight of B at once
    _same_bytes(flat(get_method("vera").expand(adapter, BasisCache())), whole)


def test_a_layers_basis_does_not_depend_on_the_others(adapter):
    first = {
        name: Coefficients(part.values[:1], part.scale[:1])
        for name, part in adapter.coefficients.items()
        if name != "b.21"
    }
    alone = replace(adapter, targets=TARGETS[:1], coefficients=first)
    whole = flat(get_method("vera").expand(adapter, BasisCache()))
    _same_bytes(flat(get_method("vera").expand(alone, BasisCache())), {"a": whole["a"]})


def test_it_is_the_formula_of_the_paper(adapter):
    """lambda_b * (B (lambda_d * (A x))), A and B of deviation sqrt(2 / fan)."""
    rng = np.random.default_rng(3)
    d, b = rng.standard_normal((1, 7)), rng.standard_normal((1, 9))
    constants = get_method("vera").constants({"rank": 7}, TARGETS[:1])
    values = {
        "d": Coefficients.store(d.astype(np.float32), constants["d"], "fp32"),
        "b.9": Coefficients.store(b.astype(np.float32), constants["b.9"], "fp32"),
    }
    one = replace(adapter, targets=TARGETS[:1], coefficients=values, storage="fp32")
    a_signs, b_signs = _sign_matrices(one)
    x = rng.standard_normal(13)
    inner = d[0] * (a_signs[:, :13] * np.sqrt(2 / 13) @ x)
    expected = b[0] * (b_signs[:9] * np.sqrt(2 / 7) @ inner)
    found = flat(get_method("vera").expand(one, BasisCache()))["a"]
    np.testing.assert_allclose((x @ found["A"]) @ found["B"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_basis_of_peft(adapter, dtype):
    """A is as wide as PEFT's widest layer, targeted here or not; layers read its first columns."""
    spec = replace(PEFT, fields={**PEFT.fields, "dtype": dtype})
    imported = Adapter.from_bytes(replace(adapter, basis=spec, seed=0).to_bytes())
    assert imported.basis == spec
    expected = _by_hand(imported, *uniform_kaiming(0, 7, 33, 21, dtype))
    cache = BasisCache()
    _same_bytes(flat(get_method("vera").expand(imported, cache)), expected)
    assert (cache.misses, cache.nbytes) == (1, 4 * 7 * (33 + 21))
    _same_bytes(flat(get_method("vera").expand(imported, cache)), expected)
    assert cache.misses == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_stored_basis(adapter, dtype):
    rng = np.random.default_rng(0)
    matrices = {
        "basis.A": rng.standard_normal((7, 30)).astype(dtype),
        "basis.B": rng.standard_normal((21, 7)).astype(dtype),
    }
    stored = replace(adapter, basis=BasisSpec("stored"), stored_basis=matrices)
    read = Adapter.from_bytes(stored.to_bytes())
    assert {name: array.dtype for name, array in read.stored_basis.items()} == {
        "basis.A": dtype, "basis.B": dtype,
    }  # fmt: skip
    cache = BasisCache()
    _same_bytes(flat(get_method("vera").expand(read, cache)), _by_hand(read, *matrices.values()))
    assert cache.misses == 0


def test_grouped_scales_are_one_product_too(make_adapter):
    adapter = make_adapter("vera", "int4", targets=TARGETS[:1], rank=20, group=8)
    assert adapter.coefficients["d"].scale.shape == (1, 3)
    found = flat(get_method("vera").expand(adapter, BasisCache()))["a"]
    part = adapter.coefficients["d"]
    for i in range(20):
        value = np.float32(part.values[0, i]) * part.scale[0, i // 8]
        column = signs(adapter.seed, 2, i, 13).astype(np.float32) * value
        assert found["A"][:, i].tobytes() == column.tobytes()


def test_counts_are_the_papers():
    """RoBERTa-base, QV of 12 layers, rank 1024: 43,008 numbers."""
    targets = [Target(f"{i}.{part}", 768, 768) for i in range(12) for part in "qv"]
    layout = get_method("vera").layout({"rank": 1024}, targets)
    assert sum(rows * length for rows, length in layout.values()) == 43_008


@pytest.mark.parametrize("spec", [BasisSpec(), PEFT])
def test_peak_memory_is_the_result_and_little_more(make_adapter, spec):
    targets = tuple(Target(f"{i}", 512, 512) for i in range(8))
    adapter = make_adapter("vera", "int8", targets=targets, rank=1024)
    fields = {"in": 512, "out": 512, "dtype": "float32"} if spec.fields else {}
    adapter = replace(adapter, basis=replace(spec, fields=fields))
    tracemalloc.start()
    try:
        found = flat(get_method("vera").expand(adapter, BasisCache()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = sum(array.nbytes for parts in found.values() for array in parts.values())
    assert result == 8 * 2 * 4 * 512 * 1024
    assert peak < result + (16 << 20)


@pytest.mark.parametrize(
    ("targets", "wide", "message"),
    [
        (
            [Target("x", 1, 1)],
            2**24,
            "basis must be at most 268435456 bytes when expanded",
        ),
        ([Target("x", 1, 2**16)], 1, "basis must be at most 268435456 bytes"),
        (
            [Target("x", 2**16, 1), Target("y", 2**16, 1)],
            0,
            "factors must be at most 1073741824",
        ),
        ([Target("x", 1, 2**16), Target("y", 1, 2**16)], 0, "got 2147483648: train with a smaller"),
    ],
)
def test_what_does_not_fit_a_device(make_adapter, targets, wide, message):
    adapter = make_adapter("vera", "int2", targets=tuple(targets), rank=2**12)
    if wide:
        fields = {"in": wide, "out": 2**24, "dtype": "float32"}
        adapter = replace(adapter, basis=BasisSpec("peft-mt19937", 1, fields))
    with pytest.raises(RegrowError, match=message):
        flat(get_method("vera").expand(adapter, BasisCache()))


BROKEN = {
    "narrower in": ({"in": 29}, "at least the widest targets' 30 and 21, got 29 and 33"),
    "narrower out": ({"out": 20}, "at least the widest targets' 30 and 21, got 33 and 20"),
    "in": ({"in": 2**24 + 1}, "basis: in must be from 1 to 16777216, got 16777217"),
    "no out": ({"out": None}, "basis: out must be of type int, got nothing"),
    "dtype": ({"dtype": "float64"}, "basis: dtype must be one of float32, bfloat16, float16, got"),
    "dtype as a number": ({"dtype": 32}, "basis: dtype must be of type str, got 32"),
    "one more": ({"fan": 1}, "basis: unknown fields fan"),
    "version": ({"version": 2}, "stored, version 1, got 'peft-mt19937' version 2"),
    "kind": ({"kind": "mt19937"}, "basis of vera must be philox-sign or peft-mt19937 or stored, v"),
    "kind without fields": ({"kind": "philox-sign"}, "basis: unknown fields dtype, in, out"),
    "stored, no tensors": ({"kind": "stored"}, "tensor basis.A is missing"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_bases(adapter, edit, name):
    change, message = BROKEN[name]
    wide = replace(PEFT, fields={**PEFT.fields, "out": 33})
    data = replace(adapter, basis=wide).to_bytes()
    if change.get("kind") == "stored":
        change = {"kind": "stored", "in": None, "out": None, "dtype": None}

    def apply(fields):
        fields["basis"] = {
            k: v for k, v in {**fields["basis"], **change}.items() if v is not None
        }  # fmt: skip

    with pytest.raises(FormatError, match=r"^file: ") as caught:
        Adapter.from_bytes(edit(data, apply), "file")
    assert message in str(caught.value)
