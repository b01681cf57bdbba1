"""An imported adapter's probe: the same from a bundle, a Hugging Face directory, a backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from regrow_format.adapter import Adapter
from regrow_runtime import Bundle, Coefficients, MismatchError
from regrow_toolchain.config import ExportConfig
from regrow_toolchain.interop import export_backbone, import_peft
from regrow_toolchain.models import load_backbone, quiet_transformers, save_backbone


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, its `backbone` and `bundle`s, and `peft`, a LoRA of it that PEFT saved."""
    from transformers import BertConfig, BertForSequenceClassification

    room = tmp_path_factory.mktemp("probe")
    torch.manual_seed(3)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=60, max_position_embeddings=24, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    with quiet_transformers():
        BertForSequenceClassification(config).eval().save_pretrained(room / "model")
    backbone = load_backbone(room / "model")
    export_backbone(backbone, room / "bundle")
    export_backbone(backbone, room / "int8", ExportConfig(precision="int8"))
    save_backbone(backbone, room / "backbone")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    wrapped = peft.get_peft_model(load_backbone(room / "model").model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(room / "peft")
    return room


def _imported(room: Path, base: str) -> Adapter:
    return Adapter.from_bytes(import_peft(room / "peft", room / base).to_bytes())


def test_every_kind_of_backbone_gives_the_same_probe(room: Path) -> None:
    probes = [_imported(room, base).probe for base in ("bundle", "model", "backbone")]
    for probe in probes:
        assert probe is not None
        assert probe.expected.shape == (3,)
        assert probe.input == probes[0].input  # type: ignore[union-attr]
        np.testing.assert_allclose(
            probe.expected.astype(float),
            probes[0].expected.astype(float),
            rtol=2e-3,
            atol=1e-3,  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("bundle", ["bundle", "int8"])
def test_bundles_check_an_imported_adapter(room: Path, bundle: str) -> None:
    adapter = _imported(room, "bundle")
    opened = Bundle.open(room / bundle, threads=1)
    opened.swap(adapter, name="user", check=True)
    assert opened.check().finding == "fine"
    turned = {
        name: Coefficients(np.ascontiguousarray(part.values[:, ::-1]), part.scale)
        for name, part in adapter.coefficients.items()
    }
    with pytest.raises(MismatchError, match="what it gave at training"):
        opened.swap(replace(adapter, coefficients=turned), name="turned", check=True)


def test_a_bundle_that_rounds_gives_no_probe(room: Path) -> None:
    """Its outputs are not what an exact one would give."""
    assert _imported(room, "int8").probe is None
