"""What a precision costs on samples: scores of the bundle and of torch, in the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, Measure, export_bundle
from regrow_export.tracing import run_torch
from regrow_format.errors import RegrowError
from regrow_format.manifest import Manifest, Score

QUERY = "vit.encoder.layer.0.attention.attention.query"

Arrays = dict[str, np.ndarray]


@pytest.fixture(params=("fp16", "int8", "int4"))
def precision(request) -> str:
    return request.param


@pytest.fixture
def inputs() -> Arrays:
    values = np.random.default_rng(5).standard_normal((3, 1, 28, 28))
    return {"pixel_values": values.astype(np.float32)}


def _outputs(pick: Callable[[Any], torch.Tensor], inputs: dict[str, np.ndarray]) -> Any:
    """A measure that gives the mean output of both models, and what it saw of them."""
    seen = []

    def scores(*models: nn.Module) -> tuple[float, ...]:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        seen[:] = [pick(model(**tensors)).numpy(force=True) for model in models]
        return tuple(float(values.mean()) for values in seen)

    return Measure("mean", False, 3, scores), seen


def test_a_score_stands_in_the_manifest(vit, precision, tmp_path, run, inputs):
    """Of the exact model and of the bundle, which is called as the model is."""
    measure, seen = _outputs(lambda outputs: outputs.logits, inputs)
    export_bundle(
        vit,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=[QUERY], precision=precision), measure=measure),
    )
    exact, found = run_torch(vit.model, inputs)["logits"], run(tmp_path / "b", inputs)["logits"]
    for got, want in zip(seen, (exact, found), strict=True):
        np.testing.assert_array_equal(got, want)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["score"] == {
        "metric": "mean", "higher_is_better": False, "samples": 3,
        "fp32": pytest.approx(exact.mean()), "variant": pytest.approx(found.mean()),
    }  # fmt: skip
    assert Manifest.load(tmp_path / "b").score == Score(
        "mean", False, 3, float(exact.mean()), float(found.mean())
    )


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Tanh()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_a_plain_module_is_measured_by_its_tensor(tmp_path, run):
    torch.manual_seed(7)
    source = ExportSource(_Blocks().eval(), "custom", "sha256:" + "ab" * 32)
    x = {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)}
    measure, seen = _outputs(lambda outputs: outputs, x)
    export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=["blocks.0"]), inputs=x, measure=measure),
    )
    np.testing.assert_array_equal(seen[1], run(tmp_path / "b", x)["output"])


def test_a_score_that_is_no_number(vit, tmp_path):
    measure = Measure("accuracy", True, 1, lambda *_: (1.0, float("nan")))
    message = "accuracy must be a finite number, got nan on 1 samples: give others, or more"
    with pytest.raises(RegrowError, match=message):
        export_bundle(
            vit, tmp_path / "b", ExportRequest(ExportConfig(targets=[QUERY]), measure=measure)
        )
    assert not (tmp_path / "b").exists()


def test_samples_that_the_bundle_does_not_take(vit, tmp_path):
    wrong = {"pixel_values": torch.zeros(1, 1, 14, 14)}
    measure = Measure("mean", True, 1, lambda _, bundle: (0.0, bundle(**wrong).logits.mean()))
    with pytest.raises(RegrowError, match="samples must be what the model takes, got: "):
        export_bundle(
            vit, tmp_path / "b", ExportRequest(ExportConfig(targets=[QUERY]), measure=measure)
        )
    assert not (tmp_path / "b").exists()
