"""`regrow verify` with torch: the whole way from training to the check on another machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_format.manifest import Manifest
from regrow_toolchain.adapters import adapt
from regrow_toolchain.config import AdaptConfig, ExportConfig
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import load_backbone


@pytest.fixture(scope="module")
def room(
    vit_folder: Path, dataset: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Bundles of a backbone, and a user's adapter with a head of its own."""
    room = tmp_path_factory.mktemp("verify")
    backbone = load_backbone(vit_folder)
    config = AdaptConfig(steps=10, holdout=0, head="new", shift=0.0, noise=0.0)
    user = adapt(backbone, dataset(40, 5), config).adapter
    user.save(room / "user.safetensors")
    export_backbone(backbone, room / "fp32")
    export_backbone(backbone, room / "int8", ExportConfig(precision="int8"))
    for mode in ("merged", "seeded"):
        export_backbone(backbone, room / mode, ExportConfig(mode=mode), adapter=user)
    return room


def _checks(found: Any) -> dict[str, tuple[str, str]]:
    return {c["check"]: (c["result"], c["detail"]) for c in found.json["checks"]}


@pytest.mark.parametrize("mode", ["fp32", "int8", "merged", "seeded"])
def test_a_bundle_is_compared_with_torch(
    room: Path, vit_folder: Path, cli: Callable[..., Any], mode: str
) -> None:
    options = ("--adapter", room / "user.safetensors", "--against", vit_folder, "--json")
    found = cli("verify", room / mode, *options)
    assert found.code == 0, found.err
    checks = _checks(found)
    compared = {"torch, user.safetensors"} | (
        {"torch, base"} if mode in ("fp32", "int8") else set()
    )
    products = {"products"} if mode == "int8" else set()
    always = {"files", "graph", "base", "user.safetensors", "backbone"}
    assert always | compared | products == set(checks)
    assert {result for result, _ in checks.values()} == {"ok"}
    if mode != "int8":
        worst = float(checks["torch, user.safetensors"][1].rpartition(" ")[2])
        assert worst < 1e-4


def test_another_backbone_is_no_reference(
    room: Path, bert_folder: Path, cli: Callable[..., Any]
) -> None:
    found = cli("verify", room / "fp32", "--against", bert_folder, "--json")
    assert found.code == 1
    result, detail = _checks(found)["backbone"]
    assert result == "failed"
    assert "is another one" in detail


def test_a_built_in_adapter_must_be_given_to_be_compared(
    room: Path, vit_folder: Path, cli: Callable[..., Any]
) -> None:
    found = cli("verify", room / "merged", "--against", vit_folder, "--json")
    assert found.code == 0
    assert _checks(found)["torch"] == (
        "skipped", "a merged bundle has an adapter built in: give it with --adapter"
    )  # fmt: skip


def test_merged_and_another_adapter(room: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    from dataclasses import replace

    from regrow_format.adapter import Adapter

    other = replace(Adapter.load(room / "user.safetensors"), user={"name": "other"})
    other.save(tmp_path / "other.safetensors")
    found = cli("verify", room / "merged", "--adapter", tmp_path / "other.safetensors", "--json")
    assert found.code == 1
    assert _checks(found)["other.safetensors"][0] == "failed"


def test_torch_finds_weights_that_were_changed_with_their_hashes(
    room: Path, vit_folder: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Somebody who changes weights and the manifest too: the outputs at export tell."""
    import json

    from regrow_format.files import sha256_file

    folder = Path(shutil.copytree(room / "fp32", tmp_path / "b"))
    data = np.fromfile(folder / "backbone.onnx.data", np.uint8)
    weights = data[: data.size // 4 * 4].view(np.float32)
    weights *= np.float32(1.1)
    data.tofile(folder / "backbone.onnx.data")
    fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    fields["files"]["backbone.onnx.data"]["sha256"] = sha256_file(folder / "backbone.onnx.data")
    (folder / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")
    Manifest.load(folder).check_files(folder, hashes=True)
    found = cli("verify", folder, "--against", vit_folder, "--json")
    assert found.code == 1
    checks = _checks(found)
    assert checks["files"][0] == "ok"
    assert checks["base"][0] == "failed"
    assert "base must give on the bundle's probe what it gave at export" in checks["base"][1]
    assert checks["torch, base"][0] == "failed"


# -- int8 ----------------------------------------------------------------------------------------


def _fields(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    import json

    path = folder / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def _with_one_wide_code(folder: Path, out: Path) -> Path:
    """One weight of 127, as listed: nothing but the weight itself tells."""
    import onnx
    from onnx import numpy_helper

    from regrow_format.files import sha256_file

    shutil.copytree(folder, out)
    path = out / "backbone.onnx"
    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if t.name.endswith("query.weight.int8"))
    codes = numpy_helper.to_array(tensor).copy()
    codes[3, 5] = 127
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    (out / "backbone.onnx.data").unlink(missing_ok=True)
    onnx.save(model, path)

    def listed(fields: dict[str, Any]) -> None:
        fields["files"].pop("backbone.onnx.data", None)
        fields["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}

    _fields(out, listed)
    return out


def test_the_weights_of_integer_products_are_looked_at(
    room: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    assert "products" not in _checks(cli("verify", room / "fp32", "--json"))
    found = _checks(cli("verify", room / "int8", "--json"))["products"]
    assert found == (
        "ok", "12 integer products with weights from -64 to 64: exact on every processor"
    )  # fmt: skip
    found = cli("verify", _with_one_wide_code(room / "int8", tmp_path / "odd"), "--json")
    assert found.code == 1
    result, detail = _checks(found)["products"]
    assert result == "failed"
    assert detail.startswith("weights of integer products must have codes from -64 to 64, got -64 ")
    assert detail.endswith("query.weight.int8 (1 such products): export it again")


@pytest.mark.parametrize("here", [False, True])
def test_weights_that_could_saturate_are_refused_where_they_do(
    room: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: Any, here: bool
) -> None:
    """A manifest that says so: from an exporter for processors with VNNI."""
    import regrow_runtime.sessions
    import regrow_toolchain.verification.bundle_checks

    for module in (regrow_runtime.sessions, regrow_toolchain.verification.bundle_checks):
        monkeypatch.setattr(module, "saturates", lambda: here)
    folder = _with_one_wide_code(room / "int8", tmp_path / "wide")
    _fields(folder, lambda fields: fields["rounding"].update(range=[-127, 127]))
    found = cli("verify", folder, "--json")
    checks = _checks(found)
    products = "12 integer products with weights from -64 to 127"
    if here:
        assert found.code == 1
        why = "saturate on this processor, which has no VNNI: export it again"
        assert checks["products"] == ("failed", f"{products} {why}")
        assert checks["graph"][0] == "failed"
        assert "base" not in checks
    else:
        assert checks["products"] == ("ok", f"{products}: exact here, wrong without VNNI")
        assert checks["graph"][0] == "ok"


def test_int8_bundles_of_before_are_refused(
    room: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(room / "int8", tmp_path / "old"))
    _fields(folder, lambda fields: fields.pop("rounding"))
    arrays = tmp_path / "x.npz"
    np.savez(arrays, pixel_values=np.zeros((1, 1, 8, 8), np.float32))
    for command in (("verify", folder), ("run", folder, "--input", arrays), ("inspect", folder)):
        found = cli(*command)
        assert found.code == 1
        assert "manifest.json: rounding must say how int8 weights were rounded" in found.err
        assert "export it again" in found.err
