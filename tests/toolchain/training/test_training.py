"""What training shares: batches, augmentation, schedules, and a random state that comes back."""

from __future__ import annotations

import math
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_format.errors import RegrowError
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import features_of, logits_of
from regrow_toolchain.training import (
    Augmentation,
    MultiUserBatches,
    accuracy,
    augment,
    batches,
    check_loss,
    cosine,
    cosine_factor,
    deterministic,
    evaluation,
    frozen,
    predict,
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


# -- batches of several users --------------------------------------------------------------------


def _images(count: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(
        {"pixel_values": rng.normal(size=(count, 2, 6, 5)).astype(np.float32),
         "ids": rng.integers(0, 99, (count, 4))},
        np.arange(count, dtype=np.int64) % 3, ("a", "b", "c"),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(1.5, 0.3)])
def test_a_users_samples_are_the_same_in_any_company(augmentation: Augmentation, seed: int) -> None:
    parts = [_images(count, i) for i, count in enumerate((9, 3, 9, 2, 14))]
    together = MultiUserBatches(parts, size=4, seed=seed, augmentation=augmentation)
    for user, part in enumerate(parts):
        alone = MultiUserBatches([part], size=4, seed=seed, augmentation=augmentation)
        size = min(4, len(part))
        for step in (0, 1, 2, 17):
            one, many = alone.batch(step), together.batch(step)
            assert one.labels.shape == one.weights.shape == (1, size)
            assert many.labels.shape == many.weights.shape == (5, 4)
            assert torch.equal(one.labels[0], many.labels[user, :size])
            assert torch.equal(one.weights[0], many.weights[user, :size])
            assert not many.weights[user, size:].any()
            for name, value in one.inputs.items():
                mine = many.inputs[name].unflatten(0, (5, 4))[user]
                assert torch.equal(value, mine[:size])
                # What fills up is a sample of the user's own, which no loss reads.
                if augmentation == Augmentation():
                    assert torch.equal(mine[size:], mine[:1].expand_as(mine[size:]))


@pytest.mark.parametrize(("count", "size"), [(9, 4), (3, 64), (7, 7), (5, 2)])
def test_a_cohort_sees_every_sample_once_in_a_pass(count: int, size: int) -> None:
    cohort = MultiUserBatches([_data(count), _data(count + 2)], size=size, seed=3)
    for user, number in ((0, count), (1, count + 2)):
        seen: list[int] = []
        used = min(size, number)
        for step in range(3 * number):
            rows = cohort.batch(step).inputs["x"].unflatten(0, (2, -1))[user, :used, 0]
            seen += rows.int().tolist()
        assert len(seen) == 3 * number * used
        for start in range(0, len(seen) - number + 1, number):
            assert sorted(seen[start : start + number]) == list(range(number))
    assert torch.equal(cohort.batch(5).labels, cohort.batch(5).labels)


def test_a_step_does_not_need_those_before_it() -> None:
    """Interrupted training goes on with the samples and the noise that it would have had."""
    parts = [_images(7, 1), _images(40, 2)]
    walked = MultiUserBatches(parts, size=5, seed=1, augmentation=Augmentation(1, 0.2))
    for step in range(30):
        last = walked.batch(step)
    fresh = MultiUserBatches(parts, size=5, seed=1, augmentation=Augmentation(1, 0.2)).batch(29)
    assert torch.equal(last.labels, fresh.labels)
    assert all(torch.equal(last.inputs[name], value) for name, value in fresh.inputs.items())


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_the_pieces_of_a_step_are_its_samples(pieces: int) -> None:
    """With their noise, and with weights that sum to 1 over all of them."""
    parts = [_images(9, 0), _images(3, 1)]
    cohort = MultiUserBatches(parts, size=4, seed=0, augmentation=Augmentation(1, 0.2))
    whole = cohort.batch(3)
    some = [cohort.batch(3, piece, pieces) for piece in range(pieces)]
    assert torch.equal(torch.cat([batch.labels for batch in some], 1), whole.labels)
    weights = torch.cat([batch.weights for batch in some], 1)
    assert torch.equal(weights, whole.weights)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    for name, value in whole.inputs.items():
        found = torch.cat([batch.inputs[name].unflatten(0, (2, -1)) for batch in some], 1)
        assert torch.equal(found.flatten(0, 1), value)


def test_only_images_are_augmented_and_no_two_steps_alike() -> None:
    part = _images(6, 0)
    cohort = MultiUserBatches([part], size=6, seed=0, augmentation=Augmentation(1, 0.2))
    plain = MultiUserBatches([part], size=6, seed=0)
    noisy = MultiUserBatches([part], size=6, seed=0, augmentation=Augmentation(0, 0.2))
    for other in (cohort, noisy):
        moved = [other.batch(s).inputs["pixel_values"] - plain.batch(s).inputs["pixel_values"]
                 for s in (0, 1)]  # fmt: skip
        assert all(change.abs().amax(dim=(1, 2, 3)).min() > 0 for change in moved)
        assert (moved[0] - moved[1]).abs().max() > 0.1
    assert torch.equal(cohort.batch(0).inputs["ids"], plain.batch(0).inputs["ids"])
    change = noisy.batch(0).inputs["pixel_values"] - plain.batch(0).inputs["pixel_values"]
    assert change.std().item() == pytest.approx(0.2, rel=0.1)


# -- augmentation --------------------------------------------------------------------------------


def test_no_augmentation_is_the_identity() -> None:
    inputs = {"pixel_values": torch.randn(3, 2, 5, 6), "mask": torch.ones(3, 4, dtype=torch.int64)}
    found = augment(inputs, 0.0, 0.0)
    assert all(found[name] is value for name, value in inputs.items())


def test_shapes_stay_and_only_images_move() -> None:
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
    monkeypatch.setattr(evaluation.torch, "rand", lambda *_: drawn)
    ramp = torch.arange(12.0)[None, :] + 10 * torch.arange(9.0)[:, None]
    moved = augment({"x": ramp[None, None]}, limit)["x"][0, 0]
    inside = (slice(2, -2), slice(2, -2))
    expected = ramp + right + 10 * down  # the grid is moved, so the image goes the other way
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
    assert rates == pytest.approx([2 * cosine_factor(step, steps) for step in range(steps)])
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


def test_features_come_from_embeddings_or_from_the_mean_of_tokens() -> None:
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    pooled = torch.randn(2, 4)
    ids = {"x": torch.ones(2, 3)}

    def gives(**outputs: torch.Tensor) -> Any:
        return lambda **_: SimpleNamespace(**outputs)

    assert features_of(gives(sentence_embedding=pooled, last_hidden_state=tokens), ids) is pooled
    assert features_of(lambda **_: pooled, ids) is pooled
    found = features_of(gives(last_hidden_state=tokens), {**ids, "attention_mask": mask})
    wanted = torch.stack([tokens[0, :2].mean(0), tokens[1, 0]])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(features_of(lambda **_: tokens, ids), tokens.mean(1))
    nothing = {**ids, "attention_mask": torch.zeros(2, 3, dtype=torch.int64)}
    assert not features_of(gives(last_hidden_state=tokens), nothing).any()  # and no NaN
    with pytest.raises(RegrowError, match="model must return embeddings, got SimpleNamespace"):
        features_of(gives(hidden=pooled), ids)


def test_inputs_that_a_model_does_not_take() -> None:
    layer = nn.Linear(4, 2)
    with pytest.raises(RegrowError, match=r"must take the data's inputs, got x \[2, 4\]: .*'x'"):
        logits_of(layer, {"x": torch.ones(2, 4)})
    with pytest.raises(RegrowError, match=r"got input \[2, 5\]: mat1 and mat2"):
        logits_of(layer, {"input": torch.ones(2, 5)})


def test_predictions_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PREDICT_BATCH", 4)
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
    assert accuracy(model, data) == 1.0
    wrong = Dataset(data.inputs, 1 - data.labels, data.names)
    assert accuracy(model, wrong) == 0.0
    assert math.isnan(accuracy(model, data.take(np.empty(0, dtype=np.int64))))
