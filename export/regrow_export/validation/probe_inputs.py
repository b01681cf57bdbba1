"""The probe: made inputs that training, export and device share, and what a model gives for them.

They follow from the model alone, so an adapter can carry outputs for them before there is a bundle.
`docs/bundle-format.md` has the definition.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_export.tracing import inputs_by_name
from regrow_format.philox import philox4x32

__all__ = ["MOST", "completed", "fingerprint", "first_output", "standard_inputs"]

Arrays = Mapping[str, NDArray[Any]]
Made = dict[str, NDArray[Any]]

ROWS = 2
_ROLE = 6  # of the streams in docs/basis.md
MOST = 64  # numbers of an adapter's probe that the format takes
_TOKENS, _SOUND = 16, 4000


def standard_inputs(model: nn.Module, like: Arrays | None = None) -> Made | None:
    """Two samples that follow from the model: what its config says, or else the form of `like`.

    Args:
        like: by argument name of `forward`, batch first; only names, dtypes and shapes are used.

    Returns:
        By argument name; None where neither says what the model takes.
    """
    shapes = _from_config(model)
    if shapes is None and like:
        shapes = {name: (value.dtype, value.shape[1:]) for name, value in like.items()}
    if shapes is None:
        return None
    bound = _vocabulary(model)
    return {
        name: _values(name, index, np.dtype(dtype), (ROWS, *shape), bound)
        for index, (name, (dtype, shape)) in enumerate(sorted(shapes.items()))
    }


def completed(standard: Arrays, others: Arrays) -> Made | None:
    """`standard` with what else a graph takes: masks of ones, and what models put in themselves.

    Args:
        others: inputs of the graph, batch first; of the batch and lengths of their own.

    Returns:
        In the graph's order; None if it takes something that has no such default.
    """
    rows = next(iter(standard.values())).shape[:2]
    made: Made = {}
    for name, value in others.items():
        if name in standard:
            made[name] = standard[name].astype(value.dtype)
        elif value.ndim == 2 and (default := _default(name, rows)) is not None:
            made[name] = default.astype(value.dtype)
        else:
            return None
    return made


def _default(name: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    if "mask" in name:
        return np.ones(shape)
    if name == "token_type_ids":
        return np.zeros(shape)
    return np.tile(np.arange(shape[1]), (shape[0], 1)) if name == "position_ids" else None


def _from_config(model: nn.Module) -> dict[str, tuple[Any, tuple[int, ...]]] | None:
    """Names, dtypes and shapes without the batch, of a Hugging Face model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return None
    known = inspect.signature(model.forward).parameters
    made: dict[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {
        "input_ids": lambda: (np.int64, (_TOKENS,)),
        "pixel_values": lambda: (np.float32, _picture(getattr(config, "vision_config", config))),
        "input_values": lambda: (np.float32, _sound(config)),
    }
    try:
        return {name: make() for name, make in made.items() if name in known} or None
    except (AttributeError, TypeError):  # a config that does not say it
        return None


def _picture(config: Any) -> tuple[int, ...]:
    size = config.image_size
    high, wide = (size, size) if isinstance(size, int) else size
    return int(config.num_channels), int(high), int(wide)


def _sound(config: Any) -> tuple[int, ...]:
    """A spectrogram's frames and bins, or samples of a wave."""
    if hasattr(config, "num_mel_bins"):
        return int(config.max_length), int(config.num_mel_bins)
    return (_SOUND,)


def _vocabulary(model: nn.Module) -> int:
    """Below what integers make sense: a language model's tokens, or any table's rows."""
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(size := getattr(part, "vocab_size", None), int):
            return size
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    return min(tables, default=2)


def _values(
    name: str, index: int, dtype: np.dtype[Any], shape: tuple[int, ...], bound: int
) -> NDArray[Any]:
    """Floats in [-1, 1), integers in [0, bound); masks are ones."""
    if dtype.kind == "b" or (dtype.kind in "iu" and "mask" in name):
        return np.ones(shape, dtype)
    count = int(np.prod(shape))
    words = philox4x32(np.arange(-(-count // 4)), index, _ROLE, 0, (0, 0)).reshape(-1)[:count]
    if dtype.kind == "f":
        return ((words >> 8) * 2.0**-23 - 1).astype(dtype).reshape(shape)
    return (
        (words.astype(np.uint64) * np.uint64(bound) >> np.uint64(32)).astype(dtype).reshape(shape)
    )


def fingerprint(standard: Arrays, output: str) -> str:
    """16 hex digits of the first sample's inputs and of the name of the output that is compared."""
    digest = hashlib.sha256()
    for name, value in sorted(standard.items()):
        row = np.ascontiguousarray(value[:1])
        digest.update(f"{name} {row.dtype} {list(row.shape)}\n".encode())
        digest.update(row.astype(row.dtype.newbyteorder("<")).tobytes())
    digest.update(output.encode())
    return digest.hexdigest()[:16]


def first_output(model: nn.Module, inputs: Arrays) -> tuple[str, NDArray[np.float32]] | None:
    """Name and values, flat, of a model's first output for the first sample; None if it fails."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    fed = {name: torch.tensor(value[:1]).to(device) for name, value in inputs.items()}
    try:
        with torch.inference_mode():
            name, value = next(iter(inputs_by_name(model(**fed)).items()))
    except Exception:  # models raise whatever comes up inside: there is no probe then
        return None
    found = value.float().cpu().numpy().reshape(-1)
    return (name, found) if found.size and np.isfinite(found).all() else None
