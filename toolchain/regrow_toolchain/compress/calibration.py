"""What flows through a model's layers on a few hundred samples: second moments, and widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow_export.layers import LayerType, layer_type
from regrow_format.errors import UsageError
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import outputs_of
from regrow_toolchain.training import trimmed

from .decomposition import Moments, Spectrum, decompose
from .layer_selection import LayerPlan

__all__ = ["calibrated", "first_tensor", "tokens_of"]

_LEAST = 2  # samples
_BATCH = 16
_ROOM = 1 << 30  # bytes of moments at a time

Inputs = dict[str, Tensor]


def calibrated(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    data: Dataset,
    *,
    samples: int,
    seed: int,
    gradients: bool = True,
    advance: Callable[[str], None] = lambda _note: None,
) -> dict[str, Spectrum]:
    """By name, the spectra of layers under the moments of `samples` samples.

    A layer that no sample reaches has none. Moments take in² + out² numbers a layer; a large model
    is gone through in several passes.

    Args:
        data: labels are not used; padding, as `attention_mask` has it, does not count.
        gradients: weigh outputs by what they do to the model's own, see `spectrum`.

    Raises:
        UsageError: there are too few samples.
        RegrowError: a weight, or what flows, is not finite.
    """
    count = min(samples, len(data))
    if count < _LEAST:
        raise UsageError(
            f"calibration must have {_LEAST} samples or more, got {count}: give more data, or "
            "--init svd"
        )
    rows = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(data))[:count])
    chosen = data.take(rows)
    found: dict[str, Spectrum] = {}
    for group in _groups(layers):
        moments = _Moments(model, [layer.name for layer in group], gradients)
        for name, both in moments.of(chosen, seed).items():
            found[name] = decompose(model.get_submodule(name), name, both)
            advance(name)
    return found


def _groups(layers: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers whose moments fit in RAM together."""
    group: list[LayerPlan] = []
    used = 0
    for layer in layers:
        size = 8 * (layer.in_features**2 + layer.out_features**2)
        if group and used + size > _ROOM:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


@dataclass(frozen=True)
class _Features:
    """Where a layer's inputs and outputs have their features."""

    module: nn.Module
    kind: LayerType

    @classmethod
    def of(cls, module: nn.Module) -> _Features:
        """Those of a layer that can be factored."""
        kind = layer_type(module)
        if kind is None:
            raise TypeError(f"layer must be of a known type, got {type(module).__name__}")
        return cls(module, kind)

    def last(self, value: Tensor) -> Tensor:
        """[..., features]."""
        return self.kind.features_last(self.module, value)

    def seen(self, x: Tensor) -> Tensor:
        """[..., in], the inputs that are multiplied."""
        return self.last(self.kind.seen(self.module, x))


class _Moments:
    """Sums over tokens, taken by hooks while samples run."""

    def __init__(self, model: nn.Module, names: Sequence[str], gradients: bool) -> None:
        self.model, self.names, self.gradients = model, names, gradients
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._mask: Tensor | None = None
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)
        self._zero = torch.zeros((), requires_grad=True)

    def of(self, data: Dataset, seed: int) -> dict[str, Moments]:
        """Means over the samples."""
        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)
            hook = self._hook(name, _Features.of(module))
            handles.append(module.register_forward_hook(hook))
        try:
            generator = torch.Generator().manual_seed(seed % 2**63)
            for start in range(0, len(data), _BATCH):
                self._run(data.take(np.arange(start, min(start + _BATCH, len(data)))), generator)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: Moments(
                self.inputs[name] / self.counts[name],
                self.outputs[name] / self.counts[name] if name in self.outputs else None,
            )
            for name in self.names
            if name in self.inputs
        }

    def _run(self, part: Dataset, generator: torch.Generator) -> None:
        """One batch; backwards from random weights of the outputs, whose mean square is theirs."""
        inputs = trimmed({name: torch.from_numpy(array) for name, array in part.inputs.items()})
        self._mask = inputs.get("attention_mask")
        with torch.set_grad_enabled(self.gradients):
            output = first_tensor(outputs_of(self.model, inputs))
            if not (self.gradients and output.requires_grad):
                return
            weights = torch.randn(output.shape, generator=generator)
            counted = self._counted(output)
            if counted is not None:
                weights = weights * counted.unsqueeze(-1)
            (output * weights).sum().backward()  # type: ignore[no-untyped-call]

    def _counted(self, x: Tensor) -> Tensor | None:
        """Which tokens of x [batch, tokens, ...] are no padding; None if all."""
        mask = self._mask
        fits = mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]
        return mask.bool() if mask is not None and fits else None

    def _rows(self, x: Tensor) -> Tensor:
        """float64 [tokens, width]."""
        counted = self._counted(x)
        rows = x[counted] if counted is not None else x.flatten(0, -2)
        return rows.detach().double()

    def _hook(self, name: str, features: _Features) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            rows, product = self._product(features.seen(args[0]))
            self.inputs[name] = self.inputs.get(name, 0) + product
            self.counts[name] = self.counts.get(name, 0) + rows
            if not self.gradients:
                return None
            output = output + self._zero  # so that gradients flow though no weight has any
            hooked: Any = output
            hooked.register_hook(lambda gradient: self._add(name, features.last(gradient)))
            return output

        return hook

    def _product(self, x: Tensor) -> tuple[int, Tensor]:
        """Query, key and value have one input: its product is formed once."""
        if self._last[0] is not x:
            rows = self._rows(x)
            self._last = (x, rows.T @ rows)
            self._count = len(rows)
        product = self._last[1]
        assert product is not None
        return self._count, product

    def _add(self, name: str, gradient: Tensor) -> None:
        rows = self._rows(gradient)
        self.outputs[name] = self.outputs.get(name, 0) + rows.T @ rows


def first_tensor(result: Any) -> Tensor:
    """The first floating-point tensor that a model gives: logits, embeddings, or tokens."""
    if isinstance(result, Tensor):
        return result
    parts = result.values() if isinstance(result, Mapping) else result
    return next(p for p in parts if isinstance(p, Tensor) and p.is_floating_point())


@torch.no_grad()
def tokens_of(model: nn.Module, names: Sequence[str], inputs: Inputs) -> dict[str, int]:
    """How many tokens of one forward pass each layer multiplies; 0 where none reach it."""
    found = dict.fromkeys(names, 0)

    def counter(name: str) -> Callable[..., None]:
        features = _Features.of(model.get_submodule(name))

        def count(_module: nn.Module, args: Any, _output: Any) -> None:
            seen = features.seen(args[0])
            found[name] += seen.numel() // seen.shape[-1]

        return count

    handles = [model.get_submodule(n).register_forward_hook(counter(n)) for n in names]
    try:
        outputs_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
