"""A swappable bundle is the base model to programs that know nothing of regrow."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from regrow_runtime import Bundle
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import load_backbone

_TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9))
_INPUTS: dict[str, dict[str, np.ndarray]] = {
    "ImageClassification": {
        "pixel_values": np.linspace(-1, 1, 864, dtype=np.float32).reshape(2, 3, 12, 12)
    },
    "SequenceClassification": {
        "input_ids": _TOKENS,
        "attention_mask": np.ones((2, 9), np.int64),
        "token_type_ids": np.zeros((2, 9), np.int64),
    },
    "CausalLM": {"input_ids": _TOKENS, "attention_mask": np.ones((2, 9), np.int64)},
}
_FOLDERS = {
    "ImageClassification": "vit_folder",
    "SequenceClassification": "bert_folder",
    "CausalLM": "gpt2_folder",
}


@pytest.fixture(scope="module")
def bundle_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Path]]:
    """bundle_of(kind): the torch model and its bundle; each is made once."""
    room, made = tmp_path_factory.mktemp("bundles"), {}

    def make(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            backbone = load_backbone(request.getfixturevalue(_FOLDERS[kind]))
            export_backbone(backbone, room / kind)
            made[kind] = (backbone.model, room / kind)
        return made[kind]

    return make


def _reads_cache(folder: Path) -> bool:
    graph = onnx.load(folder / "backbone.onnx", load_external_data=False).graph
    return any("past" in value.name for value in graph.input)


@pytest.mark.filterwarnings("default")  # optimum's and its dependencies' own
@pytest.mark.parametrize("kind", list(_INPUTS))
def test_optimum_opens_a_bundle_as_the_base_model(
    bundle_of: Callable[[str], tuple[Any, Path]], kind: str
) -> None:
    model, folder = bundle_of(kind)
    opener = getattr(importlib.import_module("optimum.onnxruntime"), f"ORTModelFor{kind}")
    options = {"use_cache": _reads_cache(folder)} if kind == "CausalLM" else {}
    loaded = opener.from_pretrained(folder, file_name="backbone.onnx", **options)
    inputs = {name: torch.from_numpy(value) for name, value in _INPUTS[kind].items()}
    with torch.inference_mode():
        wanted = model(**inputs).logits
        found = loaded(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert loaded.config.model_type == model.config.model_type
    if kind == "ImageClassification":
        assert loaded.config.id2label == model.config.id2label


@pytest.mark.filterwarnings("default")
def test_optimum_generates_with_a_language_models_bundle(
    bundle_of: Callable[[str], tuple[Any, Path]],
) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    model, folder = bundle_of("CausalLM")
    cache = _reads_cache(folder)
    loaded = ORTModelForCausalLM.from_pretrained(folder, file_name="backbone.onnx", use_cache=cache)
    inputs = {name: torch.from_numpy(value) for name, value in _INPUTS["CausalLM"].items()}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**inputs, **options)
    found = loaded.generate(**inputs, use_cache=cache, **options)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", list(_INPUTS))
def test_names_of_inputs_and_outputs_are_the_models(
    bundle_of: Callable[[str], tuple[Any, Path]], kind: str
) -> None:
    _, folder = bundle_of(kind)
    graph = Bundle.open(folder).graph
    assert {spec.name for spec in graph.inputs} >= set(_INPUTS[kind])
    assert graph.outputs[0].name == "logits"


@pytest.mark.filterwarnings("default")  # PEFT's own
def test_what_an_olive_user_types(
    cli: Callable[..., Any], bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of docs/interchange.md: the same file pair as extract-adapters, PEFT's outputs."""
    import onnxruntime as ort
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    settings = LoraConfig(
        r=3, lora_alpha=8, target_modules=["query", "output.dense"], init_lora_weights=False
    )
    inputs = _INPUTS["SequenceClassification"]
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode():
        base = load_backbone(bert_folder).model(**tensors).logits.numpy()
        tuned = get_peft_model(load_backbone(bert_folder).model, settings).eval()
        wanted = tuned(**tensors).logits.numpy()
    tuned.save_pretrained(tmp_path / "PEFT_DIR")

    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "interchange.md").read_text(encoding="utf-8")
    typed = page.partition("extract-adapters`, with a PEFT")[2].split("```")[1].splitlines()[1:]
    assert [line.split()[1] for line in typed] == ["export", "import", "convert"]
    for line in typed:
        words = line.replace("MODEL", str(bert_folder)).split()[1:]
        assert cli(*words).code == 0

    session = ort.InferenceSession("bundle/backbone.onnx", _quiet())
    adapter = ort.LoraAdapter()
    adapter.Load("user.onnx_adapter")
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    found = session.run(["logits"], inputs, options)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(session.run(["logits"], inputs)[0], base, rtol=1e-4, atol=1e-5)
    assert np.abs(found - base).max() > 1e-3


def _quiet() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options
