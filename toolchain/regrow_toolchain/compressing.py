"""Compression: PELA's factors, then distillation from the dense model."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow_runtime.errors import UsageError

from .backbone import Backbone
from .config import CompressConfig
from .data import Dataset
from .data.dataset import split
from .distill import BlockFeatures, feature_loss, perturbation_loss
from .labels import fit_labels
from .lowrank import Plan, apply_plan, dense_weight, plan_layers
from .progress import progress
from .training import (
    augment,
    batches,
    check_loss,
    cosine,
    deterministic,
    frozen,
    logits_of,
    score,
)

__all__ = ["Compressed", "compress"]

_WAY_OUT = "compression keeps the model's own labels; without data it is the plain SVD"


@dataclass(frozen=True)
class Compressed:
    """A compressed backbone with accuracies on held-back samples (NaN if there were none)."""

    backbone: Backbone
    dense_accuracy: float
    svd_accuracy: float
    accuracy: float
    samples: int


def compress(
    backbone: Backbone,
    data: Dataset | None = None,
    config: CompressConfig | None = None,
    *,
    held: Dataset | None = None,
) -> Compressed:
    """Factor every linear layer of the blocks, then train the factors if there is data.

    Args:
        backbone: the dense model; it is not changed.
        data: labelled samples; without them the result is the plain SVD.
        held: samples to measure on; a share of `data` if not given.

    Raises:
        UsageError: the ratio, the labels or a setting makes no sense, or the backbone is factored
            already.
        RegrowError: weights are not finite, there is nothing to factor, or the loss became NaN.
    """
    config = config or CompressConfig()
    if backbone.layers:
        raise UsageError("model must be a dense one, got a compressed one: compress its source")
    plans = plan_layers(backbone.model, config.ratio)
    student = copy.deepcopy(backbone.model)
    apply_plan(student, plans)
    train, held = _parts(backbone, data, held, config)
    dense = score(backbone.model, held) if held else math.nan
    svd = score(student, held) if held else math.nan
    if train is not None and config.epochs:
        with deterministic(config.seed), frozen(backbone.model):
            _distill(backbone.model, student, plans, train, config)
    student.eval().requires_grad_(False)
    after = score(student, held) if held else math.nan
    result = _result(backbone, student, plans, config)
    samples = len(held) if held else 0
    if samples:
        result.report["accuracy"] = {"dense": dense, "svd": svd, "compressed": after}
        result.report["samples"] = samples
    return Compressed(result, dense, svd, after, samples)


def _parts(
    backbone: Backbone, data: Dataset | None, held: Dataset | None, config: CompressConfig
) -> tuple[Dataset | None, Dataset | None]:
    if held is not None:
        held, _ = fit_labels(held, backbone.labels, "keep", way_out=_WAY_OUT)
    if data is None:
        return None, held
    fitted, _ = fit_labels(data, backbone.labels, "keep", way_out=_WAY_OUT)
    if held is not None:
        return fitted, held
    train, kept = split(fitted, config.holdout, config.seed)
    return train, kept if len(kept) else None


def _result(
    backbone: Backbone, student: nn.Module, plans: tuple[Plan, ...], config: CompressConfig
) -> Backbone:
    result = Backbone(
        model=student,
        backbone_id="",  # known when it is written
        task=backbone.task,
        head=backbone.head,
        labels=backbone.labels,
        files=backbone.files,
        layers=plans,
        function=backbone.function,
    )
    result.report = {
        "ratio": config.ratio,
        "source": backbone.backbone_id,
        "parameters": {"dense": backbone.parameters, "compressed": result.parameters},
    }
    return result


def _distill(
    teacher: nn.Module,
    student: nn.Module,
    plans: tuple[Plan, ...],
    data: Dataset,
    config: CompressConfig,
) -> None:
    """L = L_base + alpha L_fd + beta L_rwp; one forward of the student a step."""
    per_epoch = math.ceil(len(data) / min(config.batch_size, len(data)))
    steps = config.epochs * per_epoch
    teacher.eval()
    student.train().requires_grad_(True)
    dense = {plan.name: dense_weight(teacher.get_submodule(plan.name)) for plan in plans}
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    schedule = cosine(optimizer, steps)
    seen, wanted = BlockFeatures(student), BlockFeatures(teacher)
    try:
        with progress("compress", steps) as advance:
            for step, (inputs, labels) in enumerate(
                batches(data, config.batch_size, steps, config.seed)
            ):
                inputs = augment(inputs, config.shift, config.noise)
                loss = _loss(teacher, student, inputs, labels, (seen, wanted), dense, config)
                check_loss(loss, step)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    finally:
        seen.close()
        wanted.close()


def _loss(
    teacher: nn.Module,
    student: nn.Module,
    inputs: dict[str, Tensor],
    labels: Tensor,
    features: tuple[BlockFeatures, BlockFeatures],
    dense: dict[str, Tensor],
    config: CompressConfig,
) -> Tensor:
    seen, wanted = features
    with torch.no_grad():
        teacher(**inputs)
    loss = nn.functional.cross_entropy(
        logits_of(student, inputs), labels, label_smoothing=config.label_smoothing
    )
    loss = loss + config.alpha * feature_loss(seen.take(), wanted.take())
    if config.beta:
        loss = loss + config.beta * perturbation_loss(
            student, dense, config.epsilon, config.perturbation
        )
    return loss
