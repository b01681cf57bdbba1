"""Which slots an exported bundle gets: by method, by adapter, by target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

import regrow_toolchain.interop.onnx_export as exporting
from regrow_export import ExportConfig, ExportRequest
from regrow_format.adapter import Adapter, Coefficients, Target
from regrow_format.errors import UsageError
from regrow_format.methods import get_method
from regrow_toolchain.cli.commands.export import export_command
from regrow_toolchain.models import Backbone

LINEAR = (Target("layer.0.query", 4, 4), Target("layer.0.value", 4, 4))
BIASED = (*LINEAR, Target("layer.0.norm", 4, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


@pytest.fixture
def backbone() -> Backbone:
    model = nn.ModuleDict({"layer": nn.ModuleList([Block()])}).eval()
    return Backbone(model, "sha256:00", "custom", head=(), labels=(), files=())


@pytest.fixture
def exported(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """exported(adapter, expanders, **settings): the targets and kinds that a bundle would get."""
    asked: dict[str, ExportRequest] = {}

    def find(_model: nn.Module, _patterns: Any, *, method: str | None = None) -> Any:
        return BIASED if method == "bitfit" else LINEAR

    monkeypatch.setattr(exporting, "find_targets", find)

    def export(_source: Any, _out: Any, request: ExportRequest, *, force: bool) -> None:
        asked["request"] = request

    monkeypatch.setattr(exporting, "export_bundle", export)

    def call(
        adapter: Adapter | None = None, expanders: Sequence[Adapter] = (), **settings: Any
    ) -> tuple[list[str], list[str]]:
        config = ExportConfig(**settings)
        exporting.export_backbone(
            backbone, tmp_path / "b", config, adapter=adapter, expanders=expanders
        )
        return list(asked["request"].targets), list(asked["request"].kinds)

    call.asked = asked  # type: ignore[attr-defined]
    return call


def _adapter(method: str, config: dict[str, Any], targets: tuple[Target, ...]) -> Adapter:
    found = get_method(method)
    constants = found.constants(config, targets)
    values = {
        name: Coefficients.store(np.ones(shape, np.float32), constants[name], "int8")
        for name, shape in found.layout(config, targets).items()
    }
    return Adapter(method, config, 1, "sha256:00", targets, values, "int8")


@pytest.mark.parametrize(
    ("methods", "kinds", "targets"),
    [
        ((), ["low_rank"], LINEAR),
        (("lora", "vera", "nola"), ["low_rank"], LINEAR),
        (("fourierft",), ["delta"], LINEAR),
        (("bitfit",), ["bias"], BIASED),
        (("bitfit", "lora"), ["bias", "low_rank"], BIASED),
        (("head",), [], ()),
    ],
)
def test_methods_decide_the_kinds(
    exported: Any, methods: tuple[str, ...], kinds: list[str], targets: tuple[Target, ...]
) -> None:
    assert exported(methods=methods) == (sorted(t.name for t in targets), kinds)


def test_an_adapter_decides_kind_and_targets(exported: Any) -> None:
    adapter = _adapter("fourierft", {"n": 3, "alpha": 1.0}, LINEAR[:1])
    assert exported(adapter=adapter) == (["layer.0.query"], ["delta"])
    assert exported(adapter=adapter, methods=["lora"]) == (
        ["layer.0.query"],
        ["low_rank", "delta"],
    )
    biased = _adapter("bitfit", {}, BIASED[2:])
    assert exported(adapter=biased) == (["layer.0.norm"], ["bias"])


def test_slots_by_hand_instead_of_the_methods(exported: Any) -> None:
    names = [target.name for target in LINEAR]
    assert exported(slots=("weight",)) == (names, ["weight"])
    assert exported(slots=("weight", "bias"), methods=["bitfit", "lora"]) == (
        sorted(target.name for target in BIASED),
        ["weight", "bias"],
    )


def test_vector_slots_take_the_basis_of_the_adapter(exported: Any) -> None:
    adapter = _adapter("vera", {"rank": 3}, LINEAR[:1])
    assert exported(adapter=adapter, slots=("vector",)) == (["layer.0.query"], ["vector"])
    assert exported.asked["request"].adapter is adapter
    assert exported(adapter=adapter) == (["layer.0.query"], ["low_rank"])


def test_an_expanders_method_has_its_slots(exported: Any) -> None:
    adapter = _adapter("fourierft", {"n": 3, "alpha": 1.0}, LINEAR[:1])
    names = [target.name for target in LINEAR]
    assert exported(expanders=[adapter], fixed_rank=4) == (names, ["delta"])
    assert exported(expanders=[adapter], methods=["lora"]) == (names, ["low_rank", "delta"])
    request = exported.asked["request"]
    assert (request.expanders, request.config.fixed_rank) == ([adapter], None)


def test_an_adapter_with_saved_modules_is_refused_with_the_reason(exported: Any) -> None:
    adapter = _adapter("bitfit", {}, LINEAR)
    adapter = replace(adapter, extra={"layer.0.norm.bias": np.ones(4, np.float32)})
    with pytest.raises(UsageError, match=r"no saved modules \(layer.0.norm.bias\) to be swapped"):
        exported(adapter=adapter)


def test_requests_that_make_no_sense(exported: Any) -> None:
    with pytest.raises(UsageError, match="methods must be for mode swappable, got merged"):
        exported(mode="merged", methods=["lora"], adapter=_adapter("bitfit", {}, LINEAR))
    with pytest.raises(
        UsageError,
        match=r"targets must be left out for methods head, .*changes no layers, got query",
    ):
        exported(methods=["head"], targets=["query"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "magic"], "--for must be among nola, .*, got 'magic'"),
        (
            ["--mode", "seeded", "--adapter", "a", "--for", "lora"],
            "--for must be for --mode swappable, got seeded",
        ),
        (
            ["--mode", "merged", "--adapter", "a", "--fixed-rank", "4"],
            "--fixed-rank must be for --mode swappable, got merged",
        ),
        (
            ["--mode", "seeded", "--adapter", "a", "--slots", "weight"],
            "--slots must be for --mode swappable, got seeded",
        ),
        (
            ["--mode", "seeded", "--adapter", "a", "--expander", "b"],
            "--expander must be for --mode swappable, got seeded",
        ),
        (["--mode", "seeded"], "--adapter must be given for --mode seeded, got none"),
        (["--constants"], "--constants must be for --mode seeded, got swappable"),
        (["--fixed-rank", "0"], "--fixed-rank must be from 1 to 4096, got 0"),
        (["--slots", "hidden"], "--slots must be among .*, got 'hidden'"),
    ],
)
def test_the_command_checks_its_methods(options: list[str], message: str, tmp_path: Path) -> None:
    command = [str(tmp_path), "-o", str(tmp_path / "b"), *options]
    result = CliRunner().invoke(export_command, command)
    assert result.exit_code == 2
    assert re.search(message, result.output)


def test_a_fixed_rank_above_a_width(exported: Any) -> None:
    match = r"fixed_rank must be at most 4, the width of layer.0.query, got 5: .*methods vera"
    with pytest.raises(UsageError, match=match):
        exported(fixed_rank=5)
    assert exported(fixed_rank=4)[1] == ["low_rank"]
    assert exported(fixed_rank=5, methods=["vera"])[1] == ["low_rank"]
