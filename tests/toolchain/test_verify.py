"""`regrow verify` with torch: the whole way from training to the check on another machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_format.manifest import Manifest
from regrow_toolchain.adapting import adapt
from regrow_toolchain.backbone import load_backbone
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.exporting import export_backbone


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
    export_backbone(backbone, room / "int8", precision="int8")
    for mode in ("merged", "seeded"):
        export_backbone(backbone, room / mode, mode=mode, adapter=user)
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
    assert {"files", "graph", "base", "user.safetensors", "backbone"} | compared == set(checks)
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
