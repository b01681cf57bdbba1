"""A head alone: what it sees is computed once, where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regrow_toolchain.adapters import AdapterTrainer, TrainingStopped, adapt, adapt_each, adaptation
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone
from regrow_toolchain.training import Checkpoint

_STEPS = 30
_CONFIG = AdaptConfig(method="head", steps=_STEPS, batch_size=8, head_lr=0.05, holdout=0)
_COUNTS = {"ann": 7, "bob": 30, "cy": 12}


class _Model(nn.Module):
    """`after` is what becomes of the head's output."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(6, 3)
        self.after, self.calls = after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.after(self.head(x))


class _Twice(_Model):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + super().forward(-x)) / 2


def _backbone(model: nn.Module) -> Backbone:
    return Backbone(model.eval(), "sha256:1", "custom", ("head",), ("a", "b", "c"), ())


def _data(count: int, seed: int = 0, shape: tuple[int, ...] = (6,)) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    labels = np.arange(count, dtype=np.int64) % 3
    x[:, 0] += labels.reshape(-1, *(1,) * (x.ndim - 2))
    return Dataset({"x": x}, labels, ("open", "shut", "stop"))


def _users() -> Dataset:
    parts = [_data(count, seed) for seed, count in enumerate(_COUNTS.values())]
    inputs = {"x": np.concatenate([part.inputs["x"] for part in parts])}
    users = np.repeat(list(_COUNTS), list(_COUNTS.values()))
    labels = np.concatenate([part.labels for part in parts])
    return Dataset(inputs, labels, parts[0].names, users=users)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The parameters at the end of every training, in full precision."""
    found: list[dict[str, Tensor]] = []
    run = AdapterTrainer.run

    def noted(self: AdapterTrainer, *arguments: Any, **more: Any) -> None:
        run(self, *arguments, **more)
        found.append({name: value.detach().clone() for name, value in self.parameters().items()})

    monkeypatch.setattr(AdapterTrainer, "run", noted)
    return found


def _absolute(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - nn.functional.one_hot(labels, 3)).abs().mean(-1)


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ({}, None),
        ({"head": "new"}, None),
        ({"accumulate": 3}, None),
        ({"patience": 2, "eval_every": 5}, None),
        ({"mixed_precision": "bf16"}, None),
        ({"precision": "int8"}, None),
        ({"head": "tune"}, _absolute),
    ],
)
@pytest.mark.parametrize("users", [False, True])
def test_the_result_is_that_of_running_the_backbone(
    trained: list[dict[str, Tensor]], change: dict[str, Any], loss: Any, users: bool,
) -> None:  # fmt: skip
    data, config = _users() if users else _data(40), AdaptConfig(**{**vars(_CONFIG), **change})
    calls = []
    for model in (_Model(), _Model(torch.clone)):  # what is no more the head's own is run
        list(adapt_each(_backbone(model), data, config, loss=loss))
        calls.append(model.calls)
    kept, run = trained
    assert calls[0] < calls[1]
    near = 1e-6 if config.mixed_precision == "no" else 1e-3
    for name, value in run.items():
        assert (kept[name] - value).abs().max() <= near, name


@pytest.mark.parametrize(
    "after",
    [
        lambda x: 2 * x,
        lambda x: torch.clamp(x, -1e9, 1e9),
        lambda x: torch.cat([x[:, :1], x[:, 1:]], dim=1),
    ],
)
def test_a_model_that_changes_what_the_head_gives_is_run(after: Callable[[Tensor], Tensor]) -> None:
    model = _Model(after)
    assert adapt(_backbone(model), _data(40), _CONFIG, eval_data=_data(60, 1)).improves
    assert model.calls > _STEPS


def test_a_head_that_is_called_twice_is_run() -> None:
    model = _Twice()
    adapt(_backbone(model), _data(40), _CONFIG)
    assert model.calls > 2 * _STEPS


@pytest.mark.parametrize(("change", "runs"), [({}, True), ({"shift": 0.0, "noise": 0.0}, False)])
def test_images_that_move_are_computed_anew(change: dict[str, float], runs: bool) -> None:
    model = _Model()
    data = _data(40, shape=(1, 2, 3))
    adapt(_backbone(model), data, AdaptConfig(**{**vars(_CONFIG), **change}))
    assert (model.calls > _STEPS) is runs


def test_few_steps_do_not_compute_what_no_step_sees() -> None:
    model = _Model()
    adapt(_backbone(model), _data(200), replace(_CONFIG, steps=3, holdout=0.3))
    assert model.calls <= 3 + 4  # the scores before and after, the probe


def test_it_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapt(_backbone(_Model()), _data(40), _CONFIG).adapter.save(tmp_path / "whole")
    monkeypatch.setattr(adaptation, "Checkpoint", partial(Checkpoint, seconds=0))
    step = AdapterTrainer.step

    def stops(self: AdapterTrainer, number: int) -> Tensor:
        if number == 11:
            raise KeyboardInterrupt
        return step(self, number)

    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            adapt(_backbone(_Model()), _data(40), _CONFIG, checkpoint=state)
    done = adapt(_backbone(_Model()), _data(40), _CONFIG, checkpoint=state, resume=True)
    assert done.adapter.save(tmp_path / "resumed") == whole
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_loss_that_is_no_number_is_found_as_before() -> None:
    data = _data(40)
    data.inputs["x"][5] = np.nan
    with pytest.raises(TrainingStopped, match="loss must be finite, got nan at step"):
        adapt(_backbone(_Model()), data, _CONFIG)
