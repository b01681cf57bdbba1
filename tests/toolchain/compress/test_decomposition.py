"""Factors that look at samples, and ranks from one budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.compress import compress, factored_layers, kernel_timing, plan_layers
from regrow_toolchain.compress.calibration import calibrated
from regrow_toolchain.compress.decomposition import Moments, Spectrum, decompose
from regrow_toolchain.compress.factorization import factor
from regrow_toolchain.compress.layer_selection import LayerPlan
from regrow_toolchain.compress.rank_allocation import allocate
from regrow_toolchain.config import CompressConfig, ExportConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone, apply_plan, factorize


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 20)


def _moment(width: int, samples: int, seed: int = 1) -> torch.Tensor:
    """Of unlike sizes in unlike directions."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=draw, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, width, dtype=torch.float64)
    return x.T @ x / samples


def _cost(pair: nn.Module, layer: nn.Linear, moments: Moments) -> float:
    """||G^½ (V Uᵀ - W) C^½||² = tr(G D C Dᵀ)."""
    change = (pair.weight - layer.weight).detach().double()
    outer = torch.eye(20).double() if moments.gradients is None else moments.gradients
    return float(torch.trace(outer @ change @ moments.inputs @ change.T))


def test_without_moments_it_is_plain_svd(layer: nn.Linear) -> None:
    one = decompose(layer, "fc").pair(layer, 5)
    assert torch.allclose(one.weight, factorize(layer, 5).weight, atol=1e-6)
    assert torch.equal(one.up.bias, layer.bias)
    assert torch.allclose(one.down.weight.norm(dim=1), one.up.weight.norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize("both", [False, True])
def test_it_costs_what_its_energies_say_and_less_than_plain_svd(
    layer: nn.Linear, both: bool
) -> None:
    moments = Moments(_moment(12, 400), _moment(20, 400, 2) if both else None)
    spectrum = decompose(layer, "fc", moments)
    pair = spectrum.pair(layer, 5)
    left_out = float(spectrum.energies[5:].sum())
    assert _cost(pair, layer, moments) == pytest.approx(left_out, rel=0.1)  # but for damping
    assert _cost(pair, layer, moments) < 0.6 * _cost(factorize(layer, 5), layer, moments)
    assert torch.allclose(spectrum.pair(layer, 12)(torch.eye(12)), layer(torch.eye(12)), atol=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_few_samples_leave_nothing_undefined(layer: nn.Linear, samples: int) -> None:
    """Moments far from full rank."""
    moments = Moments(_moment(12, samples), _moment(20, samples, 2))
    pair = decompose(layer, "fc", moments).pair(layer, 6)
    assert torch.isfinite(pair.weight).all()
    assert _cost(pair, layer, moments) <= _cost(factorize(layer, 6), layer, moments)
    nothing = Moments(torch.zeros(12, 12).double(), torch.zeros(20, 20).double())
    plain = decompose(layer, "fc", nothing).pair(layer, 6)
    assert torch.allclose(plain.weight, factorize(layer, 6).weight, atol=1e-6)


def test_moments_are_those_of_the_inputs_without_padding() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 12)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(12, 12)) for _ in range(2)])

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](self.words(input_ids)))

    torch.manual_seed(0)
    model = Text().eval().requires_grad_(False)
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 9, (20, 6))
    mask = (np.arange(6) < draw.integers(1, 7, 20)[:, None]).astype(np.int64)
    data = Dataset({"input_ids": ids, "attention_mask": mask}, np.full(20, -1))
    layers = [layer for layer in plan_layers(model, 2) if layer.rank]
    found = calibrated(model, layers, data, samples=20, seed=0, gradients=False)
    rows = model.words(torch.from_numpy(ids))[torch.from_numpy(mask).bool()].double()
    first = model.get_submodule("layers.0.0")
    wanted = decompose(first, "x", Moments(rows.T @ rows / len(rows)))
    assert torch.allclose(found["layers.0.0"].energies, wanted.energies, rtol=1e-6)


# -- ranks -----------------------------------------------------------------------------------------


def _spectrum(energies: list[float]) -> Spectrum:
    values = torch.tensor(energies, dtype=torch.float64)
    return Spectrum(values, torch.zeros(1), torch.zeros(1))


def _parameters(layer: LayerPlan, rank: int) -> float:
    ends = layer.in_features, layer.out_features
    return rank * sum(ends) if rank else ends[0] * ends[1]


def test_ranks_are_the_best_for_the_budget() -> None:
    """Against every pair of ranks."""
    rng = np.random.default_rng(0)
    layers = [LayerPlan("a", 16, 16, True, 4), LayerPlan("b", 16, 48, True, 6)]
    values = [np.sort(rng.exponential(1, 16) ** 2)[::-1].tolist() for _ in layers]
    spectra = {x.name: _spectrum(v) for x, v in zip(layers, values, strict=True)}
    budget = sum(_parameters(x, x.rank) for x in layers)
    found = allocate(layers, spectra, _parameters, budget)

    def error(ranks: tuple[int, int]) -> float:
        return sum(sum(v[r:]) if r else 0 for v, r in zip(values, ranks, strict=True))

    tries = [(a, b) for a in [0, *range(1, 9)] for b in [0, *range(1, 13)]]
    fits = [r for r in tries if sum(map(_parameters, layers, r)) <= budget]
    chosen = (found["a"], found["b"])
    assert chosen in fits
    assert error(chosen) <= 1.05 * min(map(error, fits))


def test_ranks_are_multiples_and_within_the_budget() -> None:
    layers = [LayerPlan(f"l{i}", 64, 64, True, 16) for i in range(4)]
    spectra = {
        x.name: _spectrum([2.0**-k * 10**i for k in range(64)]) for i, x in enumerate(layers)
    }
    budget = sum(_parameters(x, x.rank) for x in layers)
    found = allocate(layers, spectra, _parameters, budget, multiple=8)
    assert all(rank % 8 == 0 for rank in found.values())
    assert sum(_parameters(x, found[x.name]) for x in layers) <= budget
    assert found["l3"] >= found["l0"] >= 4
    with pytest.raises(UsageError, match="budget must allow ranks of 8 or more"):
        allocate(layers, spectra, _parameters, 4 * 7 * 128, multiple=8)


# -- as a whole ------------------------------------------------------------------------------------


def test_looking_at_samples_starts_better(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    """Nearer to the dense model's logits than plain SVD, with as many parameters."""
    data, eval_data = dataset(120, 1), dataset(90, 2)
    x = torch.from_numpy(eval_data.inputs["pixel_values"])
    config = CompressConfig(ratio=4, epochs=0, multiple=1, slow_layers="factor")
    far = {}
    for name in ("svd", "activations", "outputs"):
        made = compress(backbone, data, replace(config, init=name)).backbone
        with torch.no_grad():
            far[name] = float((made.model(x).logits - backbone.model(x).logits).square().mean())
        far[f"{name} size"] = made.parameters
    assert far["outputs"] < 0.7 * far["svd"]
    assert far["activations"] < far["svd"]
    assert far["outputs size"] <= far["svd size"]


def test_int8_layers_are_timed_as_they_are_exported(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timed graph's operators are those that an export of the layer has."""
    made: list[bytes] = []
    real = onnxruntime.InferenceSession

    def kept(model: bytes, *args: Any, **more: Any) -> Any:
        made.append(model)
        return real(model, *args, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", kept)
    kernel_timing.timed.__wrapped__(((32, 8, 64),), 4, "int8")
    monkeypatch.undo()
    timed = onnx.load_from_string(made[0]).graph
    export_backbone(backbone, tmp_path / "bundle", ExportConfig(mode="merged", precision="int8"))
    exported = onnx.load(tmp_path / "bundle" / "backbone.onnx").graph
    first = next(i for i, n in enumerate(exported.node) if n.op_type == "MatMulInteger")
    kinds = [node.op_type for node in timed.node]
    assert kinds == 2 * [node.op_type for node in exported.node[first - 1 : first + 4]]
    assert {tuple(t.dims) for t in timed.initializer} == {(32, 8), (8,), (8, 64), (64,)}


def test_a_layer_that_no_sample_reaches_stays_dense(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    model = copy.deepcopy(backbone.model)
    model.vit.encoder.layer[1].attention.unused = nn.Linear(32, 32)
    found = factor(model.requires_grad_(False), dataset(40, 1), CompressConfig(epochs=0))
    reasons = {layer.name: layer.skip_reason for layer in found.layers}
    assert reasons["vit.encoder.layer.1.attention.unused"] == "no sample reaches it"


# -- what is refused -------------------------------------------------------------------------------


def test_one_sample_is_no_calibration(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    with pytest.raises(UsageError, match="calibration must have 2 samples or more, got 1: give"):
        compress(backbone, dataset(1, 1), CompressConfig(epochs=0))
    with pytest.raises(UsageError, match="calibration must be at least 2, got 1"):
        compress(backbone, dataset(30, 1), CompressConfig(epochs=0, calibration=1))


def test_what_needs_samples_says_so(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="data must be given for init outputs"):
        compress(backbone, config=CompressConfig(init="outputs"))
    with pytest.raises(UsageError, match="must be paper or kernels for init svd, got global"):
        compress(backbone, config=CompressConfig(ranks="global"))


def test_nan_in_the_weights_names_the_layer(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    with torch.no_grad():
        backbone.model.vit.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    for data in (None, dataset(30, 1)):
        with pytest.raises(RegrowError, match=r"layer\.1\.output\.dense.* must be finite"):
            compress(backbone, data, CompressConfig(epochs=0))


def test_plain_factors_are_untouched_by_it(backbone: Backbone) -> None:
    student = copy.deepcopy(backbone.model)
    apply_plan(student, factored_layers(student, 2))
    other = compress(backbone).backbone.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in student.state_dict().items())
