"""One config per command: the only home of its settings, their defaults, help and limits.

A config is checked when it is made, from the command line and from Python alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow_export import ExportConfig as ExportConfig
from regrow_export import check_settings, setting, targets_setting

__all__ = ["AdaptConfig", "CompressConfig", "ExportConfig", "ImportConfig", "ProfileConfig"]

_METHOD_SETTINGS = (
    "nola: k=64, l=64, rank=8, c=8.0, shared=true; vera: rank=64, d_initial=0.1; "
    "fourierft: n=128, alpha=64.0, init=zero, bias_frequency=0, bias_width=0; "
    "lora: rank=4, alpha=4.0, rslora=false; ia3: feedforward=auto"
)


# Settings of all training.


def _accumulate() -> Any:
    return setting(1, "Pieces that a step's samples are cut into, to save memory.", low=1)


def _device() -> Any:
    return setting("auto", "Where to train.", choices=("auto", "cpu"), decides=False)


def _mixed_precision() -> Any:
    return setting("no", "Compute in half precision (accelerate).", choices=("no", "bf16", "fp16"))


def _threads() -> Any:
    return setting(
        0,
        "CPU threads. By default one for every 1e9 multiply-adds of a step's forward pass, up to "
        "one per core: small models train as fast with 1, and leave the machine to others.",
        shown="by a step's work",
        decides=False,
    )


class _Checked:
    """A config whose settings are looked at once, when it is made."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class CompressConfig(_Checked):
    """PELA (arXiv 2310.10700): low-rank factors, then distillation from the dense model."""

    ratio: float = setting(2.0, "Compression ratio: the parameters of layers fall by it.", low=1.0)
    start: str = setting(
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
        "model's own outputs (imitation); auto: by labels and model.",
        choices=("auto", "classification", "regression", "causal-lm", "imitation"),
    )
    epochs: int = setting(12, "Passes over the training data; 0 keeps the start.")
    lr: float = setting(1e-3, "Peak learning rate (AdamW, cosine).")
    warmup: float = setting(0.1, "Share of the steps in which the learning rate rises.", high=1.0)
    weight_decay: float = setting(0.01, "AdamW's weight decay.")
    batch_size: int = setting(64, "Samples a step.", low=1)
    accumulate: int = _accumulate()
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
    device: str = _device()
    mixed_precision: str = _mixed_precision()
    threads: int = _threads()
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


@dataclass(frozen=True)
class AdaptConfig(_Checked):
    """Training of adapters. What belongs to a method alone is in `method_settings`."""

    targets: Sequence[str] = targets_setting()
    method: str = setting(
        "nola",
        "Adapter method; bitfit (biases) and head (nothing but a head) are the brackets below.",
        choices=("nola", "vera", "fourierft", "lora", "ia3", "ssf", "bitfit", "head"),
    )
    storage: str = setting(
        "int4",
        "How coefficients are stored.",
        choices=("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    )
    group: int = setting(
        0, "Coefficients that share a scale; 0 gives every vector one.", shown="a vector's"
    )
    head: str = setting(
        "auto",
        "keep the backbone's head, train a new one, tune a copy of the backbone's, or decide by "
        "the labels.",
        choices=("auto", "keep", "new", "tune"),
    )
    task: str = setting(
        "auto",
        "What is learnt; by default what labels and model mean.",
        choices=("auto", "classification", "regression", "causal-lm", "metric", "distillation"),
    )
    steps: int = setting(180, "Training steps.", low=1)
    lr: float = setting(
        0.0, "Peak learning rate (Adam, cosine); see docs/tuning.md.", shown="the method's own"
    )
    head_lr: float = setting(0.005, "Peak learning rate of a head.")
    batch_size: int = setting(64, "Samples a step.", low=1)
    accumulate: int = _accumulate()
    label_smoothing: float = setting(0.05, "Label smoothing.", high=1.0)
    shift: float = setting(0.6, "Augmentation: shift images by up to this many pixels.")
    noise: float = setting(0.15, "Augmentation: standard deviation of noise on images.")
    holdout: float = setting(
        0.2,
        "Share of the data held back to judge the adapter by; where that are fewer than 50 "
        "samples, each is held back in one of five folds. 0 judges nothing.",
    )
    validation: float = setting(
        0.2, "With --patience: share of the training samples to stop early on."
    )
    patience: int = setting(
        0, "Stop after so many evaluations without a better one, and keep the best; 0: never."
    )
    eval_every: int = setting(20, "With --patience: steps between evaluations.", low=1)
    precision: str = setting(
        "fp32",
        "Train on the backbone as it will be deployed: weights rounded as export rounds them.",
        choices=("fp32", "fp16", "int8", "int4"),
    )
    device: str = _device()
    mixed_precision: str = _mixed_precision()
    threads: int = _threads()
    users_at_once: int = setting(
        0, "With --users: users trained in one pass.", shown="as many as suit the machine"
    )
    seed: int = setting(0, "Seed of the basis and of training.")
    method_settings: Mapping[str, Any] = setting(
        dict,
        f"A setting of the method; repeatable. {_METHOD_SETTINGS} (these are the defaults).",
        option="--set",
        metavar="NAME=VALUE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed:
            from regrow_format.philox import check_seed  # not above: it loads numpy

            check_seed(self.seed)
        if self.group:
            _check_group(self.group, self.storage)
        if self.method == "head" and self.head == "keep":
            raise _refusal("{head} must be auto, new or tune for {method} head, got keep")


@dataclass(frozen=True)
class ImportConfig(_Checked):
    """Bringing in an adapter that another library trained."""

    storage: str = setting(
        "fp32",
        "How coefficients are stored; fp32 keeps every number.",
        choices=("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    )
    base_dtype: str = setting(
        "float32",
        "What the base was loaded in when VeRA was trained without saving its projections.",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class ProfileConfig(_Checked):
    """What to measure of a bundle, and for how long. Lists have commas between."""

    batch: str = setting("1", "Batch sizes, such as 1,4.")
    length: str = setting(
        "", "Sequence lengths, such as 16,197; by default that of the bundle's probe."
    )
    threads: str = setting("", "Thread counts, such as 1,2; by default one per core.")
    runs: int = setting(100, "Runs of each case at least.", low=1)
    seconds: float = setting(2.0, "Seconds of each case at least.")
    rounds: int = setting(5, "Fresh processes that share the runs of each case.", low=1)
    residents: str = setting("1,10,100,1000", "Numbers of adapters, installed and resident.")
    tokens: int = setting(16, "Language models: tokens to decode.", low=1)
    sustained: str = setting("", "Run without a pause for so long, such as 10m; p99 over time.")
    memory_limit: str = setting("", "Does it fit in so much private memory, such as 128MB?")
    profile: str = setting(
        "speed", "What the bundle is to save: time, or RAM.", choices=("speed", "memory")
    )


def _check_group(group: int, storage: str) -> None:
    from regrow_format.adapter import STORAGE  # not above: it loads numpy

    if group < 8 or STORAGE[storage] > 8:
        raise _refusal(
            "{group} must be 0, or 8 or more with a {storage} of 8 bits or fewer, got {0} with {1}",
            group,
            storage,
        )


def _refusal(text: str, *values: object) -> Exception:
    from regrow_format.errors import SettingError  # not above: it loads numpy

    return SettingError(text, *values)
