"""Adapters that PEFT itself made and saved: after import the model gives PEFT's own outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regrow_export import ExportConfig
from regrow_runtime import Adapter, Bundle
from regrow_toolchain.adapters import applied
from regrow_toolchain.interop import export_backbone, import_peft
from regrow_toolchain.models import load_backbone, quiet_transformers, save_backbone

# Or not to load: vera_A and vera_B, which are drawn again.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 48, "vocab_size": 60, "num_labels": 3}  # fmt: skip
_LONG = {"max_position_embeddings": 24}
# Class, sizes, targets; a task that PEFT knows saves the head along.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _TEXT | _LONG,
             {"target_modules": ["query", "value", "output.dense"], "task_type": "SEQ_CLS"}),
    "roberta": ("RobertaForSequenceClassification", _TEXT | _LONG,
                {"target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS"}),
    "distilbert": ("DistilBertForSequenceClassification",
                   {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": 60,
                    "num_labels": 3, **_LONG},
                   {"target_modules": ["q_lin", "v_lin", "lin1"], "task_type": "SEQ_CLS"}),
    "vit": ("ViTForImageClassification", {**_TEXT, "image_size": 12, "patch_size": 4},
            {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24,
                                 "vocab_size": 60},
             {"target_modules": ["c_attn", "c_proj", "c_fc"], "task_type": "CAUSAL_LM",
              "fan_in_fan_out": True}),
    "llama": ("LlamaForCausalLM", {**_TEXT, **_LONG, "num_key_value_heads": 1},
              {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
               "task_type": "CAUSAL_LM"}),
    "llama-classes": ("LlamaForSequenceClassification",
                      {**_TEXT, **_LONG, "num_key_value_heads": 1, "pad_token_id": 0},
                      {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
}  # fmt: skip
# PEFT's `classifier` saves what ends in it.
HEADS = {
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """dense("bert"): a Hugging Face directory, made once."""
    import transformers

    room = tmp_path_factory.mktemp("dense")

    def folder(name: str) -> Path:
        if not (room / name).exists():
            kind, sizes, _ = MODELS[name]
            torch.manual_seed(7)
            model_class = getattr(transformers, kind)
            model = model_class(model_class.config_class(initializer_range=0.1, **sizes))
            with quiet_transformers():
                model.eval().save_pretrained(room / name)
        return room / name

    return folder


# Those of every model; none is attention's.
FORWARD = r".*(layer\.\d+\.output\.dense|intermediate\.dense|lin1|mlp\.c_proj|down_proj)"
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 8}),
    "vera": (peft.VeraConfig, {"r": 24, "projection_prng_key": 2**40 + 3}),
    "vera-drawn": (peft.VeraConfig, {"r": 24, "projection_prng_key": 12,
                                     "save_projection": False}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 70, "scaling": 20, "random_loc_seed": 5}),
    "ia3": (peft.IA3Config, {"feedforward_modules": FORWARD}),
}  # fmt: skip


@pytest.fixture
def trained(dense: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """trained("bert", "lora", r=4): a PEFT directory with random coefficients, saved by PEFT."""

    def folder(name: str, kind: str = "lora", **options: Any) -> Path:
        make, settings = KINDS[kind]
        config = make(**{**settings, **MODELS[name][2], **options})
        model = peft.get_peft_model(load_backbone(dense(name)).model, config)
        torch.manual_seed(11)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.requires_grad:
                    large = "vera" in path or "fourier" in path
                    parameter.copy_(torch.randn_like(parameter) * (0.7 if large else 0.2))
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft"

    return folder


def _inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    tokens = torch.randint(4, 60, (2, 9), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _logits(model: nn.Module, name: str) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(**_inputs(name)).logits.numpy()
    return found


def _peft_logits(base: Path, folder: Path, name: str) -> np.ndarray:
    return _logits(peft.PeftModel.from_pretrained(load_backbone(base).model, folder).eval(), name)


def _compare(base: Path, folder: Path, name: str, out: Path) -> Adapter:
    """Import for a backbone that regrow saved, which needs no torch, and compare outputs."""
    backbone = save_backbone(load_backbone(base), out)
    plain = _logits(backbone.model, name)
    adapter = import_peft(folder, out)
    assert adapter.backbone_id == backbone.backbone_id
    adapter = Adapter.from_bytes(adapter.to_bytes())
    with applied(backbone.model, adapter) as model:
        found = _logits(model, name)
    wanted = _peft_logits(base, folder, name)
    print(f"{name}: {np.abs(found - wanted).max():.2e} of {np.abs(wanted).max():.2f}")  # noqa: T201
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(found - plain).max() > 0.01
    return adapter


CONFIGS = {
    "lora": {"rank": 4, "alpha": 8.0, "rslora": False},
    "vera": {"rank": 24},
    "fourierft": {"n": 70, "alpha": 20.0},
}
ENDINGS = {
    "bert": ["0.output.dense", "1.output.dense"],
    "roberta": ["dense"],
    "distilbert": ["lin1"],
    "vit": [],
    "gpt2": ["mlp.c_proj"],
    "llama": ["down_proj"],
    "llama-classes": ["down_proj"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_pefts(
    name: str,
    kind: str,
    dense: Callable[[str], Path],
    trained: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter = _compare(dense(name), trained(name, kind), name, tmp_path / "backbone")
    method = kind.partition("-")[0]
    assert (adapter.method, adapter.storage) == (method, "fp32")
    wanted = {"feedforward": ENDINGS[name]} if method == "ia3" else CONFIGS[method]
    assert dict(adapter.config) == wanted
    own = method in ("lora", "ia3")  # which draw nothing
    assert adapter.basis.kind == ("philox-sign" if own else "peft-mt19937")
    options = {**KINDS[kind][1], **MODELS[name][2]}
    seed = options.get("projection_prng_key", options.get("random_loc_seed", 0))
    assert adapter.seed == seed
    has_head = name not in ("gpt2", "llama")
    assert (adapter.head is not None) == has_head
    if adapter.head:
        assert adapter.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        layers = [layer.name for layer in adapter.head.layers]
        assert layers == HEADS.get(name, layers)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_patterns_and_rslora(
    name: str,
    rslora: bool,
    dense: Callable[[str], Path],
    trained: Callable[..., Path],
    tmp_path: Path,
) -> None:
    ranks = {"bert": {"query": 2, r"layer\.1\..*value": 7}, "gpt2": {"h.0.attn.c_attn": 9}}[name]
    alphas = {"bert": {"layer.0.output.dense": 3, "value": 20}, "gpt2": {"mlp.c_proj": 0.5}}[name]
    folder = trained(name, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    adapter = _compare(dense(name), folder, name, tmp_path / "backbone")
    assert adapter.config["rank"] == max(ranks.values())
    assert adapter.config["rslora"] is rslora


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-classes"])
def test_frequencies_by_pattern(
    name: str, dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    counts = {"bert": {"query": 20, r"layer\.1\..*value": 900}, "gpt2": {"h.0.attn.c_attn": 300},
              "llama-classes": {"k_proj": 11, "layers.1.mlp.up_proj": 333}}[name]  # fmt: skip
    folder = trained(name, "fourierft", n_frequency_pattern=counts)
    adapter = _compare(dense(name), folder, name, tmp_path / "backbone")
    assert adapter.config["n"] == max(counts.values())


def test_projections_of_a_bfloat16_base(
    dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT rounds what it draws to the base's dtype, and computes in float32."""
    folder, rounded = trained("gpt2", "vera-drawn"), tmp_path / "rounded"
    with quiet_transformers():
        load_backbone(dense("gpt2")).model.bfloat16().float().save_pretrained(rounded)
    base = load_backbone(rounded).model.bfloat16()
    wanted = _logits(peft.PeftModel.from_pretrained(base, folder).float().eval(), "gpt2")
    model = load_backbone(rounded).model
    found = {}
    for dtype in ("bfloat16", "float32"):
        with applied(model, import_peft(folder, rounded, base_dtype=dtype)) as changed:
            found[dtype] = _logits(changed, "gpt2")
    np.testing.assert_allclose(found["bfloat16"], wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(found["float32"] - wanted).max() > 1e-4


def test_numbers_are_kept(
    dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Every A, B and head number, bit by bit; from a Hugging Face directory too."""
    folder = trained("vit")
    adapter = import_peft(folder, dense("vit"))
    assert adapter.backbone_id == load_backbone(dense("vit")).backbone_id
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = [target.name for target in adapter.targets]
    for part, turn in (("A", False), ("B", True)):
        stored = [tensors[f"base_model.model.{path}.lora_{part}.weight"] for path in paths]
        rows = np.concatenate([t.numpy().T if turn else t.numpy() for t in stored])
        assert np.array_equal(adapter.coefficients[f"{part}.32"].values, rows)
    assert set(adapter.coefficients["B.32"].scale) == {np.float32(2)}
    saved = Adapter.from_bytes(adapter.to_bytes())
    assert adapter.head is not None
    assert saved.head is not None
    weight = tensors["base_model.model.classifier.weight"].numpy()
    assert np.array_equal(saved.head.layers[0].weight, weight)
    assert saved.digest() == adapter.digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_half(
    dtype: torch.dtype, dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    folder = trained("llama-classes")
    path = folder / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
    _compare(dense("llama-classes"), folder, "llama-classes", tmp_path / "backbone")


def test_names_of_older_files(
    dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """`lora_A.default.weight`, `modules_to_save.default`, and a config with few fields."""
    folder = trained("roberta")
    expected = import_peft(folder, dense("roberta"))
    path = folder / "adapter_model.safetensors"
    renamed = {
        name.replace(".weight", ".default.weight")
        if "lora_" in name
        else name.replace(".classifier.", ".classifier.modules_to_save.default."): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    few = {name: config[name] for name in ("peft_type", "r", "lora_alpha", "bias", "task_type")}
    (folder / "adapter_config.json").write_text(json.dumps(few))
    found = import_peft(folder, dense("roberta"))
    assert found.to_bytes() == expected.to_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_through_a_bundle(
    kind: str, dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """ONNX Runtime with the imported file, layers and head, gives PEFT's outputs."""
    folder, bundle = trained("vit", kind), tmp_path / "bundle"
    first = import_peft(folder, dense("vit"))
    export_backbone(load_backbone(dense("vit")), bundle, adapter=first)
    adapter = import_peft(folder, bundle)
    assert adapter.to_bytes() == first.to_bytes()
    adapter.save(tmp_path / "a.safetensors")
    device = Bundle.open(bundle)
    device.swap(tmp_path / "a.safetensors")
    found = device.run({"pixel_values": _inputs("vit")["pixel_values"].numpy()})["logits"]
    wanted = _peft_logits(dense("vit"), folder, "vit")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_ia3_in_every_kind_of_bundle(
    name: str, dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Swapped, beside others in a batch, and merged: PEFT's outputs."""
    backbone, folder = load_backbone(dense(name)), trained(name, "ia3", task_type=None)
    adapter = import_peft(folder, dense(name))
    wanted, inputs = _peft_logits(dense(name), folder, name), _inputs(name)
    feeds = {key: value.numpy() for key, value in inputs.items()}
    plain = _logits(backbone.model, name)
    assert np.abs(wanted - plain).max() > 0.01
    close = {"rtol": 1e-5, "atol": 1e-5}
    swappable = ExportConfig(cache=False)
    export_backbone(backbone, tmp_path / "swappable", swappable, adapter=adapter)
    device = Bundle.open(tmp_path / "swappable")
    device.swap(adapter, name="imported")
    np.testing.assert_allclose(_run(device, feeds), wanted, **close)
    mixed = _run(device, feeds, adapters=[None, "imported"])
    np.testing.assert_allclose(mixed, np.stack([plain[0], wanted[1]]), **close)
    merged = ExportConfig(mode="merged", cache=False)
    export_backbone(backbone, tmp_path / "merged", merged, adapter=adapter)
    np.testing.assert_allclose(_run(Bundle.open(tmp_path / "merged"), feeds), wanted, **close)


def _run(bundle: Bundle, inputs: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    names = {tensor.name for tensor in bundle.graph.inputs}
    feeds = {name: value for name, value in inputs.items() if name in names}
    if "token_type_ids" in names:
        feeds["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    if "position_ids" in names:
        feeds["position_ids"] = np.tile(np.arange(9), (2, 1))
    return np.asarray(bundle.run(feeds, **options)["logits"])


@pytest.mark.parametrize("shares", [(0.7, 0.3), (-0.5, 2.0)])
def test_a_blend_of_ia3_adds_their_changes(
    shares: tuple[float, float],
    dense: Callable[[str], Path],
    trained: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """PEFT's own model with l = 1 + w1 (l1 - 1) + w2 (l2 - 1)."""
    folder = trained("bert", "ia3", task_type=None)
    one, path = import_peft(folder, dense("bert")), folder / "adapter_model.safetensors"
    first = load_file(path)
    generator = torch.Generator().manual_seed(5)
    second = {n: torch.randn(v.shape, generator=generator) / 5 for n, v in first.items()}
    save_file(second, path)
    two = import_peft(folder, dense("bert"))
    both = {n: 1 + shares[0] * (first[n] - 1) + shares[1] * (second[n] - 1) for n in first}
    save_file(both, path)
    export_backbone(load_backbone(dense("bert")), tmp_path / "bundle", adapter=one)
    device = Bundle.open(tmp_path / "bundle")
    device.load(one, name="one")
    device.load(two, name="two")
    device.swap({"one": shares[0], "two": shares[1]}, name="both")
    found = _run(device, {key: value.numpy() for key, value in _inputs("bert").items()})
    wanted = _peft_logits(dense("bert"), folder, "bert")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("storage", "most"), [("fp16", 2e-3), ("int8", 0.05), ("int4", 1.0)])
def test_smaller_storage(
    storage: str,
    most: float,
    dense: Callable[[str], Path],
    trained: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = trained("bert")
    adapter = import_peft(folder, dense("bert"), storage=storage)
    whole = import_peft(folder, dense("bert"))
    assert len(adapter.to_bytes()) < len(whole.to_bytes())
    model = load_backbone(dense("bert")).model
    saved = Adapter.from_bytes(adapter.to_bytes())
    with applied(model, saved) as changed:
        found = _logits(changed, "bert")
    with applied(model, adapter) as changed:
        assert np.array_equal(found, _logits(changed, "bert"))  # the file is what is in memory
    assert np.abs(found - _peft_logits(dense("bert"), folder, "bert")).max() < most


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_through_a_bundle_with_a_cache(
    name: str, dense: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Token for token what PEFT's model generates, and without the adapter what the base does."""
    folder, bundle = trained(name, "lora"), tmp_path / "bundle"
    adapter = import_peft(folder, dense(name))
    export_backbone(load_backbone(dense(name)), bundle, adapter=adapter)
    device = Bundle.open(bundle, threads=1)
    prompts = _inputs(name)["input_ids"]
    device.swap(adapter, name="imported")
    found = device.generate(prompts.numpy(), max_new_tokens=8, stop=())
    model = peft.PeftModel.from_pretrained(load_backbone(dense(name)).model, folder).eval()
    wanted = [_generated(model, prompts)]
    with model.disable_adapter():
        wanted.append(_generated(model, prompts))
    assert [row.tolist() for row in found.tokens] == wanted[0]
    device.swap(None)
    found = device.generate(prompts.numpy(), max_new_tokens=8, stop=())
    assert [row.tolist() for row in found.tokens] == wanted[1] != wanted[0]


def _generated(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    with torch.inference_mode():
        rows = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            min_new_tokens=8, max_new_tokens=8, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    found: list[list[int]] = rows[:, prompts.shape[1] :].tolist()
    return found
