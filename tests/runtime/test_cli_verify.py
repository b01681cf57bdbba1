"""`regrow verify` where only the base install is: what is broken is named, nothing is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from expansions import flat

from regrow_format.methods import get_method
from regrow_runtime import BasisCache, Coefficients, Probe, Target

MAIN = "from regrow_toolchain.cli import main; main()"
EXTRAS = ("torch", "onnx", "optimum", "transformers", "accelerate", "rich", "PIL")


@pytest.fixture
def verify(python):
    """verify(*arguments): exit code, checks by name as (result, detail), stderr."""

    def call(*arguments):
        found = python(MAIN, "verify", *map(str, arguments), "--json", block=EXTRAS)
        checks = {}
        if found.stdout:
            result = json.loads(found.stdout.splitlines()[-1])
            checks = {c["check"]: (c["result"], c["detail"]) for c in result["checks"]}
            assert result["ok"] == (found.returncode == 0)
        assert "Traceback" not in found.stderr
        return found.returncode, checks, found.stderr

    return call


@pytest.fixture
def folder(probed_folder, tmp_path):
    return shutil.copytree(probed_folder, tmp_path / "bundle")


@pytest.fixture
def user(make_adapter, reference, pixels, tmp_path):
    """user(name, change): an adapter's file, changed after its probe was made."""

    def make(name, change=lambda adapter: adapter):
        adapter = make_adapter()
        expansion = flat(get_method("nola").expand(adapter, BasisCache()))
        expected = reference(pixels[:1], expansion)[0].astype(np.float16)
        adapter = replace(adapter, probe=Probe(expected, 0.01, "0123456789abcdef"))
        change(adapter).save(tmp_path / name)
        return tmp_path / name

    return make


def _values(change):
    def changed(adapter):
        parts = {
            name: Coefficients(np.ascontiguousarray(change(part.values)), part.scale)
            for name, part in adapter.coefficients.items()
        }
        return replace(adapter, coefficients=parts)

    return changed


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_whole_bundle_and_its_adapter(verify, folder, user):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    folder.chmod(0o555)
    try:
        code, checks, err = verify(folder, "--adapter", user("a.safetensors"))
    finally:
        folder.chmod(0o755)
    assert (code, err) == (0, "")
    assert {name: result for name, (result, _) in checks.items()} == {
        "files": "ok", "graph": "ok", "base": "ok", "a.safetensors": "ok"
    }  # fmt: skip
    assert "fits (2 layers), changes outputs by up to" in checks["a.safetensors"][1]
    assert "outputs as at training, within" in checks["a.safetensors"][1]
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["backbone.onnx", "head.safetensors", "probe.safetensors"])
def test_one_flipped_bit_is_named(verify, folder, user, name):
    _flip(folder / name, -5)
    code, checks, err = verify(folder, "--adapter", user("a.safetensors"))
    assert code == 1
    assert checks[name][0] == "failed"
    assert "content must have the manifest's SHA-256" in checks[name][1]
    assert checks["graph"][0] == "skipped"
    assert "a.safetensors" not in checks
    assert err.startswith(f"regrow: {folder} is not as it should be: ")


@pytest.mark.parametrize(
    ("spoil", "name", "text"),
    [
        (lambda f: (f / "backbone.onnx").write_bytes(b""), "backbone.onnx", "bytes, got 0"),
        (lambda f: (f / "backbone.onnx").unlink(), "backbone.onnx", "backbone.onnx is missing"),
        (lambda f: (f / "new.txt").write_text("x"), "new.txt", "not listed in the manifest"),
        (lambda f: (f / "sub").mkdir() or (f / "sub" / "x").touch(), "sub/x", "not listed"),
        (lambda f: (f / "l").symlink_to("/etc/hosts"), "l", "not listed in the manifest"),
    ],
)
def test_files_that_are_not_as_they_were(verify, folder, spoil, name, text):
    spoil(folder)
    code, checks, _ = verify(folder)
    assert code == 1
    assert checks[name][0] == "failed"
    assert text in checks[name][1]


def test_what_an_operating_system_leaves_is_no_finding(verify, folder):
    (folder / ".DS_Store").write_bytes(b"x")
    assert verify(folder)[0] == 0


def test_a_graph_that_does_not_open_is_said_so(verify, folder):
    """As listed, but broken: the manifest was written for it."""
    data = b"\x08\x07" + bytes(9)
    (folder / "backbone.onnx").write_bytes(data)
    import hashlib

    fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    fields["files"]["backbone.onnx"] = entry
    (folder / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")
    code, checks, _ = verify(folder)
    assert code == 1
    assert checks["files"][0] == "ok"
    assert checks["graph"][0] == "failed"
    assert "could not be opened" in checks["graph"][1]


def test_adapters_that_do_not_do_what_they_should(verify, folder, user, tmp_path):
    paths = {
        "zeros": (user("zeros.safetensors", _values(np.zeros_like)), "the same as without it"),
        "other": (user("other.safetensors", _values(lambda v: v[:, ::-1])), "what it gave at trai"),
        "wide": (
            user("wide.safetensors", lambda a: replace(a, backbone_id="sha256:00")),
            "adapter must be of the bundle's backbone",
        ),
        "cut": (user("cut.safetensors"), "must be a whole safetensors file"),
    }
    cut = paths["cut"][0]
    cut.write_bytes(cut.read_bytes()[:-9])
    good = user("good.safetensors")
    options = [o for path, _ in paths.values() for o in ("--adapter", path)]
    code, checks, err = verify(folder, *options, "--adapter", good)
    assert code == 1
    for path, text in paths.values():
        assert checks[path.name][0] == "failed"
        assert text in checks[path.name][1]
    assert checks["good.safetensors"][0] == "ok"
    assert "4 of 8 checks failed" in err


def test_every_mismatch_of_an_adapter_is_told(verify, folder, make_adapter, tmp_path):
    targets = (Target("fc1", 16, 9), Target("fc9", 8, 8))
    make_adapter(targets=targets).save(tmp_path / "a.safetensors")
    detail = verify(folder, "--adapter", tmp_path / "a.safetensors")[1]["a.safetensors"][1]
    assert "fc1 must be 16 -> 8, got 16 -> 9" in detail
    assert "fc9 must be a slot of the bundle" in detail


def test_a_bundle_without_a_probe_passes_with_a_note(verify, bundle_copy, make_adapter, tmp_path):
    make_adapter().save(tmp_path / "a.safetensors")
    code, checks, _ = verify(bundle_copy, "--adapter", tmp_path / "a.safetensors")
    assert code == 0
    assert checks["base"][0] == "skipped"
    assert "it has no probe for this bundle" in checks["a.safetensors"][1]


def test_usage(verify, python, folder, tmp_path):
    for arguments, text in (
        ((tmp_path / "none",), "bundle must be a folder that regrow export made"),
        ((folder, "--adapter", tmp_path / "none"), "an adapter must be a file, got"),
    ):
        code, checks, err = verify(*arguments)
        assert (code, checks) == (2, {})
        assert text in err
    code, _, err = verify(folder, "--against", tmp_path)
    assert code == 1
    assert "regrow verify --against needs torch" in err
    assert "[export]" in err


def test_the_table_is_for_people(python, folder, user):
    _flip(folder / "backbone.onnx", -5)
    found = python(MAIN, "verify", str(folder), block=EXTRAS)
    assert found.returncode == 1
    lines = found.stdout.splitlines()
    assert lines[0].startswith("failed   backbone.onnx  ")
    assert [line.split()[:2] for line in lines[1:]] == [["failed", "files"], ["skipped", "graph"]]
    assert len({line.index(line.split()[1]) for line in lines}) == 1
