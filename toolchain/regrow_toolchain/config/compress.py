"""Settings of `regrow compress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regrow_export import setting
from regrow_toolchain.tasks import TASK_CHOICES

from .shared import Checked, accumulate, device, mixed_precision, threads

__all__ = ["CompressConfig"]


@dataclass(frozen=True)
class CompressConfig(Checked):
    """PELA (arXiv 2310.10700): low-rank factors, then distillation from the dense model."""

    ratio: float = setting(2.0, "Compression ratio: the parameters of layers fall by it.", low=1.0)
    init: str = setting(
        "auto",
        "Where factors start: the weights' SVD, one that keeps what layers give on samples "
        "(activations), or what the model gives (outputs); auto: outputs, or svd without data.",
        choices=("auto", "svd", "activations", "outputs"),
    )
    calibration: int = setting(256, "Samples that the start looks at.", low=2)
    ranks: str = setting(
        "auto",
        "Ranks: the paper's formula for every layer, ranks near it that ONNX Runtime computes "
        "faster here (kernels), or one budget for all layers (global); auto: global where the "
        "start is outputs, else paper.",
        choices=("auto", "paper", "kernels", "global"),
    )
    budget: str = setting(
        "parameters",
        "What global ranks bring down by the ratio: parameters, multiplications (macs), or "
        "milliseconds in ONNX Runtime as measured here (time).",
        choices=("parameters", "macs", "time"),
    )
    multiple: int = setting(
        8,
        "Ranks that are not the paper's are multiples of this, but in layers whose paper's rank is "
        "lower.",
        low=1,
    )
    slow_layers: str = setting(
        "auto",
        "A layer that ONNX Runtime clearly computes no faster in factors stays dense, or is "
        "factored all the same; auto: dense where the start looks at samples.",
        choices=("auto", "dense", "factor"),
    )
    precision: str = setting(
        "fp32",
        "What the layers will be exported in: kernels, slow layers and times are measured so.",
        choices=("fp32", "int8"),
    )
    task: str = setting(
        "auto",
        "What is learnt beside the dense model's features: the labels, or without any the dense "
        "model's own outputs (distillation); auto: by labels and model.",
        choices=TASK_CHOICES,
    )
    epochs: int = setting(12, "Passes over the training data; 0 keeps the start.")
    lr: float = setting(1e-3, "Peak learning rate (AdamW, cosine).")
    warmup: float = setting(0.1, "Share of the steps in which the learning rate rises.", high=1.0)
    weight_decay: float = setting(0.01, "AdamW's weight decay.")
    batch_size: int = setting(64, "Samples a step.", low=1)
    accumulate: int = accumulate()
    ema: float = setting(
        0.0, "Decay of a moving average of the weights, which is what is kept; 0: none.", high=1.0
    )
    alpha: float = setting(10.0, "Weight of feature distillation.")
    features: str = setting(
        "relative",
        "Feature distillation: the mean squared error (paper), or divided by the features' own "
        "mean square in every block (relative), so that alpha means the same for every model.",
        choices=("paper", "relative"),
    )
    blocks: str = setting(
        "", "Lists of blocks whose outputs are distilled, as a pattern; found if not given."
    )
    beta: float = setting(0.1, "Weight of the weight perturbation term.")
    epsilon: float = setting(0.1, "Radius within which factored weights may move.")
    perturbation: str = setting(
        "hinge", "Form of the perturbation term.", choices=("hinge", "paper", "squared")
    )
    label_smoothing: float = setting(0.05, "Label smoothing.", high=1.0)
    shift: float = setting(0.0, "Augmentation: shift images by up to this many pixels.")
    noise: float = setting(0.0, "Augmentation: standard deviation of noise on images.")
    holdout: float = setting(0.1, "Share of the data kept for measuring.")
    keep: str = setting(
        "best",
        "The epoch that is kept: the best on the samples held back (whose score then flatters "
        "a little), or the last.",
        choices=("best", "last"),
    )
    device: str = device()
    mixed_precision: str = mixed_precision()
    threads: int = threads()
    seed: int = setting(0, "Seed of everything random.")
    only: Sequence[str] = setting(
        (),
        "Layer to factor, and no others: an ending such as `query`, a shell pattern such as "
        "`*.layer.0.*`, or a set, `@attention` or `@mlp`; repeatable.",
        metavar="NAME",
    )
    keep_dense: Sequence[str] = setting(
        (), "Layer that stays dense, named as for --only; repeatable.", metavar="NAME"
    )
