"""Many users in one pass: each gets what training alone would give, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.adapters import (
    Adapted,
    TrainingStopped,
    Verdict,
    adapt,
    adapt_each,
    adapt_users,
)
from regrow_toolchain.adapters.methods.registry import METHODS
from regrow_toolchain.adapters.trainer import AdapterTrainer
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, load_backbone
from regrow_toolchain.training import Batch

Data = Callable[..., Dataset]
_NAMES = ("open", "shut", "stop")
# Samples by user, in the order of their ids: more and fewer than a batch, all different.
_COUNTS = {"ann": 6, "bob": 30, "cy": 12, "dee": 9}
_CONFIG = AdaptConfig(
    storage="fp32", steps=6, batch_size=8, shift=0.8, noise=0.1, holdout=0, lr=0.01
)
_SMALL = {
    "nola": {"k": 16, "l": 16, "rank": 3},
    "vera": {"rank": 16},
    "fourierft": {"n": 24},
    "lora": {"rank": 2},
    "dora": {"rank": 2},
}


@pytest.fixture(scope="module")
def shared(vit_folder: Path) -> Backbone:
    """The tiny ViT; training leaves it as it is."""
    return load_backbone(vit_folder)


@pytest.fixture(scope="module")
def own(dataset: Data) -> Dataset:
    """Classes of the users' own; cy has two of the three. Samples of all users mixed."""
    parts = []
    for seed, (user, count) in enumerate(_COUNTS.items()):
        part = dataset(count, 20 + seed, names=_NAMES)
        if user == "cy":
            part = replace(part, labels=part.labels % 2)
        parts.append(replace(part, users=np.full(count, user)))
    return _mixed(parts)


@pytest.fixture(scope="module")
def known(own: Dataset) -> Dataset:
    """The same samples with the backbone's classes."""
    return replace(own, names=("left", "middle", "right"))


def _mixed(parts: Sequence[Dataset]) -> Dataset:
    first = parts[0]
    inputs = {n: np.concatenate([p.inputs[n] for p in parts]) for n in first.inputs}
    labels = np.concatenate([p.labels for p in parts])
    users = np.concatenate([p.users for p in parts if p.users is not None])
    order = np.random.default_rng(0).permutation(len(labels))
    return replace(first, inputs=inputs, labels=labels, users=users).take(order)


def _of(data: Dataset, user: str) -> Dataset:
    assert data.users is not None
    return replace(data.take(np.flatnonzero(data.users == user)), users=None)


def _with(method: str, **more: Any) -> AdaptConfig:
    more = {"method_settings": _SMALL.get(method, {}), **more}
    return replace(_CONFIG, method=method, **more)


def _near(found: np.ndarray, wanted: np.ndarray, relative: float) -> bool:
    return bool(np.abs(found - wanted).max() <= relative * np.abs(wanted).max())


def _check_same(together: Adapted, alone: Adapted, relative: float = 1e-4) -> None:
    """Coefficients, heads and scores."""
    one, other = together.adapter, alone.adapter
    assert one.targets == other.targets
    assert one.config == other.config
    assert list(one.coefficients) == list(other.coefficients)
    for name, part in one.coefficients.items():
        assert _near(part.dense(), other.coefficients[name].dense(), relative), name
    assert (one.head is None) is (other.head is None)
    if one.head and other.head:
        assert one.head.labels == other.head.labels
        for mine, theirs in zip(one.head.layers, other.head.layers, strict=True):
            # In fp16, which a difference of 1e-7 may round to the next number.
            assert _near(mine.weight, theirs.weight, max(relative, 1e-3))
            assert _near(mine.bias, theirs.bias, max(relative, 1e-3))
    for score in ("before", "after", "samples", "folds", "improves"):
        assert getattr(together, score) == pytest.approx(getattr(alone, score), nan_ok=True)
    assert one.validated == other.validated
    _check_verdict(together.verdict, alone.verdict)


def _check_verdict(together: Verdict | None, alone: Verdict | None) -> None:
    assert (together is None) is (alone is None)
    if together and alone:
        for field, value in vars(alone).items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, nan_ok=True)
            assert getattr(together, field) == near, field


# -- as if alone ----------------------------------------------------------------------------------


def _gradients(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> dict[Any, np.ndarray]:
    """By (samples of the user, parameter), the gradient of a step from coefficients that moved."""
    found: dict[Any, np.ndarray] = {}
    original = AdapterTrainer._step

    def step(self: AdapterTrainer, number: int) -> torch.Tensor:
        with torch.no_grad():
            for user, count in enumerate(self.batches.counts):
                generator = torch.Generator().manual_seed(count)
                for name, value in self._parameters().items():
                    width = self.heads.classes[user] if self.heads and "head" in name else None
                    value[user, ..., :width] += 0.3 * torch.randn(
                        value[user, ..., :width].shape, generator=generator
                    )
        losses = original(self, number)
        for name, value in self._parameters().items():
            for user, count in enumerate(self.batches.counts):
                assert value.grad is not None
                found[count, name] = value.grad[user].numpy().copy()
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "_step", step)
        run()
    return found


@pytest.mark.parametrize("head", ["keep", "new", "tune"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_of_training_alone(
    shared: Backbone, own: Dataset, known: Dataset, monkeypatch: pytest.MonkeyPatch,
    method: str, head: str,
) -> None:  # fmt: skip
    if (method, head) == ("head", "keep"):
        return
    data = own if head == "new" else known
    config = _with(method, head=head, steps=1, label_smoothing=0.1)
    together = _gradients(monkeypatch, lambda: adapt_users(shared, data, config))
    seen = 0
    for user in _COUNTS:
        part = _of(data, user)
        alone = _gradients(monkeypatch, lambda part=part: adapt(shared, part, config))
        for key, wanted in alone.items():
            found = together[key][tuple(slice(n) for n in wanted.shape)]
            assert np.abs(wanted).max() > 0, key
            assert _near(found, wanted, 1e-5), key
            # What pads a head of fewer classes has no gradient at all.
            assert np.count_nonzero(together[key]) == np.count_nonzero(found)
            seen += 1
    assert seen == len(together) >= len(_COUNTS)


@pytest.mark.parametrize(
    ("method", "at_once"), [*((m, 0) for m in METHODS), ("nola", 3), ("nola", 18)]
)
def test_results_equal_those_of_training_alone(
    shared: Backbone, own: Dataset, method: str, at_once: int
) -> None:
    """Unequal numbers of samples and classes, heads of their own, noise and shifts; 1e-4, fp32.

    So are the folds that judge them.
    """
    config = _with(method, users_at_once=at_once, holdout=0.3)
    together = adapt_users(shared, own, config)
    assert list(together) == sorted(_COUNTS)
    for user, done in together.items():
        assert (done.folds, done.samples) == (5, _COUNTS[user])
        _check_same(done, adapt(shared, _of(own, user), config))


@pytest.mark.parametrize("method", ["nola", "fourierft"])
def test_results_equal_with_the_backbones_head(
    shared: Backbone, known: Dataset, method: str
) -> None:
    config = _with(method, steps=12)
    for user, done in adapt_users(shared, known, config).items():
        assert done.adapter.head is None
        _check_same(done, adapt(shared, _of(known, user), config))


@pytest.mark.parametrize("count", [1, 2])
def test_the_company_changes_nothing(shared: Backbone, own: Dataset, count: int) -> None:
    """In groups of one, training users is training them alone: to the byte."""
    config = _with("nola", users_at_once=1, storage="int4", holdout=0.3)
    users = sorted(_COUNTS)[:count]
    some = own.take(np.flatnonzero(np.isin(own.users, users)))
    found = adapt_users(shared, some, config)
    assert list(found) == users
    for user, done in found.items():
        alone = adapt(shared, _of(own, user), config)
        assert done.adapter.to_bytes() == alone.adapter.to_bytes()


def test_users_with_heads_of_either_kind_in_one_run(shared: Backbone, dataset: Data) -> None:
    """Some have the backbone's classes, some their own: each as if alone, none is lost."""
    names = ("left", "middle", "right", "open", "shut", "stop")
    parts = []
    for seed, (user, count) in enumerate(_COUNTS.items()):
        part = dataset(count, 40 + seed, names=names)
        labels = part.labels + (3 if user in ("bob", "dee") else 0)
        parts.append(replace(part, labels=labels, users=np.full(count, user)))
    data = _mixed(parts)
    config = _with("lora", holdout=0.3)
    found = adapt_users(shared, data, config)
    assert sorted(found) == sorted(_COUNTS)
    for user, done in found.items():
        part = _of(data, user)
        _check_same(done, adapt(shared, part, config))
        labels = done.adapter.head.labels if done.adapter.head else None
        assert labels == (_NAMES if user in ("bob", "dee") else None)


def test_they_come_one_after_another(shared: Backbone, own: Dataset) -> None:
    """A caller has each group's adapters before the next is trained."""
    results = adapt_each(shared, own, _with("lora", users_at_once=2))
    first = next(results)
    assert first[0] == "ann"
    results.close()
    assert not any(m._forward_hooks for m in shared.model.modules())
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(p.requires_grad for p in shared.model.parameters())


# -- samples to score on --------------------------------------------------------------------------


def test_held_samples_of_each_user(shared: Backbone, own: Dataset, dataset: Data) -> None:
    parts = [replace(dataset(9, 60, names=_NAMES), users=np.full(9, user)) for user in _COUNTS]
    parts[2] = replace(parts[2], labels=parts[2].labels % 2)
    held = _mixed([*parts, replace(parts[0], users=np.full(9, "zoe"))])
    found = adapt_users(shared, own, _with("lora"), held=held)
    assert list(found) == sorted(_COUNTS)  # zoe has nothing to learn from
    for user, done in found.items():
        assert (done.samples, done.folds) == (9, 0)
        _check_same(done, adapt(shared, _of(own, user), _with("lora"), held=_of(held, user)))
    missing = held.take(np.flatnonzero(held.users != "cy"))
    with pytest.raises(UsageError, match=r"held samples must be there for every user, .* 'cy'"):
        adapt_users(shared, own, _with("lora"), held=missing)


def test_held_samples_of_one_user_need_no_id(shared: Backbone, own: Dataset) -> None:
    """`adapt` takes all as one user's, whatever stands in `users`."""
    done = adapt(shared, own, _with("lora"), held=own)
    assert done.samples == len(own)


def test_samples_without_users(shared: Backbone, own: Dataset) -> None:
    with pytest.raises(UsageError, match="data must say whose each sample is, got no users"):
        adapt_users(shared, replace(own, users=None), _with("lora"))


# -- users who do not fit -------------------------------------------------------------------------


def test_a_user_whose_samples_are_not_numbers_stops_alone(shared: Backbone, own: Dataset) -> None:
    config = _with("nola", head="new", holdout=0.3)
    pixels = own.inputs["pixel_values"].copy()
    assert own.users is not None
    pixels[own.users == "bob", 0, 0] = np.nan
    broken = replace(own, inputs={"pixel_values": pixels})
    found, clean = adapt_users(shared, broken, config), adapt_users(shared, own, config)
    assert list(found) == sorted(_COUNTS)
    assert found["bob"].stopped is not None
    assert str(found["bob"].stopped) == "loss must be finite, got nan at step 0: lower --lr"
    assert not found["bob"].improves
    found["bob"].adapter.to_bytes()  # the start, which is a whole file
    for user in ("ann", "cy", "dee"):
        assert found[user].stopped is None
        assert found[user].adapter.to_bytes() == clean[user].adapter.to_bytes()
        assert found[user].after == clean[user].after


@pytest.mark.parametrize("storage", ["fp32", "int4"])
def test_a_user_whose_loss_breaks_later_keeps_what_was_good(
    shared: Backbone, own: Dataset, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    original = AdapterTrainer._losses
    bobs = _COUNTS["bob"]

    def breaks(self: AdapterTrainer, batch: Batch) -> torch.Tensor:
        losses = original(self, batch)
        number = vars(self)["calls"] = vars(self).get("calls", -1) + 1
        if number == 4 and bobs in self.batches.counts:
            losses[self.batches.counts.index(bobs)] *= torch.nan
        return losses

    clean = adapt_users(shared, own, _with("nola", storage=storage))
    monkeypatch.setattr(AdapterTrainer, "_losses", breaks)
    found = adapt_users(shared, own, _with("nola", storage=storage))
    assert found["bob"].stopped is not None
    assert found["bob"].stopped.step == 4
    with pytest.raises(TrainingStopped, match="got nan at step 4") as alone:
        adapt(shared, _of(own, "bob"), _with("nola", storage=storage))
    assert alone.value.adapted is not None
    _check_same(found["bob"], alone.value.adapted)
    for user in ("ann", "cy", "dee"):
        assert found[user].adapter.to_bytes() == clean[user].adapter.to_bytes()


def test_users_with_too_little_are_all_named(shared: Backbone, own: Dataset) -> None:
    assert own.users is not None
    left = [
        *np.flatnonzero(own.users == "ann")[:1],
        *np.flatnonzero((own.users == "bob") & (own.labels == 1)),
        *np.flatnonzero(own.users == "cy"),
    ]
    with pytest.raises(UsageError) as error:
        adapt_users(shared, own.take(np.array(left)), _with("lora"))
    assert "ann: 1 sample" in str(error.value)
    assert "bob: 10 samples of one class, shut" in str(error.value)
    assert "cy" not in str(error.value)
    one = _of(own, "ann")
    with pytest.raises(UsageError, match="two samples or more, of two classes; got 1 sample"):
        adapt(shared, one.take(np.array([0])), _with("lora"))
    same = one.take(np.flatnonzero(one.labels == one.labels[0]))
    with pytest.raises(UsageError, match="got 2 samples of one class, "):
        adapt(shared, same, _with("lora"))


def test_a_users_labels_that_do_not_fit_name_the_user(shared: Backbone, known: Dataset) -> None:
    assert known.users is not None
    names = (*known.names, "other")
    labels = known.labels.copy()
    labels[np.flatnonzero(known.users == "cy")[0]] = 3
    with pytest.raises(UsageError, match="user cy: labels must be among the backbone's"):
        adapt_users(shared, replace(known, labels=labels, names=names), _with("lora"))


# -- models whose layers do not see the batch first -----------------------------------------------


class _Encoder(nn.Module):
    """Four tokens of width 8 through a stack of torch's own encoder layers, then a head."""

    def __init__(self, *, batch_first: bool, flat: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mixer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.batch_first, self.flat = batch_first, flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1))
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        if self.flat:  # batch and tokens in one dimension
            tokens = self.mixer(tokens.reshape(-1, 8)).reshape(tokens.shape)
        result: torch.Tensor = self.head(tokens.mean(1))
        return result


def _encoder(**options: bool) -> Backbone:
    torch.manual_seed(4)
    return Backbone(
        _Encoder(**options).eval(), "sha256:1", "custom", ("head",), ("a", "b", "c"), ()
    )


def _tokens() -> Dataset:
    rng = np.random.default_rng(5)
    labels = np.arange(24) % 3
    x = rng.normal(size=(24, 4, 8)).astype(np.float32) + labels[:, None, None]
    users = np.repeat(["ann", "bob", "cy"], [6, 9, 9])
    return Dataset({"x": x}, labels, ("a", "b", "c"), users=users)


def test_layers_that_do_not_see_the_batch_first_are_refused() -> None:
    config = _with("lora", method_settings={"rank": 2})
    words = r"targets must see the batch first .* got encoder\.layers\.0\.linear1.* one by one"
    with pytest.raises(RegrowError, match=words):
        adapt_users(_encoder(batch_first=False), _tokens(), replace(config, targets=["linear1"]))
    model = _encoder(batch_first=False)
    assert not any(m._forward_hooks for m in model.model.modules())
    for holdout in (0, 0.3):  # one user may, and has folds one by one
        config = replace(config, holdout=holdout)
        done = adapt(model, _of(_tokens(), "bob"), replace(config, targets=["linear1"]))
        assert len(done.adapter.targets) == 2
        assert done.folds == (5 if holdout else 0)


@pytest.mark.parametrize("options", [{}, {"flat": True}])
def test_layers_that_see_the_batch_first_are_taken(options: dict[str, bool]) -> None:
    model, data = _encoder(batch_first=True, **options), _tokens()
    targets = ["linear1", "linear2", "mixer"] if options else ["linear1", "linear2"]
    config = _with("nola", method_settings={"rank": 2, "k": 8, "l": 8}, targets=targets)
    for user, done in adapt_users(model, data, config).items():
        assert len(done.adapter.targets) == 2 * 2 + bool(options)
        _check_same(done, adapt(model, _of(data, user), config))
