"""Training sees the weights of the device, and gives the backbone its own back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from regrow_export.quantization import round_weight, rounded_weights
from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.compress import Compressed
from regrow_toolchain.models import Backbone, load_backbone

_BLOCK = "vit.encoder.layer.0"


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_linear_layers_of_the_blocks_are_rounded(backbone: Backbone, precision: str) -> None:
    model = backbone.model
    before = _state(model)
    with rounded_weights(model, precision) as rounded:
        assert rounded is model
        changed = _changed(model, before)
        name = f"{_BLOCK}.intermediate.dense.weight"
        expected = round_weight(before[name].T.contiguous().numpy(), precision).T
        assert np.array_equal(model.state_dict()[name].numpy(), expected)
    assert changed == {
        n for n in before if n.startswith("vit.encoder.layer.") and n.endswith(".weight")
        and "layernorm" not in n
    }  # fmt: skip
    assert len(changed) == 12
    assert _changed(model, before) == set()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_both_factors_are_rounded(compressed: Compressed, precision: str) -> None:
    model = compressed.backbone.model
    before = _state(model)
    with rounded_weights(model, precision):
        changed = _changed(model, before)
    assert {n.rsplit(".", 2)[1] for n in changed} == {"down", "up"}
    assert len(changed) == 24
    assert _changed(model, before) == set()


def test_conv1d_has_its_outputs_last(gpt2_folder: Path) -> None:
    model = load_backbone(gpt2_folder).model
    before = _state(model)
    with rounded_weights(model, "int8"):
        changed = _changed(model, before)
        name = "transformer.h.0.attn.c_attn.weight"
        expected = round_weight(before[name].numpy(), "int8")  # [in, out] as it is
        assert np.array_equal(model.state_dict()[name].numpy(), expected)
    assert len(changed) == 8
    assert not any("wte" in name or "lm_head" in name for name in changed)


def test_outputs_are_near_and_come_back(backbone: Backbone) -> None:
    pixels = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)
    far = {}
    with torch.no_grad():
        exact = backbone.model(pixels).logits
        for precision in ("fp32", "int8", "int4"):
            with rounded_weights(backbone.model, precision):
                far[precision] = (backbone.model(pixels).logits - exact).abs().max().item()
        assert torch.equal(backbone.model(pixels).logits, exact)
    assert far["fp32"] == 0
    assert 0 < far["int8"] < far["int4"] < exact.abs().max().item()


def test_weights_come_back_after_an_error(backbone: Backbone) -> None:
    before = _state(backbone.model)
    weights = {name: p.data_ptr() for name, p in backbone.model.named_parameters()}
    with pytest.raises(ValueError, match="of the user"), rounded_weights(backbone.model, "int4"):
        raise ValueError("of the user")
    assert _changed(backbone.model, before) == set()
    assert {name: p.data_ptr() for name, p in backbone.model.named_parameters()} == weights


def test_gradients_flow_through_rounded_weights(backbone: Backbone) -> None:
    """To the inputs, as an adapter's training needs; the frozen weights get none."""
    model = backbone.model.requires_grad_(False)
    pixels = torch.ones(1, 3, 12, 12, requires_grad=True)
    with rounded_weights(model, "int8"):
        model(pixels).logits.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_weight_that_is_not_finite_is_named(backbone: Backbone) -> None:
    weight = backbone.model.get_parameter(f"{_BLOCK}.output.dense.weight")
    with torch.no_grad():
        weight[0, 0] = torch.nan
    before = _state(backbone.model)
    name = rf"{_BLOCK}\.output\.dense\.weight: weight must be finite"
    with pytest.raises(RegrowError, match=name), rounded_weights(backbone.model, "int8"):
        pass
    assert _changed(backbone.model, before) <= {f"{_BLOCK}.output.dense.weight"}  # NaN != NaN


class _Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 3)


def test_tied_weights_are_rounded_once() -> None:
    """Rounding twice is another rounding in int4: the largest entry may have moved."""
    blocks = [nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))]
    blocks[1][0].weight = blocks[0][0].weight
    model = _Stack(*blocks)
    before = model.blocks[0][0].weight.detach().clone()
    with rounded_weights(model, "int4"):
        assert model.blocks[1][0].weight is model.blocks[0][0].weight
        expected = round_weight(before.T.contiguous().numpy(), "int4").T
        assert np.array_equal(model.blocks[0][0].weight.detach().numpy(), expected)
    assert torch.equal(model.blocks[0][0].weight, before)


def test_multihead_attention_is_rounded() -> None:
    model = _Stack(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    before = _state(model)
    with rounded_weights(model, "int8"):
        changed = _changed(model, before)
    assert {n.removeprefix("blocks.0.") for n in changed} == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
        "linear2.weight",
    }  # fmt: skip


def test_half_precision_stays_half(backbone: Backbone) -> None:
    model = backbone.model.to(torch.bfloat16)
    before = _state(model)
    with rounded_weights(model, "int8"):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert _changed(model, before)
    assert _changed(model, before) == set()


def test_what_is_refused(backbone: Backbone) -> None:
    wrong = "precision must be one of fp32, fp16, int8, int4, got 'int2'"
    with pytest.raises(UsageError, match=wrong), rounded_weights(backbone.model, "int2"):
        pass
    plain = nn.Sequential(nn.Linear(4, 4))
    with rounded_weights(plain, "fp32"):
        pass
    with pytest.raises(RegrowError, match="model must have linear layers in a stack of blocks"), \
            rounded_weights(plain, "int8"):  # fmt: skip
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's tracer
def test_what_the_device_computes(compressed: Compressed, tmp_path: Path) -> None:
    """A quantised graph of a block's layers holds the very weights that training saw."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    layer = compressed.backbone.model.get_submodule(f"{_BLOCK}.intermediate.dense")
    path = tmp_path / "pair.onnx"
    torch.onnx.export(
        layer, (torch.ones(1, 5, layer.in_features),), path, dynamo=False, opset_version=18
    )
    quantize_dynamic(
        path, tmp_path / "int8.onnx", per_channel=True, reduce_range=True,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    parts = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    stored = [
        codes.astype(np.float32) * parts[name.replace("_quantized", "_scale")]
        for name, codes in parts.items() if name.endswith("_quantized")
    ]  # fmt: skip
    with rounded_weights(compressed.backbone.model, "int8"):
        seen = [layer.down.weight.T.numpy(), layer.up.weight.T.numpy()]
    assert len(stored) == 2
    for weight in stored:
        assert any(w.shape == weight.shape and np.array_equal(w, weight) for w in seen)
