"""A causal language model's key-value cache: the graph inputs and outputs that it passes through.

The same graph computes a prompt (a past of length 0) and every token after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .fields import Fields
from .record import Record

__all__ = ["CacheSpec", "CacheTensor", "parse_cache"]

_NEEDED = {"input_ids", "attention_mask"}
_INPUTS = _NEEDED | {"position_ids"}
_MAX_SIZE = 1 << 24


class CacheTensor(Record):
    """Keys or values of a layer: graph input `past` [batch, heads, past length, head_dim], and
    graph output `present` [batch, heads, past length + length, head_dim].
    """

    past: str
    present: str
    heads: int
    head_dim: int


class CacheSpec(Record):
    """What the manifest says of the cache.

    Attributes:
        inputs: graph input by role: "input_ids" [batch, length], "attention_mask" [batch, past
            length + length], and "position_ids" [batch, length] if the graph takes them; int64.
        logits: the graph output [batch, length, vocabulary].
        tensors: layer by layer, keys first.
        dtype: theirs.
        context: how many tokens the model takes, if it says so.
        stop: ids of the tokens that end a text.
    """

    inputs: Mapping[str, str]
    logits: str
    tensors: tuple[CacheTensor, ...]
    dtype: str = "float32"
    context: int | None = None
    stop: tuple[int, ...] = ()

    def empty(self, batch: int) -> dict[str, NDArray[Any]]:
        """The past of length 0, by graph input."""
        return {
            tensor.past: np.zeros((batch, tensor.heads, 0, tensor.head_dim), dtype=self.dtype)
            for tensor in self.tensors
        }

    def filled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs without a past, with a mask of ones and positions by the mask where they lack."""
        found = dict(inputs)
        if (ids := self.inputs["input_ids"]) in found:
            mask = found.setdefault(self.inputs["attention_mask"], np.ones_like(found[ids]))
            if "position_ids" in self.inputs and np.ndim(mask) == 2:
                found.setdefault(self.inputs["position_ids"], positions(np.asarray(mask)))
        return found

    def check_graph(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], file: str) -> None:
        """Raise `FormatError` unless an opened graph has the cache that the manifest names.

        Args:
            inputs: shape by name of the inputs that must be fed, slots not among them.
            outputs: shape by name.
        """
        pasts = {t.past: t for t in self.tensors}
        named = {*pasts, *self.inputs.values()}
        odd = [f"{name} is no input of the graph" for name in named - inputs.keys()]
        odd += [f"{name} is not in the manifest" for name in inputs.keys() - named]
        odd += [f"{t.present} is no output" for t in self.tensors if t.present not in outputs]
        odd += [
            f"{name} is {inputs[name]}, not of {t.heads} heads of {t.head_dim}"
            for name, t in pasts.items()
            if name in inputs and inputs[name][1::2] != [t.heads, t.head_dim]
        ]
        if odd:
            raise FormatError(
                f"{file} must have the manifest's key-value cache, got another: "
                f"{'; '.join(sorted(odd)[:3])}"
            )


def positions(mask: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [batch, length]: a token's place among those that the mask counts; 0 for padding."""
    found: NDArray[np.int64] = np.maximum(np.cumsum(mask != 0, axis=1, dtype=np.int64) - 1, 0)
    return found


def parse_cache(part: Fields, inputs: Iterable[str], outputs: Iterable[str]) -> CacheSpec:
    """Read and check the manifest's `cache`.

    Args:
        inputs, outputs: names that the graph's entry in the manifest has.
    """
    roles = part.take("inputs", dict)
    spec = CacheSpec(
        inputs=roles,
        logits=part.take("logits", str),
        tensors=tuple(_tensor(item) for item in part.objects("tensors")),
        dtype=part.choice("dtype", ("float32", "float16")),
        context=part.number("context", 1, _MAX_SIZE) if part.has("context") else None,
        stop=tuple(part.take("stop", list, [])),
    )
    part.done()
    if not all(isinstance(name, str) for name in roles.values()) or sorted(roles.values()) != (
        sorted(inputs)
    ):
        raise FormatError(f"{part.where}: inputs must name each of {sorted(inputs)}, got {roles}")
    if not _NEEDED <= roles.keys() <= _INPUTS:
        raise FormatError(f"{part.where}: inputs must be {sorted(_INPUTS)}, got {sorted(roles)}")
    if spec.logits not in outputs:
        raise FormatError(f"{part.where}: logits must be an output, got {spec.logits!r:.80}")
    if not all(type(token) is int for token in spec.stop):
        raise FormatError(f"{part.where}: stop must be token ids, got {spec.stop!r:.80}")
    names = [name for t in spec.tensors for name in (t.past, t.present)]
    taken = {*inputs, *outputs}
    if not names or len(set(names)) < len(names) or taken.intersection(names):
        raise FormatError(f"{part.where}: tensors must have names of their own, got {names!r:.80}")
    return spec


def _tensor(part: Fields) -> CacheTensor:
    tensor = CacheTensor(
        past=part.take("past", str),
        present=part.take("present", str),
        heads=part.number("heads", 1, _MAX_SIZE),
        head_dim=part.number("head_dim", 1, _MAX_SIZE),
    )
    part.done()
    return tensor
