"""Compression from the command line: without labels, killed and resumed, reported, used."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regrow_format.errors import UsageError
from regrow_toolchain.adapters import adapt
from regrow_toolchain.compress import DistillationTrainer, compress
from regrow_toolchain.config import AdaptConfig, CompressConfig, ExportConfig
from regrow_toolchain.data import Dataset, load_data
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone, load_backbone, logits_of, save_backbone
from regrow_toolchain.training import accuracy, batches

Images = Callable[..., tuple[np.ndarray, np.ndarray]]
_QUICK = CompressConfig(ratio=3, epochs=2, batch_size=16, lr=3e-3)


# -- without labels --------------------------------------------------------------------------------


@pytest.fixture
def encoder_folder(bert_folder: Path, tmp_path: Path) -> Path:
    """A text encoder with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=52, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    made.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def _texts(count: int = 80) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(f"w{w}" for w in draw.integers(0, 50, draw.integers(2, 9))) for _ in
            range(count)]  # fmt: skip


def test_lines_of_text_teach_an_encoder(
    encoder_folder: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Scored by the cosine to the dense model's embeddings."""
    (tmp_path / "t.txt").write_text("\n".join(_texts()), encoding="utf-8")
    done = cli("compress", encoder_folder, "-o", tmp_path / "small", "--data", tmp_path / "t.txt",
               "--ratio", 4, "--epochs", 3, "--lr", "3e-3", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["metric"] == "cosine"
    scores = done.json["scores"]
    assert scores["dense"] == pytest.approx(1, abs=1e-5)
    assert scores["start"] <= scores["compressed"] <= 1
    assert load_backbone(tmp_path / "small").task == "feature-extraction"
    assert not (tmp_path / "small.resume").exists()


def test_every_form_without_labels(
    vit_folder: Path, encoder_folder: Path, tmp_path: Path, images: Images
) -> None:
    backbone, pixels = load_backbone(vit_folder), images(12, 1)[0]
    (tmp_path / "flat").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "flat" / f"{index}.png")
    np.savez(tmp_path / "n.npz", images=pixels)
    encoder = load_backbone(encoder_folder)
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(_texts(12)), encoding="utf-8")
    for model, name in ((backbone, "flat"), (backbone, "n.npz"), (encoder, "t.csv")):
        with pytest.raises(UsageError):
            load_data(tmp_path / name, model)
        data = load_data(tmp_path / name, model, labels="optional")
        assert data.unlabelled
        assert len(data) == 12
    assert not load_data(_labelled(tmp_path, images), backbone, labels="optional").unlabelled
    assert load_data(_labelled(tmp_path, images), backbone, labels="none").unlabelled


def _labelled(folder: Path, images: Images) -> Path:
    images, labels = images(12, 1)
    np.savez(folder / "l.npz", images=images, labels=labels)
    return folder / "l.npz"


def test_labels_that_are_missing_are_told(
    vit_folder: Path, tmp_path: Path, cli: Callable[..., Any], class_folder: Callable[..., Path]
) -> None:
    """A folder one level too deep has images, and no classes; what is meant is not told."""
    deep = class_folder(tmp_path / "train", 24, 1) / "left"
    command = ("compress", vit_folder, "--data", deep, "--ratio", 3, "--epochs", 1)
    done = cli(*command, "-o", tmp_path / "a")
    assert done.code == 0
    (line,) = done.err.splitlines()
    for fact in (f"no labels found in {deep}", "a folder per class", "--task distillation"):
        assert fact in line
    assert "100.0 %" in next(line for line in done.out.splitlines() if line.startswith("dense"))
    assert "agreement on" in done.out
    done = cli(*command, "-o", tmp_path / "b", "--task", "distillation")
    assert (done.code, done.err) == (0, "")


def test_a_classifier_is_distilled_without_labels(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    plain = dataset(240, 1)
    data = replace(plain, labels=np.full(240, -1), names=())
    eval_data = replace(dataset(150, 2), labels=np.full(150, -1), names=())
    config = replace(_QUICK, ratio=10, epochs=8, init="svd")
    done = compress(backbone, data, config, eval_data=eval_data)
    assert done.metric == "agreement"
    assert done.dense_score == 1
    assert done.score > done.start_score
    with pytest.raises(UsageError, match="data must have labels for task classification, got none"):
        compress(backbone, data, CompressConfig(task="classification"))
    chosen = compress(backbone, plain, replace(_QUICK, task="distillation", epochs=1))
    assert chosen.metric == "agreement"


def test_a_model_of_one_value_is_distilled_without_labels() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_labels=1)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    backbone = Backbone(model, "sha256:x", "text-classification", ("classifier",), ("value",))
    ids = np.random.default_rng(0).integers(0, 40, (60, 8))
    done = compress(backbone, Dataset({"input_ids": ids}, np.full(60, -1)), _QUICK)
    assert done.metric == "rmse"
    assert done.dense_score == pytest.approx(0, abs=1e-5)
    assert done.score <= done.start_score


def test_embeddings_can_be_trained_by_classes() -> None:
    """If it is asked for; by itself a model of embeddings is distilled."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4)  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    backbone = Backbone(model, "sha256:x", "feature-extraction", (), (), ())
    ids, labels = np.random.default_rng(0).integers(3, 40, (60, 8)), np.arange(60) % 3
    ids[:, 4] = labels
    data = Dataset({"input_ids": ids}, labels, ("a", "b", "c"))
    assert compress(backbone, data, replace(_QUICK, epochs=1)).metric == "cosine"
    done = compress(backbone, data, replace(_QUICK, task="metric", epochs=3))
    assert done.metric == "1-NN accuracy"
    assert done.score >= done.start_score


def test_a_language_model_is_scored_in_nats(gpt2_folder: Path) -> None:
    backbone = load_backbone(gpt2_folder)
    tokens = np.random.default_rng(0).integers(0, 60, (40, 12))
    done = compress(backbone, Dataset({"input_ids": tokens}, tokens), replace(_QUICK, epochs=1))
    assert done.metric == "nats per token"
    assert done.score <= done.start_score


# -- training --------------------------------------------------------------------------------------


def _same(one: Backbone, other: Backbone) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 7, 9])
def test_it_goes_on_to_the_same_weights(
    backbone: Backbone,
    dataset: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """Amid an epoch and at its end, with the average of weights, shifts and the best kept."""
    data = dataset(120, 1)
    config = replace(_QUICK, ema=0.9, shift=0.5, noise=0.1, accumulate=2)
    whole = compress(backbone, data, config)
    plain = DistillationTrainer.step

    def stopping(self: DistillationTrainer, number: int, *rest: Any) -> None:
        if number == step:
            raise _Killed
        plain(self, number, *rest)

    monkeypatch.setattr("regrow_toolchain.compress.compression.Checkpoint", _often)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "step", stopping)
        with pytest.raises(_Killed):
            compress(backbone, data, config, checkpoint=tmp_path / "state")
    with monkeypatch.context() as patch:  # the ranks are those of the first try: nothing is timed
        patch.setattr("regrow_toolchain.compress.compression.factor", None)
        done = compress(backbone, data, config, checkpoint=tmp_path / "state", resume=True)
    assert _same(done.backbone, whole.backbone)
    assert [vars(e) for e in done.history[1:]] == [vars(e) for e in whole.history[1:]]
    assert (done.start_score, done.score) == (whole.start_score, whole.score)
    with pytest.raises(UsageError, match="must be of the same training"):
        compress(backbone, data, replace(config, lr=1e-3), checkpoint=tmp_path / "state",
                 resume=True)  # fmt: skip


def _often(path: Path, identity: Any, **more: Any) -> Any:
    from regrow_toolchain.training import Checkpoint

    return Checkpoint(path, identity, seconds=0.0, **more)


def test_the_best_epoch_is_kept(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    """At a learning rate that breaks the model the start is the best."""
    eval_data = dataset(90, 2)
    done = compress(backbone, dataset(96, 1), replace(_QUICK, ratio=2, lr=1.0), eval_data=eval_data)
    scores = [epoch.score for epoch in done.history]
    assert len(scores) == 3
    assert done.score == max(scores) == scores[0]
    assert accuracy(done.backbone.model, eval_data) == done.score
    config = replace(_QUICK, ratio=2, lr=1.0, keep="last")
    last = compress(backbone, dataset(96, 1), config, eval_data=eval_data)
    assert last.score == scores[-1] < scores[0]


def test_the_average_of_weights_is_what_is_kept(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    data = dataset(96, 1)
    one = compress(backbone, data, replace(_QUICK, holdout=0.0))
    other = compress(backbone, data, replace(_QUICK, holdout=0.0, ema=0.99))
    assert [e.loss for e in one.history[1:]] == [e.loss for e in other.history[1:]]
    assert not _same(one.backbone, other.backbone)


def test_half_precision_trains(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    config = replace(_QUICK, mixed_precision="bf16", device="cpu", epochs=6, ratio=8)
    done = compress(backbone, dataset(240, 1), config, eval_data=dataset(120, 2))
    assert done.score > done.start_score
    assert all(p.dtype == torch.float32 for p in done.backbone.model.parameters())


# -- the result ------------------------------------------------------------------------------------


@pytest.fixture
def room(vit_folder: Path, images: Images, tmp_path: Path) -> Path:
    images, labels = images(90, 1)
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    shutil.copytree(vit_folder, tmp_path / "vit")
    return tmp_path


def _arguments(room: Path, *more: object) -> tuple[object, ...]:
    return ("compress", room / "vit", "-o", room / "small", "--data", room / "d.npz", *more)


def test_the_report(room: Path, cli: Callable[..., Any]) -> None:
    done = cli(*_arguments(room, "--epochs", 2, "--keep-dense", "key"))
    assert done.code == 0, done.err
    assert "accuracy on 9 held-back samples" in done.out
    report = json.loads((room / "small" / "report.json").read_text(encoding="utf-8"))
    small = load_backbone(room / "small")
    assert report["parameters"]["compressed"] == small.parameters
    assert report["bytes"]["compressed"] == (room / "small" / "regrow.safetensors").stat().st_size
    assert 0 < report["macs"]["compressed"] < report["macs"]["dense"]
    assert set(report["scores"]) == {"dense", "start", "compressed"}
    rows = {row["name"]: row for row in report["layers"]}
    assert len(rows) == 13
    assert rows["classifier"]["dense_because"] == "outside of the blocks"
    assert rows["vit.encoder.layer.0.attention.attention.key"]["dense_because"] == "as asked for"
    row = rows["vit.encoder.layer.0.output.dense"]
    source = load_backbone(room / "vit").model.get_submodule(row["name"]).weight
    pair = small.model.get_submodule(row["name"])
    error = (pair.weight - source).norm() / source.norm()
    assert row["relative_error"] == pytest.approx(float(error.detach()), rel=1e-5)
    assert row["rank"] == pair.rank
    assert row["tokens"] == 10
    assert min(row["milliseconds"].values()) > 0
    assert [epoch["number"] for epoch in report["epochs"]] == [0, 1, 2]
    scores = [epoch["score"] for epoch in report["epochs"]]
    assert scores[report["kept_epoch"]] == report["scores"]["compressed"] == max(scores)
    text = (room / "small" / "report.md").read_text(encoding="utf-8")
    assert f"| `{row['name']}` | 64 | 32 | {row['rank']} |" in text


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        (
            ("--epochs", 2, "--lr", 3.0, "--holdout", 0.4),
            "kept the start: none of 2 epochs",
            "plain",
        ),
        (("--epochs", 2, "--keep", "last"), "kept epoch 2 of 2", "kept the start"),
        (("--epochs", 0), "accuracy on 9 held-back samples", "after training"),
        (("--epochs", 1, "--holdout", 0), "no samples held back, so no score", "plain SVD"),
    ],
)
def test_what_came_of_the_training_is_told(
    room: Path, cli: Callable[..., Any], more: tuple[object, ...], said: str, unsaid: str
) -> None:
    done = cli(*_arguments(room, *more))
    assert done.code == 0, done.err
    assert said in done.out
    assert unsaid not in done.out


def test_options_of_training_without_data_are_told(room: Path, cli: Callable[..., Any]) -> None:
    model, out = room / "vit", room / "small"
    done = cli("compress", model, "-o", out, "--ratio", 3, "--label-smoothing", 0, "--epochs", 5)
    assert done.code == 0
    assert "without --data nothing is trained: no effect of --epochs, --label-smoothing" in done.err


def test_scores_of_other_weights_are_not_kept(room: Path, cli: Callable[..., Any]) -> None:
    assert cli(*_arguments(room, "--epochs", 1)).code == 0
    small = load_backbone(room / "small")
    assert "scores" in save_backbone(small, room / "same").report
    with torch.no_grad():
        small.model.get_parameter("classifier.bias").zero_()
    save_backbone(small, room / "tuned")
    report = load_backbone(room / "tuned").report
    assert not {"scores", "metric", "samples"} & report.keys()
    assert report["parameters"]["compressed"] == small.parameters


def test_it_is_tuned_whole_adapted_and_exported(
    backbone: Backbone, dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    """The paper's use: a plain loop over all weights."""
    small = save_backbone(compress(backbone, config=CompressConfig(ratio=10)).backbone,
                          tmp_path / "small")  # fmt: skip
    model = load_backbone(tmp_path / "small").model.requires_grad_(True)
    before = accuracy(model, dataset(120, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for inputs, labels in batches(dataset(240, 1), 48, 60, 0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(model, inputs), labels).backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert accuracy(model, dataset(120, 2)) > before + 0.05
    small = load_backbone(tmp_path / "small")
    done = adapt(small, dataset(60, 3), AdaptConfig(steps=3, coefficient_dtype="fp32", holdout=0))
    assert len(done.adapter.targets) == 12
    for precision in ("fp32", "int8"):
        export_backbone(small, tmp_path / precision, ExportConfig(precision=precision))
        assert (tmp_path / precision / "manifest.json").is_file()


def test_both_factors_are_int8(backbone: Backbone, tmp_path: Path) -> None:
    import onnx

    small = save_backbone(compress(backbone).backbone, tmp_path / "small")
    export_backbone(small, tmp_path / "bundle", ExportConfig(precision="int8"))
    graph = onnx.load(tmp_path / "bundle" / "backbone.onnx").graph
    whole = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    codes = {t.name: tuple(t.dims) for t in whole}
    read = {node.input[1] for node in graph.node if node.op_type == "MatMulInteger"}
    for plan in small.layers:
        assert codes[f"{plan.name}.down.weight.int8"] == (plan.in_features, plan.rank)
        assert codes[f"{plan.name}.up.weight.int8"] == (plan.rank, plan.out_features)
        assert {f"{plan.name}.down.weight.int8", f"{plan.name}.up.weight.int8"} <= read
    shapes = {(plan.in_features, plan.out_features) for plan in small.layers}
    assert not shapes & {tuple(t.dims) for t in graph.initializer}


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ratio", "0.5"), "--ratio"),
        (("--ratio", "40"), "ratio must leave every layer a rank of 1 or more, got 40.0"),
        (("--calibration", "1"), "--calibration must be at least 2, got 1"),
        (("--only", "nothing"), "nothing"),
        (("--blocks", "nothing"), "blocks must match a list of modules, got 'nothing'"),
    ],
)
def test_one_error_and_the_earlier_result_intact(
    room: Path,
    cli: Callable[..., Any],
    listing: Callable[[Path], dict[str, int]],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    assert cli("compress", room / "vit", "-o", room / "small").code == 0
    before = listing(room)
    failed = cli(*_arguments(room, "--force", *arguments))
    assert failed.code == 2
    assert said in failed.err
    assert len(failed.err.strip().splitlines()) == 1
    assert listing(room) == before


def test_a_half_written_result_is_one_error(room: Path, cli: Callable[..., Any]) -> None:
    assert cli("compress", room / "vit", "-o", room / "small").code == 0
    weights = room / "small" / "regrow.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    failed = cli("export", room / "small", "-o", room / "bundle")
    assert failed.code == 1
    assert "must be a whole safetensors file" in failed.err
    weights.unlink()
    failed = cli("export", room / "small", "-o", room / "bundle")
    assert "is missing: compress the model again" in failed.err
    assert not (room / "bundle").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_leaves_the_earlier_result(
    room: Path, cli: Callable[..., Any], listing: Callable[[Path], dict[str, int]]
) -> None:
    """Files of at most 20 kB: the weights do not fit."""
    assert cli("compress", room / "vit", "-o", room / "small").code == 0
    before = listing(room)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        failed = cli("compress", room / "vit", "-o", room / "small", "--force", "--ratio", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, plain)
    assert failed.code == 1
    assert len(failed.err.strip().splitlines()) == 1
    assert listing(room) == before


_OFTEN = """
from regrow_toolchain.training import checkpoint
from regrow_toolchain.compress import compression as compressing
plain = checkpoint.Checkpoint
compressing.Checkpoint = lambda *what, **more: plain(*what, seconds=0.0, **more)
from regrow_toolchain.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_kill_and_a_resume(
    room: Path, start: Callable[..., subprocess.Popen[str]], run: Callable[..., Any]
) -> None:
    """SIGKILL amid training; the same weights as without it, byte for byte."""
    arguments = (*_arguments(room), "--epochs", 40, "--shift", 0.5)
    state = room / "small.resume"
    process = start(*arguments, program=_OFTEN)
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert state.exists()
    assert not (room / "small").exists()
    refused = run(*arguments)
    assert refused.code == 2
    assert "--resume goes on with it" in refused.err
    done = run(*arguments, "--resume", "--json")
    assert done.code == 0, done.err
    weights = (room / "small" / "regrow.safetensors").read_bytes()
    shutil.rmtree(room / "small")
    assert run(*arguments).code == 0
    assert (room / "small" / "regrow.safetensors").read_bytes() == weights
    assert not state.exists()
