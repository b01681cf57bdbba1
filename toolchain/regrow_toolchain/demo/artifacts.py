"""The demo's settings, and what its steps leave for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regrow_format.adapter import Adapter
from regrow_toolchain.compress import Compressed
from regrow_toolchain.config import AdaptConfig, CompressConfig
from regrow_toolchain.models import Backbone

from .dense_model import DenseRecipe
from .digits import Digits

__all__ = ["DemoSettings", "Made"]

_LR = 5e-2  # above the default: the inverted user is far from what the backbone knows


@dataclass(frozen=True)
class DemoSettings:
    """Every number of the demo that is not the library's default."""

    seed: int = 0
    dense: DenseRecipe = field(default_factory=DenseRecipe)
    compress: CompressConfig = field(default_factory=CompressConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)

    @classmethod
    def with_seed(cls, seed: int) -> DemoSettings:
        """The demo as it is run, with another seed."""
        compress = CompressConfig(
            seed=seed,
            epochs=14,
            lr=2e-3,
            shift=0.8,
            noise=0.05,
            init="svd",
            alpha=100.0,
            features="paper",
            keep="last",  # what is held back here are the test digits: nothing is chosen on them
        )
        return cls(seed=seed, compress=compress, adapt=AdaptConfig(seed=seed, holdout=0.0, lr=_LR))


@dataclass
class Made:
    """What the steps leave for the report; seconds are by step."""

    settings: DemoSettings
    folder: Path
    out: Path
    digits: Digits
    compressed: Compressed | None = None
    dense: Backbone | None = None
    backbone: Backbone | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    samples: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(
        default_factory=dict
    )
    seconds: dict[str, float] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
