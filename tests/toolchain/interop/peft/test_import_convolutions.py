"""LoRA on convolutions of 1 x 1, as PEFT trains and saves it: PEFT's own outputs after import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from regrow_export import ExportConfig
from regrow_format.errors import MismatchError
from regrow_runtime import Bundle
from regrow_toolchain.adapters import applied
from regrow_toolchain.compress import compress
from regrow_toolchain.interop import export_backbone, import_peft
from regrow_toolchain.models import (
    Backbone,
    find_targets,
    load_backbone,
    quiet_transformers,
    save_backbone,
)

# Class, sizes, what PEFT adapts: convolutions alone, some with a stride, or linear layers beside.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "resnet": ("ResNetForImageClassification",
               {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2],
                "layer_type": "bottleneck"},
               {"target_modules": r".*(layer\.[02]|shortcut)\.convolution"}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification",
                     # With it, the model reads a stride that PEFT's wrapper does not have.
                     {"depth_multiplier": 0.35, "image_size": 64, "tf_padding": False},
                     {"target_modules": r".*layer\.(5|14)\.(expand|reduce)_1x1\.convolution",
                      "rank_pattern": {"layer.5.expand_1x1.convolution": 7}, "use_rslora": True}),
    "mobilevit": ("MobileViTForImageClassification",
                  {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32],
                   "num_attention_heads": 2, "image_size": 64,
                   "initializer_range": 0.2},
                  {"target_modules": ["conv_1x1.convolution", "conv_projection.convolution",
                                      "value"]}),
}  # fmt: skip


def _pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def _built(name: str) -> nn.Module:
    """With random weights, and BatchNorm's statistics as training would leave them."""
    import transformers

    kind, sizes, _ = MODELS[name]
    torch.manual_seed(7)
    model_class = getattr(transformers, kind)
    model: nn.Module = model_class(model_class.config_class(num_labels=3, **sizes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(pixel_values=_pixels(8))
    return model.eval()


@pytest.fixture
def dense(tmp_path: Path) -> Callable[[str], Path]:
    """dense("resnet"): a Hugging Face directory."""

    def folder(name: str) -> Path:
        with quiet_transformers():
            _built(name).save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return folder


def _trained(backbone: Backbone, folder: Path, **options: Any) -> tuple[Path, np.ndarray]:
    """A PEFT directory with random factors, and what PEFT's model gives."""
    model = peft.get_peft_model(backbone.model, peft.LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
        wanted = model.eval()(pixel_values=_pixels()).logits.numpy()
    model.save_pretrained(folder)
    return folder, wanted


def _logits(backbone: Backbone) -> np.ndarray:
    with torch.inference_mode():
        found: Tensor = backbone.model(pixel_values=_pixels()).logits
    return found.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_pefts(dense: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = dense(name)
    saved, wanted = _trained(load_backbone(folder), tmp_path / "peft", **MODELS[name][2])
    backbone = load_backbone(folder)
    adapter = import_peft(saved, folder)
    assert np.abs(wanted - _logits(backbone)).max() > 1e-3
    with applied(backbone.model, adapter):
        np.testing.assert_allclose(_logits(backbone), wanted, rtol=1e-5, atol=1e-5)

    targets = [target.name for target in adapter.targets]
    inputs = {"pixel_values": _pixels().numpy()}
    export_backbone(backbone, tmp_path / "b", ExportConfig(targets=targets), inputs=inputs)
    again = import_peft(saved, tmp_path / "b")
    assert again.coefficients.keys() == adapter.coefficients.keys()
    bundle = Bundle.open(tmp_path / "b")
    bundle.swap(again, name="user")
    np.testing.assert_allclose(bundle.run(inputs)["logits"], wanted, rtol=1e-4, atol=1e-5)
    mixed = bundle.run(inputs, adapters=[None, "user"])["logits"]
    np.testing.assert_allclose(mixed[1], wanted[1], rtol=1e-4, atol=1e-5)

    merged = ExportConfig(mode="merged")
    export_backbone(backbone, tmp_path / "m", merged, adapter=adapter, inputs=inputs)
    found = Bundle.open(tmp_path / "m").run(inputs)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_on_a_compressed_backbone(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT adapts the factors; regrow's own adapters take the pair."""
    save_backbone(compress(load_backbone(dense("resnet"))).backbone, tmp_path / "small")
    small = load_backbone(tmp_path / "small")
    saved, wanted = _trained(small, tmp_path / "peft", target_modules=["down", "up"])
    adapter = import_peft(saved, tmp_path / "small")
    assert {target.name.rpartition(".")[2] for target in adapter.targets} == {"down", "up"}
    backbone = load_backbone(tmp_path / "small")
    with applied(backbone.model, adapter):
        np.testing.assert_allclose(_logits(backbone), wanted, rtol=1e-5, atol=1e-5)


def test_larger_kernels_are_refused(dense: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dense("resnet")
    pattern = r".*stages\.0.*layer\.%s\.convolution"
    options = {"target_modules": pattern % "1"}
    saved, _ = _trained(load_backbone(folder), tmp_path / "one", **options)
    with pytest.raises(MismatchError, match="or adapts no linear layers of it"):
        import_peft(saved, folder)
    options = {"target_modules": pattern % "[01]"}
    saved, _ = _trained(load_backbone(folder), tmp_path / "both", **options)
    with pytest.raises(MismatchError, match=r"1 x 1 convolution, got factors \[4, 4, 3, 3\] and"):
        import_peft(saved, folder)


def test_all_linear_is_pefts(dense: Callable[[str], Path]) -> None:
    """Not the convolutions, which `@all` has."""
    folder = dense("mobilevit")
    backbone = load_backbone(folder)
    found = {target.name for target in find_targets(backbone.model, ["all-linear"])}
    model = peft.get_peft_model(
        load_backbone(folder).model, peft.LoraConfig(target_modules="all-linear")
    )
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for name, module in model.named_modules()
        if name.endswith(".base_layer")
    }
    assert found == theirs - {"classifier"}
    blocks = {target.name for target in find_targets(backbone.model)}
    assert any(name.endswith("expand_1x1.convolution") for name in blocks)
    small = compress(backbone).backbone.model
    assert {target.name for target in find_targets(small, ["all-linear"])} == found
