"""IA³ and SSF through bundles, against their papers' formulas written out in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle
from regrow_format.adapter import Adapter
from regrow_runtime import Bundle

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
METHODS = ("ia3", "ssf")
IDS = np.random.default_rng(3).integers(1, 50, (3, 6))
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
BERT, GPT2 = "bert.encoder.layer.", "transformer.h."
# By architecture: linear layers, of which the last is feed-forward, and norms for SSF.
TARGETS = {
    "bert": (
        [f"{BERT}0.attention.self.value", f"{BERT}1.intermediate.dense", f"{BERT}1.output.dense"],
        [f"{BERT}0.attention.output.LayerNorm"],
    ),
    "gpt2": (
        [f"{GPT2}0.attn.c_attn", f"{GPT2}0.mlp.c_fc", f"{GPT2}1.mlp.c_proj"],
        [f"{GPT2}1.ln_1"],
    ),
    "plain": (["stem", "pooled", "pair"], []),  # 4-D inputs, 2-D inputs, two factors
}
Names = tuple[list[str], list[str]]
Case = tuple[ExportSource, Names, dict[str, np.ndarray]]


@pytest.fixture(params=TARGETS)
def case(request: Any, plain: ExportSource, plain_inputs: Any) -> Case:
    """A source, its targets, and inputs."""
    if request.param == "plain":
        return plain, TARGETS["plain"], plain_inputs
    source = _text_model(request.param, plain.backbone_id)
    return source, TARGETS[request.param], TEXT


def _text_model(name: str, backbone_id: str) -> ExportSource:
    """With weights so large that a change is seen in the logits."""
    import transformers as hf

    torch.manual_seed(6)
    more = {"vocab_size": 50, "num_labels": 3, "initializer_range": 0.2}
    if name == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
        model: Any = hf.GPT2ForSequenceClassification(hf.GPT2Config(**small, **more))
        return ExportSource(model.eval(), "text-classification", backbone_id, ("score",))
    wide = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=2, **wide, **more))
    return ExportSource(model.eval(), "text-classification", backbone_id, ("classifier",))


def _adapters(make: Callable[..., Adapter], case: Case, method: str) -> list[Adapter]:
    source, (linear, norms), _ = case
    names = linear + (norms if method == "ssf" else [])
    config = {"feedforward": [linear[-1]]} if method == "ia3" else {}
    return [
        make(source, names, method=method, storage="fp32", draw=draw, **config) for draw in (1, 2)
    ]


def _small(adapter: Adapter) -> Adapter:
    for part in adapter.coefficients.values():
        part.scale[:] *= 0.1
    return adapter


def _rows(adapter: Adapter) -> dict[str, dict[str, torch.Tensor]]:
    """By target: the rows of the file, in the order of the targets."""
    used = dict.fromkeys(adapter.coefficients, 0)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for target in adapter.targets:
        inputs = adapter.method == "ia3" and target.name in adapter.config["feedforward"]
        for part in "t" if inputs else "sb" if adapter.method == "ssf" else "s":
            name = f"{part}.{target.in_features if inputs else target.out_features}"
            row = torch.from_numpy(adapter.coefficients[name].dense()[used[name]])
            found.setdefault(target.name, {})[part] = row
            used[name] += 1
    return found


@contextmanager
def _changed(model: nn.Module, rows: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """y (1 + s) + b, and x (1 + t)."""
    handles = []
    for name, parts in rows.items():
        module, own = model.get_submodule(name), {p: v.float() for p, v in parts.items()}
        if "t" in own:
            handles.append(
                module.register_forward_pre_hook(lambda _, x, t=own["t"]: (x[0] * (1 + t),))
            )
        if "s" in own:
            shift = own.get("b", torch.zeros(()))
            handles.append(
                module.register_forward_hook(lambda _m, _x, y, s=own["s"], b=shift: y * (1 + s) + b)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wanted(case: Case, blend: Sequence[tuple[Adapter, float]]) -> np.ndarray:
    """The first output by torch, changed by the sum of weight times rows."""
    source, _, inputs = case
    rows: dict[str, dict[str, torch.Tensor]] = {}
    for adapter, weight in blend:
        for name, parts in _rows(adapter).items():
            own = rows.setdefault(name, {})
            for part, row in parts.items():
                own[part] = own.get(part, torch.zeros(())) + weight * row
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode(), _changed(source.model, rows):
        found = source.model(**tensors)
    return (
        found["scores"] if isinstance(found, dict) and "scores" in found else found.logits
    ).numpy()


def _exported(case: Case, folder: Path, mode: str, adapter: Adapter) -> Bundle:
    source, _, inputs = case
    made = None if inputs is TEXT else inputs
    request = ExportRequest(ExportConfig(mode=mode, cache=False), adapter, inputs=made)
    export_bundle(source, folder, request)
    return Bundle.open(folder, threads=1)


def _run(bundle: Bundle, case: Case, **options: Any) -> np.ndarray:
    more = {"token_type_ids": np.zeros_like(IDS), "position_ids": np.tile(np.arange(6), (3, 1))}
    names = [tensor.name for tensor in bundle.graph.inputs]
    found = bundle.run({name: {**more, **case[2]}[name] for name in names}, **options)
    return np.asarray(found[bundle.graph.outputs[0].name])


@pytest.mark.parametrize("method", METHODS)
def test_swapped_in_a_batch_and_blended(
    case: Case, method: str, adapter_for: Callable[..., Adapter], tmp_path: Path
) -> None:
    one, two = map(_small, _adapters(adapter_for, case, method))
    bundle = _exported(case, tmp_path / "b", "swappable", one)
    base = _wanted(case, [])
    np.testing.assert_allclose(_run(bundle, case), base, **CLOSE)
    for name, adapter in (("one", one), ("two", two)):
        adapter.save(tmp_path / f"{name}.safetensors")
        bundle.swap(tmp_path / f"{name}.safetensors")
        wanted = _wanted(case, [(adapter, 1.0)])
        np.testing.assert_allclose(_run(bundle, case), wanted, **CLOSE)
        assert np.abs(wanted - base).max() > 0.01
    samples = ["two", None, "one"][: len(base)]
    wanted = [_wanted(case, {"one": [(one, 1.0)], "two": [(two, 1.0)]}.get(s, [])) for s in samples]
    mixed = _run(bundle, case, adapters=samples)
    np.testing.assert_allclose(mixed, [w[i] for i, w in enumerate(wanted)], **CLOSE)
    bundle.swap({"one": 0.7, "two": -0.4}, name="both")
    wanted_blend = _wanted(case, [(one, 0.7), (two, -0.4)])
    np.testing.assert_allclose(_run(bundle, case), wanted_blend, **CLOSE)


@pytest.mark.parametrize("mode", ["merged", "seeded"])
@pytest.mark.parametrize("method", METHODS)
def test_built_in(
    case: Case, method: str, mode: str, adapter_for: Callable[..., Adapter], tmp_path: Path
) -> None:
    """Merged: into Linear, Conv1D, a pair of factors and LayerNorm, biases included."""
    adapter = _small(_adapters(adapter_for, case, method)[0])
    found = _run(_exported(case, tmp_path / "b", mode, adapter), case)
    np.testing.assert_allclose(found, _wanted(case, [(adapter, 1.0)]), **CLOSE)


def test_inputs_and_outputs_of_one_layer_do_not_blend(
    bert: ExportSource, adapter_for: Callable[..., Adapter], tmp_path: Path
) -> None:
    from regrow_runtime import UsageError

    names = TARGETS["bert"][0]
    one = adapter_for(bert, names, method="ia3", feedforward=[names[0]])
    two = adapter_for(bert, names, method="ia3", feedforward=[names[1]])
    export_bundle(bert, tmp_path / "b", ExportRequest(adapter=one))
    bundle = Bundle.open(tmp_path / "b", threads=1)
    bundle.load(one, name="one")
    bundle.load(two, name="two")
    with pytest.raises(UsageError, match=r"scale and input_scale of .* which multiply each other"):
        bundle.swap({"one": 0.5, "two": 0.5}, name="both")
