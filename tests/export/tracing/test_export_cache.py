"""Causal language models with a key-value cache: as transformers generates, in every mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import regrow_export.tracing.tracer
from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, find_linears
from regrow_export.quantization import rounded_weights
from regrow_export.slots import KINDS, expansion_feeds, set_slots, with_slots
from regrow_export.tracing.kv_cache import cache_of
from regrow_format.basis import BasisCache
from regrow_format.methods import get_method
from regrow_runtime import Bundle, Generation, RegrowError, UsageError

BACKBONE = "sha256:" + "ab" * 32
PROMPTS = [[5, 9, 3, 17, 2, 8, 4], [11, 6, 30], [7]]
COUNT = 12
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 40}  # fmt: skip
# initializer_range: spread, so that the likeliest token changes from place to place.
_COMMON = {"initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60,
                      "n_positions": 40}),
    "llama": ("Llama", {**_SIZES, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {**_SIZES, "num_key_value_heads": 2}),  # grouped queries, biases
}  # fmt: skip


def make_source(family: str) -> ExportSource:
    import transformers

    name, sizes = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**sizes, **_COMMON)
    kind = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    return ExportSource(getattr(transformers, kind)(config).eval(), "text-generation", BACKBONE)


def targets_of(source: ExportSource) -> list[str]:
    """Two linear layers of each block."""
    names = [n for n in find_linears(source.model) if n.endswith(("c_attn", "q_proj", "v_proj"))]
    assert len(names) in (2, 4)
    return names


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def source(family):
    return make_source(family)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "bundle"
    export_bundle(source, out, ExportRequest(ExportConfig(targets=targets_of(source))))
    return out


@pytest.fixture
def lm(folder):
    return Bundle.open(folder, threads=1)


def generated(model, prompts, **options):
    """transformers' own greedy text: new tokens by sample, each up to the one that ends it."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": 1, **options}
    with torch.inference_mode():
        rows = model.generate(ids, attention_mask=mask, **options)[:, length:].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def lists(made):
    return [tokens.tolist() for tokens in made.tokens]


def test_the_manifest_names_the_cache(folder, source, lm):
    manifest, config = lm.manifest, source.model.config
    cache = manifest.cache
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert {(t.heads, t.head_dim) for t in cache.tensors} == {(heads, 8)}
    assert [t.past for t in cache.tensors[:2]] == ["past_key_values.0.key",
                                                   "past_key_values.0.value"]  # fmt: skip
    assert len(cache.tensors) == 2 * config.num_hidden_layers
    assert (cache.context, cache.stop, cache.dtype) == (40, (1,), "float32")
    assert [spec.name for spec in manifest.graphs[0].outputs] == ["logits"]
    assert {spec.name for spec in manifest.graphs[0].inputs} == set(cache.inputs.values())


def test_greedy_is_transformers_own(source, lm):
    """Alone, and in a batch with padding and samples that end before others."""
    wanted = generated(source.model, PROMPTS)
    assert len({tuple(row) for row in wanted}) == 3
    assert lists(lm.generate(PROMPTS, max_new_tokens=COUNT)) == wanted
    for prompt, row in zip(PROMPTS, wanted, strict=True):
        assert lists(lm.generate(prompt, max_new_tokens=COUNT)) == [row]


class Watched:
    """A bundle for a conversation, which keeps the logits after the last token of each step."""

    def __init__(self, bundle):
        self.manifest, self.adapter_feeds = bundle.manifest, bundle.adapter_feeds
        self.bundle, self.logits = bundle, []

    def run_graph(self, names, feeds):
        found = self.bundle.run_graph(names, feeds)
        self.logits.append(found[names.index(self.manifest.cache.logits)][:, -1])
        return found


def test_logits_by_steps_and_at_once(source, lm):
    ids = np.array([PROMPTS[0]])
    with torch.inference_mode():
        wanted = source.model(torch.from_numpy(ids)).logits.numpy()
    found = lm.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    np.testing.assert_allclose(found["logits"], wanted, rtol=1e-4, atol=1e-5)
    watched = Watched(lm)
    chat = Generation(watched, stop=())
    chat.generate(PROMPTS[0][:3], max_new_tokens=4)
    chat.generate(PROMPTS[1], max_new_tokens=4)  # several tokens on top of a cache
    with torch.inference_mode():
        wanted = source.model(torch.from_numpy(chat.ids)).logits.numpy()
    places = [2, 3, 4, 5, 9, 10, 11, 12]  # of the last token that each step saw
    for place, step in zip(places, watched.logits, strict=True):
        np.testing.assert_allclose(step, wanted[:, place], rtol=1e-4, atol=1e-5)


def test_with_an_adapter(source, lm, adapter_for):
    """And after a swap in the middle of a text: all of it is the other adapter's."""
    names = targets_of(source)
    slotted = with_slots(source.model, lm.manifest.slots)
    wanted = {}
    for draw, name in enumerate(("one", "two")):
        adapter = adapter_for(source, names, draw=draw)
        lm.load(adapter, name=name)
        set_slots(slotted, expansion_feeds(get_method("nola").expand(adapter, BasisCache())))
        wanted[name] = generated(slotted, PROMPTS)
        if name == "two":
            told = [p + row for p, row in zip(PROMPTS, wanted["one"], strict=True)]
            later = generated(slotted, [[*t, 9] for t in told])
    assert wanted["one"] != generated(source.model, PROMPTS)
    assert lists(lm.generate(PROMPTS, max_new_tokens=COUNT, adapters=["one", "two", "one"])) == [
        wanted["one"][0], wanted["two"][1], wanted["one"][2]
    ]  # fmt: skip
    lm.swap("one")
    chat = lm.chat()
    assert lists(chat.generate(PROMPTS, max_new_tokens=COUNT)) == wanted["one"]
    lm.swap("two")
    made = chat.generate([[9], [9], [9]], max_new_tokens=COUNT)
    assert lists(made) == later
    assert made.recomputed > 0


@pytest.mark.parametrize(("mode", "family"), [
    ("merged", "gpt2"), ("seeded", "llama"), ("merged", "qwen2"),
], indirect=["family"])  # fmt: skip
def test_other_modes(source, family, adapter_for, tmp_path, mode):
    adapter = adapter_for(source, targets_of(source))
    export_bundle(source, tmp_path / "b", ExportRequest(ExportConfig(mode=mode), adapter=adapter))
    lm = Bundle.open(tmp_path / "b", threads=1)
    slots = [KINDS["low_rank"].slot(target) for target in adapter.targets]
    slotted = with_slots(source.model, slots)
    set_slots(slotted, expansion_feeds(get_method("nola").expand(adapter, BasisCache())))
    assert lists(lm.generate(PROMPTS, max_new_tokens=COUNT)) == generated(slotted, PROMPTS)


@pytest.mark.parametrize(("precision", "family"), [
    ("fp16", "gpt2"), ("int8", "gpt2"), ("int8", "llama"), ("int4", "qwen2"),
], indirect=["family"])  # fmt: skip
def test_precisions(source, family, tmp_path, precision):
    """Texts of a model with the same weights; int8 rounds inputs too, and is only near."""
    manifest = export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=targets_of(source), precision=precision)),
    )
    assert (manifest.variant, len(manifest.cache.tensors)) == (precision, 4)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    lm = Bundle.open(tmp_path / "b", session_options=options)
    with rounded_weights(source.model, precision):
        wanted = generated(source.model, PROMPTS)
        with torch.inference_mode():
            exact = source.model(torch.tensor([PROMPTS[0]])).logits.numpy()
    found = lm.run({"input_ids": [PROMPTS[0]]})["logits"]
    if precision == "int8":
        assert np.square(found - exact).mean() < 0.01 * np.square(exact).mean()
        assert len(lm.generate(PROMPTS, max_new_tokens=COUNT).tokens) == 3
    else:
        assert lists(lm.generate(PROMPTS, max_new_tokens=COUNT)) == wanted


# -- what is asked for, and what is refused -------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return make_source("llama")


def test_without_a_cache(llama, tmp_path):
    manifest = export_bundle(
        llama,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=targets_of(llama), cache=False)),
    )
    assert manifest.cache is None
    lm = Bundle.open(tmp_path / "b", threads=1)
    with pytest.raises(UsageError, match="without --no-cache"):
        lm.generate([1])
    ids = np.array([PROMPTS[0]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids),
              "position_ids": np.arange(7)[None]}  # fmt: skip
    assert lm.run(inputs)["logits"].shape == (1, 7, 60)


def test_a_cache_that_is_wrong_is_found_at_export(llama, tmp_path, monkeypatch):
    """Keys of the one layer taken for those of the other."""

    def crossed(graph, model):
        spec = cache_of(graph, model)
        presents = [spec.tensors[i].present for i in (2, 1, 0, 3)]
        tensors = [replace(t, present=p) for t, p in zip(spec.tensors, presents, strict=True)]
        return replace(spec, tensors=tuple(tensors))

    monkeypatch.setattr(regrow_export.tracing.tracer, "cache_of", crossed)
    with pytest.raises(RegrowError, match="base, with the key-value cache: ONNX Runtime and torch"):
        export_bundle(llama, tmp_path / "b", ExportRequest(ExportConfig(targets=targets_of(llama))))
    assert list(tmp_path.iterdir()) == []


def test_inputs_may_be_given(llama, tmp_path):
    """The mask and the positions follow from the ids."""
    inputs = {"input_ids": np.array([PROMPTS[0], PROMPTS[0][::-1]])}
    manifest = export_bundle(
        llama, tmp_path / "b", ExportRequest(ExportConfig(targets=targets_of(llama)), inputs=inputs)
    )
    assert manifest.cache is not None
    assert manifest.parity["base_max_abs"] < 1e-4
