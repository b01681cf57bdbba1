"""The key-value cache of a causal language model, in a traced graph, and running it by steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from regrow_export.graph import specs
from regrow_format.errors import RegrowError
from regrow_format.kv_cache import CacheSpec, CacheTensor, positions

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cache_names", "cache_of", "decoded", "padded_inputs"]

_PAST, _PRESENT = "past_key_values", "present"
_ROLES = ("input_ids", "attention_mask", "position_ids")

Arrays = Mapping[str, NDArray[Any]]


def cache_of(graph: onnx.ModelProto, model: nn.Module) -> CacheSpec:
    """The cache of a graph that optimum traced with one; names are optimum's.

    Raises:
        RegrowError: it is not [batch, heads, length, head_dim] by layer, keys and values.
    """
    outputs = {spec.name: spec for spec in specs(graph.graph.output)}
    inputs = {spec.name: spec for spec in specs(graph.graph.input)}
    tensors, kinds = [], set()
    for name, past in inputs.items():
        if not name.startswith(f"{_PAST}."):
            continue
        present = outputs.get(_PRESENT + name.removeprefix(_PAST))
        match past.shape:
            case (str(), int(heads), str(), int(head_dim)) if present and head_dim:
                tensors.append(CacheTensor(name, present.name, heads, head_dim))
                kinds.add(past.dtype)
            case _:
                raise _no_cache(f"{name} {list(past.shape)}")
    roles = {role: role for role in _ROLES if role in inputs}
    if not tensors or len(kinds) != 1 or "attention_mask" not in roles:
        raise _no_cache(f"inputs {', '.join(inputs)}")
    return CacheSpec(roles, "logits", tuple(tensors), kinds.pop(), _context(model), _stop(model))


def _no_cache(found: str) -> RegrowError:
    return RegrowError(
        "a key-value cache must be keys and values [batch, heads, length, head_dim] by layer and "
        f"an attention mask, got {found}: export it with --no-cache"
    )


def cache_names(cache: CacheSpec | None) -> set[str]:
    """Names of the graph's inputs and outputs that are the cache."""
    return {name for t in (cache.tensors if cache else ()) for name in (t.past, t.present)}


def _context(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _stop(model: nn.Module) -> tuple[int, ...]:
    """Ids that end a text, as `generation_config.json` has them, or else the model's config."""
    for part in ("generation_config", "config"):
        found = getattr(getattr(model, part, None), "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def padded_inputs(cache: CacheSpec, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """`inputs` as a batch of prompts, the first padded on the left by a third of its tokens."""
    ids = inputs[cache.inputs["input_ids"]]
    mask = np.ones_like(ids)
    mask[0, : mask.shape[1] // 3] = 0
    roles = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    return {name: roles[role] for role, name in cache.inputs.items()}


def decoded(cache: CacheSpec, inputs: Arrays, run: Callable[[Arrays], Arrays]) -> NDArray[Any]:
    """Logits by a prompt of half the tokens, then one token, then the rest, through the cache.

    Args:
        run: from a graph's inputs to its outputs, those of the cache included.
    """
    names = cache.inputs
    ids = inputs[names["input_ids"]]
    past: dict[str, NDArray[Any]] = cache.empty(len(ids))
    length, parts = ids.shape[1], []
    half = max(length // 2, 1)
    for start, stop in ((0, half), (half, half + 1), (half + 1, length)):
        if start >= length or start == stop:
            continue
        fed = {name: inputs[name][:, start:stop] for name in names.values()}
        fed[names["attention_mask"]] = inputs[names["attention_mask"]][:, :stop]
        found = run({**fed, **past})
        parts.append(found[cache.logits])
        past = {tensor.past: found[tensor.present] for tensor in cache.tensors}
    return np.concatenate(parts, axis=1)
