"""Convolutions of 1 x 1 in compression and in training: pairs of convolutions, users in a batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from regrow_export.layers import LowRankPair, layer_type
from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.adapters import Hooks
from regrow_toolchain.compress import build_report, compress, plan_layers
from regrow_toolchain.compress.calibration import calibrated, tokens_of
from regrow_toolchain.compress.decomposition import Moments, decompose
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import (
    Backbone,
    find_targets,
    load_backbone,
    quiet_transformers,
    save_backbone,
)

BLOCK = "resnet.encoder.stages.1.layers.0"
STRIDED, WIDE = f"{BLOCK}.shortcut.convolution", f"{BLOCK}.layer.0.convolution"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet of two stages of bottlenecks, the second one with a stride of 2."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 64], depths=[1, 2], layer_type="bottleneck",
        num_labels=3,
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("resnet") / "dense"
    with quiet_transformers():
        model.eval().save_pretrained(path)
    return path


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder)


def _data(count: int) -> Dataset:
    draw = np.random.default_rng(0)
    pixels = draw.standard_normal((count, 3, 32, 32)).astype(np.float32)
    labels = np.arange(count) % 3
    pixels += labels[:, None, None, None].astype(np.float32)
    return Dataset({"pixel_values": pixels}, labels, ("LABEL_0", "LABEL_1", "LABEL_2"))


def _pixels(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def _logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(pixel_values=pixels).logits
    return found


def test_the_svd_of_the_matrix_at_the_papers_rank(backbone: Backbone, tmp_path: Path) -> None:
    small = compress(backbone).backbone
    assert {plan.name for plan in small.layers} >= {STRIDED, WIDE}
    for plan in small.layers:
        wide, high = plan.in_features, plan.out_features
        assert plan.rank == math.floor(wide * high / (2 * (wide + high)))
        pair = small.model.get_submodule(plan.name)
        assert isinstance(pair, LowRankPair)
        assert [type(part) for part in (pair.down, pair.up)] == [nn.Conv2d, nn.Conv2d]
        dense = backbone.model.get_submodule(plan.name)
        assert (pair.down.stride, pair.up.stride) == (dense.stride, (1, 1))
        matrix = dense.weight.detach()[:, :, 0, 0].double()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        best = (left[:, : plan.rank] * values[: plan.rank]) @ right[: plan.rank]
        torch.testing.assert_close(pair.weight.double(), best, rtol=1e-4, atol=1e-6)
    save_backbone(small, tmp_path / "small")
    again = load_backbone(tmp_path / "small")
    for side in (32, 45):
        pixels = _pixels(2, side)
        torch.testing.assert_close(_logits(again.model, pixels), _logits(small.model, pixels))
    assert find_targets(again.model) == find_targets(backbone.model)


def test_calibration_looks_at_the_pixels_that_are_multiplied(backbone: Backbone) -> None:
    data = _data(6)
    layers = [layer for layer in plan_layers(backbone.model, 2.0) if layer.name in (STRIDED, WIDE)]
    found = calibrated(backbone.model, layers, data, samples=6, seed=0, gradients=False)
    seen: dict[str, torch.Tensor] = {}
    for name in (STRIDED, WIDE):
        module = backbone.model.get_submodule(name)
        module.register_forward_hook(
            lambda _module, args, _output, name=name: seen.update({name: args[0].double()})
        )
    _logits(backbone.model, torch.from_numpy(data.inputs["pixel_values"]))
    for name, step in ((STRIDED, 2), (WIDE, 1)):
        x = seen[name][:, :, ::step, ::step]
        moment = torch.einsum("nchw,ndhw->cd", x, x) / (x.numel() / x.shape[1])
        want = decompose(backbone.model.get_submodule(name), name, Moments(moment))
        torch.testing.assert_close(found[name].energies, want.energies, rtol=1e-6, atol=1e-12)
    inputs = {"pixel_values": _pixels(1)}
    assert tokens_of(backbone.model, [STRIDED, WIDE], inputs) == {STRIDED: 16, WIDE: 64}


def test_with_data(backbone: Backbone, tmp_path: Path) -> None:
    data = _data(24)
    done = compress(backbone, data, CompressConfig(epochs=2, batch_size=8))
    report = build_report(done, backbone, data)
    rows = {row["name"]: row for row in report["layers"]}
    factored = {plan.name for plan in done.backbone.layers}
    assert factored
    for name in factored:
        assert rows[name]["tokens"] in (16, 64)
        assert "milliseconds" not in rows[name]
        assert 0 < rows[name]["relative_error"] < 1
    assert report["macs"]["compressed"] < report["macs"]["dense"]
    save_backbone(done.backbone, tmp_path / "small")
    again = load_backbone(tmp_path / "small")
    torch.testing.assert_close(
        _logits(again.model, _pixels()), _logits(done.backbone.model, _pixels())
    )


def test_time_decides_nothing_about_them(backbone: Backbone) -> None:
    data = _data(6)
    plain = compress(backbone).backbone.layers
    for options in ({"ranks": "kernels"}, {"slow_layers": "dense"}):
        config = CompressConfig(init="svd", epochs=0, **options)
        assert compress(backbone, data, config).backbone.layers == plain
    config = CompressConfig(epochs=0, ranks="global", budget="time")
    with pytest.raises(UsageError, match="budget must be parameters or macs where a convolution"):
        compress(backbone, data, config)


def test_users_in_a_batch_have_their_own_changes(backbone: Backbone) -> None:
    """Every kind of change at once, against torch's convolution with changed weights."""
    model, users, each = backbone.model, 3, 2
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(users, *shape, generator=draw)

    changes = {}
    for name in (STRIDED, WIDE):
        module = model.get_submodule(name)
        wide, high = module.in_channels, module.out_channels
        changes[name] = {
            "input_scale": {"t": random(1, wide)},
            "low_rank": {"A": random(wide, 3), "B": random(3, high)},
            "delta": {"D": random(wide, high)},
            "scale": {"s": random(1, high)},
            "bias": {"b": random(1, high)},
        }
    pixels = _pixels(users * each)
    hooks = Hooks(model, users=users)
    hooks.changes = changes
    hooks.attach(list(changes))
    try:
        hooks.check_batch_first(lambda count: _logits(model, _pixels(count)))
        found = _logits(model, pixels)
        hooks.check_reached()
    finally:
        hooks.detach()
    base = _logits(model, pixels)
    for user in range(users):
        changed = load_backbone(backbone.folder).model
        for name, parts in changes.items():
            changed.set_submodule(name, _convolution(model.get_submodule(name), parts, user))
        rows = slice(each * user, each * (user + 1))
        expected = _logits(changed, pixels[rows])
        torch.testing.assert_close(found[rows], expected, rtol=1e-5, atol=1e-5)
        assert (expected - base[rows]).abs().max() > 0.01


def _convolution(module: nn.Module, parts: dict, user: int) -> nn.Conv2d:
    own = {part: value[user].double() for kind in parts.values() for part, value in kind.items()}
    weight = module.weight.detach().double()[:, :, 0, 0]
    weight = weight + (own["A"] @ own["B"] + own["D"]).T
    weight = weight * (1 + own["t"]) * (1 + own["s"]).T
    fresh = nn.Conv2d(module.in_channels, module.out_channels, 1, module.stride)
    with torch.no_grad():
        fresh.weight.copy_(weight[:, :, None, None])
        fresh.bias.copy_(own["b"][0])
    return fresh


def test_a_pairs_factors_are_not_factored_again(backbone: Backbone) -> None:
    small = compress(backbone).backbone.model
    names = [layer.name for layer in plan_layers(small, 2.0)]
    assert not any(name.endswith((".down", ".up")) for name in names)
    up = find_targets(small, [f"{WIDE}.up"])[0]
    assert layer_type(small.get_submodule(up.name)).is_convolution(small.get_submodule(up.name))


class _Plain(nn.Module):
    """Convolutions in a row: no stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def test_without_blocks_the_way_out_is_said() -> None:
    model = _Plain().eval()
    backbone = Backbone(model, "", "classification", ("head",), ("a", "b"))
    with pytest.raises(RegrowError, match=r"in its blocks, got 2 that stay dense.*--only"):
        compress(backbone)
    done = compress(backbone, config=CompressConfig(only=("second",)))
    assert [plan.name for plan in done.backbone.layers] == ["second"]
    with pytest.raises(RegrowError, match="linear layers in a stack of blocks, got none"):
        find_targets(model)
    assert [target.name for target in find_targets(model, ["second"])] == ["second"]
