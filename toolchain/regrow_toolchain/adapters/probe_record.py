"""What an adapter's file keeps of a model's output; needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Probe

__all__ = ["probe_of"]

_NUMBERS = 32  # the format takes up to 64
# ONNX Runtime and torch differ by 1e-3 of a number and 1e-4 at most, or an export fails; fp16
# rounds by another 5e-4 of the largest.
_RTOL, _ATOL = 2e-3, 1e-4


def probe_of(output: NDArray[Any], known: str) -> Probe | None:
    """The last numbers of an output of one sample; None if fp16 cannot hold them.

    The last ones, since the first token of a language model sees none but itself.

    Args:
        known: fingerprint of the input.
    """
    with np.errstate(over="ignore"):
        expected = output.reshape(-1)[-_NUMBERS:].astype(np.float16)
    if not expected.size or not np.isfinite(expected).all():
        return None
    size = float(np.abs(expected.astype(np.float64)).max())
    return Probe(expected, float(f"{_ATOL + _RTOL * size:.2g}"), known)
