"""Training one adapter on a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from regrow_runtime.adapter import (
    STORAGE,
    Adapter,
    Coefficients,
    Head,
    HeadLayer,
    Target,
    Validated,
)
from regrow_runtime.errors import RegrowError, UsageError
from regrow_runtime.methods import get_method
from regrow_runtime.philox import check_seed

from .applying import Hooks, applied, linear
from .backbone import Backbone
from .config import AdaptConfig
from .data import Dataset
from .data.dataset import split
from .labels import fit_labels
from .methods import Trained, get_trainable
from .progress import progress
from .targets import find_targets
from .training import (
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

__all__ = ["Adapted", "adapt"]

# From this share of the steps on, training sees the coefficients as the file will hold them.
_ROUNDED_FROM = 0.5


@dataclass(frozen=True)
class Adapted:
    """A trained adapter with its scores on held-back samples (NaN if none were held back)."""

    adapter: Adapter
    before: float
    after: float
    samples: int


def adapt(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    targets: Sequence[str] = (),
) -> Adapted:
    """Train one adapter for one user.

    Args:
        backbone: dense or compressed; its weights do not change.
        data: the user's labelled samples; a share of them is held back for the scores.
        targets: names or patterns of the layers to adapt; every linear layer of the blocks if none.

    Raises:
        UsageError: labels, targets or settings make no sense.
        RegrowError: the loss became NaN or infinite.
    """
    config = config or AdaptConfig()
    _check(config, backbone)
    fitted, new_head = fit_labels(data, backbone.labels, config.head)
    if new_head and not backbone.head:
        raise UsageError("backbone must have a head to train a new one, got none")
    layers = find_targets(backbone.model, targets)
    train, held = split(fitted, config.holdout, config.seed)
    trained = get_trainable(config.method).start(layers, config.method_settings, config.seed)
    trained.storage = config.storage
    with deterministic(config.seed), frozen(backbone.model):
        head = _new_head(backbone, len(fitted.names)) if new_head else {}
        _train(backbone.model, trained, head, train, config)
        adapter = _adapter(backbone, trained, head, layers, fitted.names, config)
        before = _named_score(backbone, held)
        with applied(backbone.model, adapter):
            after = score(backbone.model, held)
    return Adapted(_with_scores(adapter, before, after, len(held)), before, after, len(held))


def _named_score(backbone: Backbone, held: Dataset) -> float:
    """Accuracy of the backbone alone, by class names: labels that it does not know are missed."""
    if not len(held):
        return math.nan
    answers = predict(backbone.model, held).argmax(axis=1)
    known = dict(enumerate(backbone.labels))
    pairs = zip(answers, held.labels, strict=True)
    return sum(known.get(int(a)) == held.names[int(t)] for a, t in pairs) / len(held)


def _check(config: AdaptConfig, backbone: Backbone) -> None:
    check_seed(config.seed)
    if not backbone.backbone_id:
        raise UsageError("backbone must be saved before adapters are trained for it: save_backbone")
    if config.storage not in STORAGE:
        raise UsageError(f"storage must be one of {', '.join(STORAGE)}, got {config.storage!r}")
    if config.head not in ("auto", "keep", "new"):
        raise UsageError(f"head must be auto, keep or new, got {config.head!r}")
    if not 0 <= config.label_smoothing <= 1:
        raise UsageError(f"label_smoothing must be from 0 to 1, got {config.label_smoothing}")
    if config.steps < 1 or config.batch_size < 1:
        raise UsageError("steps and batch size must be at least 1")


# -- training ------------------------------------------------------------------------------------


def _new_head(backbone: Backbone, classes: int) -> dict[str, nn.Linear]:
    """The backbone's head as a start, with a fresh last layer of `classes` outputs."""
    layers = {}
    for name in backbone.head:
        old = backbone.model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise RegrowError(f"head {name} must be a linear layer, got {type(old).__name__}")
        if name == backbone.head[-1]:
            layers[name] = nn.Linear(old.in_features, classes)
        else:
            bias = torch.zeros(old.out_features) if old.bias is None else old.bias
            layers[name] = linear(old.weight.numpy(), bias.numpy()).requires_grad_(True)
    return layers


def _train(
    model: nn.Module,
    trained: Trained,
    head: dict[str, nn.Linear],
    data: Dataset,
    config: AdaptConfig,
) -> None:
    lr = config.lr or get_trainable(config.method).default_lr
    groups = [{"params": list(trained.parameters()), "lr": lr}]
    if head:
        parameters = [p for layer in head.values() for p in layer.parameters()]
        groups.append({"params": parameters, "lr": config.head_lr})
    optimizer = torch.optim.Adam(groups)
    schedule = cosine(optimizer, config.steps)
    hooks = Hooks(model, head)
    model.eval()  # a frozen backbone without dropout: what the device computes
    try:
        hooks.attach([target.name for target in trained.targets])
        with progress(f"adapt ({config.method})", config.steps) as advance:
            steps = batches(data, config.batch_size, config.steps, config.seed)
            for step, (inputs, labels) in enumerate(steps):
                trained.rounded = step >= _ROUNDED_FROM * config.steps
                hooks.factors = trained.factors()
                logits = logits_of(model, augment(inputs, config.shift, config.noise))
                loss = nn.functional.cross_entropy(
                    logits, labels, label_smoothing=config.label_smoothing
                )
                check_loss(loss, step)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    finally:
        hooks.detach()


# -- the result ----------------------------------------------------------------------------------


def _adapter(
    backbone: Backbone,
    trained: Trained,
    head: dict[str, nn.Linear],
    targets: tuple[Target, ...],
    names: tuple[str, ...],
    config: AdaptConfig,
) -> Adapter:
    method = get_method(config.method)
    constants = method.constants(trained.config, targets)
    coefficients = {
        name: Coefficients.store(values, constants[name], config.storage)
        for name, values in trained.values().items()
    }
    return Adapter(
        method=config.method,
        config=trained.config,
        seed=config.seed,
        backbone_id=backbone.backbone_id,
        targets=targets,
        coefficients=coefficients,
        storage=config.storage,
        head=_stored_head(head, names) if head else None,
    )


def _stored_head(head: dict[str, nn.Linear], names: tuple[str, ...]) -> Head:
    """As the file holds it, in fp16, so that the scores are those of the file."""
    layers = []
    for name, layer in head.items():
        weight = layer.weight.detach().numpy().astype(np.float16).astype(np.float32)
        bias = layer.bias.detach().numpy().astype(np.float16).astype(np.float32)
        layers.append(HeadLayer(name, weight, bias))
    return Head(tuple(layers), names)


def _with_scores(adapter: Adapter, before: float, after: float, samples: int) -> Adapter:
    from dataclasses import replace

    if math.isnan(after):
        return adapter
    return replace(adapter, validated=(Validated("fp32", "accuracy", before, after, samples),))
