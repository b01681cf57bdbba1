"""Swappable bundles: the base, adapters in slots, one per sample, and heads of other sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from expansions import flat
from safetensors.numpy import load_file

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, find_linears
from regrow_format.basis import BasisCache
from regrow_format.errors import RegrowError, UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method

QUERY = "vit.encoder.layer.0.attention.attention.query"
DOWN = "vit.encoder.layer.3.output.dense"


@pytest.fixture(scope="module")
def vit_bundle(vit, tmp_path_factory):
    """A slot in every linear layer of the ViT."""
    folder = tmp_path_factory.mktemp("swappable") / "vit"
    names = [name for name in find_linears(vit.model) if name not in vit.head]
    return folder, export_bundle(vit, folder, ExportRequest(ExportConfig(targets=names)))


@pytest.fixture
def pixels():
    return np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)


def _random(bundle: Manifest, count: int, draw: int = 0) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(draw), {}
    for slot in bundle.slots:
        if slot.kind == "low_rank":
            a = rng.standard_normal((count, slot.in_features, 3)) / 10
            b = rng.standard_normal((count, 3, slot.out_features)) / 10
            feeds |= {slot.inputs["A"]: a.astype("f4"), slot.inputs["B"]: b.astype("f4")}
    return feeds


def _deltas(feeds, row=0):
    names = {name.rpartition(".")[0] for name in feeds}
    return {n: {part: feeds[f"{n}.adapter_{part}"][row] for part in "AB"} for n in names}


def test_nothing_fed_is_the_base(vit, vit_bundle, run, pixels):
    found = run(vit_bundle[0], {"pixel_values": pixels})["logits"]
    with torch.inference_mode():
        expected = vit.model(torch.from_numpy(pixels)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_in_the_slots_is_the_adapter_in_the_weights(
    vit, vit_bundle, run, pixels, merged_logits
):
    inputs, feeds = {"pixel_values": pixels}, _random(vit_bundle[1], 1)
    found = run(vit_bundle[0], inputs, feeds)["logits"]
    np.testing.assert_allclose(
        found, merged_logits(vit, inputs, _deltas(feeds)), rtol=1e-3, atol=1e-4
    )
    assert np.abs(found - run(vit_bundle[0], inputs)["logits"]).max() > 0.01


def test_one_slot_may_be_fed_alone(vit, vit_bundle, run, pixels, merged_logits):
    inputs, feeds = {"pixel_values": pixels}, _random(vit_bundle[1], 1)
    for name in (QUERY, DOWN):
        alone = {key: value for key, value in feeds.items() if key.startswith(name)}
        found = run(vit_bundle[0], inputs, alone)["logits"]
        expected = merged_logits(vit, inputs, _deltas(alone))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_every_sample_of_a_batch_may_have_its_own_adapter(
    vit, vit_bundle, run, pixels, merged_logits
):
    feeds = _random(vit_bundle[1], 3)
    found = run(vit_bundle[0], {"pixel_values": pixels}, feeds)["logits"]
    for row in range(3):
        inputs = {"pixel_values": pixels[row : row + 1]}
        expected = merged_logits(vit, inputs, _deltas(feeds, row))
        np.testing.assert_allclose(found[row : row + 1], expected, rtol=1e-3, atol=1e-4)


def test_a_seeded_adapter_fits_the_slots(vit, vit_bundle, run, pixels, merged_logits, adapter_for):
    adapter = adapter_for(vit, [QUERY, DOWN])
    expansion = flat(get_method("nola").expand(adapter, BasisCache()))
    feeds = {
        vit_bundle[1].slot_of(name).inputs[part]: value[None]
        for name, parts in expansion.items()
        for part, value in parts.items()
    }
    inputs = {"pixel_values": pixels}
    expected = merged_logits(vit, inputs, expansion)
    np.testing.assert_allclose(
        run(vit_bundle[0], inputs, feeds)["logits"], expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("classes", [2, 17])
def test_a_head_may_have_another_number_of_classes(vit_bundle, run, pixels, classes):
    folder, manifest = vit_bundle
    slot = manifest.slot_of("classifier")
    weight = np.zeros((1, 64, classes), dtype=np.float32)
    bias = np.arange(classes, dtype=np.float32).reshape(1, 1, classes)
    feeds = {slot.inputs["weight"]: weight, slot.inputs["bias"]: bias}
    found = run(folder, {"pixel_values": pixels}, feeds)["logits"]
    np.testing.assert_allclose(found, np.tile(bias[0], (3, 1)))


def test_heads_may_differ_within_a_batch(vit_bundle, run, pixels):
    folder, manifest = vit_bundle
    slot = manifest.slot_of("classifier")
    bias = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    feeds = {
        slot.inputs["weight"]: np.zeros((3, 64, 4), dtype=np.float32),
        slot.inputs["bias"]: bias,
    }
    np.testing.assert_allclose(run(folder, {"pixel_values": pixels}, feeds)["logits"], bias[:, 0])


def test_the_manifest_says_what_is_there(vit, vit_bundle):
    folder, manifest = vit_bundle
    assert Manifest.load(folder) == manifest
    manifest.check_files(folder, hashes=True)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
    assert (manifest.mode, manifest.labels, manifest.adapter) == ("swappable", vit.labels, None)
    assert manifest.backbone_id == vit.backbone_id
    (graph,) = manifest.graphs
    assert [spec.name for spec in graph.inputs] == ["pixel_values"]
    side = vit.model.config.image_size  # a ViT takes no other size, whatever the tracer says
    assert graph.inputs[0].shape == ("batch_size", vit.model.config.num_channels, side, side)
    assert [spec.name for spec in graph.outputs] == ["logits"]
    assert graph.outputs[0].shape == ("batch_size", "classifier.classes")
    assert manifest.slot_of(DOWN).in_features == 128
    assert manifest.slot_of(DOWN).out_features == 64


def test_what_was_measured_is_in_the_manifest(vit_bundle):
    parity = vit_bundle[1].parity
    assert parity["base_max_abs"] < 1e-4
    assert parity["adapter_max_abs"] < 1e-3
    assert parity["mixed_max_abs"] < 1e-3
    assert parity["adapter_effect"] >= parity["slot_effect_min"] > 0


def test_the_graph_is_pinned_and_its_weights_lie_beside_it(vit, vit_bundle):
    folder, manifest = vit_bundle
    model = onnx.load(str(folder / "backbone.onnx"), load_external_data=False)
    assert (model.ir_version, manifest.ir_version, manifest.opset) == (9, 9, 18)
    assert model.producer_name == "regrow"
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    assert metadata["backbone_id"] == vit.backbone_id
    assert metadata["mode"] == "swappable"
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        large = np.prod(tensor.dims) * 4 >= 1024
        assert (tensor.data_location == tensor.EXTERNAL) == (large and tensor.name not in inputs)
    weights = sum(p.numel() * 4 for p in vit.model.parameters())
    assert (folder / "backbone.onnx.data").stat().st_size < weights


def test_slots_are_overridable_inputs_of_rank_0(vit_bundle):
    model = onnx.load(str(vit_bundle[0] / "backbone.onnx"))
    defaults = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert defaults[f"{DOWN}.adapter_A"] == [1, 128, 0]
    assert defaults[f"{DOWN}.adapter_B"] == [1, 0, 64]
    assert shapes[f"{DOWN}.adapter_A"] == [f"{DOWN}.n", 128, f"{DOWN}.rank"]
    assert shapes["classifier.weight"] == ["classifier.n", 64, "classifier.classes"]


def test_the_probe_is_a_batch_of_two(vit_bundle, run):
    probe = load_file(vit_bundle[0] / "probe.safetensors")
    assert run(vit_bundle[0], probe)["logits"].shape == (2, 10)


def test_pooled_and_two_layer_heads(roberta, bert, run, tmp_path, merged_logits):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 100, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs["attention_mask"][1, 4:] = 0
    pooled, value = "bert.pooler.dense", "bert.encoder.layer.1.attention.self.value"
    manifest = export_bundle(
        bert, tmp_path / "bert", ExportRequest(ExportConfig(targets=[pooled, value]))
    )
    feeds, typed = _random(manifest, 1), {**inputs, "token_type_ids": np.zeros_like(ids)}
    np.testing.assert_allclose(
        run(tmp_path / "bert", typed, feeds)["logits"],
        merged_logits(bert, inputs, _deltas(feeds)), rtol=1e-3, atol=1e-4,
    )  # fmt: skip

    manifest = export_bundle(roberta, tmp_path / "roberta")
    assert [slot.target for slot in manifest.slots] == list(roberta.head)
    weight = rng.standard_normal((1, 32, 6)).astype(np.float32)
    feeds = {
        "classifier.out_proj.weight": weight,
        "classifier.out_proj.bias": np.zeros((1, 1, 6), dtype=np.float32),
    }
    with torch.inference_mode():
        hidden = roberta.model.roberta(**{k: torch.from_numpy(v) for k, v in inputs.items()})[0]
        expected = torch.tanh(roberta.model.classifier.dense(hidden[:, 0])).numpy() @ weight[0]
    found = run(tmp_path / "roberta", inputs, feeds)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_plain_module_with_a_factorised_pair(plain, plain_inputs, run, tmp_path):
    folder = tmp_path / "plain"
    targets = ["stem", "pair", "pooled"]
    manifest = export_bundle(
        plain, folder, ExportRequest(ExportConfig(targets=targets), inputs=plain_inputs)
    )
    assert [spec.name for spec in manifest.graphs[0].outputs] == ["scores", "features"]
    assert manifest.graphs[0].inputs[0].shape == ("batch_size", 3, 4, 6)
    with torch.inference_mode():
        tensors = {k: torch.from_numpy(v) for k, v in plain_inputs.items()}
        expected = plain.model(**tensors)
        merged = plain.model.pair.merged_with(*(torch.ones(shape) for shape in ((16, 1), (1, 16))))
    found = run(folder, plain_inputs)
    np.testing.assert_allclose(found["scores"], expected["scores"].numpy(), atol=1e-5)
    feeds = {
        "pair.adapter_A": np.ones((1, 16, 1), dtype=np.float32),
        "pair.adapter_B": np.ones((1, 1, 16), dtype=np.float32),
    }
    with torch.inference_mode():
        grid = torch.tanh(plain.model.stem(tensors["x"])).flatten(1, 2)
        features = torch.tanh(merged(grid)) * tensors["gate"][:, None, None]
    np.testing.assert_allclose(run(folder, plain_inputs, feeds)["features"], features, atol=1e-4)


def test_inputs_may_be_given_for_a_hugging_face_model(bert, tmp_path):
    ids = np.arange(10, dtype=np.int64)[None]
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    value = "bert.encoder.layer.0.attention.self.value"
    export_bundle(bert, tmp_path / "b", ExportRequest(ExportConfig(targets=[value]), inputs=inputs))
    probe = load_file(tmp_path / "b" / "probe.safetensors")  # made up: nobody's samples travel
    assert probe["input_ids"].shape == (2, 16)
    inputs["input_ids"] = ids + 1000  # tokens that the model does not know
    with pytest.raises(RegrowError):
        export_bundle(
            bert, tmp_path / "b2", ExportRequest(ExportConfig(targets=[value]), inputs=inputs)
        )
    with pytest.raises(
        UsageError, match="inputs must have input_ids, attention_mask, token_type_ids"
    ):
        export_bundle(
            bert,
            tmp_path / "c",
            ExportRequest(ExportConfig(targets=[value]), inputs={"input_ids": ids}),
        )


def test_torchs_fast_path_does_not_pass_by_a_slot(tmp_path):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    source = ExportSource(model, "custom", "sha256:00")
    inputs = {"src": np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)}
    manifest = export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=["layers.0.linear1"]), inputs=inputs),
    )
    assert manifest.parity["slot_effect_min"] > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_factor_of_a_pair_is_a_target_too(plain, plain_inputs, tmp_path):
    manifest = export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=["pair.down"]), inputs=plain_inputs),
    )
    slot = manifest.slot_of("pair.down")
    assert (slot.in_features, slot.out_features) == (16, 4)


def test_a_gpt2_convolution_is_a_target(tmp_path, run):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(6)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    source = ExportSource(model, "text-classification", "sha256:00", ("score",))
    name = "transformer.h.0.attn.c_attn"
    manifest = export_bundle(source, tmp_path / "gpt2", ExportRequest(ExportConfig(targets=[name])))
    slot = manifest.slot_of(name)
    assert (slot.in_features, slot.out_features) == (32, 96)
    assert manifest.parity["slot_effect_min"] > 0


def test_windows_folded_into_the_batch_keep_their_samples_adapter(tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(7)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = SwinForImageClassification(config).eval()
    source = ExportSource(model, "image-classification", "sha256:00", ("classifier",))
    names = [name for name in find_linears(model) if name.endswith(("query", "dense"))]
    manifest = export_bundle(source, tmp_path / "swin", ExportRequest(ExportConfig(targets=names)))
    # Four windows per sample: the check ran three samples, each with an adapter of its own.
    assert manifest.parity["mixed_max_abs"] < 1e-4
    assert manifest.parity["slot_effect_min"] > 0


def test_files_of_the_source_are_copied(plain, plain_inputs, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "plain"}')
    source = replace(plain, files=(config,))
    manifest = export_bundle(
        source, tmp_path / "b", ExportRequest(ExportConfig(targets=["stem"]), inputs=plain_inputs)
    )
    assert (tmp_path / "b" / "config.json").read_text() == config.read_text()
    assert manifest.files["config.json"].size == config.stat().st_size


def test_the_model_is_left_as_it_was(vit, vit_bundle):
    assert not any("adapter" in name for name, _ in vit.model.named_parameters())
    assert type(vit.model.get_submodule(QUERY)) is torch.nn.Linear
    assert all(p.requires_grad for p in vit.model.parameters())


def test_an_export_is_silent_and_repeats_itself(plain, plain_inputs, tmp_path, capfd):
    request = ExportRequest(ExportConfig(targets=["stem", "pair"]), inputs=plain_inputs)
    one = export_bundle(plain, tmp_path / "one", request)
    two = export_bundle(plain, tmp_path / "two", request)
    assert one.files == two.files
    assert capfd.readouterr() == ("", "")
