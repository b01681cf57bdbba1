"""Compression as a whole: better than plain SVD, the same every time, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.compress import Compressed, compress, factored_layers
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, apply_plan
from regrow_toolchain.training import predict


def _weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return backbone.model.state_dict()


def _same(one: Backbone, other: Backbone) -> bool:
    a, b = _weights(one), _weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_beats_plain_svd(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    """At a ratio that hurts: more held-back samples right, and logits nearer to the dense ones."""
    data, eval_data = dataset(240, 1), dataset(150, 2)
    trained = compress(
        backbone,
        data,
        CompressConfig(ratio=10, epochs=10, lr=3e-3, init="svd"),
        eval_data=eval_data,
    )
    plain = compress(backbone, eval_data=eval_data, config=CompressConfig(ratio=10))
    assert plain.score == plain.start_score == trained.start_score
    assert trained.score > trained.start_score + 0.05
    assert trained.samples == 150
    dense = predict(backbone.model, eval_data)
    far = [np.abs(predict(c.backbone.model, eval_data) - dense).mean() for c in (plain, trained)]
    assert far[1] < 0.75 * far[0]


def test_the_result_says_what_it_is(compressed: Compressed) -> None:
    backbone, report = compressed.backbone, compressed.backbone.report
    assert backbone.labels == ("left", "middle", "right")
    assert backbone.head == ("classifier",)
    assert len(backbone.layers) == 12
    assert report["ratio"] == 3
    assert report["source"].startswith("sha256:")
    assert report["parameters"]["compressed"] == backbone.parameters
    assert report["parameters"]["dense"] > 1.7 * backbone.parameters
    assert report["metric"] == "accuracy"
    assert report["scores"] == {
        "dense": compressed.dense_score,
        "start": compressed.start_score,
        "compressed": compressed.score,
    }
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_without_data_it_is_plain_svd(backbone: Backbone) -> None:
    plain = compress(backbone)
    assert plain.samples == 0
    assert all(map(math.isnan, (plain.dense_score, plain.start_score, plain.score)))
    assert "scores" not in plain.backbone.report
    apply_plan(backbone.model, factored_layers(backbone.model, CompressConfig().ratio))
    assert _same(plain.backbone, backbone)


def test_no_epochs_are_plain_svd_with_scores(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    scored = compress(backbone, dataset(60, 1), CompressConfig(epochs=0, init="svd"))
    assert _same(scored.backbone, compress(backbone).backbone)
    assert scored.samples == 6  # a tenth, of every class
    assert scored.score == scored.start_score


def test_the_same_seed_gives_the_same_weights(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    config = CompressConfig(epochs=2, shift=0.5, noise=0.1)
    torch.manual_seed(1)
    one = compress(backbone, dataset(48, 1), config).backbone
    torch.manual_seed(2)
    assert _same(compress(backbone, dataset(48, 1), config).backbone, one)
    assert not _same(compress(backbone, dataset(48, 1), replace(config, seed=1)).backbone, one)


def test_a_compressed_model_is_refused(compressed: Compressed) -> None:
    with pytest.raises(UsageError, match="model must be a dense one, got a compressed one"):
        compress(compressed.backbone)


def test_labels_of_others_are_refused(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    for names in (("cat", "dog", "cow"), ("left", "middle", "up")):
        with pytest.raises(UsageError, match=r"labels must be among the backbone's \(left, middle"):
            compress(backbone, dataset(12, 1, names=names))
    numbers = replace(dataset(12, 1), labels=np.arange(12), named=False)
    with pytest.raises(UsageError, match="labels must be from 0 to 2 as in the backbone, got 11"):
        compress(backbone, numbers)


def test_labels_in_another_order_mean_the_same(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    """Classes are matched by name, in the samples held back too."""
    eval_data = dataset(90, 2)
    turned = replace(eval_data, labels=2 - eval_data.labels, names=eval_data.names[::-1])
    config = CompressConfig(epochs=1)
    one = compress(backbone, dataset(30, 1), config, eval_data=eval_data)
    other = compress(backbone, dataset(30, 1), config, eval_data=turned)
    assert one.dense_score > 0.9
    assert other.dense_score == one.dense_score
    assert compress(backbone, eval_data=turned).dense_score == one.dense_score


def test_a_loss_that_breaks_stops(backbone: Backbone, dataset: Callable[..., Dataset]) -> None:
    data = dataset(24, 1)
    data.inputs["pixel_values"][3] = np.nan
    with pytest.raises(RegrowError, match="loss must be finite, got nan at step 0"):
        compress(backbone, data, CompressConfig(epochs=1, init="svd"))
    with pytest.raises(RegrowError, match=r"what flows through .*query must be finite"):
        compress(backbone, data, CompressConfig(epochs=1))
    assert not any(module._forward_hooks for module in backbone.model.modules())


def test_an_unknown_form_of_perturbation_is_refused(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    with pytest.raises(UsageError, match="perturbation must be"):
        compress(backbone, dataset(24, 1), CompressConfig(epochs=1, perturbation="l2"))


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_to_hold_back_must_leave_samples(
    backbone: Backbone, dataset: Callable[..., Dataset], share: float
) -> None:
    with pytest.raises(UsageError, match="holdout must be"):
        compress(backbone, dataset(24, 1), CompressConfig(holdout=share))
