"""Threads that follow from the work of a step, and a training that is resumed with as many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.adapters import AdapterTrainer, adapt, training_threads
from regrow_toolchain.compress import DistillationTrainer, compress
from regrow_toolchain.config import AdaptConfig, CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone
from regrow_toolchain.training import Checkpoint, step_threads, threads
from regrow_toolchain.training.threads import step_macs, suited_threads, usable_cores

Data = Callable[..., Dataset]
_ADAPT = AdaptConfig(steps=6, batch_size=8, method="lora", shift=0, noise=0)
_COMPRESS = CompressConfig(ratio=3, epochs=2, batch_size=32, init="svd")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with two cores, whatever this one has; torch is told so too."""
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    else:
        monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "cores", "wanted"),
    [(0.0, 8, 1), (0.9, 8, 1), (1.9, 8, 1), (2.0, 8, 2), (7.5, 8, 7), (1e6, 8, 8), (1e6, 1, 1)],
)
def test_a_thread_for_so_much_work(work: float, cores: int, wanted: int) -> None:
    assert suited_threads(int(work * threads.MACS_PER_THREAD), cores) == wanted


def test_the_work_is_counted_on_the_samples() -> None:
    """[1, 5, 12] through 12 -> 20 and 20 -> 7, of 64 samples."""
    model = nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 7)).train()
    data = Dataset({"input": np.ones((3, 5, 12), np.float32)}, np.zeros(3))
    state = torch.random.get_rng_state()
    assert step_macs(model, data, 64) == 64 * 5 * (12 * 20 + 20 * 7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_count_leaves_no_numbers_behind() -> None:
    """A running mean is not moved, and what a model keeps for later is real."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.kept = nn.BatchNorm1d(6), nn.Linear(6, 6), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kept is None:
                self.kept = torch.arange(6.0)
            result: torch.Tensor = self.fc(self.norm(x) + self.kept)
            return result

    model = Keeps()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step_macs(model, Dataset({"x": np.ones((4, 6), np.float32)}, np.zeros(4)), 1) == 36
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.kept is not None
    assert model.kept.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_model_that_does_not_take_the_inputs_says_so(two_cores: None) -> None:
    data = Dataset({"input": np.ones((3, 5), np.float32)}, np.zeros(3))
    with pytest.raises(RegrowError, match=r"model must take the data's inputs, got input \[1, 5\]"):
        step_threads(nn.Linear(12, 20), data, 1)


def test_cores_are_those_that_may_be_used(two_cores: None, tmp_path: Path) -> None:
    assert usable_cores() <= 2
    torch.set_num_threads(1)
    assert usable_cores() == 1
    (tmp_path / "a" / "b").mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("3:cpu:/elsewhere\n0::/a/b\n")
    quota = threads.cgroup_cores
    assert quota(own, tmp_path) > 1000
    assert quota(tmp_path / "none", tmp_path) > 1000
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert quota(own, tmp_path) > 1000
    (tmp_path / "a" / "cpu.max").write_text("350000 100000\n")
    assert quota(own, tmp_path) == 3
    (tmp_path / "a" / "b" / "cpu.max").write_text("50000 100000\n")
    assert quota(own, tmp_path) == 1


@pytest.mark.parametrize(
    ("settings", "users", "samples"),
    [
        ({}, False, 30), ({"batch_size": 8}, False, 8),
        ({"batch_size": 8, "accumulate": 3}, False, 3),
        ({"batch_size": 8}, True, 30), ({"batch_size": 8, "users_at_once": 2}, True, 16),
    ],
)  # fmt: skip
def test_a_step_has_so_many_samples(
    backbone: Backbone, dataset: Data, monkeypatch: pytest.MonkeyPatch, two_cores: None,
    settings: dict[str, int], users: bool, samples: int,
) -> None:  # fmt: skip
    data = dataset(30, 1)
    if users:
        data = replace(data, users=np.repeat(["a", "b", "c"], 10))
    macs = step_macs(backbone.model, data, 1)
    config = AdaptConfig(**settings)
    for per_thread, wanted in ((macs * samples // 2, 2), (macs * samples // 2 + 1, 1)):
        monkeypatch.setattr(threads, "MACS_PER_THREAD", per_thread)
        assert training_threads(backbone, data, config) == min(wanted, usable_cores())
    assert training_threads(backbone, data, replace(config, threads=5)) == 5


# -- what trains -----------------------------------------------------------------------------------


class _Killed(Exception):
    pass


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch's threads at every step of either training; the list's length says where to kill."""
    seen: list[int] = []

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            seen.append(torch.get_num_threads())
            return original(*arguments)

        return step

    monkeypatch.setattr(AdapterTrainer, "step", watched(AdapterTrainer.step))
    monkeypatch.setattr(DistillationTrainer, "step", watched(DistillationTrainer.step))
    return seen


def _trained(kind: str, backbone: Backbone, data: Dataset, count: int = 0, **more: Any) -> None:
    if kind == "adapt":
        adapt(backbone, data, replace(_ADAPT, threads=count), **more)
    else:
        compress(backbone, data, replace(_COMPRESS, threads=count), **more)


@pytest.mark.parametrize("kind", ["adapt", "compress"])
def test_a_small_model_is_trained_with_one_thread(
    kind: str, backbone: Backbone, dataset: Data, two_cores: None, steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _trained(kind, backbone, dataset(48, 1))
    assert set(steps) == {1}
    assert torch.get_num_threads() == 2
    steps.clear()
    monkeypatch.setattr(threads, "MACS_PER_THREAD", 1)
    _trained(kind, backbone, dataset(48, 1))
    assert set(steps) == {usable_cores()}
    steps.clear()
    _trained(kind, backbone, dataset(48, 1), 3)
    assert set(steps) == {3}
    assert torch.get_num_threads() == 2


def test_without_data_the_threads_count_too(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow_toolchain.compress import compression

    seen, original = [], compression.factor

    def watched(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return original(*arguments)

    monkeypatch.setattr(compression, "factor", watched)
    compress(backbone, config=CompressConfig(threads=3))
    assert seen == [3]


@pytest.mark.parametrize("kind", ["adapt", "compress"])
def test_another_number_of_threads_is_no_resuming(
    kind: str, backbone: Backbone, dataset: Data, tmp_path: Path, two_cores: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Begun with what the rule says, one; then where the rule says two, and then as it was."""
    monkeypatch.setitem(Checkpoint.__init__.__kwdefaults__, "seconds", 0.0)
    data, state = dataset(48, 1), tmp_path / "state"
    of, calls = (AdapterTrainer if kind == "adapt" else DistillationTrainer), [0]
    original = of.step

    def breaks(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise _Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(of, "step", breaks)
        with pytest.raises(_Killed):
            _trained(kind, backbone, data, checkpoint=state)
    left = state.read_bytes()
    words = r"as many threads as it was begun with.*, got 2 for 1: give --threads 1, or remove .*st"
    with pytest.raises(UsageError, match=words):
        _trained(kind, backbone, data, 2, checkpoint=state, resume=True)
    assert state.read_bytes() == left
    with monkeypatch.context() as patch:
        patch.setattr(threads, "MACS_PER_THREAD", 1)
        if usable_cores() == 2:
            with pytest.raises(UsageError, match=words):
                _trained(kind, backbone, data, checkpoint=state, resume=True)
        _trained(kind, backbone, data, 1, checkpoint=state, resume=True)  # the way out
