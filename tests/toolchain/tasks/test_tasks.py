"""Kinds of training: losses and scores against plain references, and whole runs on tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.adapters import Adapted, adapt, adapt_users, applied
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset, split
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import Classification, Distillation, Loss, Regression, choose_task
from regrow_toolchain.tasks.custom import Custom
from regrow_toolchain.tasks.features import Metric
from regrow_toolchain.tasks.language import CausalLm

_ALL = ("classification", "metric", "regression", "distillation", "causal-lm")


def _config(**more: Any) -> AdaptConfig:
    settings = {"rank": 2} if more.get("method", "lora") == "lora" else {}
    start = {"method": "lora", "storage": "fp32", "noise": 0.0, "shift": 0.0, "batch_size": 16}
    return AdaptConfig(**{**start, "method_settings": settings, **more})


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_classification_is_torchs_cross_entropy(smoothing: float) -> None:
    """Of each user's own classes: what pads the head of another has no part in it."""
    torch.manual_seed(0)
    outputs = (3 * torch.randn(3, 4, 5)).requires_grad_()
    counts = torch.tensor([5, 2, 3])
    classes = (torch.arange(5)[None] < counts[:, None])[:, None]
    labels = torch.stack([torch.randint(0, int(c), (4,)) for c in counts])
    found = Classification(smoothing).losses(outputs, labels, classes)
    for user, count in enumerate(counts):
        wanted = functional.cross_entropy(
            outputs[user, :, :count], labels[user], label_smoothing=smoothing, reduction="none"
        )
        torch.testing.assert_close(found[user], wanted)
    (grad,) = torch.autograd.grad(found.sum(), outputs)
    assert grad.isfinite().all()
    assert not grad[1, :, 2:].any()
    torch.testing.assert_close(
        Classification(smoothing).losses(outputs[:1], labels[:1], None), found[:1]
    )


def test_regression_is_torchs_squared_error() -> None:
    outputs, labels = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = functional.mse_loss(outputs, labels, reduction="none").mean(-1)
    torch.testing.assert_close(Regression().losses(outputs, labels, None), wanted)
    one = Regression().losses(outputs[..., :1], labels[..., 0], None)
    torch.testing.assert_close(one, (outputs[..., 0] - labels[..., 0]) ** 2)
    model = nn.Module()
    model.forward = lambda x: x.sum(-1)  # type: ignore[method-assign]
    found = Regression().outputs(model, {"x": torch.ones(5, 2)})
    assert found.shape == (5, 1)  # a model may leave the last dimension out
    with pytest.raises(RegrowError, match="as many values as the model gives, 4 per sample, got 1"):
        Regression().losses(outputs, labels[..., 0], None)


def _llama(seed: int = 0, vocabulary: int = 24) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=vocabulary, max_position_embeddings=32,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=24, initializer_range=0.3
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_causal_lm_is_the_loss_of_transformers(make: Callable[[], nn.Module]) -> None:
    """By sample with padding left out; and over all tokens for the score."""
    model, task = make(), CausalLm()
    tokens = torch.randint(0, 24, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[1, 5:] = -100
    labels[2, :3] = -100
    labels[3] = -100  # nothing to learn: no loss, and no NaN
    with torch.no_grad():
        outputs = task.outputs(model, {"input_ids": tokens})
        found = task.losses(outputs.unflatten(0, (2, 2)), labels.view(2, 2, 9), None).flatten()
        for row in range(3):
            wanted = model(input_ids=tokens[row : row + 1], labels=labels[row : row + 1]).loss
            torch.testing.assert_close(found[row], wanted)
        assert found[3] == 0
        whole = model(input_ids=tokens, labels=labels).loss
    measured = task.measure(outputs, labels)
    assert measured[:, 1].tolist() == [8, 4, 6, 0]
    assert task.score(measured, labels.numpy()) == pytest.approx(whole.item(), rel=1e-5)
    assert math.isnan(task.score(measured[3:], labels[3:].numpy()))
    assert math.isnan(task.score(measured[:0], labels[:0].numpy()))


def _contrastive(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> list[float]:
    """Equation 2 of arXiv 2004.11362, one sample after another."""
    found = []
    for i in range(len(labels)):
        others = [a for a in range(len(labels)) if a != i]
        near = {a: math.exp(float(features[i] @ features[a]) / temperature) for a in others}
        same = [p for p in others if labels[p] == labels[i]]
        total = sum(near.values())
        loss = -sum(math.log(near[p] / total) for p in same)
        found.append(loss / len(same) if same else 0.0)
    return found


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_metric_is_the_supervised_contrastive_loss(temperature: float) -> None:
    torch.manual_seed(0)
    features = functional.normalize(torch.randn(2, 6, 8), dim=-1)
    labels = torch.tensor([[0, 1, 0, 1, 2, 0], [5, 5, 5, 5, 1, 1]])  # one class alone
    found = Metric(temperature).losses(features, labels, None)
    for user in range(2):
        wanted = _contrastive(features[user], labels[user], temperature)
        assert found[user].tolist() == pytest.approx(wanted, rel=1e-4)


def test_what_fills_up_a_batch_is_nobodys_neighbour() -> None:
    torch.manual_seed(0)
    features = functional.normalize(torch.randn(1, 6, 8), dim=-1)
    labels = torch.tensor([[0, 1, 0, 1, 0, 0]])
    used = torch.tensor([[True] * 4 + [False] * 2])
    found = Metric().losses(features, labels, None, used)[0, :4]
    torch.testing.assert_close(found, Metric().losses(features[:, :4], labels[:, :4], None)[0])


def test_a_sample_alone_in_its_batch_has_no_metric_loss() -> None:
    """And gradients of 0, which a softmax over nothing would make NaN."""
    features = torch.randn(2, 1, 8, requires_grad=True)
    loss = Metric().losses(functional.normalize(features, dim=-1), torch.zeros(2, 1).long(), None)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    assert not loss.any()
    assert not grad.any()


def test_distillation_is_one_minus_the_cosine() -> None:
    outputs, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = Distillation().losses(outputs, teacher, None)
    wanted = 1 - (
        functional.normalize(outputs, dim=-1) * functional.normalize(teacher, dim=-1)
    ).sum(-1)
    torch.testing.assert_close(found, wanted)
    for labels, words in ((teacher[..., :3], "5, got 3"), (teacher[..., 0], "5, got one number")):
        with pytest.raises(RegrowError, match=f"features as wide as the model's, {words} per"):
            Distillation().losses(outputs, labels, None)


def test_a_loss_of_ones_own() -> None:
    outputs, labels = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    each = Custom(lambda o, t: (o - t).abs().sum(-1))
    torch.testing.assert_close(each.losses(outputs, labels, None), (outputs - labels).abs().sum(-1))
    parts = Custom(lambda o, t: (o - t).abs())  # [N, 4]: a sample's mean
    torch.testing.assert_close(
        parts.losses(outputs, labels, None), (outputs - labels).abs().mean(-1)
    )
    whole = Custom(lambda o, t: (o - t).abs().mean())
    found = whole.losses(outputs[:1], labels[:1], None)
    assert found.shape == (1, 3)
    assert (found == (outputs[0] - labels[0]).abs().mean()).all()
    with pytest.raises(UsageError, match="one number per sample to train several users at once"):
        whole.losses(outputs, labels, None)
    for task in (each, parts, whole):
        measured = task.measure(outputs[0], labels[0])
        assert measured.shape == (3, 1)
        assert task.score(measured, labels[0].numpy()) == pytest.approx(
            task.losses(outputs[:1], labels[:1], None).mean().item(), rel=1e-5
        )


def test_a_loss_of_ones_own_sees_the_first_of_several_outputs() -> None:
    tensor = torch.ones(2)
    task, x = Custom(lambda o, t: o), {"x": tensor}
    for result in (tensor, (tensor, 1), [tensor], {"logits": tensor, "other": 2}):
        assert task.outputs(lambda x, result=result: result, x) is tensor  # type: ignore[misc]


@pytest.mark.parametrize("loss", [lambda o, t: o.sum(-1)[:2], lambda o, t: o.mean().view(1)])
def test_a_loss_of_another_shape(loss: Loss) -> None:
    words = r"one number per sample, or one for all, got \[[12]\] for 6 samples"
    with pytest.raises(UsageError, match=words):
        Custom(loss).losses(torch.ones(2, 3, 4), torch.ones(2, 3), None)


@pytest.mark.parametrize("task", [Custom(lambda o, t: o), Metric(), Regression()])
def test_inputs_that_a_model_does_not_take(task: Any) -> None:
    with pytest.raises(RegrowError, match=r"must take the data's inputs, got x \[2, 5\]: mat1"):
        task.outputs(_plain().model, {"x": torch.ones(2, 5)})
    with pytest.raises(RegrowError, match=r"must take the data's inputs, got y \[2, 6\]: "):
        task.outputs(_plain().model, {"y": torch.ones(2, 6)})


# -- scores ---------------------------------------------------------------------------------------


def test_scores() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    task = Classification()
    assert task.score(task.measure(logits, labels), labels.numpy()) == 0.75
    values = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    truth = torch.tensor([[1.0, 4.0], [3.0, 5.0]])
    wanted = float(np.sqrt(np.mean([0, 4, 0, 0])))
    regression = Regression()
    assert regression.score(regression.measure(values, truth), truth.numpy()) == wanted
    points = functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.25]]))
    classes = np.array([0, 0, 1, 1, 1])
    metric = Metric()
    assert metric.score(metric.measure(points, torch.tensor(classes)), classes) == 0.8
    assert math.isnan(metric.score(points[:1].numpy(), classes[:1]))
    cosine = Distillation().measure(values, truth)
    assert Distillation().score(cosine, truth.numpy()) == pytest.approx(
        functional.cosine_similarity(values, truth).mean().item()
    )
    for each in (task, regression, Distillation(), Custom(lambda o, t: o)):
        assert math.isnan(each.score(np.empty((0, 1), np.float32), np.empty(0)))


def test_classification_measures_the_nats_of_a_label() -> None:
    """Torch's cross-entropy, whatever smoothing trains with; a label that is no output has none."""
    outputs = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 1, -1, 2])
    measured = Classification(0.1).measure(outputs, labels)
    found = Classification(0.1).sample_losses(measured, labels.numpy(), np.zeros(5, np.int64))
    known = labels >= 0
    wanted = functional.cross_entropy(outputs[known], labels[known], reduction="none")
    np.testing.assert_allclose(found[known.numpy()], wanted.numpy(), rtol=1e-5)
    assert found[3] == math.inf
    assert measured[:, 0].tolist() == outputs.argmax(-1).tolist()


def test_what_is_no_number_is_never_right() -> None:
    """NaN stands first among the classes: a model that broke must not score by it."""
    logits = torch.tensor([[math.nan] * 3, [0.0, math.nan, 1.0], [3.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 0])
    task = Classification()
    assert task.score(task.measure(logits, labels), labels.numpy()) == pytest.approx(1 / 3)
    features = np.full((3, 4), np.nan, np.float32)
    assert math.isnan(Metric().score(features, np.zeros(3)))
    broken = np.array([[1.0], [math.nan]], np.float32)
    for other in (Regression(), Distillation(), Custom(len)):
        assert math.isnan(other.score(broken, np.zeros(2)))


def test_which_way_is_better() -> None:
    tasks = [Classification(), Regression(), CausalLm(), Metric(), Distillation(), Custom(len)]
    assert [task.higher_is_better for task in tasks] == [True, False, False, True, True, False]
    assert [task.metric for task in tasks] == [
        "accuracy", "rmse", "nats per token", "1-NN accuracy", "cosine", "loss"
    ]  # fmt: skip


# -- which task -----------------------------------------------------------------------------------

_CLASSES = Dataset({"x": np.zeros((4, 1), np.float32)}, np.arange(4) % 2, ("a", "b"))
_VALUES = replace(_CLASSES, labels=np.zeros(4, np.float32), names=())
_VECTORS = replace(_VALUES, labels=np.zeros((4, 3), np.float32))
_TOKENS = replace(_VALUES, labels=np.zeros((4, 3), np.int64))


@pytest.mark.parametrize(
    ("data", "model_task", "name"),
    [
        (_CLASSES, "image-classification", "classification"),
        (_CLASSES, "custom", "classification"),
        (_CLASSES, "feature-extraction", "metric"),
        (_VALUES, "text-classification", "regression"),
        (_VECTORS, "custom", "regression"),
        (_VECTORS, "feature-extraction", "distillation"),
        (_TOKENS, "text-generation", "causal-lm"),
    ],
)
def test_labels_and_model_say_what_is_learnt(data: Dataset, model_task: str, name: str) -> None:
    assert choose_task(AdaptConfig(), data, model_task).name == name
    assert choose_task(AdaptConfig(task=name), data, "whatever").name == name
    assert choose_task(AdaptConfig(task=name), data, model_task, lambda o, t: o).name == "custom"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("classification", _VALUES, "labels must be class labels for task classification, got flo"),
        ("classification", _TOKENS, "labels must be class labels .*, got token labels"),
        ("metric", _VECTORS, "labels must be class labels for task metric, got floating-point"),
        ("regression", _CLASSES, "labels must be numbers for task regression, got integer labels"),
        ("distillation", _CLASSES, "labels must be a teacher's features .*, got integer labels"),
        ("causal-lm", _CLASSES, "labels must be tokens for task causal-lm, got integer labels"),
        ("sorting", _CLASSES, "task must be one of auto, .*, got 'sorting'"),
    ],
)
def test_labels_that_a_task_does_not_take(name: str, data: Dataset, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_task(AdaptConfig(task=name), data, "custom")


# -- whole runs -----------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 24)
        self.fc2 = nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.fc2(torch.tanh(self.fc1(self.norm(x))))
        return result


class _Perceptron(nn.Module):
    """A plain module: x [n, 6] to [n, outputs], or [n] where `flat`."""

    def __init__(self, outputs: int = 1, *, flat: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(12, outputs)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(x)
        return result[:, 0] if self.flat else result


def _plain(outputs: int = 1, labels: tuple[str, ...] = (), **more: bool) -> Backbone:
    torch.manual_seed(3)
    model = _Perceptron(outputs, **more).eval()
    return Backbone(model, "sha256:1", "custom", ("head",), labels, ())


def _values(count: int, outputs: int = 1, seed: int = 0) -> Dataset:
    """What the plain model gives, twice as much and moved, on inputs that it has not seen."""
    x = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    with torch.no_grad():
        y = 2 * _plain(outputs).model(torch.from_numpy(x)) + 1
    return Dataset({"x": x}, y[:, 0].numpy() if outputs == 1 else y.numpy(), ())


@pytest.mark.parametrize("method", ["lora", "bitfit", "head"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_with_a_head_of_ones_own(method: str, outputs: int) -> None:
    config = _config(method=method, steps=60, lr=0.02, head_lr=0.05, holdout=0.4)
    data = _values(128, outputs)
    done = adapt(_plain(outputs), data, config)
    head = done.adapter.head
    assert head is not None
    assert head.labels == tuple(f"value_{i}" for i in range(outputs))
    assert (done.metric, done.higher_is_better, done.samples) == ("rmse", False, 51)
    train, held = split(data, 0.4, config.seed)
    constant = np.sqrt(np.mean((held.labels - train.labels.mean(axis=0)) ** 2))
    assert done.before == pytest.approx(constant)  # nothing else is known of the values
    assert constant > 0.3
    assert done.after < 0.8 * constant
    assert done.verdict is not None
    assert done.verdict.baseline == "mean of the labels"
    assert done.improves


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("head", ["auto", "keep", "tune"])
def test_regression_with_the_backbones_head(head: str, flat: bool) -> None:
    backbone = _plain(1, ("size",), flat=flat)
    config = _config(method="lora", head=head, steps=60, lr=0.02, holdout=0.4)
    if flat and head == "tune":
        return  # such a model takes the last dimension off itself, whatever its head is
    done = adapt(backbone, _values(128), config)
    assert (done.adapter.head is None) is (head != "tune")
    assert done.before > 0.5
    assert done.after < 0.8 * done.before
    assert done.improves
    with applied(backbone.model, done.adapter), torch.no_grad():
        data = _values(40, seed=9)
        found = backbone.model(torch.from_numpy(data.inputs["x"])).reshape(-1).numpy()
    assert np.sqrt(np.mean((found - data.labels) ** 2)) < done.before


def test_regression_to_more_values_than_the_head_has() -> None:
    with pytest.raises(UsageError, match="a trained head of 3 outputs to keep, got 1: --head new"):
        adapt(_plain(1, ("size",)), _values(16, 3), _config(head="keep", steps=2))


def _causal(make: Callable[[], nn.Module]) -> Backbone:
    return Backbone(make(), "sha256:1", "text-generation", (), (), ())


def _sequences(count: int, seed: int = 0) -> Dataset:
    """One pattern of tokens from a random place on, some padded at the end."""
    rng = np.random.default_rng(seed)
    pattern = np.array([3, 7, 7, 1, 12, 20, 5])
    rows = np.stack(
        [np.roll(pattern, -int(s))[np.arange(12) % 7] for s in rng.integers(0, 7, count)]
    )
    labels = rows.copy()
    mask = np.ones_like(rows)
    labels[::3, 9:], mask[::3, 9:] = -100, 0
    return Dataset({"input_ids": rows, "attention_mask": mask}, labels, ())


@pytest.mark.parametrize("method", ["nola", "lora", "vera", "fourierft", "ia3", "ssf", "bitfit"])
@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_a_causal_lm_learns_a_sequence(make: Callable[[], nn.Module], method: str) -> None:
    """Nats per token fall from those of a model that knows nothing."""
    if make is _llama and method == "bitfit":
        return  # no layer of it has a bias
    rates = {"nola": 0.1, "vera": 0.3, "fourierft": 0.3, "lora": 0.05}
    config = _config(method=method, steps=30, lr=rates.get(method, 0.1), storage="int8",
                     method_settings={"rank": 4} if method == "nola" else {})  # fmt: skip
    done = adapt(_causal(make), _sequences(32), config, held=_sequences(24, 1))
    assert done.metric == "nats per token"
    assert done.adapter.head is None
    assert done.before > 3
    assert done.after < 0.8 * done.before
    assert done.improves


@pytest.mark.parametrize("method", ["nola", "vera", "fourierft", "lora"])
def test_a_model_in_bf16_learns(method: str) -> None:
    backbone = _causal(_llama)
    backbone.model.to(torch.bfloat16)
    settings = {"rank": 4} if method in ("nola", "lora") else {}
    rates = {"nola": 0.1, "vera": 0.3, "fourierft": 0.3, "lora": 0.05}
    config = _config(method=method, steps=20, lr=rates[method], method_settings=settings)
    done = adapt(backbone, _sequences(32), config, held=_sequences(8, 1))
    assert done.after < 0.9 * done.before


class _Half(nn.Module):
    """The plain model in bf16, fed with float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _plain(3).model.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x.to(torch.bfloat16))
        return result


@pytest.mark.parametrize("head", ["new", "tune"])
def test_a_model_in_bf16_takes_a_head(head: str) -> None:
    """Heads are float32 in training and in the file, whatever the model computes in."""
    names = ("a", "b", "c")
    backbone = Backbone(_Half().eval(), "sha256:1", "custom", ("inner.head",), names, ())
    done = adapt(backbone, _labelled(40), _config(steps=4, head=head, holdout=0))
    assert done.adapter.head is not None
    x = torch.from_numpy(_labelled(40).inputs["x"])
    with torch.no_grad(), applied(backbone.model, done.adapter):
        assert backbone.model(x).dtype == torch.bfloat16


def test_a_causal_lm_keeps_its_head() -> None:
    for more in ({"head": "new"}, {"method": "head"}):
        with pytest.raises(UsageError, match="head must be kept for task causal-lm"):
            adapt(_causal(_gpt2), _sequences(8), _config(steps=1, **more))


def _bert() -> Backbone:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=40, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    return Backbone(model, "sha256:1", "feature-extraction", (), (), ())


def _texts(count: int, seed: int = 0) -> Dataset:
    """A word of the class among others that mean nothing; padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, 40, (count, 8))
    labels = np.arange(count) % 3
    ids[np.arange(count), rng.integers(0, 5, count)] = labels + 1
    mask = np.ones_like(ids)
    mask[::2, 6:] = 0
    return Dataset({"input_ids": ids, "attention_mask": mask}, labels, ("a", "b", "c"))


@pytest.mark.parametrize("method", ["nola", "lora", "fourierft"])
def test_embeddings_of_a_class_come_together(method: str) -> None:
    settings = {"rank": 4} if method != "fourierft" else {}
    config = _config(method=method, steps=60, lr=0.05, holdout=0.4, batch_size=48,
                     method_settings=settings)  # fmt: skip
    train, held = split(_texts(90), 0.4, config.seed)
    done = adapt(_bert(), train, config, held=held)
    assert (done.metric, done.adapter.head) == ("1-NN accuracy", None)
    assert done.before < 0.7
    assert done.after > done.before + 0.2


def test_features_come_closer_to_a_teachers() -> None:
    rng = np.random.default_rng(0)
    data = _texts(60)
    words = rng.normal(size=(3, 16)).astype(np.float32)
    data = replace(data, labels=words[data.labels], names=())
    done = adapt(
        _bert(), data, _config(steps=60, lr=0.05, holdout=0.4, method_settings={"rank": 4})
    )
    assert done.metric == "cosine"
    assert abs(done.before) < 0.5
    assert done.after > done.before + 0.3
    narrow = replace(data, labels=data.labels[:, :5])
    with pytest.raises(RegrowError, match="features as wide as the model's, 16, got 5"):
        adapt(_bert(), narrow, _config(steps=1))


def _absolute(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - labels).abs()


def _absolute_mean(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - labels).abs().mean()


@pytest.mark.parametrize("loss", [_absolute, _absolute_mean])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_ones_own_is_learned(loss: Loss, accumulate: int) -> None:
    config = _config(steps=50, lr=0.02, accumulate=accumulate, holdout=0.4)
    done = adapt(_plain(), _values(128), config, loss=loss)
    assert (done.metric, done.higher_is_better) == ("loss", False)
    assert done.adapter.head is None
    assert done.after < 0.8 * done.before
    assert done.improves


def test_one_number_for_all_serves_one_user_alone() -> None:
    data = replace(_values(24), users=np.repeat(["ann", "bob"], 12))
    with pytest.raises(UsageError, match="one number per sample to train several users at once"):
        adapt_users(_plain(), data, _config(steps=2), loss=_absolute_mean)
    alone = adapt_users(
        _plain(), data, _config(steps=2, users_at_once=1), loss=_absolute_mean
    )  # each in a pass of its own
    assert sorted(alone) == ["ann", "bob"]


@pytest.mark.parametrize("head", ["auto", "tune"])
def test_a_loss_of_ones_own_trains_the_backbones_head(head: str) -> None:
    method = "head" if head == "auto" else "lora"
    config = _config(method=method, head=head, steps=50, head_lr=0.05, lr=0.02, holdout=0.4)
    done = adapt(_plain(2), _values(128), config, loss=_absolute)
    assert done.adapter.head is not None
    assert done.adapter.head.labels == ("value_0", "value_1")
    assert done.after < 0.8 * done.before
    with pytest.raises(UsageError, match="head must be kept for task custom"):
        adapt(_plain(2), _values(40), _config(head="new", steps=1), loss=_absolute)


def test_a_model_that_gives_no_logits() -> None:
    backbone = replace(_bert(), labels=("a", "b", "c"))
    with pytest.raises(RegrowError, match="model must return logits, got BaseModelOutput"):
        adapt(backbone, _texts(12), _config(steps=1, task="classification"))


def test_a_language_model_does_not_classify() -> None:
    backbone, data = replace(_causal(_gpt2), labels=("a", "b", "c")), _texts(12)
    ids = data.inputs["input_ids"] % 24
    data = replace(data, inputs={"input_ids": ids})
    words = r"logits \[batch, classes\] to classify, got \[12, 8, 24\]"
    with pytest.raises(RegrowError, match=words):
        adapt(backbone, data, _config(steps=1, task="classification", holdout=0))


# -- many users -----------------------------------------------------------------------------------


def _check_alone(
    backbone: Backbone, data: Dataset, config: AdaptConfig, loss: Loss | None = None
) -> None:
    counts = [5, 12, 8]
    users = np.repeat(["ann", "bob", "cy"], counts)
    data = replace(data.take(np.arange(25)), users=users)
    found: dict[str, Adapted] = adapt_users(backbone, data, config, loss=loss)
    assert list(found) == ["ann", "bob", "cy"]
    for user, done in found.items():
        mine = replace(data.take(np.flatnonzero(users == user)), users=None)
        alone = adapt(backbone, mine, config, loss=loss)
        for name, part in done.adapter.coefficients.items():
            wanted = alone.adapter.coefficients[name].dense()
            assert np.abs(part.dense() - wanted).max() <= 1e-4 * np.abs(wanted).max(), (user, name)
        assert (done.samples, done.folds) == (alone.samples, 5)
        assert done.before == pytest.approx(alone.before, nan_ok=True)
        assert done.after == pytest.approx(alone.after, rel=1e-4, nan_ok=True)
        assert done.improves == alone.improves


@pytest.mark.parametrize("method", ["nola", "fourierft"])
@pytest.mark.parametrize("task", [*_ALL, "custom"])
def test_users_together_are_as_if_alone(task: str, method: str) -> None:
    """Unequal numbers of samples in every task: what fills up a batch changes nothing."""
    settings = {"rank": 2, "k": 8, "l": 8} if method == "nola" else {"n": 16}
    config = _config(
        method=method, method_settings=settings, steps=6, lr=0.01, batch_size=7, holdout=0.2
    )
    if task == "classification":
        _check_alone(_plain(3, ("a", "b", "c")), _labelled(25), config)
    elif task == "regression":
        _check_alone(_plain(), _values(25), config)
    elif task == "causal-lm":
        _check_alone(_causal(_llama), _sequences(25), config)
    elif task == "metric":
        _check_alone(_bert(), _texts(25), config)
    elif task == "distillation":
        features = np.random.default_rng(0).normal(size=(25, 16)).astype(np.float32)
        _check_alone(_bert(), replace(_texts(25), labels=features, names=()), config)
    else:
        _check_alone(_plain(), _values(25), config, _absolute)


def _labelled(count: int) -> Dataset:
    x = np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)
    return Dataset({"x": x}, np.arange(count) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("threads", [1, 2])
def test_training_takes_the_threads_it_is_given_and_gives_them_back(threads: int) -> None:
    seen = []

    def watched(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return _absolute_mean(outputs, labels)

    before = torch.get_num_threads()
    adapt(_plain(), _values(8), _config(steps=2, threads=threads), loss=watched)
    assert set(seen) == {threads}
    assert torch.get_num_threads() == before
