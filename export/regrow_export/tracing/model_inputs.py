"""Inputs to trace and check a model with, where optimum's would not reach all of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.kv_cache import positions

__all__ = ["completed", "dummy_inputs"]

# Their output is what the first end-of-text token sees; without one, what the first token sees.
_POOLED_AT_END = ("clip_text_model", "clipseg_text_model", "owlvit_text_model", "owlv2_text_model")
_LEGACY_EOS = 2  # with this id in its config, CLIP takes the largest id of a text for its end

Arrays = Mapping[str, NDArray[Any]]


def dummy_inputs(config: Any, model: Any, batch: int) -> dict[str, NDArray[Any]]:
    """optimum's dummy inputs, the same at every call; the caller's random state stays.

    Masks that optimum draws leave as few as no tokens: here the last sample alone has padding, a
    quarter of it, on the right. Texts of CLIP end with the token at which it looks.
    """
    import torch

    state = random.getstate()
    try:
        random.seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = config.generate_dummy_inputs(framework="pt", batch_size=batch)
            made = config.rename_ambiguous_inputs(made)
    finally:
        random.setstate(state)
    found = {n: value.numpy() for n, value in made.items() if isinstance(value, torch.Tensor)}
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    if ids is not None and mask is not None and ids.shape == mask.shape:
        mask[:] = 1
        mask[-1, len(mask[-1]) - len(mask[-1]) // 4 :] = 0
    if ids is not None and (eos := _end_of_text(model)) is not None:
        ids[ids == eos] = 0
        ids[:, -1] = eos
        if mask is not None:
            mask[:] = 1
    return found


def _end_of_text(model: Any) -> int | None:
    config = getattr(model.config, "text_config", model.config)
    if getattr(config, "model_type", "") not in _POOLED_AT_END:
        return None
    eos = config.eos_token_id
    return int(config.vocab_size) - 1 if eos == _LEGACY_EOS else int(eos)


def completed(inputs: Arrays, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Given `inputs` with a mask of ones and positions by the mask, if they lack and are wanted."""
    found = dict(inputs)
    if (ids := found.get("input_ids")) is not None and ids.ndim == 2:
        if "attention_mask" in wanted:
            found.setdefault("attention_mask", np.ones_like(ids))
        if "position_ids" in wanted:
            mask = found.get("attention_mask", np.ones_like(ids))
            found.setdefault("position_ids", positions(mask))
    return found
