"""What an adapter says of its model in torch is what a bundle computes, in every family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, slot_targets
from regrow_export.validation import completed, fingerprint, standard_inputs
from regrow_format.adapter import Adapter
from regrow_format.methods import get_method
from regrow_format.philox import philox4x32
from regrow_runtime import Bundle, Coefficients, MismatchError
from regrow_toolchain.adapters import Prober, adapt, adapt_users, applied, probe_of
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone

BACKBONE = "sha256:" + "ab" * 32
_SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "initializer_range": 0.1,
}  # fmt: skip
_QUICK = AdaptConfig(
    steps=4, holdout=0.0, shift=0.0, noise=0.0, method_settings={"k": "8", "l": "8"}
)


class Mixer(nn.Module):
    """No Hugging Face model: a mask, tokens of a small table and floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 64)
        self.first = nn.Linear(64, 64)
        self.fc = nn.Linear(64, 5)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        found = (self.table(tokens) * mask[..., None]).sum(1) + x
        scores: torch.Tensor = self.fc(torch.tanh(self.first(found)))
        return scores


_PLAIN = {
    "tokens": np.zeros((3, 6), np.int64),
    "mask": np.ones((3, 6), bool),
    "x": np.linspace(-1, 1, 192, dtype=np.float32).reshape(3, 64),
}


def _model(family: str) -> tuple[nn.Module, str, list[str]]:
    """A model, its task, and layers that adapters change."""
    import transformers as t

    torch.manual_seed(1)
    if family == "plain":
        return Mixer().eval(), "custom", ["first"]
    if family == "vit":
        config = t.ViTConfig(**_SMALL, image_size=(16, 24), patch_size=8, num_labels=40)
        return t.ViTForImageClassification(config).eval(), "image-classification", ["query"]
    if family == "swin":
        config = t.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=32,
            depths=[2],
            num_heads=[2],
            window_size=4,
            initializer_range=0.1,
        )
        return t.SwinForImageClassification(config).eval(), "image-classification", ["query"]
    if family == "bert":
        config = t.BertConfig(**_SMALL, vocab_size=90, num_labels=3)
        return t.BertForSequenceClassification(config).eval(), "text-classification", ["query"]
    if family == "roberta":
        config = t.RobertaConfig(**_SMALL, vocab_size=90, num_labels=3)
        return t.RobertaForSequenceClassification(config).eval(), "text-classification", ["query"]
    if family == "features":
        return t.BertModel(t.BertConfig(**_SMALL, vocab_size=90)).eval(), "feature-extraction", [
            "query"
        ]  # fmt: skip
    if family == "gpt2":
        config = t.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=40, vocab_size=90)
        return t.GPT2LMHeadModel(config).eval(), "text-generation", ["c_attn"]
    if family == "llama":
        config = t.LlamaConfig(**_SMALL, vocab_size=90)
        return t.LlamaForCausalLM(config).eval(), "text-generation", ["q_proj", "v_proj"]
    assert family == "wav2vec2"
    config = t.Wav2Vec2Config(
        **_SMALL, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        num_labels=4, classifier_proj_size=16,
    )  # fmt: skip
    model = t.Wav2Vec2ForSequenceClassification(config).eval()
    return model, "audio-classification", ["q_proj", "v_proj"]


def _adapter(model: nn.Module, ends: list[str], scale: float = 1.0) -> Adapter:
    """A made one, strong enough to be seen."""
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in ends]
    targets = slot_targets(model, names)
    config = {"k": 16, "l": 12, "rank": 4, "c": 40.0, "shared": True}
    method, rng = get_method("nola"), np.random.default_rng(3)
    constants = method.constants(config, targets)
    values = {
        name: Coefficients.store(
            scale * rng.standard_normal(shape).astype(np.float32), constants[name], "int8"
        )
        for name, shape in method.layout(config, targets).items()
    }
    return Adapter("nola", config, 5, BACKBONE, tuple(targets), values, "int8")


def _turned(adapter: Adapter) -> Adapter:
    values = {
        name: Coefficients(np.ascontiguousarray(part.values[:, ::-1]), part.scale)
        for name, part in adapter.coefficients.items()
    }
    return replace(adapter, coefficients=values)


_FAMILIES = [
    "vit", "bert", "plain",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("swin", "roberta", "features", "gpt2", "llama", "wav2vec2")),
]  # fmt: skip


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_bundle_gives_what_torch_gave(family: str, precision: str, tmp_path: Path) -> None:
    model, task, ends = _model(family)
    if family == "plain" and precision != "fp32":
        pytest.skip("a module without blocks has nothing to round")
    adapter = _adapter(model, ends)
    prober = Prober(model, _PLAIN if family == "plain" else None)
    with applied(model, adapter):
        adapter = replace(adapter, probe=prober.probe())
    assert adapter.probe is not None
    assert 0 < adapter.probe.expected.size <= 32
    names = [target.name for target in adapter.targets]
    inputs = _PLAIN if family == "plain" else None
    source = ExportSource(model, task, BACKBONE)
    manifest = export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=names, precision=precision), inputs=inputs),
    )
    assert manifest.checks is not None
    assert manifest.checks.probe == adapter.probe.input
    assert (manifest.checks.spread == 0) == (precision == "fp32")
    bundle = Bundle.open(tmp_path / "b", threads=1)
    assert bundle.check().finding == "fine"
    bundle.swap(adapter, name="right", check=True)
    found = bundle.check()
    assert found.finding == "fine"
    assert found.effect is not None
    assert found.effect > 0
    bundle.load(_turned(adapter), name="turned")
    assert bundle.check("turned").finding == "differs"
    with pytest.raises(MismatchError, match="the same as without it"):
        bundle.swap(replace(_adapter(model, ends, 0.0), probe=adapter.probe), name="0", check=True)
    assert bundle.active == "right"


# -- the input -------------------------------------------------------------------------------------


def test_the_input_is_the_documented_one() -> None:
    """docs/bundle-format.md: words of Philox, role 6, key 0; the vector is the name's place."""
    made = standard_inputs(Mixer(), _PLAIN)
    assert made is not None
    assert list(made) == ["mask", "tokens", "x"]
    assert made["mask"].all()
    words = philox4x32(np.arange(3), 1, 6, 0, (0, 0)).reshape(-1).tolist()
    assert made["tokens"].reshape(-1).tolist() == [(word * 7) >> 32 for word in words]
    words = philox4x32(np.arange(32), 2, 6, 0, (0, 0)).reshape(-1).tolist()
    wanted = [(word >> 8) / 2**23 - 1 for word in words]
    assert made["x"].reshape(-1).tolist() == wanted
    digest = hashlib.sha256()
    for name, kind, shape in (("mask", "bool", [1, 6]), ("tokens", "int64", [1, 6]),
                              ("x", "float32", [1, 64])):  # fmt: skip
        digest.update(f"{name} {kind} {shape}\n".encode() + made[name][:1].tobytes())
    digest.update(b"output")
    assert fingerprint(made, "output") == digest.hexdigest()[:16] == "1ccd76c1f6121a24"
    other = {**made, "x": made["x"] + np.float32(0.5)}
    assert len({fingerprint(m, o) for m in (made, other) for o in ("output", "logits")}) == 4


def test_data_only_lends_its_form() -> None:
    """Samples of a user do not enter: neither their values nor how many there are."""
    rng = np.random.default_rng(0)
    data = {name: rng.integers(0, 2, (9, *v.shape[1:])).astype(v.dtype) for name, v in
            _PLAIN.items()}  # fmt: skip
    one, other = standard_inputs(Mixer(), _PLAIN), standard_inputs(Mixer(), data)
    assert one is not None
    assert other is not None
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert standard_inputs(Mixer()) is None


def test_what_a_graph_takes_besides_is_what_models_put_in() -> None:
    ids = np.arange(8, dtype=np.int64).reshape(2, 4)
    others = {
        "input_ids": ids[:, :3], "attention_mask": ids, "token_type_ids": ids, "position_ids": ids
    }  # fmt: skip
    made = completed({"input_ids": ids}, others)
    assert made is not None
    assert list(made) == list(others)
    assert made["attention_mask"].tolist() == [[1] * 4] * 2
    assert made["token_type_ids"].tolist() == [[0] * 4] * 2
    assert made["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert completed({"input_ids": ids}, {**others, "speed": ids}) is None


def test_numbers_that_a_half_cannot_hold_give_no_probe() -> None:
    assert probe_of(np.array([1.0, 7e4]), "") is None
    found = probe_of(np.arange(100.0), "ab")
    assert found is not None
    assert found.expected.tolist() == list(range(68, 100))
    assert (found.tolerance, found.input) == (0.2, "ab")


def test_a_model_that_cannot_take_the_probe_gives_none() -> None:
    class Picky(Mixer):
        def forward(self, tokens: Any, mask: Any, x: Any) -> Any:
            raise ValueError("never")

    assert Prober(Picky().eval(), _PLAIN).probe() is None


# -- training --------------------------------------------------------------------------------------


def test_training_writes_what_a_bundle_gives(
    backbone: Backbone, dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    config = replace(_QUICK, head="new", precision="int4", coefficient_dtype="int2")
    done = adapt(backbone, dataset(40, 5), config)
    export_backbone(backbone, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b", threads=1)
    bundle.swap(done.adapter, name="user", check=True)
    found = bundle.check()
    assert found.finding == "fine"
    assert found.difference is not None
    assert found.difference < 0.01  # of exact weights, whatever it was trained on
    again = Adapter.from_bytes(done.adapter.to_bytes())
    assert again.probe is not None
    assert again.probe.input == bundle.manifest.checks.probe  # type: ignore[union-attr]


def test_users_together_have_probes_of_their_own(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    data = dataset(40, 5)
    users = np.array(["one", "two"])[np.arange(40) % 2]
    done = adapt_users(backbone, replace(data, users=users), _QUICK)
    one, two = (done[user].adapter.probe for user in ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.input == two.input
    assert not np.array_equal(one.expected, two.expected)
    alone = adapt(backbone, data.take(np.flatnonzero(users == "two")), _QUICK).adapter.probe
    assert alone is not None
    np.testing.assert_allclose(alone.expected.astype(float), two.expected.astype(float), atol=2e-3)


def test_it_costs_little(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    """Forward passes besides those of training: one of one sample."""
    seen: list[int] = []
    handle = backbone.model.register_forward_hook(
        lambda _m, _a, output: seen.append(len(output.logits))
    )
    adapt(backbone, dataset(40, 5), _QUICK)
    handle.remove()
    assert seen.count(1) == 1
