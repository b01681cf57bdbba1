"""Blends of adapters and adapters at another strength, against dense sums of delta W."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from expansions import flat

from regrow_format.manifest import SeededSpec
from regrow_format.methods import get_method
from regrow_runtime import (
    PROFILES,
    BasisCache,
    Bundle,
    MismatchError,
    RegrowError,
    Target,
    UsageError,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LINEAR = ("nola", "vera", "lora", "fourierft")
ONE = (Target("fc2", 8, 8),)


def _logits(bundle, pixels, **options):
    return bundle.run({"pixel_values": pixels}, **options)["logits"]


def _deltas(adapter):
    """By target, float64: what is added to the weights [in, out] ("D") and to the bias ("b")."""
    found = {}
    for name, parts in flat(get_method(adapter.method).expand(adapter, BasisCache())).items():
        wide = {part: value.astype(np.float64) for part, value in parts.items()}
        found[name] = {"D": wide["A"] @ wide["B"]} if "A" in wide else wide
    return found


def _dense(weights, blend, pixels, head=None):
    """The network in float64 with sum of weight times delta in it; blend: (adapter, weight)."""
    x = pixels.reshape(len(pixels), 16).astype(np.float64)
    for name in ("fc1", "fc2"):
        w, b = weights[f"{name}.weight"].T.astype(np.float64), weights[f"{name}.bias"]
        for adapter, share in blend:
            parts = _deltas(adapter).get(name, {})
            w, b = w + share * parts.get("D", 0), b + share * parts.get("b", 0)
        x = np.tanh(x @ w + b)
    weight, bias = head or (weights["head.weight"], weights["head.bias"])
    return x @ weight.T.astype(np.float64) + bias


def _loaded(bundle, *adapters):
    for index, adapter in enumerate(adapters):
        bundle.load(adapter, name=f"user-{index}")


@pytest.mark.parametrize("method", [*LINEAR, "bitfit"])
@pytest.mark.parametrize("shares", [(0.7, 0.3), (1.0, 1.0), (-0.5, 2.0)])
def test_a_blend_is_the_sum_of_the_updates(bundle, pixels, weights, make_adapter, method, shares):
    pair = [make_adapter(method, draw=i) for i in range(2)]
    _loaded(bundle, *pair)
    cost = bundle.swap({"user-0": shares[0], "user-1": shares[1]}, name="mix")
    assert (cost.kind, cost.name, bundle.active) == ("blend", "mix", "mix")
    assert cost.resident_bytes == bundle.residents["mix"] > 0
    expected = _dense(weights, list(zip(pair, shares, strict=True)), pixels)
    np.testing.assert_allclose(_logits(bundle, pixels), expected, **CLOSE)


def test_unlike_methods_of_unlike_layers_blend(bundle, pixels, weights, make_adapter):
    parts = [
        (make_adapter("nola"), 0.5),
        (make_adapter("lora", draw=1, rank=3, targets=ONE), 0.25),
        (make_adapter("vera", draw=2), 0.75),
        (make_adapter("fourierft", draw=3), -0.5),
        (make_adapter("bitfit", draw=4, targets=ONE), 1.5),
    ]
    _loaded(bundle, *(adapter for adapter, _ in parts))
    bundle.swap({f"user-{i}": share for i, (_, share) in enumerate(parts)}, name="mix")
    np.testing.assert_allclose(_logits(bundle, pixels), _dense(weights, parts, pixels), **CLOSE)


def test_a_blend_is_a_resident_as_others_are(bundle, pixels, weights, make_adapter):
    """It serves samples of a batch, goes into further blends, and outlives what it is made of."""
    one, two = make_adapter(), make_adapter("fourierft", draw=1)
    _loaded(bundle, one, two)
    assert bundle.load({"user-0": 0.5, "user-1": 0.5}, name="half").kind == "blend"
    assert bundle.active is None
    bundle.load({"half": 0.5, "user-0": 1}, name="again")
    bundle.unload("user-1")
    found = _logits(bundle, pixels, adapters=["half", None, "again", "user-0", "half"])
    sums = {"half": (0.5, 0.5), None: (0, 0), "again": (1.25, 0.25), "user-0": (1, 0)}
    for row, name in enumerate(["half", None, "again", "user-0", "half"]):
        parts = list(zip((one, two), sums[name], strict=True))
        expected = _dense(weights, parts, pixels[row : row + 1])
        np.testing.assert_allclose(found[row], expected[0], **CLOSE)
    assert bundle.swap("again").kind == "resident"


@pytest.mark.parametrize("method", [*LINEAR, "bitfit"])
@pytest.mark.parametrize("scale", [0.5, 0, -1, np.float32(2)])
def test_a_scale_is_of_the_update(bundle, pixels, weights, make_adapter, method, scale):
    adapter = make_adapter(method)
    bundle.swap(adapter, name="x", scale=scale)
    expected = _dense(weights, [(adapter, scale)], pixels)
    np.testing.assert_allclose(_logits(bundle, pixels), expected, **CLOSE)
    bundle.swap(adapter, name="x")
    bundle.swap({"x": scale / 2}, name="y", scale=2)
    np.testing.assert_allclose(_logits(bundle, pixels), expected, **CLOSE)


def test_a_scale_of_one_changes_no_bit(bundle, pixels, make_adapter):
    bundle.swap(make_adapter("nola"), name="x")
    before = _logits(bundle, pixels)
    bundle.swap({"x": 1}, name="y")
    np.testing.assert_array_equal(_logits(bundle, pixels), before)


def test_a_scale_leaves_the_head(bundle, pixels, weights, make_adapter):
    adapter = make_adapter(classes=4)
    layer = adapter.head.layers[0]
    for scale in (0.5, 0, -1):
        bundle.swap(adapter, name="x", scale=scale)
        expected = _dense(weights, [(adapter, scale)], pixels, (layer.weight, layer.bias))
        np.testing.assert_allclose(_logits(bundle, pixels), expected, **CLOSE)
        assert bundle.labels() == adapter.head.labels


@pytest.mark.parametrize("shares", [(0.7, 0.3), (3, 1), (-1, 2)])
def test_heads_are_averaged(bundle, pixels, weights, make_adapter, shares):
    pair = [make_adapter(draw=i, classes=4) for i in range(2)]
    _loaded(bundle, *pair)
    bundle.swap({"user-0": shares[0], "user-1": shares[1]}, name="mix")
    part = np.array(shares) / sum(shares)
    layers = [adapter.head.layers[0] for adapter in pair]
    head = [
        sum(
            p * getattr(layer, key).astype(np.float64)
            for p, layer in zip(part, layers, strict=True)
        )
        for key in ("weight", "bias")
    ]
    expected = _dense(weights, list(zip(pair, shares, strict=True)), pixels, head)
    np.testing.assert_allclose(_logits(bundle, pixels), expected, **CLOSE)
    assert bundle.labels() == pair[0].head.labels


def test_a_head_with_the_bases_labels_is_averaged_with_the_bases(
    bundle, pixels, weights, make_adapter
):
    own = make_adapter(classes=3)
    own = replace(own, head=replace(own.head, labels=bundle.manifest.labels))
    _loaded(bundle, own, make_adapter(draw=1))
    bundle.swap({"user-0": 0.25, "user-1": 0.75}, name="mix")
    layer = own.head.layers[0]
    head = (
        0.25 * layer.weight + 0.75 * weights["head.weight"],
        0.25 * layer.bias + 0.75 * weights["head.bias"],
    )
    parts = [(own, 0.25), (make_adapter(draw=1), 0.75)]
    np.testing.assert_allclose(
        _logits(bundle, pixels), _dense(weights, parts, pixels, head), **CLOSE
    )


# -- slots of a fixed rank -------------------------------------------------------------------------


@pytest.fixture
def fixed(bundle_copy):
    """The bundle with slots of rank 5."""
    path = bundle_copy / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for slot in data["slots"]:
        slot["rank"] = 5 if slot["kind"] == "low_rank" else None
    path.write_text(json.dumps(data), encoding="utf-8")
    return Bundle.open(bundle_copy, threads=1)


def test_a_blend_is_padded_to_the_fixed_rank(fixed, pixels, weights, make_adapter):
    pair = [make_adapter(draw=i) for i in range(2)]  # of rank 2
    _loaded(fixed, *pair)
    fixed.swap({"user-0": 0.7, "user-1": 0.3}, name="mix")
    assert fixed.adapter_feeds(None, 1)[1]["fc1.adapter_A"].shape == (1, 16, 5)
    expected = _dense(weights, [(pair[0], 0.7), (pair[1], 0.3)], pixels)
    np.testing.assert_allclose(_logits(fixed, pixels), expected, **CLOSE)
    fixed.swap(pair[0], name="x", scale=0.5)
    np.testing.assert_allclose(
        _logits(fixed, pixels), _dense(weights, [(pair[0], 0.5)], pixels), **CLOSE
    )


def test_a_blend_of_too_high_a_rank(fixed, pixels, make_adapter):
    _loaded(fixed, *(make_adapter(draw=i) for i in range(3)))
    fixed.swap("user-0")
    before = _logits(fixed, pixels)
    message = r"fc1: ranks of a blend must add up to 5 or less, as the slot has, got 6: blend fewer"
    with pytest.raises(MismatchError, match=message):
        fixed.swap({f"user-{i}": 0.3 for i in range(3)}, name="mix")
    assert fixed.active == "user-0"
    np.testing.assert_array_equal(_logits(fixed, pixels), before)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ({}, {}, "a blend must be of at least one adapter, got none"),
        ({"user-0": 1}, {"name": None}, "name must be given with a blend, got None"),
        ({"user-0": 1, "nobody": 1}, {}, "adapter must be resident .*, got 'nobody': load"),
        ({"user-0": np.nan}, {}, "weight of user-0 must be a finite number, got nan"),
        ({"user-0": "0.7"}, {}, "weight of user-0 must be a finite number, got '0.7'"),
        ({"user-0": 1}, {"scale": np.inf}, "scale must be a finite number, got inf"),
        ({"user-0": 1}, {"scale": None}, "scale must be a finite number, got None"),
        ({"user-0": 1, "headed": 1}, {}, "must have the same labels, got user-0 with 3 .ant, "),
        ({"user-0": 1}, {"name": "user-0"}, "must not be that of one of its adapters, got user-0"),
        ({"headed": 1, "other": -1}, {}, "with heads must add up to more than 0, got 0.0"),
    ],
)
def test_what_cannot_be_blended(bundle, make_adapter, shares, options, message):
    _loaded(bundle, make_adapter())
    bundle.load(make_adapter(classes=4), name="headed")
    bundle.load(make_adapter(classes=4, draw=1), name="other")
    bundle.swap("user-0")
    with pytest.raises(UsageError, match=message) as caught:
        bundle.swap(shares, **{"name": "mix", **options})
    assert "\n" not in str(caught.value)
    assert bundle.active == "user-0"
    assert "mix" not in bundle.residents


@pytest.mark.parametrize("method", ["nola", "fourierft", "bitfit"])
def test_weights_that_overflow(bundle, make_adapter, method):
    _loaded(bundle, make_adapter(method))
    with pytest.raises(RegrowError, match=r"fc1.* must be finite, got weights that are too large"):
        bundle.swap({"user-0": 1e300}, name="mix")


def test_a_resident_is_not_scaled_in_place(bundle, make_adapter):
    _loaded(bundle, make_adapter())
    with pytest.raises(UsageError, match=r"got 0.5: swap\(\{'user-0': 0.5\}, name=...\)"):
        bundle.swap("user-0", scale=0.5)


def test_a_seeded_graph_takes_one_adapter_as_it_is(bundle, make_adapter):
    adapter = make_adapter("vera")
    inputs = {
        "seed": "seed",
        **{f"{n}{s}": n for n in adapter.coefficients for s in ("", ".scale")},
    }
    spec = SeededSpec("vera", dict(adapter.config), "int8", ("fc1", "fc2"), inputs)
    manifest = replace(bundle.manifest, mode="seeded", seeded=spec)
    seeded = Bundle(bundle.folder, manifest, None, PROFILES["speed"])  # nothing is run
    with pytest.raises(UsageError, match="a scale needs a swappable bundle, got seeded"):
        seeded.load(adapter, name="x", scale=0.5)
