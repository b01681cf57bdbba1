"""Baselines, grouped scales, extra tensors, probes: read again as written, and nothing broken."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from expansions import flat

from regrow_format.adapter import Adapter, Coefficients, Probe, Target
from regrow_format.basis import BasisCache, BasisSpec, signs
from regrow_format.errors import FormatError, RegrowError
from regrow_format.methods import METHODS, get_method

EXTRA = {
    "norm.bias": np.array([[0.5, -2.0]], np.float32),
    "norm.weight": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
    "scale": np.array(3, np.float16),
}


@pytest.fixture(scope="module")
def full(make_adapter) -> Adapter:
    """Of grouped scales, with extra tensors and a probe."""
    probe = Probe(np.array([0.5, -1.25, 3.0], np.float16), 1e-3)
    return replace(make_adapter("lora", "int4", group=8), extra=EXTRA, probe=probe)


def test_extra_and_probe_are_read_again(full):
    read = Adapter.from_bytes(full.to_bytes())
    assert list(read.extra) == ["norm.bias", "norm.weight", "scale"]
    for name, array in EXTRA.items():
        np.testing.assert_array_equal(read.extra[name], array, strict=True)
    np.testing.assert_array_equal(read.probe.expected, full.probe.expected, strict=True)
    assert read.probe.tolerance == 1e-3
    assert read.group == 8
    assert read.to_bytes() == full.to_bytes()


def test_bitfit_is_its_stored_rows(make_adapter):
    adapter = make_adapter("bitfit", "int6", targets=(*_targets(9, 8), Target("norm", 5, 5)))
    assert {n: p.values.shape for n, p in adapter.coefficients.items()} == {
        "b.8": (2, 8), "b.5": (1, 5),
    }  # fmt: skip
    found = flat(get_method("bitfit").expand(adapter, BasisCache()))
    for name, tensor, row in (("0", "b.8", 0), ("1", "b.8", 1), ("norm", "b.5", 0)):
        part = adapter.coefficients[tensor]
        expected = part.values[row].astype(np.float32) * part.scale[row]
        assert list(found[name]) == ["b"]
        assert found[name]["b"].tobytes() == expected.tobytes()


def _targets(wide: int, high: int) -> tuple[Target, ...]:
    return Target("0", wide, high), Target("1", wide, high)


def test_biases_that_do_not_fit_a_device():
    targets = tuple(Target(f"{i:02}", 2**24, 2**24) for i in range(17))
    adapter = Adapter("bitfit", {}, 0, "", targets, {})
    with pytest.raises(RegrowError, match="biases must be at most 1073741824 bytes when expanded"):
        flat(get_method("bitfit").expand(adapter, BasisCache()))


def test_a_head_is_no_targets_and_no_numbers(make_adapter):
    adapter = Adapter.from_bytes(make_adapter("head").to_bytes())
    assert (adapter.targets, adapter.coefficients) == ((), {})
    assert adapter.head.labels == ("own 0", "own 1")
    assert flat(get_method("head").expand(adapter, BasisCache())) == {}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_constants_are_one_per_row(name, make_adapter):
    adapter = make_adapter(name)
    constants = get_method(name).constants(adapter.config, adapter.targets)
    layout = get_method(name).layout(adapter.config, adapter.targets)
    assert {n: (len(c),) for n, c in constants.items()} == {n: s[:1] for n, s in layout.items()}
    assert all(c.dtype == np.float32 for c in constants.values())


# -- grouped scales --------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [8, 9, 20, 21, 40, 10**6])
@pytest.mark.parametrize("storage", ["int8", "int4", "int2", "fp16"])
def test_every_group_has_a_scale(storage, group):
    values = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    values[1, 8:] *= 1000
    constant = np.array([1, 2, 0.5], np.float32)
    found = Coefficients.store(values, constant, storage, group)
    assert found.scale.shape == (3, -(-20 // group))
    assert found.values.shape == (3, 20)
    for row in range(3):
        for start in range(0, 20, group):
            one = Coefficients.store(values[row : row + 1, start : start + group],
                                     constant[row : row + 1], storage)  # fmt: skip
            np.testing.assert_array_equal(found.values[row, start : start + group], one.values[0])
            assert found.scale[row, start // group] == one.scale[0]
            dense = found.dense()[row, start : start + group]
            assert dense.tobytes() == one.dense()[0].tobytes()


@pytest.mark.parametrize("shared", [True, False])
def test_nola_with_groups(make_adapter, shared):
    adapter = make_adapter("nola", "int4", group=8, k=20, shared=shared)
    found = flat(get_method("nola").expand(adapter, BasisCache()))
    for row, target in enumerate(adapter.targets):
        part, total = adapter.coefficients["alpha"], np.zeros(target.in_features * 2)
        for i in range(20):
            value = float(part.values[row, i]) * float(part.scale[row, i // 8])
            layer = 0 if shared else 1 + row
            total += value * signs(adapter.seed, 0, i, len(total), layer=layer)
        error = np.abs(found[target.name]["A"].reshape(-1) - total).max()
        assert error <= 1e-6 * np.abs(total).max()


# -- broken files ----------------------------------------------------------------------------------


def _set(**fields):
    return lambda data: data.update(fields)


BROKEN = {
    "group of 7": (_set(group=7), "group must be from 8 to 16777216, got 7"),
    "group too large": (_set(group=2**40), "group must be from 8 to 16777216"),
    "group as text": (_set(group="8"), "group must be of type int, got '8'"),
    "another group": (_set(group=16), "tensor A.16.scale must be F32 [2, 1], got F32 [2, 2]"),
    "no group": (lambda d: d.pop("group"), "A.16.scale must be F32 [2], got F32 [2, 2]"),
    "extra missing": (_set(extra=["more", *EXTRA]), "tensor extra.more is missing"),
    "extra not named": (_set(extra=["norm.bias", "scale"]), "unknown tensors extra.norm.weight"),
    "extra unsorted": (_set(extra=["scale", "norm.bias", "norm.weight"]), "extra must be sorted"),
    "extra twice": (_set(extra=["scale", "scale"]), "extra must be sorted, each named once"),
    "extra that rings": (_set(extra=["\x07"]), "in characters that print"),
    "extra as text": (_set(extra="scale"), "extra must be of type list"),
    "extra as a number": (_set(extra=[1]), "extra must be a list of strings"),
    "probe removed": (lambda d: d.pop("probe"), "unknown tensors probe"),
    "probe as a list": (_set(probe=[]), "probe must be an object, got list"),
    "no tolerance": (_set(probe={}), "probe: tolerance must be of type float, got nothing"),
    "negative tolerance": (_set(probe={"tolerance": -1e-9}), "not negative, got 3 and -1e-09"),
    "endless tolerance": (_set(probe={"tolerance": 10**400}), "tolerance must be a finite number"),
    "one more of the probe": (_set(probe={"tolerance": 0, "x": 1}), "probe: unknown fields x"),
    "basis of another method": (
        _set(basis={"kind": "stored", "version": 1}), "basis of lora must be philox-sign, version",
    ),
    "basis without version": (_set(basis={"kind": "stored"}), "version must be of type int, got n"),
    "method without tensors": (_set(method="bitfit", config={}), "tensor b.8 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_metadata(full, edit, name):
    change, message = BROKEN[name]
    with pytest.raises(FormatError, match=r"^file: ") as caught:
        Adapter.from_bytes(edit(full.to_bytes(), change), "file")
    assert message in str(caught.value)


def _tensor(name, dtype, array):
    def change(parts):
        parts[:] = [part for part in parts if part[0] != name]
        parts.append([name, dtype, list(array.shape), array.tobytes()])

    return change


NAN = np.full((2, 2), np.nan, np.float32)
HALVES, FLOATS = np.zeros(65, np.float16), np.zeros(3, np.float32)
TENSORS = {
    "probe of 65": (_tensor("probe", "F16", HALVES), "probe must have 1 to 64 numbers and a toler"),
    "probe of none": (_tensor("probe", "F16", HALVES[:0]), "probe must have 1 to 64 numbers"),
    "probe of floats": (_tensor("probe", "F32", FLOATS), "probe must be F16 [3], got F32 [3]"),
    "probe of two dimensions": (_tensor("probe", "F16", HALVES[None]), "probe must be 1, got 2"),
    "probe NaN": (_tensor("probe", "F16", np.full(1, np.nan, np.float16)), "probe must be finite"),
    "scale NaN": (_tensor("A.16.scale", "F32", NAN), "tensor A.16.scale must be finite, got NaN"),
    "scale of halves": (
        _tensor("A.16.scale", "F16", np.ones((2, 2), np.float16)), "must be F32 [2, 2], got F16",
    ),
    "extra of codes": (_tensor("extra.scale", "I8", np.int8(1)), "extra.scale must be F16/F32 []"),
    "extra infinite": (
        _tensor("extra.scale", "F32", np.float32(np.inf)), "tensor extra.scale must be finite",
    ),
    "extra of 40 dimensions": (
        _tensor("extra.scale", "F16", HALVES[:1].reshape([1] * 9)), "extra.scale must be at most 8",
    ),
    "head that is not named": (_tensor("head.h.b", "F16", HALVES), "unknown tensors head.h.b"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_broken_tensors(full, edit, name):
    change, message = TENSORS[name]
    with pytest.raises(FormatError, match=r"^file: ") as caught:
        Adapter.from_bytes(edit(full.to_bytes(), tensors=change), "file")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"head": None},
        {"targets": (Target("a", 1, 1),)},
    ],
)
def test_a_head_needs_a_head_and_nothing_else(make_adapter, change):
    adapter = replace(make_adapter("head"), **change)
    with pytest.raises(FormatError, match="an adapter of method head must have a head and no targ"):
        adapter.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"targets": (Target("b", 1, 1), Target("a", 1, 1))},
        {"extra": {"\n": np.zeros(1, np.float32)}},
        {"extra": {"a": np.zeros(1, np.float64)}},
        {"extra": {"a": np.array([np.nan], np.float32)}},
        {"probe": Probe(np.zeros(65, np.float16), 0.0)},
        {"group": 16},
        {"basis": BasisSpec("stored")},
        {"basis": BasisSpec("philox-sign", 1, {"in": 3})},
        {"stored_basis": {"basis.A": np.zeros(3, np.float32)}},
        {"config": {"rank": 0}},
    ],
)
def test_no_file_is_written_that_could_not_be_read(full, tmp_path, change):
    with pytest.raises(RegrowError, match=r"^adapter: "):
        replace(full, **change).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# A few hundred bytes that claim gigabytes: method, config, targets, basis.
WIDE = [[f"{i:03}", 2**24, 2**24] for i in range(200)]
HOSTILE = {
    "vera": ("vera", {"rank": 4096}, WIDE, {"kind": "philox-sign", "version": 1}),
    "vera of PEFT": (
        "vera", {"rank": 4096}, WIDE,
        {"kind": "peft-mt19937", "version": 1, "in": 2**24, "out": 2**24, "dtype": "float32"},
    ),
    "vera stored": ("vera", {"rank": 4096}, WIDE, {"kind": "stored", "version": 1}),
    "fourierft": ("fourierft", {"n": 2**16, "alpha": 1}, WIDE, {"kind": "stored", "version": 1}),
    "lora": (
        "lora", {"rank": 4096, "alpha": 1}, WIDE, {"kind": "philox-sign", "version": 1},
    ),
    "ia3": ("ia3", {}, WIDE, {"kind": "philox-sign", "version": 1}),
    "ia3 of inputs": (
        "ia3", {"feedforward": [f"{i:03}" for i in range(200)]}, WIDE,
        {"kind": "philox-sign", "version": 1},
    ),
    "ssf": ("ssf", {}, WIDE, {"kind": "philox-sign", "version": 1}),
    "bitfit": ("bitfit", {}, WIDE, {"kind": "philox-sign", "version": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.parametrize("storage", ["fp32", "int2"])
def test_a_small_hostile_file_allocates_little(full, edit, name, storage):
    method, config, targets, basis = HOSTILE[name]
    change = _set(
        method=method, config=config, targets=targets, basis=basis, storage=storage, group=2**24
    )
    data = edit(full.to_bytes(), change)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"^file: tensor .* is missing$"):
            Adapter.from_bytes(data, "file")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_group_that_is_longer_than_the_vector_allocates_nothing(make_adapter):
    adapter = make_adapter("fourierft", "int8", group=2**24)
    tracemalloc.start()
    try:
        flat(get_method("fourierft").expand(adapter, BasisCache()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_of_many_dimensions_is_refused(edit, full):
    """NumPy has 32 or 64 dimensions at most; a header may claim any number."""

    def change(parts):
        part = next(p for p in parts if p[0] == "extra.scale")
        part[2] = [1] * 100

    data = edit(full.to_bytes(), tensors=change)
    assert struct.unpack("<Q", data[:8])[0] < 4000
    with pytest.raises(FormatError, match=r"extra\.scale must be at most 8, got 100"):
        Adapter.from_bytes(data)
