"""What training shares: batches, augmentation, schedules, and a random state that comes back."""

from __future__ import annotations

import math
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from regrow_runtime.errors import RegrowError
from regrow_toolchain import training
from regrow_toolchain.data import Dataset
from regrow_toolchain.training import (
    augment,
    batches,
    check_loss,
    cosine,
    deterministic,
    frozen,
    logits_of,
    predict,
    score,
)


def _data(count: int, classes: int = 2) -> Dataset:
    x = np.arange(count, dtype=np.float32)[:, None]
    labels = np.arange(count, dtype=np.int64) % classes
    return Dataset({"x": x}, labels, tuple(map(str, range(classes))))


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (3, 64), (7, 7), (5, 2)])
def test_batches_cover_all_samples_each_epoch(count: int, size: int) -> None:
    """ceil(count / size) steps see everything, and nobody is seen more than the others."""
    steps = 6 * math.ceil(count / min(size, count))
    seen = []
    for inputs, labels in batches(_data(count), size, steps, 0):
        assert inputs["x"].shape == (min(size, count), 1)
        assert torch.equal(labels, inputs["x"][:, 0].long() % 2)
        seen += inputs["x"][:, 0].int().tolist()
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))
    assert len(seen) == steps * min(size, count)


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[float]:
        return [x for inputs, _ in batches(_data(20), 5, 8, seed) for x in inputs["x"][:, 0]]

    assert order(3) == order(3) != order(4)
    assert order(3)[:20] != order(3)[20:]  # a new order for the second pass


# -- augmentation --------------------------------------------------------------------------------


def test_no_augmentation_is_the_identity() -> None:
    inputs = {"pixel_values": torch.randn(3, 2, 5, 6), "mask": torch.ones(3, 4, dtype=torch.int64)}
    found = augment(inputs, 0.0, 0.0)
    assert all(found[name] is value for name, value in inputs.items())


def test_shapes_stay_and_only_pictures_move() -> None:
    inputs = {
        "pixel_values": torch.randn(3, 2, 5, 6),
        "features": torch.randn(3, 7),
        "ids": torch.arange(12).view(3, 4),
    }
    found = augment(inputs, 1.5)
    assert found["pixel_values"].shape == (3, 2, 5, 6)
    assert not torch.equal(found["pixel_values"], inputs["pixel_values"])
    assert torch.equal(found["features"], inputs["features"])
    noisy = augment(inputs, 0, 0.5)
    assert torch.equal(noisy["ids"], inputs["ids"])
    assert (noisy["features"] - inputs["features"]).std().item() == pytest.approx(0.5, rel=0.5)


@pytest.mark.parametrize(("right", "down"), [(0.5, 0.0), (0.0, -0.75), (1.25, 0.3)])
def test_a_shift_moves_by_that_many_pixels(
    monkeypatch: pytest.MonkeyPatch, right: float, down: float
) -> None:
    """A ramp tells how far: it grows by 1 a pixel to the right, and by 10 a pixel downwards."""
    limit = 2.0
    drawn = (torch.tensor([[right, down]]) / limit + 1) / 2
    monkeypatch.setattr(training.torch, "rand", lambda *_: drawn)
    ramp = torch.arange(12.0)[None, :] + 10 * torch.arange(9.0)[:, None]
    moved = augment({"x": ramp[None, None]}, limit)["x"][0, 0]
    inside = (slice(2, -2), slice(2, -2))
    expected = ramp + right + 10 * down  # the grid is moved, so the picture goes the other way
    torch.testing.assert_close(moved[inside], expected[inside], atol=1e-4, rtol=0)
    assert moved.min() >= ramp.min() - 1e-4  # edges are repeated, nothing comes in from outside
    assert moved.max() <= ramp.max() + 1e-4


def test_shifts_stay_within_the_limit_and_differ_by_sample() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(40.0).expand(64, 1, 40, 40)
    far = augment({"x": ramp}, 3.0)["x"][:, 0, 20, 20] - 20
    assert far.abs().max() <= 3 + 1e-4
    assert far.max() > 2
    assert far.min() < -2


# -- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_the_schedule_rises_then_ends_at_zero(steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(2.0)
    assert min(rates) > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0 if steps > 1 else 2, abs=1e-9)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# -- state ---------------------------------------------------------------------------------------


def test_the_random_state_comes_back() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with deterministic(1):
        first = torch.rand(3)
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(3), wanted)
    with deterministic(1):
        assert torch.equal(torch.rand(3), first)
    with deterministic(2**64 - 1):
        assert not torch.equal(torch.rand(3), first)


def test_settings_come_back_after_an_error() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with suppress(KeyError), deterministic(1):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_frozen_weights_thaw() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with suppress(KeyError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == flags == [False, True, True, True]


# -- models and losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops(value: float) -> None:
    with pytest.raises(RegrowError, match=r"loss must be finite, got .* at step 7: lower --lr"):
        check_loss(torch.tensor(value), 7)
    check_loss(torch.tensor(1e30), 7)


def test_logits_come_from_a_tensor_or_an_output() -> None:
    logits = torch.ones(2, 3)
    assert logits_of(lambda x: logits, {"x": logits}) is logits
    assert logits_of(lambda x: SimpleNamespace(logits=logits), {"x": logits}) is logits
    with pytest.raises(RegrowError, match="model must return logits, got tuple"):
        logits_of(lambda x: (logits,), {"x": logits})


def test_inputs_that_a_model_does_not_take() -> None:
    layer = nn.Linear(4, 2)
    with pytest.raises(RegrowError, match=r"must take the data's inputs, got x \[2, 4\]: .*'x'"):
        logits_of(layer, {"x": torch.ones(2, 4)})
    with pytest.raises(RegrowError, match=r"got input \[2, 5\]: mat1 and mat2"):
        logits_of(layer, {"input": torch.ones(2, 5)})


def test_predictions_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_PREDICT_BATCH", 4)
    sizes: list[int] = []

    class Parity(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            sizes.append(len(x))
            odd = x[:, 0] % 2
            return torch.stack([1 - odd, odd], dim=1)

    model = Parity().train()
    data = _data(10)
    assert predict(model, data).argmax(axis=1).tolist() == data.labels.tolist()
    assert sizes == [4, 4, 2]
    assert score(model, data) == 1.0
    wrong = Dataset(data.inputs, 1 - data.labels, data.names)
    assert score(model, wrong) == 0.0
    assert math.isnan(score(model, data.take(np.empty(0, dtype=np.int64))))
