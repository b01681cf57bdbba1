"""Settings of `regrow adapt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow_export import setting, targets_setting
from regrow_toolchain.tasks import TASK_CHOICES

from .shared import Checked, accumulate, device, mixed_precision, threads

__all__ = ["AdaptConfig"]

_METHOD_SETTINGS = (
    "nola: k=64, l=64, rank=8, c=8.0, shared=true; vera: rank=64, d_initial=0.1; "
    "fourierft: n=128, alpha=64.0, init=zero, bias_frequency=0, bias_width=0; "
    "lora, dora: rank=4, alpha=4.0, rslora=false; ia3: feedforward=auto"
)


@dataclass(frozen=True)
class AdaptConfig(Checked):
    """Training of adapters. What belongs to a method alone is in `method_settings`."""

    targets: Sequence[str] = targets_setting()
    method: str = setting(
        "nola",
        "Adapter method; bitfit (biases) and head (nothing but a head) are the brackets below.",
        choices=("nola", "vera", "fourierft", "lora", "dora", "ia3", "ssf", "bitfit", "head"),
    )
    coefficient_dtype: str = setting(
        "int4",
        "How coefficients are stored.",
        choices=("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    )
    group_size: int = setting(
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
        choices=TASK_CHOICES,
    )
    steps: int = setting(180, "Training steps.", low=1)
    lr: float = setting(
        0.0, "Peak learning rate (Adam, cosine); see docs/tuning.md.", shown="the method's own"
    )
    head_lr: float = setting(0.005, "Peak learning rate of a head.")
    batch_size: int = setting(64, "Samples a step.", low=1)
    accumulate: int = accumulate()
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
    device: str = device()
    mixed_precision: str = mixed_precision()
    threads: int = threads()
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
        if self.group_size:
            _check_group(self.group_size, self.coefficient_dtype)
        if self.method == "head" and self.head == "keep":
            raise _refusal("{head} must be auto, new or tune for {method} head, got keep")


def _check_group(group_size: int, coefficient_dtype: str) -> None:
    from regrow_format.adapter import STORAGE  # not above: it loads numpy

    if group_size < 8 or STORAGE[coefficient_dtype] > 8:
        raise _refusal(
            "{group_size} must be 0, or 8 or more with a {coefficient_dtype} of 8 bits or fewer, "
            "got {0} with {1}",
            group_size,
            coefficient_dtype,
        )


def _refusal(text: str, *values: object) -> Exception:
    from regrow_format.errors import SettingError  # not above: it loads numpy

    return SettingError(text, *values)
