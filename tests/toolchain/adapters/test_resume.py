"""Training that was interrupted, stopped early, cut into pieces, or done in fewer bits."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from regrow_export.quantization import round_weight
from regrow_format.errors import UsageError
from regrow_toolchain.adapters import (
    Adapted,
    AdapterTrainer,
    TrainingStopped,
    adapt,
    adapt_each,
    adapt_users,
    adaptation,
    applied,
)
from regrow_toolchain.adapters.methods.registry import METHODS
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset, split
from regrow_toolchain.models import Backbone, load_backbone
from regrow_toolchain.training import (
    Checkpoint,
    StateFile,
    TrainingIdentity,
    accuracy,
    predict,
    training_identity,
)

Data = Callable[..., Dataset]
_OWN = ("open", "shut", "stop")
_CONFIG = AdaptConfig(
    steps=10, batch_size=16, shift=0.5, noise=0.1, lr=0.02, holdout=0,
    method_settings={"k": 16, "l": 16},
)  # fmt: skip


@pytest.fixture(scope="module")
def shared(vit_folder: Path) -> Backbone:
    """The tiny ViT; training leaves it as it is."""
    return load_backbone(vit_folder)


@pytest.fixture(scope="module")
def data(dataset: Data) -> Dataset:
    return dataset(48, 5, names=_OWN)


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is written after each step."""

    def often(path: Path, identity: TrainingIdentity, **more: Any) -> Checkpoint:
        return Checkpoint(path, identity, seconds=0, **more)

    monkeypatch.setattr(adaptation, "Checkpoint", often)


class _Killed(Exception):
    pass


@contextmanager
def _killed_at(step: int) -> Iterator[list[int]]:
    """Raise instead of the step of this number; gives the numbers of those that were run."""
    original = AdapterTrainer.step
    seen: list[int] = []

    def run(self: AdapterTrainer, number: int) -> torch.Tensor:
        if number == step:
            raise _Killed
        seen.append(number)
        return original(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "step", run)
        yield seen


def _of(method: str, **more: Any) -> AdaptConfig:
    settings = _CONFIG.method_settings if method == "nola" else {}
    return replace(_CONFIG, method=method, method_settings=settings, **more)


# -- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "step"), [*((method, 6) for method in METHODS), ("nola", 1), ("lora", 9)]
)
def test_it_goes_on_to_the_same_bytes(
    shared: Backbone, data: Dataset, tmp_path: Path, method: str, step: int
) -> None:
    """Before and after coefficients are rounded in training, with a head of its own."""
    state, config = tmp_path / "state", _of(method)
    whole = adapt(shared, data, config).adapter.to_bytes()
    with pytest.raises(_Killed), _killed_at(step):
        adapt(shared, data, config, checkpoint=state)
    assert state.is_file()
    torch.manual_seed(step)
    with _killed_at(-1) as seen:
        done = adapt(shared, data, config, checkpoint=state, resume=True)
    assert seen == list(range(step, 10))
    assert done.adapter.to_bytes() == whole
    assert list(tmp_path.iterdir()) == []  # done: nothing is left


def test_it_may_be_interrupted_often(shared: Backbone, data: Dataset, tmp_path: Path) -> None:
    whole = adapt(shared, data, _CONFIG).adapter.to_bytes()
    for step in (2, 3, 7):
        with pytest.raises(_Killed), _killed_at(step):
            adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state", resume=True)
    done = adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state", resume=True)
    assert done.adapter.to_bytes() == whole


def test_after_the_last_step_nothing_is_trained_again(
    shared: Backbone, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adapt(shared, data, _CONFIG).adapter.to_bytes()
    run = AdapterTrainer.run

    def killed_after(self: AdapterTrainer, *arguments: Any, **more: Any) -> None:
        run(self, *arguments, **more)
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "run", killed_after)
        with pytest.raises(_Killed):
            adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state")
    with _killed_at(-1) as seen:
        done = adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state", resume=True)
    assert (seen, done.adapter.to_bytes()) == ([], whole)


def test_without_resume_it_starts_anew(shared: Backbone, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(_Killed), _killed_at(5):
        adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state")
    with _killed_at(-1) as seen:
        adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state")
    assert seen == list(range(10))
    with _killed_at(-1) as seen:
        adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state", resume=True)
    assert seen == list(range(10))  # there is no file to go on from


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"steps": 11}, {"lr": 0.01}, {"coefficient_dtype": "int8"}, {"noise": 0.0},
        {"method_settings": {"k": 16, "l": 17}}, {"head": "new"}, {"holdout": 0.3},
        {"precision": "int8"}, {"accumulate": 2},
    ],
)  # fmt: skip
def test_another_trainings_state_is_refused(
    shared: Backbone, dataset: Data, tmp_path: Path, change: dict[str, Any]
) -> None:
    state, mine = tmp_path / "state", dataset(48, 5)
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, mine, _CONFIG, checkpoint=state)
    before = state.read_bytes()
    with pytest.raises(UsageError, match=r"must be of the same training .*remove .*state to start"):
        adapt(shared, mine, replace(_CONFIG, **change), checkpoint=state, resume=True)
    assert state.read_bytes() == before
    done = adapt(shared, mine, _CONFIG, checkpoint=state, resume=True)
    assert done.adapter.to_bytes() == adapt(shared, mine, _CONFIG).adapter.to_bytes()


def test_a_state_of_other_samples_layers_or_backbones_is_refused(
    shared: Backbone, dataset: Data, tmp_path: Path
) -> None:
    state, mine = tmp_path / "state", dataset(48, 5)
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, mine, _CONFIG, checkpoint=state)
    pixels = mine.inputs["pixel_values"].copy()
    pixels[0, 0, 0, 0] += 1e-3
    labels = mine.labels.copy()
    labels[:2] = labels[1::-1]
    others = [
        (shared, replace(mine, inputs={"pixel_values": pixels}), {}),
        (shared, replace(mine, labels=labels), {}),
        (shared, mine, {"targets": ("query",)}),
        (replace(shared, backbone_id="sha256:2"), mine, {}),
    ]
    for backbone, samples, change in others:
        config = replace(_CONFIG, **change)
        with pytest.raises(UsageError, match="must be of the same training"):
            adapt(backbone, samples, config, checkpoint=state, resume=True)


def test_every_setting_decides_but_where_it_is_computed(shared: Backbone) -> None:
    """No setting can be forgotten: each is changed in turn."""
    known = training_identity(_CONFIG, shared.backbone_id)
    others: dict[str, Any] = {"method_settings": {"k": 5}, "targets": ("query",)}
    same = set()
    for item in fields(AdaptConfig):
        value = getattr(_CONFIG, item.name)
        choices = [one for one in item.metadata["choices"] if one != value]
        other = others.get(item.name, choices[0] if choices else None)
        if other is None:
            other = value + (8 if isinstance(value, int) else 0.01)
        config = replace(_CONFIG, **{item.name: other})
        if training_identity(config, shared.backbone_id).digest == known.digest:
            same.add(item.name)
    assert same == {"device", "threads"}


def test_settings_as_text_are_those_that_they_mean(shared: Backbone) -> None:
    """The command line has text, Python numbers."""
    first, second = (
        replace(_CONFIG, method="nola", method_settings=given)
        for given in ({"k": "5", "l": "6"}, {"l": 6, "k": 5})
    )
    assert training_identity(first, "a") == training_identity(second, "a")


@pytest.mark.parametrize("before", ["symmetric, codes (-127, 127), a scale per out", None])
def test_a_state_of_another_int8_rounding_is_refused(
    shared: Backbone, data: Dataset, tmp_path: Path, before: str | None
) -> None:
    """Adapters learn from rounded weights; `None` is a version that did not say its rounding."""
    config, state = replace(_CONFIG, precision="int8"), tmp_path / "state"
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, data, config, checkpoint=state)
    with safe_open(state, "pt") as file:
        about = dict(file.metadata())
    assert about["rounding"] == "symmetric, codes (-64, 64), a scale per out"
    del about["rounding"]
    save_file(load_file(state), state, about | ({"rounding": before} if before else {}))
    words = r"resumed with the int8 rounding .*\(-64, 64\).* for .*: remove .*state to start anew"
    with pytest.raises(UsageError, match=words):
        adapt(shared, data, config, checkpoint=state, resume=True)


def test_other_precisions_have_no_rounding_to_compare() -> None:
    assert {
        kind: bool(training_identity(replace(_CONFIG, precision=kind), "a").rounding)
        for kind in ("fp32", "fp16", "int8", "int4")
    } == {"fp32": False, "fp16": False, "int8": True, "int4": False}


def test_a_state_of_another_loss_is_refused(
    shared: Backbone, dataset: Data, tmp_path: Path
) -> None:
    def first(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean(-1)

    def second(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs.abs().mean(-1)

    mine, config = dataset(24, 5), replace(_CONFIG, method="lora", method_settings={})
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, mine, config, checkpoint=tmp_path / "state", loss=first)
    with pytest.raises(UsageError, match="must be of the same training"):
        adapt(shared, mine, config, checkpoint=tmp_path / "state", resume=True, loss=second)


class _Unused(nn.Module):
    """Calls a layer whose output nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)])
        self.side = nn.Linear(6, 9)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.side(x)
        for block in self.blocks:
            x = torch.tanh(block["fc"](x))
        result: torch.Tensor = self.head(x)
        return result


def test_coefficients_without_a_gradient_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Backbone(_Unused().eval(), "sha256:1", "custom", ("head",), ("a", "b", "c"), ())
    x = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    samples = Dataset({"x": x}, np.arange(24) % 3, ("a", "b", "c"))
    state, targets = tmp_path / "state", ["fc", "side"]
    config = replace(_of("bitfit"), targets=targets)
    whole = adapt(backbone, samples, config)
    assert not whole.adapter.coefficients["b.9"].values.any()
    with pytest.raises(_Killed), _killed_at(4):
        adapt(backbone, samples, config, checkpoint=state)
    found = adapt(backbone, samples, config, checkpoint=state, resume=True)
    assert found.adapter.to_bytes() == whole.adapter.to_bytes()


@pytest.mark.parametrize("broken", [b"", b"no checkpoint", b"\xff" * 200])
def test_a_broken_state_is_refused(
    shared: Backbone, data: Dataset, tmp_path: Path, broken: bytes
) -> None:
    state = tmp_path / "state"
    state.write_bytes(broken)
    with pytest.raises(
        UsageError, match=r"must be a whole checkpoint: .*; remove .* to start anew"
    ):
        adapt(shared, data, _CONFIG, checkpoint=state, resume=True)
    assert state.read_bytes() == broken


def test_a_state_of_an_older_regrow_is_refused(
    shared: Backbone, data: Dataset, tmp_path: Path
) -> None:
    """It held one pass, of the same training, and called its step `step`."""
    state = tmp_path / "state"
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, data, _CONFIG, checkpoint=state)
    with safe_open(state, "pt") as file:
        identity = file.metadata()["identity"]
    save_file({"x": torch.zeros(1)}, state, {"identity": identity, "step": "2"})
    with pytest.raises(UsageError, match=r"this version of regrow, got an older one; remove .*"):
        adapt(shared, data, _CONFIG, checkpoint=state, resume=True)


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_half_a_state_is_refused(
    shared: Backbone, data: Dataset, tmp_path: Path, keep: float
) -> None:
    state = tmp_path / "state"
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, data, _CONFIG, checkpoint=state)
    state.write_bytes(state.read_bytes()[: int(keep * state.stat().st_size)])
    with pytest.raises(UsageError, match="must be a whole checkpoint"):
        adapt(shared, data, _CONFIG, checkpoint=state, resume=True)


def test_states_are_written_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state = Checkpoint(tmp_path / "state", TrainingIdentity("a", threads=1))
    calls: list[int] = []

    def tensors() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.tensor([float(len(calls))])}

    for step, moment in enumerate((101, 109.9, 110.1, 115, 121), 1):
        now[0] = moment
        state.save(step, tensors)
    assert len(calls) == 2
    assert load_file(tmp_path / "state")["0:x"].item() == 2
    found = Checkpoint(tmp_path / "state", TrainingIdentity("a", threads=1)).load()
    assert found is not None
    assert found[0] == 5
    state.remove()
    state.remove()
    assert Checkpoint(tmp_path / "state", TrainingIdentity("a", threads=1)).load() is None


_LONG = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from regrow_toolchain.adapters import adaptation as adapting
from regrow_toolchain.models import load_backbone
from regrow_toolchain.training import Checkpoint
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
torch.set_num_threads(1)
adapting.Checkpoint = lambda *what, **more: Checkpoint(*what, seconds=0, **more)
folder, arrays, state, out = map(Path, sys.argv[1:5])
loaded = np.load(arrays)
data = Dataset({"pixel_values": loaded["x"]}, loaded["y"], ("open", "shut", "stop"))
config = AdaptConfig(**json.loads(sys.argv[5]))
done = adapting.adapt(load_backbone(folder), data, config, checkpoint=state,
                      resume=state.exists())
done.adapter.save(out)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 150, "batch_size": 16, "patience": 50, "eval_every": 10, "holdout": 0},
        {"steps": 40, "batch_size": 16},  # folds beside one another
        {"steps": 20, "batch_size": 16, "users_at_once": 1},  # folds one after another
    ],
    ids=["one adapter", "folds", "folds in passes"],
)
def test_a_process_that_was_killed_goes_on(
    vit_folder: Path, data: Dataset, tmp_path: Path, settings: dict[str, Any],
    start: Callable[..., subprocess.Popen[str]],
) -> None:  # fmt: skip
    """SIGKILL, whenever it comes: also while a state is being written."""
    np.savez(tmp_path / "data.npz", x=data.inputs["pixel_values"], y=data.labels)
    state, out = tmp_path / "state", tmp_path / "out.safetensors"
    arguments = (vit_folder, tmp_path / "data.npz", state, out, json.dumps(settings))
    process = start(*arguments, program=_LONG)
    end = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert state.is_file()
    assert not out.exists()
    error = start(*arguments, program=_LONG).communicate(timeout=120)[1]
    assert error == ""
    assert not state.exists()
    config = AdaptConfig(**settings)
    whole = adapt(load_backbone(vit_folder), data, config)
    assert out.read_bytes() == whole.adapter.to_bytes()


# -- interrupted, with several users --------------------------------------------------------------


def _users(dataset: Data, counts: dict[str, int]) -> Dataset:
    parts = [dataset(n, 30 + i, names=_OWN) for i, n in enumerate(counts.values())]
    return Dataset(
        {"pixel_values": np.concatenate([p.inputs["pixel_values"] for p in parts])},
        np.concatenate([p.labels for p in parts]), _OWN,
        users=np.repeat(list(counts), list(counts.values())),
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [0, 2])
def test_users_go_on_to_the_same_bytes(
    shared: Backbone, dataset: Data, tmp_path: Path, at_once: int
) -> None:
    """In one pass or in several, each of which has a state of its own."""
    samples = _users(dataset, {"ann": 9, "bob": 20, "cy": 12, "dee": 15})
    config = replace(_CONFIG, users_at_once=at_once)
    whole = {user: done.adapter.to_bytes() for user, done in adapt_each(shared, samples, config)}
    state = tmp_path / "state"
    original, calls = AdapterTrainer.step, [0]

    def breaks(self: AdapterTrainer, number: int) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == (7 if at_once == 0 else 16):  # of the second pass, if there are two
            raise _Killed
        return original(self, number)

    early = {}
    with pytest.MonkeyPatch.context() as patch, suppress(_Killed):
        patch.setattr(AdapterTrainer, "step", breaks)
        for user, done in adapt_each(shared, samples, config, state=StateFile(state)):
            early[user] = done.adapter.to_bytes()
    assert list(early) == (["ann", "bob"] if at_once else [])
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("state.")  # named by what it is of, not by its turn
    found = adapt_each(shared, samples, config, state=StateFile(state, resume=True))
    assert {user: done.adapter.to_bytes() for user, done in found} == whole
    assert list(tmp_path.iterdir()) == []


def test_who_had_stopped_stays_stopped(
    shared: Backbone, dataset: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's loss broke before the interruption: the step and the coefficients are known."""
    samples = _users(dataset, {"ann": 9, "bob": 20})
    original = AdapterTrainer.losses

    def breaks(self: AdapterTrainer, batch: Any) -> torch.Tensor:
        losses = original(self, batch)
        if self.optimizer.param_groups[0]["lr"] == self.optimizer.param_groups[0]["peak"]:
            losses[1] *= torch.nan  # at the end of the rise: step 0 of 10 steps
        return losses

    monkeypatch.setattr(AdapterTrainer, "losses", breaks)
    whole = adapt_users(shared, samples, _CONFIG)
    assert whole["bob"].stopped is not None
    with pytest.raises(_Killed), _killed_at(6):
        dict(adapt_each(shared, samples, _CONFIG, state=StateFile(tmp_path / "state")))
    found = dict(
        adapt_each(shared, samples, _CONFIG, state=StateFile(tmp_path / "state", resume=True))
    )
    for user, done in found.items():
        assert done.adapter.to_bytes() == whole[user].adapter.to_bytes()
        assert str(done.stopped) == str(whole[user].stopped)


@pytest.mark.parametrize("step", [5, 6, 7])
def test_the_last_good_adapter_is_the_same_after_an_interruption(
    shared: Backbone, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also where the loss breaks in the very first step after it."""
    original = AdapterTrainer.losses

    def breaks(self: AdapterTrainer, batch: Any) -> torch.Tensor:
        losses = original(self, batch)
        return losses * torch.nan if numbers[-1] == 7 else losses

    inner, numbers = AdapterTrainer.step, list[int]()

    def counted(self: AdapterTrainer, number: int) -> torch.Tensor:
        numbers.append(number)
        return inner(self, number)

    monkeypatch.setattr(AdapterTrainer, "losses", breaks)
    monkeypatch.setattr(AdapterTrainer, "step", counted)
    with pytest.raises(TrainingStopped, match="got nan at step 7") as whole:
        adapt(shared, data, _CONFIG)
    with pytest.raises(_Killed), _killed_at(step):
        adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state")
    with pytest.raises(TrainingStopped, match="got nan at step 7") as found:
        adapt(shared, data, _CONFIG, checkpoint=tmp_path / "state", resume=True)
    assert whole.value.adapted is not None
    assert found.value.adapted is not None
    assert found.value.adapted.adapter.to_bytes() == whole.value.adapted.adapter.to_bytes()
    assert list(tmp_path.iterdir()) == []


# -- early stopping -------------------------------------------------------------------------------

_EARLY = replace(
    _CONFIG, steps=40, eval_every=2, patience=3, validation=0.3, lr=0.5, coefficient_dtype="fp32"
)


@contextmanager
def _evaluations(scores: Callable[[int, int], float] | None = None) -> Iterator[list[list[float]]]:
    """Every evaluation's scores by user; `scores(user's samples, evaluation)` instead of real."""
    original = AdapterTrainer.evaluate
    seen: list[list[float]] = []

    def validate(self: AdapterTrainer, validation: Any) -> list[float]:
        found = original(self, validation)
        if scores:
            number = vars(self)["evaluations"] = vars(self).get("evaluations", -1) + 1
            found = [scores(count, number) for count in self.batches.counts]
        seen.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "evaluate", validate)
        yield seen


def _coefficients(done: Adapted) -> dict[str, np.ndarray]:
    return {name: part.dense() for name, part in done.adapter.coefficients.items()}


def test_the_best_is_kept(shared: Backbone, data: Dataset) -> None:
    """Evaluations get better until the third, then no more: patience is over after the sixth."""
    order = [0.1, 0.2, 0.5, 0.4, 0.5, 0.3, 0.9]
    copies: list[dict[str, np.ndarray]] = []
    original = AdapterTrainer.evaluate

    def keeps(self: AdapterTrainer, validation: Any) -> list[float]:
        values = {n.removeprefix("adapter."): v[0].detach().numpy().copy()
                  for n, v in self.parameters().items()}  # fmt: skip
        copies.append(values)
        return original(self, validation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "evaluate", keeps)
        with _evaluations(lambda _, number: order[number]) as seen, _killed_at(-1) as steps:
            done = adapt(shared, data, _EARLY)
    assert len(seen) == 6
    assert steps == list(range(12))
    for name, part in done.adapter.coefficients.items():
        assert np.array_equal(part.values, copies[2][name])


def test_without_patience_it_goes_on(shared: Backbone, data: Dataset) -> None:
    with _evaluations() as seen, _killed_at(-1) as steps:
        adapt(shared, data, replace(_EARLY, patience=0))
    assert (seen, len(steps)) == ([], 40)


def test_where_lower_is_better(shared: Backbone, data: Dataset) -> None:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    order = [0.9, 0.5, 0.6, 0.7, 0.8]
    with _evaluations(lambda _, number: order[number]) as seen:
        adapt(shared, data, replace(_EARLY, method="lora", method_settings={}), loss=loss)
    assert len(seen) == 5


def test_real_scores_stop_a_training_that_only_gets_worse(shared: Backbone, dataset: Data) -> None:
    """The backbone's own condition with a rate far too high: the start was as good as any."""
    config = replace(_EARLY, lr=3.0, steps=200, head="keep")
    with _evaluations() as seen, _killed_at(-1) as steps:
        done = adapt(shared, dataset(60, 5), config)
    assert len(steps) < 200
    assert seen[-1][0] <= max(row[0] for row in seen)
    with applied(shared.model, done.adapter):
        kept = accuracy(shared.model, dataset(90, 9))
    assert kept > 0.3


@pytest.mark.parametrize(
    "scores",
    [
        lambda count, number: -abs(number - count % 5),  # each has another best
        lambda count, number: float("nan"),  # nothing is ever good
        lambda count, number: float("nan") if count < 10 else float(number),
    ],
)
def test_early_stopping_is_the_same_in_company(
    shared: Backbone, dataset: Data, scores: Callable[[int, int], float]
) -> None:
    samples = _users(dataset, {"ann": 12, "bob": 30, "cy": 24})
    with _evaluations(scores):
        together = adapt_users(shared, samples, _EARLY, eval_data=samples)
    assert samples.users is not None
    for user, done in together.items():
        mine = replace(samples.take(np.flatnonzero(samples.users == user)), users=None)
        with _evaluations(scores):
            alone = adapt(shared, mine, _EARLY, eval_data=mine)
        for name, wanted in _coefficients(alone).items():
            found = _coefficients(done)[name]
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(), (user, name)
        assert done.after == pytest.approx(alone.after)


@pytest.mark.parametrize("step", [3, 8, 11])
def test_early_stopping_resumes(shared: Backbone, dataset: Data, tmp_path: Path, step: int) -> None:
    samples, _ = split(_users(dataset, {"ann": 12, "bob": 30}), 0.2, 0)
    config = replace(_EARLY, steps=20)
    whole = adapt_users(shared, samples, config)
    with pytest.raises(_Killed), _killed_at(step):
        dict(adapt_each(shared, samples, config, state=StateFile(tmp_path / "state")))
    found = dict(
        adapt_each(shared, samples, config, state=StateFile(tmp_path / "state", resume=True))
    )
    for user, done in found.items():
        assert done.adapter.to_bytes() == whole[user].adapter.to_bytes()


def test_who_is_done_may_break_no_more(
    shared: Backbone, dataset: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go on after a user's patience is over; what its loss does then is nobody's concern."""
    original = AdapterTrainer.losses

    def breaks(self: AdapterTrainer, batch: Any) -> torch.Tensor:
        losses = original(self, batch)
        if torch.is_grad_enabled() and bool(self.best.done[0]) and self.users > 1:
            losses[0] *= torch.nan
        return losses

    monkeypatch.setattr(AdapterTrainer, "losses", breaks)
    samples = _users(dataset, {"ann": 12, "bob": 30})
    with _evaluations(lambda count, number: float(number if count > 12 else -number)):
        found = adapt_users(shared, samples, _EARLY)
        alone = adapt(shared, samples.take(np.arange(12)), _EARLY)
    assert found["ann"].stopped is None
    assert found["bob"].stopped is None
    for name, wanted in _coefficients(alone).items():
        far = np.abs(_coefficients(found["ann"])[name] - wanted).max()
        assert far <= 1e-4 * np.abs(wanted).max()


def test_what_broke_is_never_the_best(
    shared: Backbone, data: Dataset, before_steps: Callable[..., None]
) -> None:
    """A step makes NaN of the coefficients right before an evaluation that scores well."""
    steps = itertools.count(1)

    def breaks(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if next(steps) == 4:
            for group in optimizer.param_groups:
                for value in group["params"]:
                    value.grad *= torch.nan

    before_steps(breaks)
    with (
        _evaluations(lambda _, number: float(number)),
        pytest.raises(TrainingStopped, match="got nan at step 4") as error,
    ):
        adapt(shared, data, _EARLY)
    assert error.value.adapted is not None
    error.value.adapted.adapter.to_bytes()


def test_validation_needs_samples(shared: Backbone, dataset: Data) -> None:
    with pytest.raises(
        UsageError, match="validation must leave samples to stop early on, got none"
    ):
        adapt(shared, dataset(24, 5), replace(_EARLY, validation=0.0))
    few = _users(dataset, {"ann": 30, "bob": 2})
    with pytest.raises(UsageError, match="user bob: validation must leave samples"):
        adapt_users(shared, few, replace(_EARLY, holdout=0.2))


# -- gradient accumulation ------------------------------------------------------------------------


@contextmanager
def _gradients() -> Iterator[list[dict[str, torch.Tensor]]]:
    """Those of every step, as the optimizer gets them."""
    original = AdapterTrainer.step
    seen: list[dict[str, torch.Tensor]] = []

    def note(self: AdapterTrainer, number: int) -> torch.Tensor:
        losses = original(self, number)
        found = {name: value.grad for name, value in self.parameters().items()}
        seen.append({name: grad.clone() for name, grad in found.items() if grad is not None})
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "step", note)
        yield seen


@pytest.mark.parametrize("pieces", [2, 3, 16, 100])
@pytest.mark.parametrize("method", ["nola", "lora"])
def test_accumulation_changes_nothing_but_memory(
    shared: Backbone, dataset: Data, method: str, pieces: int
) -> None:
    """Gradients to 1e-6, for users with fewer samples than pieces too.

    Coefficients to 1e-3: Adam divides by a gradient's own size, so where that is a ten-thousandth
    of the largest, rounding has a thousandth of the step. How products of other shapes round is
    the processor's: with AVX2 it came to 1.2e-4, with SSE alone to 2.4e-4.
    """
    samples, _ = split(_users(dataset, {"ann": 4, "bob": 30, "cy": 21}), 0.2, 0)
    config = _of(method, coefficient_dtype="fp32", lr=0.01, steps=4)
    with _gradients() as wanted:
        whole = adapt_users(shared, samples, config)
    with _gradients() as found:
        cut = adapt_users(shared, samples, replace(config, accumulate=pieces))
    assert len(found) == len(wanted) == 4
    for name, grad in wanted[0].items():
        assert (found[0][name] - grad).abs().max() <= 1e-6 * grad.abs().max(), name
    for user, done in whole.items():
        for name, values in _coefficients(done).items():
            far = np.abs(_coefficients(cut[user])[name] - values).max()
            assert far <= 1e-3 * np.abs(values).max(), (user, name)


def test_accumulation_runs_the_model_on_pieces(shared: Backbone, data: Dataset) -> None:
    sizes: list[int] = []
    handle = shared.model.register_forward_pre_hook(
        lambda _m, _a, inputs: sizes.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    adapt(shared, data, replace(_CONFIG, accumulate=3, steps=2, holdout=0))
    handle.remove()
    assert sizes == [*[6, 5, 5] * 2, 1]  # and the probe


_RATES = {
    "nola": 0.05, "lora": 0.02, "dora": 0.02, "vera": 0.05, "fourierft": 0.03,
          "ia3": 0.1, "ssf": 0.02, "bitfit": 0.05,
}  # fmt: skip

# -- precision and devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["nola", *(pytest.param(m, marks=pytest.mark.slow) for m in _RATES if m != "nola")],
)
def test_mixed_precision_runs_and_helps(shared: Backbone, dataset: Data, method: str) -> None:
    seen: set[torch.dtype] = set()

    def note(_module: Any, _args: Any, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    layer = "vit.encoder.layer.0.attention.attention.query"
    handle = shared.model.get_submodule(layer).register_forward_hook(note)
    faint = method in ("ia3", "ssf", "bitfit")  # they cannot turn light into dark
    samples, eval_data = (dataset(n, seed, inverted=not faint) for n, seed in ((48, 5), (30, 6)))
    if faint:
        samples, eval_data = _faint(samples), _faint(eval_data)
    config = AdaptConfig(
        method=method, steps=60, lr=_RATES[method], shift=0.3, noise=0.0, mixed_precision="bf16"
    )
    done = adapt(shared, samples, config, eval_data=eval_data)
    handle.remove()
    assert seen == {torch.bfloat16, torch.float32}  # trained in one, scored in the other
    assert done.improves
    assert done.after > done.before + 0.1
    assert all(p.dtype == torch.float32 for p in shared.model.parameters())


def _faint(data: Dataset) -> Dataset:
    pixels = 0.1 * data.inputs["pixel_values"]
    return replace(data, inputs={"pixel_values": pixels.astype(np.float32)})


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_training_on_the_weights_of_the_device(
    shared: Backbone, dataset: Data, precision: str
) -> None:
    """Rounded as export rounds them while it runs, and when it scores; then they come back.

    The probe is of exact weights, so that it serves bundles of every precision.
    """
    samples, eval_data = dataset(48, 5, inverted=True), dataset(30, 6, inverted=True)
    weights = {name: value.clone() for name, value in shared.model.state_dict().items()}
    name = "vit.encoder.layer.1.intermediate.dense.weight"
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, _output: Any) -> None:
        seen.append(shared.model.get_parameter(name).detach().clone())

    handle = shared.model.register_forward_hook(keep)
    config = replace(_of("lora"), steps=60, lr=0.02, noise=0.05, precision=precision)
    done = adapt(shared, samples, config, eval_data=eval_data)
    handle.remove()
    wanted = round_weight(np.ascontiguousarray(weights[name].numpy().T), precision).T
    assert len(seen) > 60
    exact = [np.array_equal(weight.numpy(), weights[name].numpy()) for weight in seen]
    assert exact.count(True) == 1
    assert all(e or np.array_equal(w.numpy(), wanted) for e, w in zip(exact, seen, strict=True))
    assert not np.array_equal(wanted, weights[name].numpy())
    for key, value in shared.model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert done.improves
    assert [v.variant for v in done.adapter.validated] == [precision]


def test_weights_come_back_after_a_failure(shared: Backbone, data: Dataset) -> None:
    outputs = predict(shared.model, data)
    with pytest.raises(_Killed), _killed_at(2):
        adapt(shared, data, replace(_CONFIG, precision="int4"))
    assert np.array_equal(predict(shared.model, data), outputs)
    assert all(p.requires_grad for p in shared.model.parameters())


def test_on_the_cpu_it_is_the_same(shared: Backbone, data: Dataset) -> None:
    found = [
        adapt(shared, data, replace(_CONFIG, device=device)).adapter.to_bytes()
        for device in ("auto", "cpu")
    ]
    assert torch.cuda.is_available() or found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, got 'tpu'"),
        ({"mixed_precision": "fp16", "device": "cpu"}, "mixed_precision must be .*, got fp16"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"precision": "int2"}, "precision must be one of fp32, fp16, int8, int4, got 'int2'"),
    ],
)
def test_devices_and_precisions_that_are_not_there(
    shared: Backbone, data: Dataset, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        adapt(shared, data, replace(_CONFIG, **change))
    assert not any(m._forward_hooks for m in shared.model.modules())
