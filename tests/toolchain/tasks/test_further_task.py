"""A task from outside: one class, one entry in the registry, and everything works with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regrow_format.adapter import Adapter
from regrow_format.errors import UsageError
from regrow_toolchain.adapters import adapt, adapt_users, applied
from regrow_toolchain.cli.tables import score
from regrow_toolchain.compress import compress
from regrow_toolchain.config import AdaptConfig, CompressConfig
from regrow_toolchain.data import Dataset, split
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import TASKS, Fitted, Task, TaskEntry, choose_task, in_percent

_CLASSES = 4


@dataclass(frozen=True)
class MultiLabel(Task):
    """Labels are int64 [n, classes], 0 or 1: binary cross-entropy, micro-F1."""

    name = "multi-label"
    label_words = "0 or 1 for every class"
    metric = "micro-F1"
    higher_is_better = True
    heads = ("new", "tune")

    @classmethod
    def takes(cls, data: Dataset) -> bool:
        return data.labels.ndim == 2 and bool(np.isin(data.labels, (0, 1)).all())

    @classmethod
    def suits(cls, data: Dataset, model_task: str) -> bool:
        return cls.takes(data) and model_task != "text-generation"

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        count = data.labels.shape[1]
        known = head != "new" and len(backbone.labels) == count
        own = tuple(f"class_{index}" for index in range(count))
        return Fitted(data, eval_data, backbone.labels if known else own, known)

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            outputs.float(), labels.float(), reduction="none"
        ).mean(-1)

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, 1 + classes]: the loss and the answers."""
        answers = (outputs > 0).float().cpu().numpy()
        return np.concatenate([super().measure(outputs, labels), answers], axis=1)

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        hits = 2 * (measured[:, 1:] * labels).sum()
        return float(hits / max(measured[:, 1:].sum() + labels.sum(), 1))

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        share = (train.sum(axis=0) + 0.5) / (len(train) + 1)
        loss = -np.where(labels, np.log(share), np.log1p(-share)).mean(axis=1, keepdims=True)
        answers = np.broadcast_to(share > 0.5, labels.shape)
        return {"class frequencies": np.concatenate([loss, answers], axis=1).astype(np.float32)}


@dataclass(frozen=True)
class AbsoluteError(Task):
    """The least that a task must say; all else is as `Task` has it."""

    name = "absolute-error"
    label_words, label_kind = "numbers", "values"
    metric = "mean absolute error"
    higher_is_better = False

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        return (outputs - labels).abs().mean(-1)


@pytest.fixture
def registered() -> Iterator[None]:
    """As an application would do it; first, since all labels of two dimensions could be tokens."""
    before = dict(TASKS)
    TASKS.clear()
    TASKS["multi-label"] = TaskEntry(f"{__name__}:MultiLabel", percent=("micro-F1",))
    TASKS.update(before)
    TASKS["absolute-error"] = TaskEntry(f"{__name__}:AbsoluteError")
    yield
    TASKS.clear()
    TASKS.update(before)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 24)
        self.fc2 = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.fc2(torch.tanh(self.fc1(self.norm(x))))
        return result


class _Net(nn.Module):
    """x [n, 6] to [n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(12, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


def _backbone(labels: tuple[str, ...] = ("a", "b", "c", "d")) -> Backbone:
    torch.manual_seed(3)
    return Backbone(_Net().eval(), "sha256:1", "custom", ("head",), labels, ())


def _labelled(count: int = 150) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return Dataset({"x": x}, (x @ rng.normal(size=(6, _CLASSES)) > 0.5).astype(np.int64))


def _config(**more: Any) -> AdaptConfig:
    start = {"method": "lora", "coefficient_dtype": "fp32", "noise": 0.0, "shift": 0.0, "lr": 0.02,
             "steps": 60, "holdout": 0.4, "task": "multi-label"}  # fmt: skip
    return AdaptConfig(**{**start, **more})


@pytest.mark.parametrize("head", ["auto", "new", "tune"])
def test_it_trains_and_is_gated_by_its_own_metric(registered: None, head: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    backbone, data, config = _backbone(), _labelled(), _config(head=head)
    done = adapt(backbone, data, config)
    own = {"auto": None, "new": tuple(f"class_{i}" for i in range(4)), "tune": backbone.labels}
    assert (done.adapter.head and done.adapter.head.labels) == own[head]
    train, eval_data = split(data, config.holdout, config.seed)
    with applied(backbone.model, done.adapter), torch.no_grad():
        logits = backbone.model(torch.from_numpy(eval_data.inputs["x"]))
    wanted = metrics.f1_score(eval_data.labels, (logits > 0).numpy(), average="micro")
    assert done.after == pytest.approx(wanted)
    assert (done.metric, done.higher_is_better, done.samples) == ("micro-F1", True, 60)
    verdict = done.verdict
    assert verdict is not None
    assert (verdict.metric, verdict.improves) == ("micro-F1", True)
    labels = torch.from_numpy(eval_data.labels).float()
    loss = functional.binary_cross_entropy_with_logits(logits, labels).item()
    assert verdict.loss_after == pytest.approx(loss, rel=1e-5)
    if head == "new":  # whose base knows none of these classes
        assert verdict.baseline == "class frequencies"
        often = np.broadcast_to(train.labels.mean(axis=0) > 0.5, eval_data.labels.shape)
        assert done.before == pytest.approx(
            metrics.f1_score(eval_data.labels, often, average="micro")
        )


def test_what_it_learns_from_noise_is_refused(registered: None) -> None:
    data = _labelled()
    noise = np.random.default_rng(9).integers(0, 2, data.labels.shape)
    done = adapt(_backbone(), replace(data, labels=noise), _config(head="new", steps=20))
    assert not done.improves


def test_users_share_a_pass(registered: None) -> None:
    data = replace(_labelled(60), users=np.repeat(["ann", "bob"], 30))
    together = adapt_users(_backbone(), data, _config(steps=4))
    mine = replace(data.take(np.arange(30)), users=None)
    alone = adapt(_backbone(), mine, _config(steps=4))
    assert together["ann"].after == pytest.approx(alone.after)


def test_the_least_that_a_task_must_say(registered: None) -> None:
    backbone, x = _backbone(), _labelled(150).inputs["x"]
    with torch.no_grad():
        labels = 2 * backbone.model(torch.from_numpy(x)).numpy() + 1
    data, config = Dataset({"x": x}, labels), _config(task="absolute-error")
    done = adapt(backbone, data, config)
    _, eval_data = split(data, config.holdout, config.seed)
    with applied(backbone.model, done.adapter), torch.no_grad():
        found = backbone.model(torch.from_numpy(eval_data.inputs["x"])).numpy()
    assert done.after == pytest.approx(np.abs(found - eval_data.labels).mean(), rel=1e-5)
    assert done.improves
    with pytest.raises(UsageError, match="head must be kept for task absolute-error"):
        adapt(backbone, data, _config(task="absolute-error", head="new"))


def test_compression_learns_it(registered: None) -> None:
    config = CompressConfig(task="multi-label", ratio=1.5, epochs=2, init="svd", holdout=0.3)
    done = compress(_backbone(), _labelled(), config)
    assert done.metric == done.backbone.report["metric"] == "micro-F1"
    assert 0 < done.dense_score < 1
    assert math.isfinite(done.score)


def test_labels_that_it_does_not_take(registered: None) -> None:
    data = replace(_labelled(8), labels=np.full((8, 4), 2))
    words = r"labels must be 0 or 1 for every class for task multi-label, got int64 .* \[8, 4\]"
    with pytest.raises(UsageError, match=words):
        adapt(_backbone(), data, _config())


def test_the_first_that_suits_is_what_labels_mean(registered: None) -> None:
    data = _labelled(8)
    assert choose_task(AdaptConfig(), data, "custom").name == "multi-label"
    assert choose_task(AdaptConfig(), data, "text-generation").name == "causal-lm"


def test_names_are_choices_only_while_they_are_registered() -> None:
    with pytest.raises(UsageError, match=r"task must be one of auto, .*got 'multi-label'"):
        adapt(_backbone(), _labelled(8), _config())


def test_scores_are_shown_as_the_registry_says(registered: None) -> None:
    assert score(0.8731, "micro-F1") == "87.3 %"
    assert score(0.8731, "mean absolute error") == "0.8731"
    assert score(None, "micro-F1") == "no score"


def test_metrics_in_percent_are_those_of_the_task() -> None:
    for name, entry in TASKS.items():
        task = entry.load()
        assert task.name == name
        made = task.from_settings(AdaptConfig())
        metrics = {made.metric, made.gate_metric}
        if name != "distillation":  # whose metric follows from what the teacher gives
            assert set(entry.percent) <= metrics
        assert in_percent(made.metric) == (made.metric in entry.percent)


def make_model() -> nn.Module:
    """For the command line."""
    return _backbone().model


def test_the_command_takes_it(registered: None, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """From an array of 0 and 1, by what the labels mean; the file has its score."""
    data = _labelled()
    np.savez(tmp_path / "d.npz", labels=data.labels, **data.inputs)
    out = tmp_path / "a.safetensors"
    done = cli("adapt", f"{__name__}:make_model", "--data", tmp_path / "d.npz", "-o", out,
               "--method", "lora", "--lr", 0.02, "--steps", 60)  # fmt: skip
    assert done.code == 0, done.err
    assert re.search(r"micro-F1 \d+\.\d % before, \d+\.\d % after, on 150 samples", done.out)
    (stored,) = Adapter.load(out).validated
    assert stored.metric == "micro-F1"
    shown = cli("inspect", out)
    assert f"micro-F1 {100 * stored.before:.1f} % -> {100 * stored.after:.1f} %" in shown.out
