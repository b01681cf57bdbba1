"""The probe on the device: adapters that do nothing, or something else than at training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from expansions import flat
from safetensors.numpy import load_file, save_file

from regrow_format.manifest import Checks, Manifest
from regrow_format.methods import METHODS, get_method
from regrow_runtime import (
    BasisCache,
    Bundle,
    Coefficients,
    FormatError,
    MismatchError,
    Probe,
    UsageError,
)
from regrow_runtime.checks import Prober
from regrow_runtime.slots import LoadedAdapter

KNOWN = "0123456789abcdef"


@pytest.fixture
def probed(probed_folder):
    return Bundle.open(probed_folder, threads=1)


@pytest.fixture
def with_probe(reference, pixels):
    """with_probe(adapter): the same, with the outputs that NumPy gives for the bundle's probe."""

    def make(adapter, known=KNOWN, tolerance=0.01):
        expansion = flat(get_method(adapter.method).expand(adapter, BasisCache()))
        logits = reference(pixels[:1], expansion, adapter.head)
        return replace(adapter, probe=Probe(logits[0].astype(np.float16), tolerance, known))

    return make


def _changed(adapter, change):
    values = {
        name: Coefficients(np.ascontiguousarray(change(part.values)), part.scale, part.group)
        for name, part in adapter.coefficients.items()
    }
    return replace(adapter, coefficients=values)


def _zeros(adapter):
    return _changed(adapter, np.zeros_like)


def _permuted(adapter):
    return _changed(adapter, lambda values: values[:, ::-1])


def _rewritten(folder, target, **changes):
    """A copy of a bundle whose manifest has other fields."""
    shutil.copytree(folder, target)
    manifest = replace(Manifest.load(target), **changes)
    (target / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return target


# -- findings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_training_gave_is_fine(probed, with_probe, make_adapter, method):
    adapter = with_probe(make_adapter(method, "int4"))
    probed.swap(adapter, name="user", check=True)
    found = probed.check()
    assert (found.name, found.finding, found.ok) == ("user", "fine", True)
    assert found.difference <= 0.002 * np.abs(adapter.probe.expected).max()
    assert found.allowed == 0.01
    assert found.effect > 0.1


def test_the_effect_is_the_largest_change(probed, with_probe, make_adapter, pixels, reference):
    adapter = with_probe(make_adapter())
    probed.load(adapter, name="user")
    expansion = flat(get_method("nola").expand(adapter, BasisCache()))
    wanted = np.abs(reference(pixels[:1], expansion) - reference(pixels[:1])).max()
    assert probed.check("user").effect == pytest.approx(wanted, rel=1e-4)
    assert probed.active is None


def test_classes_of_ones_own_are_an_endless_effect(probed, with_probe, make_adapter):
    probed.swap(with_probe(make_adapter(classes=2)), name="user", check=True)
    assert probed.check().effect == np.inf
    assert probed.check().finding == "fine"


@pytest.mark.parametrize(
    ("spoil", "finding", "text"),
    [
        (_zeros, "no effect", "adapter user must change the model's answers, got the same as "),
        (_permuted, "differs", "adapter user must give on the bundle's probe what it gave at tra"),
        (lambda a: replace(a, seed=1), "differs", "within 0.01, got a difference of "),
    ],
)
@pytest.mark.parametrize("call", ["swap", "load"])
def test_a_spoilt_adapter_never_becomes_active(
    probed, with_probe, make_adapter, pixels, spoil, finding, text, call
):
    good = with_probe(make_adapter())
    probed.swap(good, name="good", check=True)
    before = probed.run({"pixel_values": pixels})["logits"]
    with pytest.raises(MismatchError, match=text) as raised:
        getattr(probed, call)(spoil(good), name="user", check=True)
    assert "\n" not in str(raised.value)
    assert probed.active == "good"
    assert list(probed.residents) == ["good"]
    np.testing.assert_array_equal(probed.run({"pixel_values": pixels})["logits"], before)
    probed.load(spoil(good), name="user")  # unless nobody asks
    assert probed.check("user").finding == finding
    with pytest.raises(MismatchError, match=text):
        probed.swap("user", check=True)
    assert probed.active == "good"


def test_zeros_are_found_without_a_probe_in_the_file(probed, make_adapter):
    with pytest.raises(MismatchError, match="got the same as without it"):
        probed.swap(_zeros(make_adapter()), name="user", check=True)
    probed.swap(make_adapter(), name="user", check=True)
    found = probed.check()
    assert (found.finding, found.difference, found.allowed) == ("no probe", None, None)
    assert found.ok


def test_a_probe_of_another_input_says_nothing(probed, with_probe, make_adapter):
    spoilt = _permuted(with_probe(make_adapter(), known="f" * 16))
    probed.swap(spoilt, name="user", check=True)
    assert probed.check().finding == "no probe"
    with pytest.raises(MismatchError, match="got the same as without it"):
        probed.swap(_zeros(spoilt), name="zeros", check=True)


def test_a_probe_that_does_not_say_its_input_is_for_the_bundles(probed, with_probe, make_adapter):
    adapter = with_probe(make_adapter(), known="")
    probed.swap(adapter, name="user", check=True)
    assert probed.check().finding == "fine"
    with pytest.raises(MismatchError, match="at training"):
        probed.swap(_permuted(adapter), name="user", check=True)


def test_more_numbers_than_there_are_outputs_differ(probed, make_adapter):
    long = Probe(np.zeros(7, np.float16), 100.0, KNOWN)
    probed.load(replace(make_adapter(), probe=long), name="user")
    found = probed.check("user")
    assert (found.finding, found.difference) == ("differs", np.inf)


def test_the_last_numbers_are_those_that_count(probed, with_probe, make_adapter):
    adapter = with_probe(make_adapter())
    last = replace(adapter.probe, expected=adapter.probe.expected[-1:])
    first = replace(adapter.probe, expected=adapter.probe.expected[:1])
    probed.load(replace(adapter, probe=last), name="last")
    probed.load(replace(adapter, probe=first), name="first")
    assert probed.check("last").finding == "fine"
    assert probed.check("first").finding == "differs"


def test_a_bundle_without_a_probe_can_say_nothing(bundle, make_adapter):
    bundle.swap(_zeros(make_adapter()), name="user", check=True)
    assert bundle.check().finding == "no probe"
    assert bundle.check().effect is None
    bundle.swap(None)
    assert bundle.check().finding == "no probe"


def test_only_residents_can_be_checked(probed):
    with pytest.raises(UsageError, match="adapter must be resident"):
        probed.check("nobody")


def test_classes_that_only_fill_up_the_head_do_not_count(probed_folder, make_adapter):
    """A head of fixed size gives -inf for those that the user does not have."""
    logits = np.array([[1.0, 2.0, -np.inf]], np.float32)
    prober = Prober(probed_folder, Manifest.load(probed_folder))
    probe = Probe(np.array([1.0, 2.0], np.float16), 0.01, KNOWN)
    resident = LoadedAdapter("user", {}, ("a", "b"), probe=probe)
    found = prober.check(lambda _, r: {"logits": logits if r else np.zeros((1, 3))}, resident)
    assert (found.finding, found.difference) == ("fine", 0)


# -- variants --------------------------------------------------------------------------------------


@pytest.fixture
def rounding(probed_folder, tmp_path, reference, pixels):
    """A bundle whose base is 0.5 off, as one of few bits may be: exact outputs lie beside."""
    exact = reference(pixels[:1]).reshape(-1)
    folder = tmp_path / "rounding"
    shutil.copytree(probed_folder, folder)
    save_file({"logits": exact, "logits.exact": exact + 0.5}, folder / "expected.safetensors")
    manifest = Manifest.load(folder)
    size = (folder / "expected.safetensors").stat().st_size
    entry = replace(manifest.files["expected.safetensors"], size=size)
    spread = float(0.5 / np.abs(exact).max())
    manifest = replace(
        manifest,
        checks=Checks(KNOWN, spread),
        files={**manifest.files, "expected.safetensors": entry},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder, threads=1)


def test_a_variant_that_rounds_compares_changes(rounding, with_probe, make_adapter):
    """All outputs are 0.5 off, with the adapter and without: the change is the same."""
    right = with_probe(make_adapter())
    moved = replace(right.probe, expected=right.probe.expected + np.float16(0.5))
    rounding.load(replace(right, probe=moved), name="user")
    found = rounding.check("user")
    assert found.finding == "fine"
    assert found.difference < 0.01  # and not 0.5
    change = found.effect
    assert found.allowed == pytest.approx(0.01 + 1.25 * 0.5 + 0.25 * change, rel=0.01)


def test_a_variant_that_rounds_still_finds_zeros_and_others(rounding, with_probe, make_adapter):
    right = with_probe(make_adapter())
    moved = replace(right.probe, expected=right.probe.expected + np.float16(0.5))
    with pytest.raises(MismatchError, match="got the same as without it"):
        rounding.swap(_zeros(replace(right, probe=moved)), name="user", check=True)
    with pytest.raises(MismatchError, match="what it gave at training"):
        rounding.swap(_permuted(replace(right, probe=moved)), name="user", check=True)


def test_own_classes_have_no_base_to_compare_with(rounding, with_probe, make_adapter):
    right = with_probe(make_adapter(classes=2))
    rounding.swap(right, name="user", check=True)
    assert rounding.check().difference < 0.01
    other = replace(right.probe, expected=(-right.probe.expected).astype(np.float16))
    rounding.load(replace(right, probe=other), name="other")
    assert rounding.check("other").finding == "differs"


# -- the base --------------------------------------------------------------------------------------


def test_the_base_is_compared_with_what_it_was_at_export(probed):
    found = probed.check()
    assert (found.name, found.finding) == (None, "fine")
    assert found.difference < 1e-5
    assert 1e-4 < found.allowed < 0.1


def test_another_base_is_found(probed_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(probed_folder, folder)
    stored = load_file(folder / "expected.safetensors")
    save_file({"logits": stored["logits"] + np.float32(0.3)}, folder / "expected.safetensors")
    found = Bundle.open(folder).check()
    assert (found.finding, found.ok) == ("differs", False)
    assert found.difference == pytest.approx(0.3, abs=1e-4)
    with pytest.raises(MismatchError, match="base must give on the bundle's probe what it gave at"):
        found.require()


# -- broken files ----------------------------------------------------------------------------------


def test_a_broken_probe_is_one_clear_error(probed_folder, tmp_path, make_adapter):
    folder = tmp_path / "broken"
    shutil.copytree(probed_folder, folder)
    size = (folder / "probe.safetensors").stat().st_size
    (folder / "probe.safetensors").write_bytes(bytes(size))
    bundle = Bundle.open(folder)
    with pytest.raises(FormatError, match=r"probe.safetensors must be a whole safetensors file"):
        bundle.swap(make_adapter(), name="user", check=True)
    assert bundle.active is None


def test_a_probe_without_an_input_is_named(probed_folder, tmp_path):
    folder = _rewritten(probed_folder, tmp_path / "lost")
    data = (folder / "probe.safetensors").read_bytes()
    (folder / "probe.safetensors").write_bytes(data.replace(b"pixel_values", b"pixel_valued"))
    with pytest.raises(FormatError, match=r"probe.safetensors must have pixel_values, got none"):
        Bundle.open(folder).check()


@pytest.mark.parametrize(
    ("checks", "text"),
    [
        ([], "checks must be an object, got list"),
        ({"probe": 1}, "probe must be of type str, got 1"),
        ({"spread": "x"}, "spread must be of type float"),
        ({"partitions": {"nnapi": -1}}, "nnapi must be from 0 to"),
        ({"other": 1}, "unknown fields other"),
    ],
)
def test_checks_of_a_manifest_are_checked(probed_folder, tmp_path, checks, text):
    folder = _rewritten(probed_folder, tmp_path / "m")
    fields = json.loads((folder / "manifest.json").read_text())
    fields["checks"] = checks
    (folder / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(FormatError, match=text):
        Manifest.load(folder)


def test_checks_are_read_as_written(probed_folder, tmp_path):
    wanted = Checks("ab", 0.25, {"nnapi": 3})
    folder = _rewritten(probed_folder, tmp_path / "m", checks=wanted)
    assert Manifest.load(folder).checks == wanted
    assert Manifest.load(_rewritten(probed_folder, tmp_path / "n", checks=None)).checks is None


# -- health ----------------------------------------------------------------------------------------


def test_health_tells_what_happened(probed, with_probe, make_adapter, tmp_path):
    probed.swap(with_probe(make_adapter()), name="one")
    probed.load(make_adapter(seed=1), name="two")
    probed.swap("two")
    probed.swap(None)
    with pytest.raises(UsageError):
        probed.swap(tmp_path / "missing.safetensors")
    with pytest.raises(MismatchError):
        probed.load(_zeros(make_adapter()), name="zeros", check=True)
    found = probed.health()
    assert json.loads(json.dumps(found)) == found
    assert found["active"] is None
    assert {name: r["bytes"] for name, r in found["residents"].items()} == probed.residents
    assert found["swaps"] == {"cold": 1, "resident": 1, "base": 1}
    assert found["failures"] == 2
    assert found["last_failure"].startswith("adapter zeros must change the model's answers")
    assert found["file_bytes"] == sum(entry.size for entry in probed.manifest.files.values())
    assert found["basis_bytes"] == probed.basis.nbytes > 0
    assert (found["profile"], found["threads"]) == ("speed", 1)
    assert found["providers"] == ["CPUExecutionProvider"]


def test_a_run_counts_as_use(probed, make_adapter, pixels):
    probed.swap(make_adapter(), name="one")
    probed._residents["one"].last_use -= 100
    assert 99 < probed.health()["residents"]["one"]["idle_s"] < 130
    probed.run({"pixel_values": pixels})
    assert probed.health()["residents"]["one"]["idle_s"] < 30
