"""PELA's training terms against plain arithmetic, and what a training step does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from regrow_format.errors import UsageError
from regrow_toolchain.compress import DistillationTrainer, compress, factored_layers
from regrow_toolchain.compress.losses import (
    BlockFeatures,
    feature_blocks,
    feature_loss,
    perturbation_loss,
)
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, apply_plan, weight_of
from regrow_toolchain.tasks import Classification
from regrow_toolchain.training import accelerated


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
    plans = factored_layers(student, 2)
    apply_plan(student, plans)
    dense = {p.name: weight_of(backbone.model.get_submodule(p.name)) for p in plans}
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
    """Both as in use; the frozen teacher without a graph."""
    calls: list[tuple[str, bool, bool]] = []
    plain = DistillationTrainer.step

    def counting(self: DistillationTrainer, *rest: object) -> None:
        def note(name: str) -> Callable[..., None]:
            return lambda module, *_: calls.append((name, module.training, torch.is_grad_enabled()))

        handles = [
            self.teacher.register_forward_hook(note("teacher")),
            self.student.register_forward_hook(note("student")),
        ]
        plain(self, *rest)
        for handle in handles:
            handle.remove()

    monkeypatch.setattr(DistillationTrainer, "step", counting)
    config = CompressConfig(epochs=2, batch_size=16, holdout=0, init="svd")
    compress(backbone, dataset(40, 1), config)
    # 2 epochs of 16 + 16 + 8, filled up
    assert calls == [("teacher", False, False), ("student", False, True)] * 6


@pytest.fixture
def step_terms(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> Callable[..., tuple[float, float, float]]:
    """The terms of the first step of a training at ratio 3, and its student's own features."""

    def terms(**settings: object) -> tuple[float, float, float]:
        config = CompressConfig(ratio=3, batch_size=12, epsilon=0.0, **settings)
        student = copy.deepcopy(backbone.model)
        apply_plan(student, factored_layers(student, 3))
        task = Classification(config.label_smoothing)
        with accelerated(backbone.model, config) as accelerator:
            job = DistillationTrainer(
                backbone.model, student, task, dataset(12, 1), config, accelerator=accelerator
            )
            seen = BlockFeatures(student), BlockFeatures(backbone.model)
            parts = [
                job.terms(batch, seen, first=number == 0)
                for number, batch in enumerate(job.pieces(0))
            ]
        return tuple(sum(float(part[i].detach()) for part in parts) for i in range(3))

    return terms


def test_the_terms_are_those_of_a_plain_computation(
    backbone: Backbone,
    dataset: Callable[..., Dataset],
    step_terms: Callable[..., tuple[float, float, float]],
) -> None:
    student = copy.deepcopy(backbone.model)
    plans = factored_layers(student, 3)
    apply_plan(student, plans)
    data = dataset(12, 1)
    x = {name: torch.from_numpy(array) for name, array in data.inputs.items()}
    labels = torch.from_numpy(data.labels)
    with torch.no_grad():
        own = student(**x, output_hidden_states=True)
        other = backbone.model(**x, output_hidden_states=True)
    smooth = nn.functional.cross_entropy(own.logits, labels, label_smoothing=0.05).item()
    pairs = list(zip(own.hidden_states[1:], other.hidden_states[1:], strict=True))
    squares = np.mean([((s - t) ** 2).mean().item() for s, t in pairs])
    shares = np.mean([(((s - t) ** 2).mean() / (t**2).mean()).item() for s, t in pairs])
    far = [
        (student.get_submodule(p.name).weight
         - weight_of(backbone.model.get_submodule(p.name))).abs().max().item()
        for p in plans
    ]  # fmt: skip
    base, fd, rwp = step_terms(features="paper")
    assert base == pytest.approx(smooth, rel=1e-5)
    assert fd == pytest.approx(squares, rel=1e-4)
    assert rwp == pytest.approx(sum(far), rel=1e-4)
    assert step_terms()[1] == pytest.approx(shares, rel=1e-4)
    pieces = step_terms(accumulate=3, features="paper")
    assert pieces == pytest.approx((smooth, squares, sum(far)), rel=1e-4)
    assert step_terms(alpha=0.0, beta=0.0)[1:] == (0, 0)


def test_the_loss_is_the_weighted_sum(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    config = CompressConfig(epochs=1, alpha=7.0, beta=0.3, epsilon=0.0, holdout=0, init="svd")
    (epoch,) = compress(backbone, dataset(24, 1), config).history[1:]
    whole = epoch.base + 7 * epoch.fd + 0.3 * epoch.rwp
    assert min(epoch.base, epoch.fd, epoch.rwp) > 0
    assert epoch.loss == pytest.approx(whole, rel=1e-5)


def test_padding_has_no_features() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    kept = ((student - teacher) ** 2)[mask.bool()].mean()
    assert feature_loss([student], [teacher], mask).item() == pytest.approx(kept.item(), rel=1e-6)


def test_blocks_of_blocks_are_compared_one_by_one() -> None:
    """Swin's stages hold the blocks that have all factored layers."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 2],
                        num_heads=[2, 4], window_size=4)  # fmt: skip
    model = SwinForImageClassification(config)
    apply_plan(model, factored_layers(model, 2))
    stages = "swin.encoder.layers"
    assert feature_blocks(model) == (
        f"{stages}.0.blocks.0", f"{stages}.1.blocks.0", f"{stages}.1.blocks.1",
    )  # fmt: skip
    assert feature_blocks(model, stages) == (f"{stages}.0", f"{stages}.1")
    with pytest.raises(UsageError, match="blocks must match a list of modules, got 'stage'"):
        feature_blocks(model, "stage")


def test_a_list_in_a_list_is_no_block() -> None:
    """SegFormer keeps lists of layers in a list: the layers are called, the lists are not."""
    from transformers import SegformerConfig, SegformerForImageClassification

    config = SegformerConfig(hidden_sizes=[16, 32], depths=[1, 2], num_attention_heads=[1, 2],
                             num_encoder_blocks=2, sr_ratios=[2, 1])  # fmt: skip
    model = SegformerForImageClassification(config).eval()
    apply_plan(model, factored_layers(model, 2))
    found = feature_blocks(model)
    stages = "segformer.encoder.block"
    assert found == (f"{stages}.0.0", f"{stages}.1.0", f"{stages}.1.1")
    seen = BlockFeatures(model, found)
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert len(seen.take()) == len(found)
    seen.close()


def test_blocks_that_are_not_called_are_an_error() -> None:
    with pytest.raises(UsageError, match="blocks must be modules that the model calls"):
        feature_loss([], [])


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
