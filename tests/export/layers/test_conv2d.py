"""Convolutions of 1 x 1 as linear layers: against torch's own convolution with changed weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from expansions import expanded
from torch import nn
from torch.nn import functional as F

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle
from regrow_export.layers import find_biased, find_linears, layer_type
from regrow_export.modes import merged_model
from regrow_export.slots import KINDS, TARGET_KINDS, TargetSlot, set_slots, slot_targets, with_slots
from regrow_format.slot_kinds import SLOT_KINDS
from regrow_runtime import Bundle

BACKBONE = "sha256:" + "ab" * 32  # that of `make_adapter`
# Of the two in a block of ResNet's bottlenecks, and the one that skips every other pixel.
SMALL = "resnet.encoder.stages.1.layers.0"
WIDE, NARROW = f"{SMALL}.layer.0.convolution", f"{SMALL}.layer.2.convolution"
STRIDED = f"{SMALL}.shortcut.convolution"
PLAIN_KINDS = tuple(kind for kind in TARGET_KINDS if kind != "vector")  # which needs an adapter

Parts = Mapping[str, Mapping[str, np.ndarray]]


def _steady(model: nn.Module, pixels: torch.Tensor) -> nn.Module:
    """In eval mode, with BatchNorm's statistics as training would leave them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.8, 1.3)
            nn.init.normal_(module.bias, std=0.1)
    model.train()
    with torch.no_grad():
        model(pixels)
    return model.eval()


@pytest.fixture(scope="module")
def resnet() -> ExportSource:
    """Two stages of bottlenecks; convolutions without bias, BatchNorm behind each."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck",
        num_labels=3,
    )  # fmt: skip
    model = _steady(ResNetForImageClassification(config), torch.randn(8, 3, 32, 32))
    return ExportSource(model, "image-classification", BACKBONE, ("classifier.1",), tuple("abc"))


def _pixels(count: int, height: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(height)
    return draw.standard_normal((count, 3, height, width)).astype(np.float32)


def _changed(model: nn.Module, changes: Mapping[str, Parts]) -> nn.Module:
    """A copy whose convolutions have what `changes` do in weights and biases of their own.

    y = (W' (x + x t)) (1 + s) + b with W' the weight, or the one given, plus A B and D.
    """
    copied = copy.deepcopy(model)
    for name, parts in changes.items():
        flat = {
            part: torch.from_numpy(v).double() for own in parts.values() for part, v in own.items()
        }
        old = copied.get_submodule(name)
        weight = old.weight.data.double().flatten(1)
        weight = flat["W"].T if "W" in flat else weight
        if "A" in flat:
            weight = weight + (flat["A"] @ flat["B"]).T
        if "D" in flat:
            weight = weight + F.pad(flat["D"].T, (0, weight.shape[1] - len(flat["D"])))
        weight = weight * (1 + flat.get("t", torch.zeros(1)).reshape(-1))
        scale = 1 + flat.get("s", torch.zeros(1, len(weight))).reshape(-1)
        own = getattr(old, "up", old).bias
        bias = 0 if own is None else own.data.double() * scale
        fresh = nn.Conv2d(weight.shape[1], len(weight), 1, old.stride)
        fresh.weight.data = (weight * scale[:, None])[:, :, None, None].float()
        fresh.bias.data = (bias + flat.get("b", torch.zeros(1, len(weight))).reshape(-1)).float()
        copied.set_submodule(name, fresh)
    return copied.eval()


def _logits(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(pixels)).logits.numpy()


def _draws(slots: Any, count: int, rows_of_deltas: int = 2) -> dict[str, np.ndarray]:
    """[count, rows, columns] by input; ranks are 3."""
    draw, feeds = np.random.default_rng(0), {}
    for slot in slots:
        for part in SLOT_KINDS[slot.kind].parts:
            rows, columns = SLOT_KINDS[slot.kind].shape(part, slot, 3)
            rows = rows_of_deltas if slot.kind == "delta" else rows
            value = draw.standard_normal((count, rows, columns)) * 0.3
            feeds[slot.inputs[part]] = value.astype(np.float32)
    return feeds


def _changes(slots: Any, feeds: Mapping[str, np.ndarray], row: int) -> dict[str, Parts]:
    found: dict[str, Any] = {}
    for slot in slots:
        parts = {part: feeds[name][row] for part, name in slot.inputs.items()}
        found.setdefault(slot.target, {})[slot.kind] = parts
    return found


# -- which they are --------------------------------------------------------------------------------


class _Standardised(nn.Conv2d):
    """As BiT's, which is another function of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class _Named(nn.Conv2d):
    """Nothing but a name."""


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (nn.Conv2d(6, 4, 1), True),
        (nn.Conv2d(6, 4, 1, stride=(1, 3), dilation=2), True),
        (nn.Conv2d(6, 4, 1, padding="same", bias=False), True),
        (nn.Conv2d(6, 4, 1, padding="valid"), True),
        (_Named(6, 4, 1), True),
        (nn.Conv2d(6, 4, 3), False),
        (nn.Conv2d(6, 4, (1, 2)), False),
        (nn.Conv2d(6, 4, 1, padding=1), False),
        (nn.Conv2d(6, 4, 1, groups=2), False),
        (nn.Conv1d(6, 4, 1), False),
        (nn.ConvTranspose2d(6, 4, 1), False),
        (_Standardised(6, 4, 1), False),
    ],
    ids=str,
)
def test_which_convolutions_are_linear_layers(module, known):
    found = layer_type(module)
    assert bool(found) == known
    if found:
        assert found.sizes(module) == (6, 4)
        assert found.is_convolution(module)
        assert found.product is None
        np.testing.assert_array_equal(found.weight(module), module.weight[:, :, 0, 0].detach())


@pytest.mark.parametrize("stride", [1, 2, (2, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("rank", [0, 5], ids=["dense", "pair"])
def test_the_matrix_times_what_is_seen_is_the_convolution(stride, rank):
    torch.manual_seed(0)
    module: nn.Module = nn.Conv2d(6, 4, 1, stride)
    if rank:
        bias = module.bias
        module = layer_type(module).pair(module, rank)
        module.up.bias = bias
    kind, x = layer_type(module), torch.randn(2, 6, 7, 9)
    y = module(x)
    rows = kind.features_last(module, kind.seen(module, x))
    found = F.linear(rows, kind.weight(module).float(), kind.bias(module))
    torch.testing.assert_close(kind.features_back(module, found), y)
    torch.testing.assert_close(found, kind.features_last(module, y))
    unbatched = kind.features_last(module, kind.seen(module, x[0]))
    torch.testing.assert_close(unbatched, rows[0])


def test_they_are_found_in_the_models_order(resnet):
    names = [
        name
        for name, module in resnet.model.named_modules()
        if isinstance(module, nn.Linear) or getattr(module, "kernel_size", None) == (1, 1)
    ]
    assert list(find_linears(resnet.model)) == names
    assert STRIDED in names
    assert resnet.model.get_submodule(STRIDED).stride == (2, 2)
    assert list(find_biased(resnet.model)) == ["classifier.1"]  # no norm over channels is one


# -- changes folded in -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("vector", "weight")])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rank", [0, 3], ids=["dense", "pair"])
def test_a_change_in_the_weights_is_the_change_in_a_slot(kind, bias, rank):
    torch.manual_seed(1)
    layer: nn.Module = nn.Conv2d(6, 5, 1, (2, 1), bias=bias)
    if rank:
        layer = layer_type(layer).pair(layer, rank)
    model = nn.Sequential(layer)
    target = slot_targets(model, ["0"], [kind])[0]
    slots = [KINDS[kind].slot(target)]
    feeds = _draws(slots, 1, rows_of_deltas=6)
    slotted = with_slots(model, slots)
    assert isinstance(slotted[0], TargetSlot)
    set_slots(slotted, feeds)
    folded = merged_model(model, _changes(slots, feeds, 0))
    x = torch.randn(3, 6, 5, 7)
    expected = _changed(model, _changes(slots, feeds, 0))(x)
    torch.testing.assert_close(slotted(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected - model(x)).abs().max() > 0.02
    grown = {"low_rank": rank + 3}.get(kind, rank)
    assert getattr(folded[0], "rank", 0) == (0 if kind == "delta" else grown if rank else 0)
    assert folded[0].stride == (2, 1)


# -- bundles ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(resnet, tmp_path_factory):
    """Every kind of slot but vector in three convolutions, one with a stride of 2."""
    folder = tmp_path_factory.mktemp("conv2d") / "b"
    kinds = tuple(kind for kind in PLAIN_KINDS if kind != "weight")
    config = ExportConfig(targets=[WIDE, NARROW, STRIDED], slots=kinds)
    return folder, export_bundle(resnet, folder, ExportRequest(config))


@pytest.mark.parametrize("size", [(32, 32), (48, 41)], ids=str)
def test_every_sample_has_its_own_changes_at_any_size(resnet, bundle, run, size):
    slots = [slot for slot in bundle[1].slots if slot.kind != "head"]
    feeds, pixels = _draws(slots, 3), _pixels(3, *size)
    found = run(bundle[0], {"pixel_values": pixels}, feeds)["logits"]
    base = _logits(resnet.model, pixels)
    for row in range(3):
        expected = _logits(_changed(resnet.model, _changes(slots, feeds, row)), pixels[row:][:1])
        np.testing.assert_allclose(found[row], expected[0], rtol=1e-4, atol=1e-5)
        assert np.abs(expected[0] - base[row]).max() > 1e-3
    np.testing.assert_allclose(
        run(bundle[0], {"pixel_values": pixels})["logits"], base, rtol=1e-4, atol=1e-5
    )


def test_a_weight_is_taken_whole(resnet, run, tmp_path):
    config = ExportConfig(targets=[WIDE, STRIDED], slots=("weight",))
    manifest = export_bundle(resnet, tmp_path / "b", ExportRequest(config))
    slots, pixels = manifest.slots[:2], _pixels(2, 40, 32)
    assert [slot.kind for slot in slots] == ["weight", "weight"]
    stored = (tmp_path / "b" / slots[0].weight.file).read_bytes()
    start, count = slots[0].weight.offset, slots[0].in_features * slots[0].out_features
    values = np.frombuffer(stored, "<f4", count, start).reshape(slots[0].in_features, -1)
    own = resnet.model.get_submodule(slots[0].target).weight
    np.testing.assert_array_equal(values, own[:, :, 0, 0].detach().numpy().T)
    feeds = _draws(slots, 1)
    found = run(tmp_path / "b", {"pixel_values": pixels}, feeds)["logits"]
    expected = _logits(_changed(resnet.model, _changes(slots, feeds, 0)), pixels)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


METHODS = ("nola", "lora", "vera", "fourierft", "bitfit")


@pytest.fixture(scope="module")
def biased() -> ExportSource:
    """As PoolFormer's MLPs: convolutions with a bias."""
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    torch.manual_seed(4)
    config = PoolFormerConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, patch_sizes=[7, 3],
        strides=[4, 2], padding=[2, 1], num_labels=3, layer_scale_init_value=0.5,
        initializer_range=0.3,
    )  # fmt: skip
    model = PoolFormerForImageClassification(config).eval()
    return ExportSource(model, "image-classification", BACKBONE, ("classifier",), tuple("abc"))


@pytest.fixture(scope="module")
def poolformer_bundle(biased, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conv2d") / "p"
    config = ExportConfig(targets=_of(biased), methods=("lora", "fourierft", "bitfit"))
    export_bundle(
        biased, folder, ExportRequest(config, inputs={"pixel_values": _pixels(2, 32, 32)})
    )
    return folder


def _of(source: ExportSource) -> list[str]:
    return [name for name in find_linears(source.model) if name not in source.head]


def _of_adapter(adapter: Any) -> dict[str, Parts]:
    return {name: {"any": parts} for name, parts in expanded(adapter).items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_runtime_swaps_adapters_of_every_method(biased, poolformer_bundle, adapter_for, method):
    one, two = (adapter_for(biased, _of(biased), method=method, draw=draw) for draw in (0, 1))
    bundle, pixels = Bundle.open(poolformer_bundle), _pixels(3, 32, 48)
    want = {
        "one": _logits(_changed(biased.model, _of_adapter(one)), pixels),
        "two": _logits(_changed(biased.model, _of_adapter(two)), pixels),
        None: _logits(biased.model, pixels),
    }
    for name, adapter in (("one", one), ("two", two)):
        bundle.swap(adapter, name=name)
        found = bundle.run({"pixel_values": pixels})["logits"]
        np.testing.assert_allclose(found, want[name], rtol=1e-4, atol=1e-5)
    users = ["two", None, "one"]
    mixed = bundle.run({"pixel_values": pixels}, adapters=users)["logits"]
    expected = np.stack([want[user][row] for row, user in enumerate(users)])
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(want["one"] - want["two"]).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["merged", "seeded"])
def test_an_adapter_is_built_in(biased, run, tmp_path, adapter_for, method, mode):
    adapter = adapter_for(biased, _of(biased), method=method)
    export_bundle(
        biased, tmp_path / "b",
        ExportRequest(ExportConfig(mode=mode), adapter=adapter,
                      inputs={"pixel_values": _pixels(2, 32, 32)}),
    )  # fmt: skip
    pixels = _pixels(3, 32, 32)
    expected = _logits(_changed(biased.model, _of_adapter(adapter)), pixels)
    found = run(tmp_path / "b", {"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_veras_vectors_alone(resnet, tmp_path, adapter_for):
    names = [WIDE, NARROW, STRIDED]
    one, two = (adapter_for(resnet, names, method="vera", draw=draw) for draw in (0, 1))
    config = ExportConfig(slots=("vector",), targets=names)
    export_bundle(resnet, tmp_path / "b", ExportRequest(config, adapter=one))
    bundle, pixels = Bundle.open(tmp_path / "b"), _pixels(2, 32, 32)
    for name, adapter in (("one", one), ("two", two)):
        bundle.swap(adapter, name=name)
    mixed = bundle.run({"pixel_values": pixels}, adapters=["one", "two"])["logits"]
    for row, adapter in enumerate((one, two)):
        expected = _logits(_changed(resnet.model, _of_adapter(adapter)), pixels[row:][:1])
        np.testing.assert_allclose(mixed[row], expected[0], rtol=1e-4, atol=1e-5)


# -- precision -------------------------------------------------------------------------------------


class _Mixed(nn.Module):
    """Blocks of a convolution and a linear layer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(32, 32, 1), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.conv(x)).permute(0, 2, 3, 1)
            return x + self.fc(y).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_below_fp32_convolutions_stay_as_they_are(precision, tmp_path):
    torch.manual_seed(5)
    source = ExportSource(_Mixed().eval(), "custom", BACKBONE)
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 32, 4, 4)).astype(np.float32)}
    config = ExportConfig(precision=precision, targets=["blocks.0.conv", "blocks.1.fc"])
    export_bundle(source, tmp_path / "b", ExportRequest(config, inputs=inputs))
    graph = onnx.load(str(tmp_path / "b" / "backbone.onnx")).graph
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    kernels = [name for name, (_, dims) in kinds.items() if dims == (32, 32, 1, 1)]
    assert len(kernels) == 2
    assert all(kinds[name][0] == onnx.TensorProto.FLOAT for name in kernels)
    stored = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8,
              "int4": onnx.TensorProto.INT4}[precision]  # fmt: skip
    assert sum(kind == (stored, (32, 32)) for kind in kinds.values()) == 2
