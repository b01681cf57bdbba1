"""Backbones on disk: what is saved comes back to the bit, and broken folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow_format.errors import FormatError, MismatchError, RegrowError, UsageError
from regrow_toolchain.compress import compress
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import (
    Backbone,
    LowRankPair,
    load_backbone,
    logits_of,
    quiet_transformers,
    save_backbone,
)

_PLAIN = CompressConfig(ratio=2)


def _inputs(backbone: Backbone) -> dict[str, torch.Tensor]:
    if backbone.task == "image-classification":
        return {"pixel_values": torch.randn(2, 3, 12, 12)}
    return {"input_ids": torch.arange(14).view(2, 7)}


@pytest.fixture(params=["vit", "bert", "gpt2"])
def any_folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture
def copied(compressed_folder: Path, tmp_path: Path) -> Path:
    """A compressed backbone to break."""
    return Path(shutil.copytree(compressed_folder, tmp_path / "copied"))


@pytest.fixture
def dense_copy(vit_folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory to break."""
    return Path(shutil.copytree(vit_folder, tmp_path / "dense"))


def _edit_json(path: Path, change: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


# -- round trips ---------------------------------------------------------------------------------


def test_saved_and_loaded_gives_the_same_bits(any_folder: Path, tmp_path: Path) -> None:
    dense = load_backbone(any_folder)
    made = compress(dense, config=_PLAIN).backbone
    saved = save_backbone(made, tmp_path / "out")
    loaded = load_backbone(tmp_path / "out")
    assert loaded.backbone_id == saved.backbone_id != dense.backbone_id
    assert (loaded.task, loaded.head, loaded.labels) == (dense.task, dense.head, dense.labels)
    assert loaded.layers == made.layers
    assert loaded.report == json.loads(json.dumps(made.report))
    assert loaded.parameters == made.parameters < dense.parameters
    inputs = _inputs(loaded)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded.model, inputs), logits_of(made.model, inputs))
    assert any(isinstance(module, LowRankPair) for module in loaded.model.modules())


def test_nothing_is_left_without_memory(any_folder: Path, tmp_path: Path) -> None:
    """Buffers that are not stored, such as BERT's position ids, are made as usual."""
    save_backbone(compress(load_backbone(any_folder), config=_PLAIN).backbone, tmp_path / "out")
    loaded, dense = load_backbone(tmp_path / "out").model, load_backbone(any_folder).model
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    for name, buffer in dense.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    assert not any(module.training for module in loaded.modules())


def test_dense_weights_are_never_made(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a compressed model is built, no layer of its blocks has numbers."""
    seen = []
    plain = torch.nn.Module.load_state_dict

    def look(model: torch.nn.Module, *args: Any, **named: Any) -> Any:
        seen.extend(parameter.is_meta for parameter in model.parameters())
        return plain(model, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", look)
    load_backbone(copied)
    assert seen
    assert all(seen)


def test_tied_weights_are_stored_once_and_tied_again(gpt2_folder: Path, tmp_path: Path) -> None:
    made = compress(load_backbone(gpt2_folder), config=_PLAIN).backbone
    save_backbone(made, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "regrow.safetensors")
    assert "transformer.wte.weight" in stored
    assert "lm_head.weight" not in stored
    model = load_backbone(tmp_path / "out").model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_companions_travel(compressed_folder: Path) -> None:
    assert {p.name for p in compressed_folder.iterdir()} == {
        "config.json", "preprocessor_config.json", "regrow.json", "regrow.safetensors",
    }  # fmt: skip
    preprocess = load_backbone(compressed_folder).preprocessor()
    assert (preprocess.channels, preprocess.size) == (3, (12, 12))


def test_the_same_model_is_the_same_files(compressed_folder: Path, tmp_path: Path) -> None:
    save_backbone(load_backbone(compressed_folder), tmp_path / "again")
    for file in compressed_folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_plain_transformers_does_not_load_it_with_random_layers(compressed_folder: Path) -> None:
    from transformers import AutoModelForImageClassification

    with quiet_transformers(), pytest.raises(OSError, match="no file named"):
        AutoModelForImageClassification.from_pretrained(compressed_folder, local_files_only=True)


def test_an_existing_folder_is_refused(compressed_folder: Path, copied: Path) -> None:
    backbone = load_backbone(compressed_folder)
    (copied / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="output must be a new path"):
        save_backbone(backbone, copied)
    assert (copied / "mine.txt").read_text() == "keep"
    save_backbone(backbone, copied, force=True)
    assert not (copied / "mine.txt").exists()


def test_half_precision_checkpoints_compute_in_fp32(vit_folder: Path, dense_copy: Path) -> None:
    weights = load_file(dense_copy / "model.safetensors")
    half = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(half, dense_copy / "model.safetensors", {"format": "pt"})
    backbone = load_backbone(dense_copy)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert backbone.backbone_id != load_backbone(vit_folder).backbone_id


def test_sharded_weights_are_one_backbone(vit_folder: Path, tmp_path: Path) -> None:
    whole = load_backbone(vit_folder)
    with quiet_transformers():
        whole.model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    parts = load_backbone(tmp_path / "shards")
    assert parts.backbone_id == whole.backbone_id
    with torch.no_grad():
        inputs = _inputs(whole)
        assert torch.equal(logits_of(parts.model, inputs), logits_of(whole.model, inputs))


def test_heads_side_by_side_keep_their_classes(
    tmp_path: Path, dataset: Callable[..., Dataset]
) -> None:
    """DeiT with a teacher: its own classes serve; a user's own are refused, not half learned."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    from regrow_toolchain.adapters import adapt
    from regrow_toolchain.config import AdaptConfig
    from regrow_toolchain.interop import export_backbone

    names = ("left", "middle", "right")
    config = DeiTConfig(
        image_size=12, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, id2label=dict(enumerate(names)),
    )  # fmt: skip
    with quiet_transformers():
        DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "deit")
    backbone = load_backbone(tmp_path / "deit")
    assert (backbone.head, backbone.labels) == ((), names)
    assert backbone.task == "image-classification"
    done = adapt(backbone, dataset(24, 1), AdaptConfig(steps=2, holdout=0))
    assert done.adapter.head is None
    with pytest.raises(UsageError, match="backbone must have a head"):
        adapt(backbone, dataset(24, 1, names=("a", "b", "c")), AdaptConfig(steps=2, holdout=0))
    assert export_backbone(backbone, tmp_path / "bundle").labels == names


def test_feature_extractors_have_no_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=60, max_position_embeddings=24,
    )  # fmt: skip
    with quiet_transformers():
        BertModel(config).save_pretrained(tmp_path / "bert")
    backbone = load_backbone(tmp_path / "bert")
    assert (backbone.task, backbone.head, backbone.labels) == ("feature-extraction", (), ())
    made = save_backbone(compress(backbone, config=_PLAIN).backbone, tmp_path / "small")
    assert load_backbone(tmp_path / "small").backbone_id == made.backbone_id


def test_weights_that_are_not_finite(dense_copy: Path) -> None:
    weights = load_file(dense_copy / "model.safetensors")
    weights["vit.layernorm.bias"][3] = float("inf")
    save_file(weights, dense_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(RegrowError, match=r"NaN or infinity in vit\.layernorm\.bias$"):
        load_backbone(dense_copy)


# -- identity ------------------------------------------------------------------------------------


def test_another_head_is_the_same_backbone(compressed_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(compressed_folder)
    identity = backbone.backbone_id
    with torch.no_grad():
        backbone.model.classifier.weight.add_(1)
    assert save_backbone(backbone, tmp_path / "head").backbone_id == identity
    with torch.no_grad():
        backbone.model.vit.layernorm.bias[0] += 1
    assert save_backbone(backbone, tmp_path / "body").backbone_id != identity


def test_another_head_of_a_dense_model_is_the_same_backbone(
    vit_folder: Path, dense_copy: Path
) -> None:
    weights = load_file(dense_copy / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, dense_copy / "model.safetensors", {"format": "pt"})
    identity = load_backbone(vit_folder).backbone_id
    assert load_backbone(dense_copy).backbone_id == identity
    weights["vit.layernorm.bias"][0] += 1
    save_file(weights, dense_copy / "model.safetensors", {"format": "pt"})
    assert load_backbone(dense_copy).backbone_id != identity


# -- what is refused -----------------------------------------------------------------------------


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"must be a model's folder, got .*no such folder"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"must be a model's folder, got .*it is a file"):
        load_backbone(file)
    with pytest.raises(UsageError, match=r"it has no config\.json"):
        load_backbone(tmp_path)


def test_weights_must_be_safetensors(dense_copy: Path) -> None:
    (dense_copy / "model.safetensors").rename(dense_copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only pytorch_model\.bin, which is pickle"):
        load_backbone(dense_copy)
    (dense_copy / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"must have model\.safetensors, got none"):
        load_backbone(dense_copy)


def test_truncated_weights_of_a_dense_model(dense_copy: Path) -> None:
    weights = dense_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="could not be loaded"):
        load_backbone(dense_copy)


def test_a_checkpoint_without_a_block(dense_copy: Path) -> None:
    weights = load_file(dense_copy / "model.safetensors")
    del weights["vit.encoder.layer.1.output.dense.bias"]
    save_file(weights, dense_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"weights lack vit\.encoder\.layer\.1\.output"):
        load_backbone(dense_copy)


@pytest.mark.parametrize("names", [["NoSuchModel"], [], ["set_seed"], ["GenerationConfig"]])
def test_an_architecture_must_be_a_model_of_transformers(
    dense_copy: Path, copied: Path, names: list[str]
) -> None:
    for folder in (dense_copy, copied):
        _edit_json(folder / "config.json", lambda config: config.update(architectures=names))
        with pytest.raises(UsageError, match="architectures must name a model class"):
            load_backbone(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "no-such-type"}, "config.json"),
        ({"model_type": None}, "config.json"),
        ({"hidden_size": 48}, "does not fit the model"),
        ({"num_hidden_layers": 1}, "vit.encoder.layer.1"),
        ({"num_hidden_layers": 3}, "vit.encoder.layer.2"),
        ({"hidden_size": 33}, "config.json must describe a model: The hidden size 33"),
    ],
)
def test_a_config_that_is_not_the_weights(copied: Path, change: dict, words: str) -> None:
    _edit_json(copied / "config.json", lambda config: config.update(change))
    with pytest.raises(RegrowError, match=words) as error:
        load_backbone(copied)
    assert str(copied) in str(error.value)


def test_config_that_is_no_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json must be JSON"):
        load_backbone(copied)


def test_truncated_weights(copied: Path) -> None:
    weights = copied / "regrow.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(
            FormatError, match=r"regrow\.safetensors must be a whole safetensors.*copy it again"
        ):
            load_backbone(copied)
    weights.unlink()
    with pytest.raises(FormatError, match=r"regrow\.safetensors is missing"):
        load_backbone(copied)


def test_edited_weights(copied: Path) -> None:
    weights = load_file(copied / "regrow.safetensors")
    weights["vit.encoder.layer.0.output.dense.down.weight"][0, 0] += 1
    save_file(weights, copied / "regrow.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"must have the backbone_id of regrow\.json"):
        load_backbone(copied)


def test_missing_and_foreign_tensors_are_all_listed(copied: Path) -> None:
    weights = load_file(copied / "regrow.safetensors")
    del weights["vit.encoder.layer.0.output.dense.down.weight"], weights["vit.layernorm.bias"]
    weights["other"] = torch.zeros(1)
    save_file(weights, copied / "regrow.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError) as error:
        load_backbone(copied)
    assert set(error.value.findings) == {
        "vit.encoder.layer.0.output.dense.down.weight is missing",
        "vit.layernorm.bias is missing",
        "other is unknown",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=2), "format must be 1, got 2"),
        (lambda d: d.pop("backbone_id"), "backbone_id must be of type str, got nothing"),
        (lambda d: d.update(other=1), "unknown fields other"),
        (lambda d: d["layers"][0].update(rank=0), "rank must be from 1"),
        (lambda d: d["layers"][0].update(rank=6), "down.weight must be .6, 32., got .5, 32."),
        (lambda d: d["layers"][0].update(name="vit.encoder.layer.7.query"), "layer.7.query"),
        (lambda d: d["layers"][0].update(name="nothing"), "nothing"),
        (lambda d: d["layers"][0].update(name=""), "'' is no layer of the model"),
        (lambda d: d["layers"].pop(), "regrow.safetensors"),
        (lambda d: d.update(head=[]), "backbone_id"),
    ],
)
def test_a_broken_regrow_json(copied: Path, change: Callable[[dict], None], words: str) -> None:
    _edit_json(copied / "regrow.json", change)
    with pytest.raises(RegrowError, match=words) as error:
        load_backbone(copied)
    assert str(copied) in str(error.value)


def test_images_need_preprocessing(bert_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"model must have preprocessor_config\.json"):
        load_backbone(bert_folder).preprocessor()


def test_no_code_of_the_folder_is_run(dense_copy: Path) -> None:
    """A config that asks for code of its own gets transformers' class, and nothing is imported."""
    flag = dense_copy / "ran"
    (dense_copy / "evil.py").write_text(f"open({str(flag)!r}, 'w').close()\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    _edit_json(dense_copy / "config.json", lambda config: config.update(auto_map=auto))
    with suppress(RegrowError):
        load_backbone(dense_copy)
    assert not flag.exists()


def test_unsaved_backbones_say_so(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    """An adapter names the backbone it belongs to, so the backbone must have a name."""
    from regrow_toolchain.adapters import adapt

    with pytest.raises(UsageError, match="backbone must be saved"):
        adapt(compress(backbone).backbone, dataset(12, 1))


# -- the hub -------------------------------------------------------------------------------------


def test_a_name_on_the_hub_is_fetched(vit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only weights in safetensors, and the files that go with them."""
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(vit_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    backbone = load_backbone("someone/tiny-vit")
    assert backbone.backbone_id == load_backbone(vit_folder).backbone_id
    ((name, patterns),) = asked
    assert name == "someone/tiny-vit"
    assert "*.safetensors" in patterns
    assert not any(".bin" in pattern or ".py" in pattern for pattern in patterns)


def test_a_slip_in_a_path_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_args: object, **_options: object) -> str:
        raise AssertionError("the folder is there, the model in it is not")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regrow-demo").mkdir()
    with pytest.raises(UsageError, match=r"must be a model's folder, got .*no such folder"):
        load_backbone("regrow-demo/backbon")


def test_a_hub_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_args: object, **_options: object) -> str:
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RegrowError, match=r"or a name on the hub, got a/b: .* \(OSError\)$"):
        load_backbone("a/b")
