"""PELA's training terms against plain arithmetic, and what a training step does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from regrow_runtime.errors import UsageError
from regrow_toolchain import compressing
from regrow_toolchain.backbone import Backbone
from regrow_toolchain.compressing import compress
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.distill import BlockFeatures, feature_loss, perturbation_loss
from regrow_toolchain.lowrank import apply_plan, dense_weight, plan_layers


def test_feature_loss_is_the_mean_square_over_tokens_then_blocks() -> None:
    rng = np.random.default_rng(0)
    student = [rng.standard_normal((2, 5, 8)).astype(np.float32) for _ in range(3)]
    teacher = [rng.standard_normal((2, 5, 8)).astype(np.float32) for _ in range(3)]
    loss = feature_loss(
        [torch.from_numpy(s) for s in student], [torch.from_numpy(t) for t in teacher]
    )
    by_block = [((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True)]
    assert loss.item() == pytest.approx(np.mean(by_block), rel=1e-6)


def test_features_of_unlike_models_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        feature_loss([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])


def test_features_are_every_blocks_output(backbone: Backbone) -> None:
    kept = BlockFeatures(backbone.model)
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        states = backbone.model(pixel_values=x, output_hidden_states=True).hidden_states
    features = kept.take()
    assert [f.shape for f in features] == [(3, 10, 32)] * 2
    assert all(torch.equal(f, h) for f, h in zip(features, states[1:], strict=True))
    assert kept.take() == []
    kept.close()
    backbone.model(pixel_values=x)
    assert kept.outputs == []


@pytest.fixture
def moved(backbone: Backbone) -> tuple[nn.Module, dict[str, torch.Tensor], np.ndarray]:
    """A factored model, its dense weights, and how far each layer is from them."""
    student = copy.deepcopy(backbone.model)
    plans = plan_layers(student, 2)
    apply_plan(student, plans)
    dense = {p.name: dense_weight(backbone.model.get_submodule(p.name)) for p in plans}
    far = [
        np.abs(
            student.get_submodule(name).up.weight.detach().numpy()
            @ student.get_submodule(name).down.weight.detach().numpy()
            - weight.numpy()
        ).max()
        for name, weight in dense.items()
    ]
    return student, dense, np.array(far)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("hinge", lambda d: np.maximum(d, 0).sum()),
        ("paper", lambda d: d.sum()),
        ("squared", lambda d: (d**2).mean()),
    ],
)
def test_perturbation_loss(
    moved: tuple[nn.Module, dict[str, torch.Tensor], np.ndarray],
    form: str,
    expected: Callable[[np.ndarray], float],
) -> None:
    student, dense, far = moved
    epsilon = float(np.median(far))  # so that some layers are inside the radius, some outside
    loss = perturbation_loss(student, dense, epsilon, form)
    assert loss.item() == pytest.approx(expected(far - epsilon), rel=1e-4)
    loss.backward()
    assert student.vit.encoder.layer[0].output.dense.up.weight.grad is not None


def test_hinge_is_zero_inside_the_radius(
    moved: tuple[nn.Module, dict[str, torch.Tensor], np.ndarray],
) -> None:
    student, dense, far = moved
    assert perturbation_loss(student, dense, float(far.max()) + 1e-3, "hinge").item() == 0
    assert perturbation_loss(student, dense, float(far.max()) + 1e-3, "paper").item() < 0


def test_an_unknown_form_is_refused(
    moved: tuple[nn.Module, dict[str, torch.Tensor], np.ndarray],
) -> None:
    with pytest.raises(UsageError, match="perturbation must be hinge, paper or squared, got 'x'"):
        perturbation_loss(moved[0], moved[1], 0.1, "x")


def test_one_forward_of_each_model_a_step(
    backbone: Backbone, dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SimpleNamespace(teacher=0, student=0, steps=0, modes=set())
    plain = compressing._loss

    def counting(teacher: nn.Module, student: nn.Module, *rest: object) -> torch.Tensor:
        calls.steps += 1
        calls.modes.add((teacher.training, student.training))
        handles = [
            teacher.register_forward_hook(lambda *_: setattr(calls, "teacher", calls.teacher + 1)),
            student.register_forward_hook(lambda *_: setattr(calls, "student", calls.student + 1)),
        ]
        loss = plain(teacher, student, *rest)
        for handle in handles:
            handle.remove()
        return loss

    monkeypatch.setattr(compressing, "_loss", counting)
    compress(backbone, dataset(40, 1), CompressConfig(epochs=2, batch_size=16, holdout=0))
    assert (calls.teacher, calls.student, calls.steps) == (6, 6, 6)  # 2 epochs of 16 + 16 + 8
    assert calls.modes == {(False, True)}


def test_the_loss_is_the_sum_of_its_terms(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    student = copy.deepcopy(backbone.model)
    plans = plan_layers(student, 3)
    apply_plan(student, plans)
    dense = {p.name: dense_weight(backbone.model.get_submodule(p.name)) for p in plans}
    data = dataset(12, 1)
    inputs = {name: torch.from_numpy(array) for name, array in data.inputs.items()}
    labels = torch.from_numpy(data.labels)
    seen, wanted = BlockFeatures(student), BlockFeatures(backbone.model)

    def loss(**other: float) -> float:
        config = CompressConfig(**{"alpha": 0.0, "beta": 0.0, "epsilon": 0.0, **other})
        found = compressing._loss(
            backbone.model, student, inputs, labels, (seen, wanted), dense, config
        )
        return found.item()

    with torch.no_grad():
        logits = student(**inputs).logits
        own = student(**inputs, output_hidden_states=True).hidden_states[1:]
        other = backbone.model(**inputs, output_hidden_states=True).hidden_states[1:]
        seen.take(), wanted.take()
        base = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05).item()
        features = feature_loss(own, other).item()
        moved = perturbation_loss(student, dense, 0.0, "hinge").item()
    assert loss() == pytest.approx(base, rel=1e-5)
    assert loss(alpha=7.0) == pytest.approx(base + 7 * features, rel=1e-4)
    assert loss(alpha=7.0, beta=0.3) == pytest.approx(base + 7 * features + 0.3 * moved, rel=1e-4)


def test_the_teacher_stays_as_it_is(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    flags = [p.requires_grad for p in backbone.model.parameters()]
    compress(backbone, dataset(24, 1), CompressConfig(epochs=1, holdout=0))
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module.training for module in backbone.model.modules())
    assert [p.requires_grad for p in backbone.model.parameters()] == flags
    assert not any(module._forward_hooks for module in backbone.model.modules())
