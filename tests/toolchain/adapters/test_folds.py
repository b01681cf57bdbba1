"""Few samples: each is held back in one of five folds, and the adapter learns from all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from regrow_format.adapter import Adapter
from regrow_format.errors import UsageError
from regrow_toolchain.adapters import (
    Adapted,
    AdapterTrainer,
    adapt,
    adapt_each,
    adapt_users,
    adaptation,
    applied,
)
from regrow_toolchain.adapters.user_data import UserData, prepare
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset, by_user, equal_samples, fold_numbers, split
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import choose_task
from regrow_toolchain.training import Checkpoint, StateFile

_KNOWN, _OWN = ("a", "b", "c"), ("open", "shut", "stop")
_STEPS = 4
_CONFIG = AdaptConfig(
    method="lora", method_settings={"rank": 2}, coefficient_dtype="fp32", steps=_STEPS,
    batch_size=8, lr=0.05, label_smoothing=0.1,
)  # fmt: skip


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["fc"](x))
        result: Tensor = self.head(x)
        return result


def _backbone() -> Backbone:
    return Backbone(_Model().eval(), "sha256:1", "custom", ("head",), _KNOWN, ())


def _data(count: int, seed: int = 0, names: tuple[str, ...] = _KNOWN) -> Dataset:
    labels = np.arange(count) % 3
    x = np.random.default_rng(seed).normal(size=(count, 6)) + labels[:, None]
    return Dataset({"x": x.astype(np.float32)}, labels, names)


def _users(counts: dict[str, int]) -> Dataset:
    parts = [_data(count, seed, _OWN) for seed, count in enumerate(counts.values())]
    x = np.concatenate([part.inputs["x"] for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Dataset({"x": x}, labels, _OWN, users=np.repeat(list(counts), list(counts.values())))


def _again(data: Dataset, rows: list[int]) -> Dataset:
    """With these samples a second time."""
    return data.take(np.array([*range(len(data)), *rows]))


# -- who stands where ------------------------------------------------------------------------------


def _copies(which: list[int], classes: list[int]) -> Dataset:
    """Samples that are equal where `which` is; the first of equal ones decides on the label."""
    x = np.array(which, dtype=np.float32)[:, None]
    labels = np.array([classes[number] for number in which], dtype=np.int64)
    return Dataset({"x": x, "mask": x < 3}, labels, tuple("abcd"))


_MANY = st.lists(st.integers(0, 29), min_size=2, max_size=60)
_CLASSES = st.lists(st.integers(0, 3), min_size=30, max_size=30)


@settings(deadline=None)
@given(_MANY, _CLASSES, st.floats(0, 0.9), st.integers(0, 2**64))
def test_equal_samples_stand_on_one_side_of_a_split(
    which: list[int], classes: list[int], share: float, seed: int
) -> None:
    rest, eval_data = split(_copies(which, classes), share, seed)
    mine, theirs = ({*part.inputs["x"][:, 0].tolist()} for part in (rest, eval_data))
    assert not mine & theirs
    assert len(rest) + len(eval_data) == len(which)


@settings(deadline=None)
@given(_MANY, _CLASSES, st.integers(2, 7), st.integers(0, 2**64))
def test_folds_deal_out_every_class_evenly(
    which: list[int], classes: list[int], count: int, seed: int
) -> None:
    """Counted in different samples; equal ones are in one fold. The seed alone decides."""
    data = _copies(which, classes)
    found = fold_numbers(data, count, seed)
    fold = dict(zip(which, found.tolist(), strict=True))
    assert found.tolist() == [fold[number] for number in which]
    assert found.tolist() == fold_numbers(data, count, seed).tolist()
    for numbers in (fold, *([n for n in fold if classes[n] == c] for c in range(4))):
        dealt = np.bincount([fold[number] for number in numbers], minlength=count)
        assert len(dealt) == count
        assert dealt.max() - dealt.min() <= 1


def test_another_seed_deals_otherwise() -> None:
    data = _data(30)
    assert (fold_numbers(data, 5, 0) != fold_numbers(data, 5, 1)).any()


def test_samples_are_equal_by_all_their_inputs() -> None:
    x = np.array([0, 1, 0, 0, 1], dtype=np.float32)[:, None]
    mask = np.array([1, 1, 1, 0, 1], dtype=bool)
    data = Dataset({"x": x, "mask": mask}, np.array([0, 1, 1, 0, 1]))  # labels do not count
    assert equal_samples(data).tolist() == [0, 1, 0, 2, 1]


def _prepared(data: Dataset, **more: Any) -> UserData:
    config = replace(_CONFIG, **more)
    (user,) = prepare(_backbone(), data, None, choose_task(config, data, "custom"), config)
    return user


@pytest.mark.parametrize("count", [2, 4, 5, 6, 31])
def test_each_sample_is_held_back_once_and_trains_the_result(count: int) -> None:
    data = _again(_data(count), [0, 1, 1])
    user = _prepared(data)
    assert len(user.folds) == min(5, count)
    seen = []
    for fold in user.folds:
        mine, theirs = ({*map(bytes, part.inputs["x"])} for part in (fold.train, fold.eval_data))
        assert not mine & theirs
        assert len(fold.train) + len(fold.eval_data) == len(data)
        seen += [*map(bytes, fold.eval_data.inputs["x"])]
    assert sorted(seen) == sorted(map(bytes, data.inputs["x"]))
    assert np.array_equal(user.result.train.inputs["x"], data.inputs["x"])
    assert len(user.result.eval_data) == 0


def test_fifty_different_samples_held_back_need_no_folds() -> None:
    enough, too_few = _data(248), _again(_data(240), [0] * 80)  # 50 and 48 of them
    user = _prepared(enough)
    assert (user.folds, len(user.result.train), len(user.result.eval_data)) == ((), 198, 50)
    assert user.judged == (user.result,)
    assert len(_prepared(too_few).folds) == 5
    assert len(_prepared(enough, holdout=0.19).folds) == 5
    assert _prepared(too_few, holdout=0).judged == ()


def test_equal_samples_alone_are_refused() -> None:
    data = _data(2).take(np.array([0, 0]))
    data = replace(data, labels=np.array([0, 1]))
    with pytest.raises(UsageError, match=r"^data must have two different samples .*, got 2 equal"):
        adapt(_backbone(), data, _CONFIG)
    both = replace(_data(4).take(np.array([0, 1, 2, 2])), users=np.repeat(["ann", "bob"], 2))
    both = replace(both, labels=np.array([0, 1, 0, 1]))
    with pytest.raises(UsageError, match="user bob: data must have two different samples"):
        adapt_users(_backbone(), both, _CONFIG)
    assert adapt(_backbone(), data, replace(_CONFIG, holdout=0)).verdict is None


@contextmanager
def _trained() -> Iterator[list[list[int]]]:
    """How many samples each adapter learns from, pass by pass."""
    original, seen = AdapterTrainer.run, list[list[int]]()

    def run(self: AdapterTrainer, *arguments: Any, **more: Any) -> None:
        seen.append(self.batches.counts)
        original(self, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "run", run)
        yield seen


def test_samples_given_to_judge_by_make_folds_needless() -> None:
    with _trained() as seen:
        done = adapt(_backbone(), _data(12), _CONFIG, eval_data=_data(7, 1))
    assert seen == [[12]]
    assert (done.folds, done.samples) == (0, 7)
    assert done.verdict is not None
    assert done.verdict.groups == 7


@pytest.mark.parametrize(("at_once", "passes"), [(0, [6]), (6, [6]), (4, [4, 2]), (1, [1] * 6)])
def test_six_adapters_are_trained(at_once: int, passes: list[int]) -> None:
    with _trained() as seen:
        done = adapt(_backbone(), _data(12), replace(_CONFIG, users_at_once=at_once))
    assert [len(counts) for counts in seen] == passes
    assert sorted(itertools.chain(*seen)) == [9, 9, 10, 10, 10, 12]
    assert (done.folds, done.samples) == (5, 12)


# -- what is said of the result --------------------------------------------------------------------


def _logits(backbone: Backbone, data: Dataset, adapter: Adapter | None = None) -> Tensor:
    x = torch.from_numpy(data.inputs["x"])
    with torch.no_grad():
        if adapter is None:
            return backbone.model(x)
        with applied(backbone.model, adapter):
            return backbone.model(x)


def _nats(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    return functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none").numpy()


def _grouped(losses: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A mean for each different sample."""
    keys = [*map(bytes, x)]
    return np.array(
        [np.mean([loss for k, loss in zip(keys, losses, strict=True) if k == key])
         for key in dict.fromkeys(keys)]
    )  # fmt: skip


def _p_value(differences: np.ndarray) -> float:
    signs = np.array([*itertools.product((1, -1), repeat=len(differences))])
    return float((signs @ differences >= differences.sum() - 1e-9).mean())


@pytest.mark.parametrize("names", [_KNOWN, _OWN])
@pytest.mark.parametrize("at_once", [0, 1, 4])
def test_the_judgement_is_that_of_five_adapters_trained_alone(
    names: tuple[str, ...], at_once: int
) -> None:
    """Each on the rest of the samples, whatever the result then learns from."""
    backbone = _backbone()
    data = _again(_data(11, names=names), [0, 1, 1])
    config = replace(_CONFIG, users_at_once=at_once, steps=20)
    done = adapt(backbone, data, config)
    number, alone = fold_numbers(data, 5, config.seed), replace(config, holdout=0)
    adapted, constant, order = list[Tensor](), list[np.ndarray](), list[int]()
    for fold in range(5):
        train, eval_data = (
            data.take(np.flatnonzero(mask)) for mask in (number != fold, number == fold)
        )
        adapted.append(_logits(backbone, eval_data, adapt(backbone, train, alone).adapter))
        counts = np.bincount(train.labels, minlength=3)
        constant.append(-np.log(np.maximum(counts[eval_data.labels], 0.5) / len(train)))
        order += np.flatnonzero(number == fold).tolist()
    truth, x = data.labels[order], data.inputs["x"][order]
    logits = torch.cat(adapted)
    assert done.after == np.mean(logits.argmax(1).numpy() == truth)
    assert (done.samples, done.folds) == (14, 5)
    (kept,) = done.adapter.validated
    assert (kept.before, kept.after, kept.samples) == (done.before, done.after, 14)

    base = _logits(backbone, data.take(np.array(order)))
    candidates = {
        "class frequencies": _grouped(np.concatenate(constant), x),
        "even chances": np.full(11, np.log(len(set(truth.tolist())))),
    }
    if names == _KNOWN:
        assert done.before == np.mean(base.argmax(1).numpy() == truth)
        candidates["base model"] = _grouped(_nats(base, truth), x)
    else:
        assert done.before == 0
    name, reference = min(candidates.items(), key=lambda one: one[1].mean())
    mine = _grouped(_nats(logits, truth), x)
    verdict = done.verdict
    assert verdict is not None
    assert (verdict.baseline, verdict.groups, verdict.metric) == (name, 11, "balanced accuracy")
    assert verdict.loss_after == pytest.approx(mine.mean(), rel=1e-4)
    assert verdict.loss_before == pytest.approx(reference.mean(), rel=1e-4)
    assert verdict.p_value == pytest.approx(_p_value(reference - mine), abs=2e-3)
    right = logits.argmax(1).numpy() == truth
    balanced = np.mean([right[truth == label].mean() for label in range(3)])
    assert verdict.after == pytest.approx(balanced)
    assert done.improves is (verdict.after >= verdict.before and verdict.p_value <= 0.02)


@pytest.mark.parametrize("patience", [0, 1])
def test_the_result_is_that_of_training_on_all(patience: int) -> None:
    """To the byte, but for what is said of it."""
    config = replace(_CONFIG, users_at_once=1, patience=patience, eval_every=2, steps=8)
    done = adapt(_backbone(), _data(15, names=_OWN), config)
    alone = adapt(_backbone(), _data(15, names=_OWN), replace(config, holdout=0))
    assert replace(done.adapter, validated=()).to_bytes() == alone.adapter.to_bytes()


def _check_verdict(found: Adapted, wanted: Adapted) -> None:
    assert wanted.verdict is not None
    for field, value in vars(wanted.verdict).items():
        near = value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
        assert getattr(found.verdict, field) == near, field


def _absolute(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs[:, 0] - labels).abs()


def _absolute_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    return _absolute(outputs, labels).mean()


def test_a_loss_of_one_number_for_all_is_judged_sample_by_sample() -> None:
    """Its folds are trained one after another, and to the same result."""
    data = replace(_data(12), labels=np.linspace(-3, 3, 12).astype(np.float32), names=())
    config = replace(_CONFIG, steps=20, batch_size=16)
    with _trained() as seen:
        each = adapt(_backbone(), data, config, loss=_absolute)
    assert len(seen) == 1
    with _trained() as seen:
        whole = adapt(_backbone(), data, config, loss=_absolute_mean)
    assert [len(counts) for counts in seen] == [1] * 6
    _check_verdict(whole, each)
    base = _logits(_backbone(), data)
    assert whole.before == pytest.approx(float(_absolute_mean(base, torch.from_numpy(data.labels))))


# -- interrupted -----------------------------------------------------------------------------------


class _Killed(Exception):
    pass


@contextmanager
def _killed_at(call: int) -> Iterator[list[int]]:
    """Raise instead of the step of this number, from 1 on; gives the steps before."""
    original, seen = AdapterTrainer.step, list[int]()

    def step(self: AdapterTrainer, number: int) -> Any:
        if len(seen) + 1 == call:
            raise _Killed
        seen.append(number)
        return original(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "step", step)
        yield seen


@contextmanager
def _killed_between(number: int, *, ends: bool) -> Iterator[None]:
    """Raise where the pass of this number, from 1 on, begins or ends."""
    original, passes = AdapterTrainer.run, count(1)

    def run(self: AdapterTrainer, *arguments: Any, **more: Any) -> None:
        found = next(passes)
        if found == number and not ends:
            raise _Killed
        original(self, *arguments, **more)
        if found == number:
            raise _Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "run", run)
        yield


@pytest.fixture
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "Checkpoint", partial(Checkpoint, seconds=0))


def _bytes(found: dict[str, Adapted]) -> dict[str, tuple[bytes, Any]]:
    return {user: (done.adapter.to_bytes(), done.verdict) for user, done in found.items()}


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("call", [1, 2, 4, 5, 8, 14, 21, 24])
def test_a_kill_in_any_pass_loses_nothing(tmp_path: Path, call: int) -> None:
    """One adapter after another; adapters and judgement are the same, and no step is repeated."""
    data, state = _data(12, names=_OWN), tmp_path / "state"
    config = replace(_CONFIG, users_at_once=1)
    whole = adapt(_backbone(), data, config)
    with pytest.raises(_Killed), _killed_at(call) as before:
        adapt(_backbone(), data, config, checkpoint=state)
    assert state.exists() is (call > 1)
    with _killed_at(0) as after:
        done = adapt(_backbone(), data, config, checkpoint=state, resume=True)
    assert before + after == [*range(_STEPS)] * 6
    assert _bytes({"": done}) == _bytes({"": whole})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_a_kill_between_passes_loses_nothing(tmp_path: Path, number: int, ends: bool) -> None:
    """As a pass ends, or the next begins; with patience, too, which ends passes early."""
    data, state = _data(15, names=_OWN), tmp_path / "state"
    config = replace(_CONFIG, users_at_once=1, steps=8, patience=1, eval_every=2, lr=1.0)
    whole = adapt(_backbone(), data, config)
    with pytest.raises(_Killed), _killed_between(number, ends=ends):
        adapt(_backbone(), data, config, checkpoint=state)
    done = adapt(_backbone(), data, config, checkpoint=state, resume=True)
    assert _bytes({"": done}) == _bytes({"": whole})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize(("at_once", "call"), [(0, 3), (4, 2), (4, 6), (4, 11), (1, 7), (1, 31)])
def test_users_with_folds_go_on_to_the_same_bytes(tmp_path: Path, at_once: int, call: int) -> None:
    """All in one pass; each in two passes; each in six. It may be killed often."""
    data, config = _users({"ann": 6, "bob": 13}), replace(_CONFIG, users_at_once=at_once)
    whole = _bytes(adapt_users(_backbone(), data, config))
    state = tmp_path / "state"
    for again in (call, 1):
        with pytest.raises(_Killed), _killed_at(again):
            dict(adapt_each(_backbone(), data, config, state=StateFile(state, resume=True)))
    found = dict(adapt_each(_backbone(), data, config, state=StateFile(state, resume=True)))
    assert _bytes(found) == whole
    assert list(tmp_path.iterdir()) == []


def test_users_together_are_judged_as_if_alone() -> None:
    data = _users({"ann": 6, "bob": 13, "cy": 9})
    for user, done in adapt_users(_backbone(), data, _CONFIG).items():
        alone = adapt(_backbone(), by_user(data)[user], _CONFIG)
        assert (done.folds, done.samples) == (alone.folds, alone.samples)
        _check_verdict(done, alone)


# -- the command -----------------------------------------------------------------------------------


def test_without_a_share_the_command_writes_what_nobody_judged(
    cli: Callable[..., Any],
    compressed_folder: Path,
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
    tmp_path: Path,
) -> None:
    pixels, labels = images(4, 1)  # too few to tell, with any share
    np.savez(tmp_path / "d.npz", images=pixels, labels=labels)
    command = ("adapt", compressed_folder, "--data", tmp_path / "d.npz", "--steps", 2)
    refused = cli(*command, "-o", tmp_path / "a.safetensors")
    assert refused.code == 2
    assert "or train one untested with --holdout 0" in refused.err
    said = cli(*command, "-o", tmp_path / "a.safetensors", "--holdout", 0, "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json["samples"] == {"data": 4, "held_back": 0, "folds": 0}
    assert [said.json[name] for name in ("before", "after", "gate")] == [None] * 3
    assert Adapter.load(tmp_path / "a.safetensors").validated == ()
    shown = cli(*command, "-o", tmp_path / "b.safetensors", "--holdout", 0).out
    assert "no samples held back, so no score" in shown


def test_the_command_says_how_it_judged(
    cli: Callable[..., Any],
    compressed_folder: Path,
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
    tmp_path: Path,
) -> None:
    pixels, labels = images(9, 1)
    np.savez(tmp_path / "d.npz", images=pixels, labels=labels)
    command = ("adapt", compressed_folder, "--data", tmp_path / "d.npz", "--steps", 2)
    out = tmp_path / "a.safetensors"
    kept = cli(*command, "-o", out, "--keep-anyway", "--json")
    assert kept.json["samples"] == {"data": 9, "held_back": 9, "folds": 5}
    gate = kept.json["gate"]
    assert json.dumps(gate)  # plain JSON, without NaN
    assert (gate["groups"], gate["metric"]) == (9, "balanced accuracy")
    shown = cli(*command, "-o", out, "--force", "--keep-anyway").out
    assert "on 9 samples, each held back in one of 5 folds (p" in shown
    lost = cli(*command, "-o", tmp_path / "b.safetensors", "--lr", 1e-9)
    assert lost.code == 1
    assert "adapter must be better than none to be written, got balanced accuracy" in lost.err
    assert "on 9 samples held back in 5 folds: give more samples" in lost.err
    assert not (tmp_path / "b.safetensors").exists()
