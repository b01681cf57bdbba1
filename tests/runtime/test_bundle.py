"""Opening a bundle, swapping adapters, running: against the same network in NumPy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from expansions import flat

from regrow_format.methods import get_method
from regrow_runtime import (
    PROFILES,
    BasisCache,
    Bundle,
    FormatError,
    MismatchError,
    Profile,
    RegrowError,
    Target,
    UsageError,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _expansion(adapter):
    return flat(get_method(adapter.method).expand(adapter, BasisCache()))


def _logits(bundle, pixels, **options):
    return bundle.run({"pixel_values": pixels}, **options)["logits"]


def _spoil_manifest(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


# -- opening ---------------------------------------------------------------------------------------


def test_without_an_adapter_it_is_the_base(bundle, pixels, reference):
    found = _logits(bundle, pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(pixels), **CLOSE)
    assert bundle.active is None
    assert bundle.labels() == ("ant", "bee", "cat")
    assert bundle.residents == {}


@pytest.mark.parametrize("profile", [*PROFILES, Profile(1000, prepack=False, arena=True)])
def test_profiles_change_no_output(bundle_folder, pixels, reference, make_adapter, profile):
    bundle = Bundle.open(bundle_folder, profile=profile, threads=1)
    adapter = make_adapter()
    bundle.swap(adapter, name="x")
    np.testing.assert_allclose(
        _logits(bundle, pixels), reference(pixels, _expansion(adapter)), **CLOSE
    )


def test_the_memory_profile_keeps_no_basis(bundle_folder, make_adapter):
    bundle = Bundle.open(bundle_folder, profile="memory")
    assert bundle.swap(make_adapter(), name="a").kind == "cold"
    assert bundle.swap(make_adapter(draw=1), name="b").kind == "cold"
    assert bundle.basis.nbytes == 0
    assert bundle.swap("a").kind == "resident"


def test_own_session_options_are_used(bundle_folder, pixels, reference):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    bundle = Bundle.open(bundle_folder, session_options=options)
    np.testing.assert_allclose(_logits(bundle, pixels), reference(pixels), **CLOSE)


def test_opening_nothing(tmp_path):
    with pytest.raises(UsageError, match="bundle must be a folder that regrow export made"):
        Bundle.open(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "fast"}, "profile must be one of speed, memory, got 'fast'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_opening_with_wrong_settings(bundle_folder, options, message):
    with pytest.raises(UsageError, match=message):
        Bundle.open(bundle_folder, **options)


def test_opening_checks_sizes(bundle_copy):
    (bundle_copy / "backbone.onnx").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"backbone\.onnx must have \d+ bytes, got 5: copy it ag"):
        Bundle.open(bundle_copy)


def test_opening_what_onnx_runtime_refuses(bundle_copy):
    path = bundle_copy / "backbone.onnx"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(FormatError, match=r"backbone\.onnx could not be opened: ") as caught:
        Bundle.open(bundle_copy)
    assert "\n" not in str(caught.value)


# -- swapping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nola", "lora", "vera", "fourierft", "ia3", "ssf", "bitfit"])
@pytest.mark.parametrize("storage", ["fp32", "int8", "int3"])
def test_a_swapped_file_is_its_update(
    bundle, pixels, reference, make_adapter, tmp_path, method, storage
):
    adapter = make_adapter(method, storage)
    path = tmp_path / "user-17.safetensors"
    adapter.save(path)
    bundle.swap(path)
    assert bundle.active == "user-17"
    found = _logits(bundle, pixels)
    np.testing.assert_allclose(found, reference(pixels, _expansion(adapter)), **CLOSE)
    assert np.abs(found - reference(pixels)).max() > 0.05
    bundle.swap(None)
    np.testing.assert_allclose(_logits(bundle, pixels), reference(pixels), **CLOSE)


def test_an_adapter_of_one_layer_leaves_the_others(bundle, pixels, reference, make_adapter):
    adapter = make_adapter(targets=(Target("fc2", 8, 8),), rank=3)
    bundle.swap(make_adapter(draw=4), name="before")
    bundle.swap(adapter, name="one")
    np.testing.assert_allclose(
        _logits(bundle, pixels), reference(pixels, _expansion(adapter)), **CLOSE
    )


def test_a_head_of_its_own(bundle, pixels, reference, make_adapter):
    adapter = make_adapter(classes=5)
    bundle.swap(adapter, name="own")
    found = _logits(bundle, pixels)
    assert found.shape == (5, 5)
    np.testing.assert_allclose(found, reference(pixels, _expansion(adapter), adapter.head), **CLOSE)
    assert bundle.labels() == ("own 0", "own 1", "own 2", "own 3", "own 4")
    bundle.swap(None)
    assert bundle.labels() == ("ant", "bee", "cat")
    assert bundle.labels("own") == adapter.head.labels


def test_costs(bundle, make_adapter, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    make_adapter().save(first)
    make_adapter(draw=1).save(second)  # the same seed: the same basis
    cold, cached = bundle.swap(first), bundle.swap(second)
    resident, base = bundle.swap("first"), bundle.swap(None)
    costs = (cold, cached, resident, base)
    assert [cost.kind for cost in costs] == ["cold", "cached", "resident", "base"]
    assert [cost.name for cost in costs] == ["first", "second", "first", None]
    for cost in (cold, cached):
        parts = cost.read_ms, cost.check_ms, cost.expand_ms
        assert all(part > 0 for part in parts)
        assert cost.total_ms >= sum(parts) * 0.95
    assert resident.read_ms == resident.expand_ms == base.expand_ms == 0
    assert resident.total_ms > 0
    # A and B of fc1 and fc2, rank 2, float32.
    assert cold.resident_bytes == resident.resident_bytes == 4 * 2 * (16 + 8 + 8 + 8)
    assert bundle.residents == {"first": cold.resident_bytes, "second": cold.resident_bytes}
    assert bundle.swap(make_adapter(seed=3), name="third").kind == "cold"
    assert bundle.swap(make_adapter("lora"), name="fourth").kind == "cached"  # needs no basis


def test_loading_does_not_activate(bundle, pixels, reference, make_adapter, tmp_path):
    make_adapter().save(tmp_path / "a.safetensors")
    cost = bundle.load(str(tmp_path / "a.safetensors"), name="other")
    assert cost.kind == "cold"
    assert bundle.active is None
    np.testing.assert_allclose(_logits(bundle, pixels), reference(pixels), **CLOSE)
    assert bundle.swap("other").kind == "resident"
    assert bundle.active == "other"


def test_an_adapter_in_memory_needs_a_name(bundle, make_adapter):
    with pytest.raises(UsageError, match="name must be given with an adapter in memory, got None"):
        bundle.swap(make_adapter())


def test_a_failed_swap_leaves_the_old_adapter(bundle, pixels, make_adapter, tmp_path):
    good = make_adapter()
    bundle.swap(good, name="good")
    before, residents = _logits(bundle, pixels), bundle.residents
    (tmp_path / "cut").write_bytes(good.to_bytes()[:-1])
    other = replace(make_adapter(draw=1), backbone_id="sha256:" + "cd" * 32)
    attempts = (
        (tmp_path / "none", {}, UsageError),
        (tmp_path / "cut", {}, FormatError),
        (other, {"name": "good"}, MismatchError),
        ("never loaded", {}, UsageError),
    )
    for source, options, error in attempts:
        with pytest.raises(error):
            bundle.swap(source, **options)
        assert bundle.active == "good"
        assert bundle.residents == residents
        np.testing.assert_array_equal(_logits(bundle, pixels), before)


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_numbers_that_overflow_together(bundle, make_adapter, storage):
    """Every number of the file is finite, their product is not."""
    adapter = make_adapter(storage=storage)
    adapter.coefficients["beta"].scale[1] = 3e38
    with pytest.raises(RegrowError, match=r"adapter: fc2\.adapter_B must be finite when expanded"):
        bundle.swap(adapter, name="x")
    assert bundle.residents == {}


@pytest.fixture
def crowded(bundle_folder, make_adapter):
    """A bundle with room for three adapters of one size; "a", "b" and "c" are resident."""
    size = Bundle.open(bundle_folder).load(make_adapter(), name="x").resident_bytes
    profile = replace(PROFILES["speed"], resident_bytes=3 * size)
    bundle = Bundle.open(bundle_folder, profile=profile, threads=1)
    for name in "abc":
        bundle.load(make_adapter(), name=name)
    return bundle


def test_what_was_not_used_for_longest_is_dropped(crowded, make_adapter):
    assert set(crowded.residents) == {"a", "b", "c"}
    crowded.swap("a")
    crowded.swap(None)
    crowded.load(make_adapter(), name="d")
    assert set(crowded.residents) == {"a", "c", "d"}
    with pytest.raises(UsageError, match=r"adapter must be resident \(a, c, d\), got 'b'"):
        crowded.unload("b")


def test_a_run_is_a_use(crowded, make_adapter, pixels):
    _logits(crowded, pixels[:2], adapters=["a", None])
    crowded.load(make_adapter(), name="d")
    assert set(crowded.residents) == {"a", "c", "d"}


def test_the_active_adapter_is_never_dropped(crowded, make_adapter, pixels):
    crowded.swap("a")
    expected = _logits(crowded, pixels)
    for name in "defg":
        crowded.load(make_adapter(draw=1), name=name)
    assert set(crowded.residents) == {"a", "f", "g"}
    assert crowded.active == "a"
    np.testing.assert_array_equal(_logits(crowded, pixels), expected)


def test_an_adapter_under_its_old_name_takes_its_place(crowded, make_adapter):
    crowded.load(make_adapter(draw=1), name="b")
    assert set(crowded.residents) == {"a", "b", "c"}


def test_what_has_just_been_loaded_stays_however_large(bundle_folder, make_adapter, pixels):
    profile = replace(PROFILES["memory"], resident_bytes=0)
    bundle = Bundle.open(bundle_folder, profile=profile, threads=1)
    bundle.load(make_adapter(), name="a")
    assert set(bundle.residents) == {"a"}
    bundle.swap(make_adapter(), name="b")
    assert set(bundle.residents) == {"b"}
    bundle.load(make_adapter(), name="c")
    assert set(bundle.residents) == {"b", "c"}
    _logits(bundle, pixels[:1], adapters=["c"])


def test_forgetting(bundle, pixels, make_adapter):
    bundle.swap(make_adapter(), name="a")
    before = _logits(bundle, pixels)
    bundle.unload("a")
    assert bundle.residents == {}
    assert bundle.active == "a"  # until the next swap
    np.testing.assert_array_equal(_logits(bundle, pixels), before)
    for use in (bundle.unload, bundle.labels):
        with pytest.raises(UsageError, match=r"must be resident \(none\), got 'a': load or swap"):
            use("a")
    bundle.load(make_adapter(), name="b")
    with pytest.raises(UsageError, match=r"must be resident \(b\), got 'a'"):
        bundle.labels("a")


# -- what does not fit -----------------------------------------------------------------------------


def test_every_mismatch_stands_in_one_error(bundle, make_adapter):
    targets = (
        Target("fc1", 16, 9), Target("fc2", 8, 8), Target("fc3", 8, 8), Target("head", 8, 3),
    )  # fmt: skip
    adapter = make_adapter(targets=targets, classes=2)
    layer = replace(adapter.head.layers[0], weight=np.zeros((2, 7), np.float32))
    adapter = replace(adapter, head=replace(adapter.head, layers=(layer,)))
    with pytest.raises(MismatchError) as caught:
        bundle.swap(adapter, name="x")
    assert caught.value.findings == (
        "fc1 must be 16 -> 8, got 16 -> 9",
        "fc3 must be a slot of the bundle, got none: export it with this target",
        "head must have a low_rank slot, got head",
        "head head must take 8 features, got 7",
    )
    assert str(caught.value).splitlines() == [
        "adapter does not fit this bundle:", *(f"  {text}" for text in caught.value.findings)
    ]  # fmt: skip
    findings = caught.value.findings
    with pytest.raises(MismatchError) as caught:  # one line says the reason, `findings` the rest
        bundle.swap(replace(adapter, backbone_id="sha256:" + "cd" * 32), name="x")
    assert str(caught.value) == (
        "adapter must be of the bundle's backbone, sha256:abababababab…, got one of another, "
        "sha256:cdcdcdcdcdcd… (4 of its layers do not fit either): train it on this backbone, or "
        "use the bundle of its own (a compressed backbone is another than the dense one)"
    )
    assert caught.value.findings == findings


def test_an_id_that_is_damaged_late_is_told_from_where(bundle, make_adapter):
    adapter = make_adapter()
    damaged = adapter.backbone_id[:40] + "f" + adapter.backbone_id[41:]
    with pytest.raises(MismatchError, match=f"got {damaged}, which differs from character 41 on"):
        bundle.swap(replace(adapter, backbone_id=damaged), name="x")


def test_of_very_many_mismatches_the_first_are_shown(bundle, make_adapter):
    targets = tuple(Target(f"other{i:02}", 8, 8) for i in range(30))
    with pytest.raises(MismatchError) as caught:
        bundle.swap(make_adapter(targets=targets), name="x")
    assert len(caught.value.findings) == 30
    assert str(caught.value).splitlines()[-1] == "  … 10 more"


def test_a_head_that_the_bundle_does_not_have(bundle, make_adapter):
    adapter = make_adapter(classes=2)
    layer = replace(adapter.head.layers[0], name="top")
    with pytest.raises(MismatchError, match=r"head must be \['head'\], got \['top'\]"):
        bundle.swap(replace(adapter, head=replace(adapter.head, layers=(layer,))), name="x")


def test_another_backbone_only_on_request(bundle, pixels, reference, make_adapter):
    adapter = replace(make_adapter(), backbone_id="sha256:" + "cd" * 32)
    with pytest.raises(MismatchError, match="must be of the bundle's backbone"):
        bundle.load(adapter, name="x")
    bundle.swap(adapter, name="x", any_backbone=True)
    np.testing.assert_allclose(
        _logits(bundle, pixels), reference(pixels, _expansion(adapter)), **CLOSE
    )
    wide = replace(adapter, targets=(Target("fc1", 16, 9), Target("fc2", 8, 8)))
    with pytest.raises(MismatchError, match="fc1 must be 16 -> 8"):
        bundle.swap(wide, name="y", any_backbone=True)


def test_a_merged_bundle_takes_no_adapter(bundle_copy, make_adapter):
    _spoil_manifest(bundle_copy, lambda data: data.update(mode="merged", slots=[]))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UsageError, match="bundle must be swappable to take an adapter, got a merg"):
        bundle.swap(make_adapter(), name="x")


def test_a_fixed_rank_is_padded(bundle_copy, pixels, reference, make_adapter):
    def fix(data):
        for slot in data["slots"]:
            if slot["kind"] == "low_rank":
                slot["rank"] = 4

    _spoil_manifest(bundle_copy, fix)
    bundle, adapter = Bundle.open(bundle_copy), make_adapter(rank=3)
    assert bundle.swap(adapter, name="x").resident_bytes == 4 * 4 * (16 + 8 + 8 + 8)
    np.testing.assert_allclose(
        _logits(bundle, pixels), reference(pixels, _expansion(adapter)), **CLOSE
    )
    with pytest.raises(
        MismatchError, match=r"must have rank 4 or less, .*, got 5: export .* --fixed-rank 5"
    ):
        bundle.swap(make_adapter(rank=5), name="y")
    assert bundle.active == "x"


# -- one adapter per sample ------------------------------------------------------------------------


def test_every_sample_has_its_own_adapter(bundle, pixels, reference, make_adapter):
    """Ranks 2, 3 and 1, class counts 3 (the base's), 5 and 2, layers missing, and the base."""
    adapters = {
        "plain": make_adapter(draw=1),
        "five": make_adapter("lora", draw=2, rank=3, classes=5),
        "two": make_adapter(draw=3, rank=1, classes=2, targets=(Target("fc1", 16, 8),)),
    }
    for name, adapter in adapters.items():
        bundle.load(adapter, name=name)
    names = ["five", None, "two", "plain", "five"]
    found = _logits(bundle, pixels, adapters=names)
    assert found.shape == (5, 5)
    for row, name in enumerate(names):
        adapter = adapters.get(name)
        head = adapter.head if adapter else None
        expected = reference(pixels[row : row + 1], _expansion(adapter) if adapter else None, head)[
            0
        ]
        np.testing.assert_allclose(found[row, : len(expected)], expected, **CLOSE)
        assert (found[row, len(expected) :] == -np.inf).all()


def test_samples_without_heads_need_no_head_file(bundle_copy, pixels, reference, make_adapter):
    (bundle_copy / "head.safetensors").unlink()
    _spoil_manifest(bundle_copy, lambda data: data["files"].pop("head.safetensors"))
    bundle, adapter = Bundle.open(bundle_copy), make_adapter()
    bundle.load(adapter, name="a")
    bundle.load(make_adapter(classes=2), name="own")
    found = _logits(bundle, pixels, adapters=["a", None, "a", None, None])
    np.testing.assert_allclose(found[1], reference(pixels)[1], **CLOSE)
    np.testing.assert_allclose(found[2], reference(pixels, _expansion(adapter))[2], **CLOSE)
    assert _logits(bundle, pixels, adapters=["own"] * 5).shape == (5, 2)
    with pytest.raises(UsageError, match="the base's head must be a file, got"):
        _logits(bundle, pixels, adapters=["a", None, "a", None, "own"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"head\.weight must be float32 \[3, 8\]"),
        ({"head.weight": np.zeros((3, 8), np.float32)}, r"head\.bias must be float32 \[3\]"),
        (
            {"head.weight": np.zeros((8, 3), np.float32), "head.bias": np.zeros(3, np.float32)},
            r"head\.weight must be float32 \[3, 8\]",
        ),
        (
            {"head.weight": np.zeros((3, 8), np.float16), "head.bias": np.zeros(3, np.float32)},
            r"head\.weight must be float32 \[3, 8\]",
        ),
        (None, "must be a whole safetensors file"),
    ],
)
def test_a_broken_head_file(bundle_copy, pixels, make_adapter, tensors, message):
    from safetensors.numpy import save_file

    path = bundle_copy / "head.safetensors"
    if tensors is None:
        path.write_bytes(b"broken")
    else:
        save_file(tensors, path)
    size = path.stat().st_size
    _spoil_manifest(bundle_copy, lambda d: d["files"]["head.safetensors"].update(size=size))
    bundle = Bundle.open(bundle_copy)
    bundle.load(make_adapter(classes=2), name="own")
    with pytest.raises(FormatError, match=message):
        _logits(bundle, pixels, adapters=["own", None, None, None, None])


def test_per_sample_adapters_ignore_the_active_one(bundle, pixels, reference, make_adapter):
    bundle.swap(make_adapter(classes=2), name="active")
    found = _logits(bundle, pixels, adapters=[None] * 5)
    np.testing.assert_allclose(found, reference(pixels), **CLOSE)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([None] * 4, r"adapters must be one per sample \(\[5\]\), got 4"),
        ([], r"adapters must be one per sample \(\[5\]\), got 0"),
        (["stranger"] * 5, r"adapter must be resident \(none\), got 'stranger'"),
    ],
)
def test_wrong_adapters_per_sample(bundle, pixels, names, message):
    with pytest.raises(UsageError, match=message):
        _logits(bundle, pixels, adapters=names)


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs must have pixel_values, got \[\]"),
        ({"x": np.zeros(3)}, r"inputs must have pixel_values, got \['x'\]"),
        (
            {"pixel_values": np.zeros((1, 1, 4, 4), np.float32), "fc1.adapter_A": 0},
            r"inputs must be \['pixel_values'\], got also \['fc1\.adapter_A'\]",
        ),
        (
            {"pixel_values": np.zeros((1, 1, 4, 4), np.complex64)},
            "pixel_values must be float32, got complex64",
        ),
        ({"pixel_values": np.array(["a"])}, "pixel_values must be float32, got <U1"),
        (
            {"pixel_values": np.zeros((1, 1, 4), np.float32)},
            r"pixel_values must be of shape \['batch', 1, 4, 4\], got \[1, 1, 4\]",
        ),
        (
            {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)},
            r"pixel_values must be of shape \['batch', 1, 4, 4\], got \[1, 3, 4, 4\]",
        ),
    ],
)
def test_wrong_inputs(bundle, inputs, message):
    with pytest.raises(UsageError, match=message):
        bundle.run(inputs)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8])
def test_numbers_of_another_kind_are_converted(bundle, dtype):
    pixels = np.arange(16).reshape(1, 1, 4, 4)
    expected = _logits(bundle, pixels.astype(np.float32))
    np.testing.assert_array_equal(_logits(bundle, pixels.astype(dtype)), expected)
    np.testing.assert_array_equal(_logits(bundle, pixels.tolist()), expected)


def test_outputs_are_chosen_by_name(bundle, pixels):
    assert list(bundle.run({"pixel_values": pixels}, outputs=["logits"])) == ["logits"]
    with pytest.raises(UsageError, match=r"outputs must be among \['logits'\], got \['more'\]"):
        bundle.run({"pixel_values": pixels}, outputs=["more"])


def test_run_all_goes_in_parts(bundle, make_adapter):
    pixels = np.random.default_rng(0).standard_normal((11, 1, 4, 4)).astype(np.float32)
    bundle.swap(make_adapter(), name="x")
    expected = _logits(bundle, pixels)
    for batch in (1, 4, 11, 64):
        found = bundle.run_all({"pixel_values": pixels}, batch=batch)["logits"]
        np.testing.assert_allclose(found, expected, **CLOSE)
    with pytest.raises(UsageError, match="inputs must have one number of samples, not 0"):
        bundle.run_all({"pixel_values": pixels[:0]})


def test_run_all_sees_one_adapter(bundle, make_adapter, monkeypatch):
    """A swap between two parts must not mix adapters in one answer."""
    pixels = np.random.default_rng(0).standard_normal((8, 1, 4, 4)).astype(np.float32)
    bundle.swap(make_adapter(), name="x")
    expected = _logits(bundle, pixels)
    run = bundle._session.run

    class Session:
        def run(self, *args):
            bundle.swap(None)
            return run(*args)

    monkeypatch.setattr(bundle, "_session", Session())
    found = bundle.run_all({"pixel_values": pixels}, batch=2)["logits"]
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_a_moved_bundle_still_runs(bundle_folder, tmp_path, pixels, reference):
    moved = shutil.copytree(bundle_folder, tmp_path / "Ünï code folder")
    np.testing.assert_allclose(_logits(Bundle.open(moved), pixels), reference(pixels), **CLOSE)


def test_memory_that_does_not_suffice_is_named(bundle_folder, monkeypatch):
    opened = Bundle.open(bundle_folder, threads=1)

    class Short:
        def run(self, *_: object) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 131072")

    monkeypatch.setattr(opened, "_session", Short())
    pixels = np.ones((2, 1, 4, 4), np.float32)
    with pytest.raises(RegrowError, match=r'memory must suffice .* profile="memory"'):
        opened.run({"pixel_values": pixels})
