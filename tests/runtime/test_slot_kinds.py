"""Delta and bias slots in a bundle: alone, mixed in a batch with others, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from expansions import expanded, flat

from regrow_format.errors import FormatError
from regrow_format.manifest import SeededSpec, Slot, StoredWeight
from regrow_format.methods import METHODS, get_method
from regrow_runtime import (
    BasisCache,
    BasisSpec,
    Bundle,
    MismatchError,
    RegrowError,
    Target,
    UsageError,
)
from regrow_runtime.fit import check_fit
from regrow_runtime.slots import expand

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ONE = (Target("fc1", 16, 8),)


def _logits(bundle, pixels, **options):
    return bundle.run({"pixel_values": pixels}, **options)["logits"]


def _expected(reference, adapter, pixels):
    return reference(pixels, expanded(adapter), adapter.head)


@pytest.mark.parametrize(("method", "numbers"), [("fourierft", 16 * 8 + 8 * 8), ("bitfit", 8 + 8)])
def test_what_is_resident(bundle, make_adapter, method, numbers):
    assert bundle.swap(make_adapter(method), name="x").resident_bytes == 4 * numbers


def test_swapping_kinds_leaves_nothing_behind(bundle, pixels, reference, make_adapter):
    for method in ("fourierft", "bitfit", "dora", "nola", "head", "bitfit", "vera"):
        adapter = make_adapter(method)
        bundle.swap(adapter, name=method)
        np.testing.assert_allclose(
            _logits(bundle, pixels), _expected(reference, adapter, pixels), **CLOSE
        )
    bundle.swap(None)
    np.testing.assert_allclose(_logits(bundle, pixels), reference(pixels), **CLOSE)


def test_every_sample_has_a_method_of_its_own(bundle, reference, make_adapter):
    """All kinds of slots in one batch, some for one layer only, heads of 2 and 4 classes."""
    adapters = {name: make_adapter(name, draw=i) for i, name in enumerate(sorted(METHODS))}
    adapters["delta of one"] = make_adapter("fourierft", targets=ONE, classes=4)
    adapters["bias of one"] = make_adapter("bitfit", draw=7, targets=ONE)
    for name, adapter in adapters.items():
        bundle.load(adapter, name=name)
    names = [*adapters, None, *reversed(adapters)]
    pixels = np.random.default_rng(1).standard_normal((len(names), 1, 4, 4)).astype(np.float32)
    found = _logits(bundle, pixels, adapters=names)
    assert found.shape == (len(names), 4)
    for row, name in enumerate(names):
        one = pixels[row : row + 1]
        expected = _expected(reference, adapters[name], one) if name else reference(one)
        np.testing.assert_allclose(found[row, : expected.shape[1]], expected[0], **CLOSE)
        assert (found[row, expected.shape[1] :] == -np.inf).all()


def test_a_cold_basis_is_told_from_a_cached_one(bundle, make_adapter):
    for method in ("vera", "fourierft"):
        assert bundle.swap(make_adapter(method), name="a").kind == "cold"
        assert bundle.swap(make_adapter(method, draw=1), name="b").kind == "cached"
    assert bundle.swap(make_adapter("bitfit"), name="c").kind == "cached"
    assert bundle.swap(make_adapter("head"), name="d").kind == "cached"


def test_a_fixed_rank_is_of_low_rank_slots_alone(bundle_copy, pixels, reference, make_adapter):
    path = bundle_copy / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for slot in data["slots"]:
        slot["rank"] = 11
    path.write_text(json.dumps(data), encoding="utf-8")
    bundle = Bundle.open(bundle_copy)
    for method in ("vera", "nola", "fourierft", "bitfit"):
        adapter = make_adapter(method)
        bundle.swap(adapter, name=method)
        np.testing.assert_allclose(
            _logits(bundle, pixels), _expected(reference, adapter, pixels), **CLOSE
        )


@pytest.mark.parametrize("part", ["D", "b"])
def test_numbers_that_overflow_together(bundle, make_adapter, part):
    adapter = make_adapter({"D": "fourierft", "b": "bitfit"}[part])
    next(iter(adapter.coefficients.values())).scale[1] = 3e38
    with pytest.raises(RegrowError, match=rf"fc2\.adapter_{part} must be finite when expanded"):
        bundle.swap(adapter, name="x")


# -- slots that take other tensors of the same methods --------------------------------------------


@pytest.fixture
def whole(bundle, tmp_path):
    """Of a bundle with weight slots: manifest, folder, and the weights [in, out] by target."""
    weights, slots, at = {}, [], 8
    rng = np.random.default_rng(4)
    with (tmp_path / "weights").open("wb") as stream:
        stream.write(bytes(at))
        for name, wide, high in (("fc1", 16, 8), ("fc2", 8, 8)):
            weights[name] = rng.standard_normal((wide, high)).astype("<f4")
            stream.write(weights[name].tobytes())
            stored = StoredWeight("weights", at)
            slots.append(
                Slot(name, "weight", wide, high, {"W": f"{name}.W"}, fixed=True, weight=stored)
            )
            at += weights[name].nbytes
    return replace(bundle.manifest, slots=tuple(slots)), tmp_path, weights


@pytest.mark.parametrize("method", ["nola", "vera", "lora", "fourierft"])
def test_a_weight_slot_is_fed_the_sum(whole, make_adapter, method):
    manifest, folder, weights = whole
    adapter = make_adapter(method)
    check_fit(adapter, manifest)
    feeds = expand(adapter, manifest, BasisCache(), folder)
    for name, parts in flat(get_method(method).expand(adapter, BasisCache())).items():
        change = parts["D"] if "D" in parts else parts["A"] @ parts["B"]
        assert feeds[f"{name}.W"].shape == (1, *weights[name].shape)
        np.testing.assert_array_equal(feeds[f"{name}.W"][0], weights[name] + change)
    assert set(feeds) == {"fc1.W", "fc2.W"}


def test_weights_that_are_not_there(whole, make_adapter):
    manifest, folder, _ = whole
    (folder / "weights").write_bytes(bytes(100))
    with pytest.raises(FormatError, match="weights must hold the weights"):
        expand(make_adapter("lora"), manifest, BasisCache(), folder)
    with pytest.raises(MismatchError, match="its method, bitfit, needs bias slots, got weight"):
        check_fit(make_adapter("bitfit"), manifest)


def test_a_vector_slot_is_fed_numbers_times_scales(bundle, make_adapter, tmp_path):
    adapter = make_adapter("vera")
    slots = tuple(
        Slot(
            t.name, "vector", t.in_features, t.out_features,
            {part: f"{t.name}.{part}" for part in "db"}, rank=11, seed=str(adapter.seed),
        )
        for t in adapter.targets
    )  # fmt: skip
    manifest = replace(bundle.manifest, slots=slots)
    check_fit(adapter, manifest)
    feeds = expand(adapter, manifest, BasisCache(), tmp_path)
    d, b = (adapter.coefficients[name].dense() for name in ("d", "b.8"))
    for row, name in enumerate(["fc1", "fc2"]):
        np.testing.assert_array_equal(feeds[f"{name}.d"], d[row][None, None])
        np.testing.assert_array_equal(feeds[f"{name}.b"], b[row][None, None])
    with pytest.raises(MismatchError, match=r"vector slots, rank 11 and philox-sign of seed \d+"):
        check_fit(make_adapter("vera", seed=adapter.seed + 1), manifest)


def test_a_batch_has_one_adapter_where_shapes_are_fixed(bundle_copy, pixels, make_adapter):
    path = bundle_copy / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for slot in data["slots"]:
        slot["fixed"] = True
    path.write_text(json.dumps(data), encoding="utf-8")
    bundle = Bundle.open(bundle_copy, threads=1)
    bundle.load(make_adapter("lora"), name="x")
    with pytest.raises(UsageError, match=r"got fixed ones \(such as fc1, low_rank\): run the samp"):
        bundle.run({"pixel_values": pixels}, ["x"] * len(pixels))


# -- what does not fit -----------------------------------------------------------------------------


def test_a_bundle_without_the_kind(bundle, make_adapter):
    slots = tuple(slot for slot in bundle.manifest.slots if slot.kind != "delta")
    with pytest.raises(MismatchError) as caught:
        check_fit(make_adapter("fourierft"), replace(bundle.manifest, slots=slots))
    assert caught.value.findings == (
        "fc1 must have a delta slot, got low_rank, bias, scale, input_scale",
        "fc2 must have a delta slot, got low_rank, bias, scale, input_scale",
    )


@pytest.mark.parametrize("method", ["fourierft", "bitfit", "vera", "dora"])
def test_other_widths(bundle, make_adapter, method):
    adapter = make_adapter(method, targets=(Target("fc1", 16, 9), Target("fc2", 8, 8)))
    with pytest.raises(MismatchError, match="fc1 must be 16 -> 8, got 16 -> 9"):
        bundle.swap(adapter, name="x")


def test_extra_tensors_have_no_slots(bundle, make_adapter):
    extra = {"norm.weight": np.ones(8, np.float32), "norm.bias": np.ones(8, np.float32)}
    with pytest.raises(MismatchError) as caught:
        bundle.swap(replace(make_adapter(), extra=extra), name="x")
    assert caught.value.findings == (
        "extra must be folded in by a merged export, got 2 whole tensors (such as norm.bias) for "
        "which a bundle has no slots",
    )


def test_a_seeded_graph_takes_its_own_basis_and_one_scale_per_vector(bundle, make_adapter):
    good = make_adapter("vera")
    inputs = {"seed": "seed", **{f"{n}{s}": n for n in good.coefficients for s in ("", ".scale")}}
    spec = SeededSpec("vera", dict(good.config), "int8", ("fc1", "fc2"), inputs)
    manifest = replace(bundle.manifest, mode="seeded", seeded=spec)
    check_fit(good, manifest)
    fields = {"in": 16, "out": 8, "dtype": "float32"}
    for basis in (BasisSpec("peft-mt19937", 1, fields), BasisSpec("stored")):
        with pytest.raises(MismatchError) as caught:
            check_fit(replace(good, basis=basis), manifest)
        assert caught.value.findings == (
            f"basis must be 'philox-sign' as in the seeded graph, got '{basis.kind}'",
        )
    with pytest.raises(MismatchError) as caught:
        check_fit(make_adapter("vera", group=8), manifest)
    assert caught.value.findings == (
        "scales must be 'one per vector' as in the seeded graph, got 'one per 8'",
    )
    with pytest.raises(MismatchError, match="method must be 'vera' as in the seeded graph"):
        check_fit(make_adapter("head"), manifest)
