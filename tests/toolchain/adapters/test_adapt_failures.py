"""What cannot work says so in one line before it trains; what breaks keeps what was good."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrow_format.adapter import Adapter, Coefficients
from regrow_format.errors import RegrowError, UsageError
from regrow_format.methods import get_method
from regrow_toolchain.adapters import (
    Adapted,
    AdapterTrainer,
    TrainingStopped,
    adapt,
    adapt_users,
    applied,
)
from regrow_toolchain.adapters.methods.registry import METHODS
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, load_backbone
from regrow_toolchain.training import Batch, accuracy

Data = Callable[..., Dataset]
_OWN = ("open", "shut", "stop")
_QUICK = AdaptConfig(steps=8, noise=0.0, shift=0.0, holdout=0)


@pytest.fixture(scope="module")
def shared(vit_folder: Path) -> Backbone:
    """The tiny ViT; training leaves it as it is, whatever happens."""
    return load_backbone(vit_folder)


@pytest.fixture(autouse=True)
def _left_alone(shared: Backbone) -> Any:
    """After every failure here the model is as it was."""
    weights = {name: value.clone() for name, value in shared.model.state_dict().items()}
    yield
    assert not any(module._forward_hooks for module in shared.model.modules())
    assert all(p.requires_grad and p.grad is None for p in shared.model.parameters())
    assert all(torch.equal(v, weights[n]) for n, v in shared.model.state_dict().items())
    assert not torch.are_deterministic_algorithms_enabled()


# -- a loss that breaks ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", ["fp32", "int4"])
def test_the_last_good_adapter_is_kept(
    shared: Backbone, dataset: Data, monkeypatch: pytest.MonkeyPatch, method: str, storage: str
) -> None:
    """The coefficients with which the loss was last a number: those before the step that broke."""
    losses, copies = AdapterTrainer.losses, list[dict[str, np.ndarray]]()

    def breaks(self: AdapterTrainer, batch: Batch) -> torch.Tensor:
        copies.append(self.trained.values())
        found = losses(self, batch)
        return found * math.inf if len(copies) == 6 else found

    monkeypatch.setattr(AdapterTrainer, "losses", breaks)
    data, config = dataset(45, 5), replace(_QUICK, method=method, coefficient_dtype=storage)
    with pytest.raises(TrainingStopped) as error:
        adapt(shared, data, config)
    assert str(error.value) == "loss must be finite, got inf at step 5: lower --lr"
    done = error.value.adapted
    assert isinstance(done, Adapted)
    assert done.stopped is not None
    assert done.stopped.step == 5
    assert len(copies) == 6
    constants = get_method(method).constants(done.adapter.config, done.adapter.targets)
    for name, part in done.adapter.coefficients.items():
        wanted = Coefficients.store(copies[4][name], constants[name], storage)
        assert np.array_equal(part.values, wanted.values)
        assert np.array_equal(part.scale, wanted.scale)
    adapter = Adapter.from_bytes(done.adapter.to_bytes())  # a whole file, ready for use
    with applied(shared.model, adapter):
        assert accuracy(shared.model, data) > 0.5


def test_a_loss_that_breaks_in_the_first_step_leaves_nothing(
    shared: Backbone, dataset: Data
) -> None:
    data = dataset(24, 5)
    data.inputs["pixel_values"][:] = np.nan
    with pytest.raises(TrainingStopped, match="loss must be finite, got nan at step 0") as error:
        adapt(shared, data, _QUICK)
    assert error.value.adapted is None


def test_a_rate_that_breaks_the_loss_stops(shared: Backbone, dataset: Data) -> None:
    with pytest.raises(TrainingStopped, match=r"got (nan|inf) at step \d: lower --lr") as error:
        adapt(shared, dataset(24, 5), replace(_QUICK, lr=1e30), eval_data=dataset(30, 6))
    kept = error.value.adapted
    assert kept is not None
    kept.adapter.to_bytes()
    assert kept.verdict is not None
    lower = kept.verdict.loss_after < kept.verdict.loss_before
    assert not kept.improves or (kept.after >= kept.before and lower)


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int4"])
def test_numbers_that_break_in_the_last_step_are_not_kept(
    shared: Backbone, dataset: Data, before_steps: Callable[..., None], storage: str
) -> None:
    """The loss was finite, what the optimizer made of its gradient was not."""

    def breaks(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer.param_groups[0]["lr"] < 1e-2 * optimizer.param_groups[0]["peak"]:
            for group in optimizer.param_groups:
                for value in group["params"]:
                    value.grad[0] *= math.nan

    before_steps(breaks)
    config = replace(_QUICK, method="lora", coefficient_dtype=storage, steps=30)
    with pytest.raises(TrainingStopped, match="got nan at step 30: lower --lr") as error:
        adapt(shared, dataset(24, 5), config)
    assert error.value.adapted is not None
    error.value.adapted.adapter.to_bytes()
    both = dataset(48, 5)
    users = replace(both, users=np.repeat(["ann", "bob"], 24))
    found = adapt_users(shared, users, config)
    assert found["ann"].stopped is not None
    assert found["bob"].stopped is None
    for done in found.values():
        done.adapter.to_bytes()


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "magic"}, "method must be one of nola, vera, .*, head, got 'magic'"),
        ({"coefficient_dtype": "int9"}, "dtype must be one of fp32, .*int2, got 'int9'"),
        ({"head": "maybe"}, "head must be one of auto, keep, new, tune, got 'maybe'"),
        ({"task": "sorting"}, "task must be one of auto, .*, got 'sorting'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, r"steps must be a whole number, got 2\.5"),
        ({"steps": "8"}, "steps must be a whole number, got '8'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"users_at_once": -1}, "users_at_once must be at least 0, got -1"),
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"lr": math.inf}, "lr must be a finite number, got inf"),
        ({"head_lr": -1.0}, "head_lr must be at least 0, got -1.0"),
        ({"noise": -1.0}, "noise must be at least 0, got -1.0"),
        ({"shift": math.nan}, "shift must be a finite number, got nan"),
        ({"holdout": 1.0}, "holdout must be from 0 to below 1, got 1.0"),
        ({"holdout": -0.1}, "holdout must be at least 0, got -0.1"),
        ({"validation": 1.0, "patience": 2}, "must be from 0 to below 1, got 1.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be from 0 to 1, got 1\.5"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"group_size": 4}, "group_size must be 0, or 8 or more .* of 8 bits or fewer, got 4"),
        ({"group_size": -8}, "group_size must be at least 0, got -8"),
        ({"group_size": 16, "coefficient_dtype": "fp32"}, "got 16 with fp32"),
        ({"group_size": 16, "coefficient_dtype": "fp16"}, "got 16 with fp16"),
        ({"method": "head", "head": "keep"}, "head must be auto, new or tune for method head"),
        ({"method_settings": {"speed": 1}}, "settings of nola must be among"),
        ({"method_settings": {"k": 0}}, "nola: config: k must be from 1 to 65536, got 0"),
        ({"method_settings": {"l": 0}}, "nola: config: l must be from 1 to 65536, got 0"),
        ({"method_settings": {"rank": 33}}, "rank must be at most 32, the width of vit.*, got 33"),
        ({"method": "lora", "method_settings": {"rank": 33}}, "rank must be at most 32, the width"),
        ({"method": "vera", "method_settings": {"rank": 0}}, "rank must be from 1 to 4096, got 0"),
        ({"method": "fourierft", "method_settings": {"n": 1025}}, "n must be at most 1024, the si"),
        ({"method": "bitfit", "method_settings": {"rank": 1}}, "it has no settings, got 'rank'"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(
    shared: Backbone, dataset: Data, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        adapt(shared, dataset(24, 5), replace(_QUICK, **change))


def test_numpys_numbers_are_numbers(shared: Backbone, dataset: Data, tmp_path: Path) -> None:
    settings = {"k": np.int64(9), "rank": np.int64(2)}
    config = replace(_QUICK, steps=np.int64(2), lr=np.float32(0.1), method_settings=settings)
    done = adapt(shared, dataset(24, 5), config, checkpoint=tmp_path / "state")
    assert Adapter.from_bytes(done.adapter.to_bytes()).config["k"] == 9


@pytest.mark.parametrize("group", [8, 20, 1000])
@pytest.mark.parametrize("storage", ["int8", "int3"])
def test_groups_of_any_size(shared: Backbone, dataset: Data, storage: str, group: int) -> None:
    """Longer than the vectors too; training sees them as the file has them."""
    done = adapt(
        shared, dataset(24, 5), replace(_QUICK, coefficient_dtype=storage, group_size=group)
    )
    read = Adapter.from_bytes(done.adapter.to_bytes())
    assert read.group == group
    assert read.coefficients["alpha"].scale.shape == (12, -(-64 // group))


# -- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        ([0, 1, 3], {}, r"labels must be from 0 to 2 as in the backbone, got 3"),
        ([0, 1, -1], {}, "labels must be 0 or more, got -1"),
        ([0, 1, -1], {"head": "new"}, "labels must be 0 or more, got -1"),
        ([0, 1, 99], {"head": "keep"}, "labels must be from 0 to 2 as in the backbone, got 99"),
        ([0, 1, 3], {"method": "head"}, "labels must be from 0 to 2 as in the backbone, got 3"),
        ([0, 1, 3], {"head": "tune"}, "labels must be from 0 to 2 as in the backbone, got 3"),
    ],
)
def test_labels_outside_the_head(
    shared: Backbone, dataset: Data, labels: list[int], more: dict[str, Any], words: str
) -> None:
    data = dataset(24, 5)
    names = tuple(map(str, range(max(labels) + 1)))
    odd = replace(data, labels=np.array(labels)[data.labels], names=names, named=False)
    with pytest.raises(UsageError, match=words):
        adapt(shared, odd, replace(_QUICK, **more))


def test_labels_beyond_their_names(shared: Backbone, dataset: Data) -> None:
    data = replace(dataset(24, 5), names=("left", "right"))
    for head in ("auto", "new"):
        with pytest.raises(UsageError, match="labels must be below 2, the number of names, got 2"):
            adapt(shared, data, replace(_QUICK, head=head))


def test_labels_of_no_user_of_this_run_do_not_matter(shared: Backbone, dataset: Data) -> None:
    """Names that no sample has, such as those of others in the same file."""
    data = replace(dataset(24, 5), names=("left", "middle", "right", "elsewhere"))
    assert adapt(shared, data, _QUICK).adapter.head is None


@pytest.mark.parametrize("rows", [[0], [0, 3, 6]])
def test_one_sample_or_one_class(shared: Backbone, dataset: Data, rows: list[int]) -> None:
    words = "got 1 sample" if len(rows) == 1 else "got 3 samples of one class, left"
    with pytest.raises(UsageError, match=f"data must have two samples or more, .*; {words}"):
        adapt(shared, dataset(24, 5).take(np.array(rows)), _QUICK)


def test_held_samples_of_other_classes(shared: Backbone, dataset: Data) -> None:
    eval_data = dataset(9, 6, names=("left", "middle", "else"))
    with pytest.raises(UsageError, match="eval_data must be of the data's classes, got 'else'"):
        adapt(shared, dataset(24, 5), _QUICK, eval_data=eval_data)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_held_samples_may_number_their_classes_otherwise(
    shared: Backbone, dataset: Data, order: tuple[int, int, int]
) -> None:
    eval_data = dataset(30, 6)
    turned = replace(
        eval_data,
        labels=np.argsort(order)[eval_data.labels],
        names=tuple(eval_data.names[i] for i in order),
    )
    wanted = adapt(shared, dataset(24, 5), _QUICK, eval_data=eval_data)
    found = adapt(shared, dataset(24, 5), _QUICK, eval_data=turned)
    assert (found.before, found.after) == (wanted.before, wanted.after)
    assert found.before > 0.5


def test_held_samples_of_another_length(bert_folder: Path) -> None:
    """Texts that were padded apart; and classes that only other users have."""
    backbone, rng = load_backbone(bert_folder), np.random.default_rng(0)
    names = ("LABEL_0", "LABEL_1", "elsewhere")

    def texts(count: int, length: int) -> Dataset:
        inputs = {"input_ids": rng.integers(1, 60, (count, length))}
        return Dataset(inputs, np.arange(count) % 2, names)

    done = adapt(backbone, texts(12, 9), _QUICK, eval_data=texts(6, 14))
    assert (done.samples, done.adapter.head) == (6, None)


# -- backbones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"head": "new"}, {"head": "auto"}, {"method": "head"}])
def test_a_backbone_without_a_head(shared: Backbone, dataset: Data, change: dict[str, str]) -> None:
    bare = replace(shared, head=(), labels=())
    with pytest.raises(UsageError, match="backbone must have a head to train one, got none"):
        adapt(bare, dataset(24, 5), replace(_QUICK, **change))


def test_a_backbone_that_was_not_saved(shared: Backbone, dataset: Data) -> None:
    with pytest.raises(UsageError, match="backbone must be saved before adapters are trained"):
        adapt(replace(shared, backbone_id=""), dataset(24, 5), _QUICK)


def test_head_only_takes_no_targets(shared: Backbone, dataset: Data) -> None:
    with pytest.raises(UsageError, match="method head changes no layers, got targets query"):
        adapt(shared, dataset(24, 5), replace(_QUICK, method="head", targets=["query"]))


def test_a_head_that_is_trained_is_no_target(shared: Backbone, dataset: Data) -> None:
    for config in (replace(_QUICK, head="new"), replace(_QUICK, head="tune")):
        targets = ["query", "classifier"]
        config = replace(config, method_settings={"rank": 2}, targets=targets)
        with pytest.raises(UsageError, match=r"must not be layers of a head .*, got classifier"):
            adapt(shared, dataset(24, 5), config)
    config = replace(_QUICK, method_settings={"rank": 2})
    done = adapt(
        shared, dataset(24, 5), replace(config, targets=["classifier"])
    )  # a head that is kept may
    assert done.adapter.targets[0].name == "classifier"


def test_a_model_that_takes_no_images(bert_folder: Path, dataset: Data) -> None:
    names = ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(RegrowError, match=r"model must take the data's inputs, got pixel_values"):
        adapt(load_backbone(bert_folder), dataset(24, 5, names=names), _QUICK)
