"""The bundle's manifest, and the files it lists."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from regrow_format.errors import FormatError, UsageError
from regrow_format.manifest import (
    ExpanderSpec,
    Manifest,
    SeededSpec,
    Slot,
    StoredWeight,
    TensorSpec,
)
from regrow_format.rounding import Rounding


def _change(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_what_is_written_is_read_again(bundle_folder, bundle_copy):
    manifest = Manifest.load(bundle_folder)
    text = (bundle_folder / "manifest.json").read_text(encoding="utf-8")
    assert manifest.to_json() == text
    fixed = Slot("fc1", "low_rank", 16, 8, {"A": "a", "B": "b"}, rank=4)
    seeded = SeededSpec("nola", {"k": 1}, "int8", ("fc1",), {"seed": "seed", "alpha": "alpha"})
    stored = StoredWeight("backbone.onnx", 16)
    more = (
        Slot("fc2", "weight", 8, 8, {"W": "w"}, fixed=True, weight=stored),
        Slot("fc1", "vector", 16, 8, {"d": "d", "b": "b"}, rank=11, seed=str(2**64 - 1)),
    )
    inputs = (TensorSpec("seed", "uint32", (2,)), TensorSpec("alpha", "int8", (1, 1)))
    about = {"method": "nola", "config": {"k": 1}, "storage": "int8", "targets": ("fc1",)}
    expander = ExpanderSpec(**about, file="backbone.onnx", inputs=inputs, outputs=("a", "b"))
    fuller = replace(
        manifest, mode="seeded", variant="int8", adapter="00ff", seeded=seeded,
        slots=(fixed, *more), expanders=(expander,),
        rounding=Rounding("symmetric", (-64, 64), "out"),
    )  # fmt: skip
    (bundle_copy / "manifest.json").write_text(fuller.to_json(), encoding="utf-8")
    assert Manifest.load(bundle_copy) == fuller


def test_what_came_later_may_be_missing(bundle_folder, bundle_copy):
    def drop(data):
        del data["expanders"], data["rounding"]
        for slot in data["slots"]:
            for name in ("fixed", "seed", "weight"):
                del slot[name]

    _change(bundle_copy, drop)
    assert Manifest.load(bundle_copy) == Manifest.load(bundle_folder)


def test_slots_are_found_by_target_and_kind(bundle_folder):
    manifest = Manifest.load(bundle_folder)
    assert manifest.slot_of("fc2").inputs == {"A": "fc2.adapter_A", "B": "fc2.adapter_B"}
    assert manifest.slot_of("fc2", "delta").inputs == {"D": "fc2.adapter_D"}
    assert manifest.slot_of("fc2", "bias").inputs == {"b": "fc2.adapter_b"}
    assert manifest.slot_of("fc2", "head") is None
    assert manifest.slot_of("head").kind == "head"
    assert manifest.slot_of("fc3") is None


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match=r"a folder without manifest.json$"):
        Manifest.load(tmp_path)
    with pytest.raises(UsageError, match=r"that regrow export made, got .*: no such folder$"):
        Manifest.load(tmp_path / "none")


def _set(**fields):
    return lambda data: data.update(fields)


def _in(name, index=0, **fields):
    return lambda data: data[name][index].update(fields)


ENTRY = {"size": 1, "sha256": "00"}
WEIGHT = {"file": "backbone.onnx", "offset": 0, "orientation": "in_out"}


def _weight(fixed=True, **fields):
    weight = {**WEIGHT, **fields}
    return _in("slots", kind="weight", inputs={"W": "w"}, fixed=fixed, weight=weight)


SEEDED = {"method": "nola", "config": {}, "storage": "int8", "targets": [], "inputs": {"seed": "s"}}
SCORE = {"metric": "rmse", "higher_is_better": False, "samples": 9, "fp32": 0.5, "variant": 0.6}
ROUNDING = {"scheme": "symmetric", "range": [-64, 64], "axis": "out"}


def _rounding(**fields):
    return _set(variant="int8", rounding={**ROUNDING, **fields})


BROKEN = {
    "version": (_set(format=2), "format must be 1, got 2"),
    "unknown field": (_set(surprise=1), "unknown fields surprise"),
    "mode": (_set(mode="magic"), "mode must be one of swappable, merged, seeded, got 'magic'"),
    "variant": (_set(variant="fp8"), "variant must be one of fp32, fp16, int8, int4, got 'fp8'"),
    "int8 of before": (_set(variant="int8"), "wrong numbers on processors without VNNI; export it"),
    "rounding of fp32": (_set(rounding=ROUNDING), "rounding must be null for fp32, which has none"),
    "rounding scheme": (_rounding(scheme="x"), "scheme must be one of symmetric, got 'x'"),
    "rounding axis": (_rounding(axis="in"), "rounding: axis must be one of out, got 'in'"),
    "rounding range": (_rounding(range=[-64]), "range must be a code below 0 and one above, of i"),
    "rounding ends": (_rounding(range=[64, -64]), "got [64, -64]"),
    "rounding wide": (_rounding(range=[-64, 128]), "got [-64, 128]"),
    "rounding bool": (_rounding(range=[-64, True]), "got [-64, True]"),
    "rounding type": (_rounding(range="all"), "range must be of type list, got 'all'"),
    "rounding field": (_rounding(bits=8), "rounding: unknown fields bits"),
    "task": (_set(task=1), "task must be of type str, got 1"),
    "opset": (_set(opset=0), "opset must be from 1 to 1000, got 0"),
    "opset text": (_set(opset="17"), "opset must be of type int, got '17'"),
    "labels": (_set(labels=[1]), "labels must be a list of strings"),
    "adapter": (_set(adapter=1), "adapter must be of type str"),
    "parity": (_set(parity={"x": "small"}), "parity: x must be of type float"),
    "score": (_set(score={"metric": "rmse"}), "score: higher_is_better must be of type bool"),
    "score number": (_set(score={**SCORE, "fp32": "1"}), "score: fp32 must be of type float, got"),
    "score samples": (_set(score={**SCORE, "samples": 0}), "samples must be from 1 to"),
    "score field": (_set(score={**SCORE, "seed": 1}), "score: unknown fields seed"),
    "no graphs": (_set(graphs=[]), "graphs must name at least one"),
    "graph not listed": (_in("graphs", file="other.onnx"), "files must list other.onnx"),
    "graph field": (_in("graphs", surprise=1), "graphs[0]: unknown fields surprise"),
    "shape": (
        lambda d: d["graphs"][0]["inputs"][0].update(shape=[1.5]),
        "graphs[0]: inputs[0]: shape must be numbers and names, got [1.5]",
    ),
    "negative shape": (
        lambda d: d["graphs"][0]["inputs"][0].update(shape=[-1]), "shape must be numbers and nam",
    ),
    "bool shape": (
        lambda d: d["graphs"][0]["inputs"][0].update(shape=[True]), "shape must be numbers and n",
    ),
    "slot kind": (_in("slots", kind="magic"), "slots[0]: kind must be one of "),
    "slot part": (_in("slots", inputs={"A": "x"}), "slots[0]: inputs must be A, B"),
    "slot parts of another kind": (_in("slots", kind="delta"), "slots[0]: inputs must be D"),
    "slot twice": (_in("slots", 1, kind="low_rank", inputs={"A": "x", "B": "y"}), "kind once"),
    "slot input": (_in("slots", inputs={"A": "x", "B": 1}), "slots[0]: inputs must be A, B"),
    "slot width": (_in("slots", in_features=0), "slots[0]: in_features must be from 1 to 16777216"),
    "slot rank": (_in("slots", rank=0), "slots[0]: rank must be from 1 to"),
    "slot fixed": (_in("slots", fixed=1), "slots[0]: fixed must be of type bool"),
    "slot seed": (_in("slots", seed=7), "slots[0]: seed must be of type str"),
    "weight file": (_weight(file="x"), "fc1: its weight must lie in a listed file"),
    "weight end": (_weight(offset=10**6), "fc1: its weight must lie in a listed file"),
    "weight start": (_weight(offset=-1), "slots[0]: weight: offset must be from 0 to"),
    "weight turned": (_weight(orientation="out_in"), "orientation must be one of in_out, got 'ou"),
    "weight field": (_weight(x=1), "slots[0]: weight: unknown fields x"),
    "weight per sample": (_weight(fixed=False), "weight must say where a fixed weight slot's"),
    "weight of a delta": (_in("slots", 1, weight=WEIGHT), "slots[1]: weight must be left out"),
    "vector rank": (_in("slots", kind="vector", inputs={"d": "d", "b": "b"}), "a rank and a seed"),
    "expanders": (_set(expanders=[{}]), "expanders[0]: method must be of type str, got nothing"),
    "slot field": (_in("slots", 2, surprise=1), "slots[2]: unknown fields surprise"),
    "files": (_set(files=[]), "files must be of type dict"),
    "size": (_set(files={"backbone.onnx": {**ENTRY, "size": -1}}), "size must be from 0 to"),
    "hash": (_set(files={"backbone.onnx": {**ENTRY, "sha256": 1}}), "sha256 must be of type str"),
    "file field": (_set(files={"backbone.onnx": {**ENTRY, "x": 1}}), "unknown fields x"),
    "seeded": (_set(seeded=[]), "seeded must be an object, got list"),
    "seeded storage": (_set(seeded={**SEEDED, "storage": "int4"}), "storage must be one of int8"),
    "seeded seed": (_set(seeded={**SEEDED, "inputs": {"x": "a"}}), "inputs must name the seed's"),
    "seeded input": (_set(seeded={**SEEDED, "inputs": {"seed": 1}}), "seeded: inputs must name"),
    "seeded field": (_set(seeded={**SEEDED, "x": 1}), "seeded: unknown fields x"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_manifests(bundle_copy, name):
    change, message = BROKEN[name]
    _change(bundle_copy, change)
    with pytest.raises(FormatError) as caught:
        Manifest.load(bundle_copy)
    assert str(caught.value).startswith(f"{bundle_copy}{os.sep}manifest.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000])
def test_manifests_that_are_none(bundle_copy, text):
    (bundle_copy / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=r"manifest\.json must be (JSON|an object)"):
        Manifest.load(bundle_copy)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "..",
        "/etc/passwd",
        "//host/x",
        "a\\b",
        "..\\x",
        "C:/x",
        "C:x",
        "",
        "x:y",
    ],
)
def test_files_stay_in_the_bundle(bundle_copy, name):
    _change(bundle_copy, lambda data: data["files"].update({name: ENTRY}))
    with pytest.raises(FormatError, match="files: a file must lie in the bundle, got"):
        Manifest.load(bundle_copy)


def test_whole_bundles_pass(bundle_folder):
    manifest = Manifest.load(bundle_folder)
    manifest.check_files(bundle_folder)
    manifest.check_files(bundle_folder, hashes=True)
    assert "backbone.onnx" in manifest.files


def test_a_missing_file(bundle_copy):
    (bundle_copy / "head.safetensors").unlink()
    with pytest.raises(FormatError, match=r"head\.safetensors is missing; export the bundle again"):
        Manifest.load(bundle_copy).check_files(bundle_copy)


def test_a_folder_in_the_place_of_a_file(bundle_copy):
    (bundle_copy / "head.safetensors").unlink()
    (bundle_copy / "head.safetensors").mkdir()
    with pytest.raises(FormatError, match=r"head\.safetensors is missing"):
        Manifest.load(bundle_copy).check_files(bundle_copy)


def test_a_file_of_another_size(bundle_copy):
    path = bundle_copy / "backbone.onnx"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=f"must have {size} bytes, got {size - 1}: copy it again"):
        Manifest.load(bundle_copy).check_files(bundle_copy)


def test_a_changed_byte_is_found_by_hashes(bundle_copy):
    path = bundle_copy / "backbone.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = Manifest.load(bundle_copy)
    manifest.check_files(bundle_copy)  # sizes alone do not tell
    with pytest.raises(FormatError, match=r"backbone\.onnx: content must have the manifest's SHA-"):
        manifest.check_files(bundle_copy, hashes=True)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_refused(bundle_copy, tmp_path):
    path = bundle_copy / "head.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"head\.safetensors must be a file of the bundle, got a"):
        Manifest.load(bundle_copy).check_files(bundle_copy)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_linked_folders_are_refused(bundle_copy, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"1")
    (bundle_copy / "sub").symlink_to(outside)
    _change(bundle_copy, lambda data: data["files"].update({"sub/x": ENTRY}))
    with pytest.raises(FormatError, match="must be a file of the bundle, got a link"):
        Manifest.load(bundle_copy).check_files(bundle_copy)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_the_bundle_itself_may_be_a_link(bundle_folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle_folder)
    manifest = Manifest.load(link)
    manifest.check_files(link, hashes=True)
    assert manifest == Manifest.load(bundle_folder)
