"""From a dense model to its factored copy: which layers, which ranks, which factors."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import (
    Plan,
    apply_plan,
    empty_pair,
    example_inputs,
    finite_weight,
    quiet_if_loaded,
)
from regrow_toolchain.training import progress, trimmed

from .calibration import calibrated, tokens_of
from .decomposition import Spectrum
from .kernel_timing import timed
from .layer_selection import LayerPlan, plan_layers, plans_of
from .layer_times import LayerTimes, Shape, Timer
from .rank_allocation import Cost, allocate, candidates

__all__ = ["Factored", "factor", "one_sample", "restored", "tokens_by_layer"]

_NO_TOKENS = 128  # where nothing says how many tokens a layer gets


@dataclass(frozen=True, eq=False)
class Factored:
    """A factored copy of a model, not trained yet.

    Attributes:
        layers: every linear layer, as it became.
        plans: those that are factored.
        lost: by layer, the share of the energy that its start left out.
        samples: how many the start looked at; 0 for the weights' own SVD.
    """

    model: nn.Module
    layers: tuple[LayerPlan, ...]
    plans: tuple[Plan, ...]
    lost: Mapping[str, float]
    samples: int

    def as_tensor(self) -> torch.Tensor:
        """What `restored` takes, as JSON in uint8: for a checkpoint."""
        rows = {layer.name: [layer.rank, layer.skip_reason] for layer in self.layers}
        text = json.dumps({"layers": rows, "lost": dict(self.lost), "samples": self.samples})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)


def restored(model: nn.Module, stored: torch.Tensor, config: CompressConfig) -> Factored:
    """A factored copy with the ranks of an earlier one; its factors hold no useful numbers."""
    known = json.loads(bytes(stored.tolist()))
    found = plan_layers(model, config.ratio, only=config.only, keep_dense=config.keep_dense)
    layers = tuple(
        replace(
            layer, rank=known["layers"][layer.name][0], skip_reason=known["layers"][layer.name][1]
        )
        for layer in found
    )
    student, plans = copy.deepcopy(model), plans_of(layers)
    pairs = {plan.name: empty_pair(model.get_submodule(plan.name), plan.rank) for plan in plans}
    apply_plan(student, plans, pairs=pairs)
    return Factored(student, layers, plans, known["lost"], known["samples"])


def factor(
    model: nn.Module, data: Dataset | None, config: CompressConfig, *, timer: Timer = timed
) -> Factored:
    """Factor a copy of the model as the config says.

    Args:
        timer: where times decide, what measures them.

    Raises:
        UsageError: the ratio or a pattern makes no sense, or what a setting needs is missing.
        RegrowError: weights are not finite, or there is nothing to factor.
    """
    layers = plan_layers(model, config.ratio, only=config.only, keep_dense=config.keep_dense)
    for plan in plans_of(layers):
        finite_weight(model.get_submodule(plan.name), plan.name)
    start, times = _start(config, data), LayerTimes(config.precision, timer)
    if config.ranks == "kernels":
        sample = one_sample(data) if data is not None else {}
        layers = _suited(model, layers, sample, config, times)
    if start == "svd":
        return _plainly(model, data, layers, config, times)
    assert data is not None
    wanted = [layer for layer in layers if layer.rank]
    with progress("look at samples", len(wanted)) as advance:
        spectra = calibrated(
            model, wanted, data, samples=config.calibration, seed=config.seed,
            gradients=start == "outputs", advance=advance,
        )  # fmt: skip
    layers = tuple(
        layer.kept_dense("no sample reaches it")
        if layer.rank and layer.name not in spectra
        else layer
        for layer in layers
    )
    if config.ranks == "global" or (config.ranks == "auto" and start == "outputs"):
        layers = _ranked(model, layers, spectra, one_sample(data), config, times)
    layers = _fast(model, layers, one_sample(data), config, times)
    return _built(model, layers, spectra, min(config.calibration, len(data)))


def _start(config: CompressConfig, data: Dataset | None) -> str:
    start = config.init
    if start == "auto":
        start = "svd" if data is None else "outputs"
    if start != "svd" and data is None:
        raise UsageError(f"data must be given for init {start}, got none")
    if start == "svd" and config.ranks == "global":
        raise UsageError(
            "ranks must be paper or kernels for init svd, got global: for one budget, give --data "
            "and --init outputs or activations"
        )
    return start


def _plainly(
    model: nn.Module,
    data: Dataset | None,
    layers: tuple[LayerPlan, ...],
    config: CompressConfig,
    times: LayerTimes,
) -> Factored:
    if config.slow_layers == "dense":
        layers = _fast(model, layers, one_sample(data) if data else {}, config, times)
    student = copy.deepcopy(model)
    plans = plans_of(layers)
    apply_plan(student, plans)
    return Factored(student, layers, plans, {}, 0)


def _built(
    model: nn.Module, layers: tuple[LayerPlan, ...], spectra: Mapping[str, Spectrum], samples: int
) -> Factored:
    student = copy.deepcopy(model)
    plans = plans_of(layers)
    pairs = {
        plan.name: spectra[plan.name].pair(model.get_submodule(plan.name), plan.rank)
        for plan in plans
    }
    apply_plan(student, plans, pairs=pairs)
    lost = {plan.name: spectra[plan.name].lost(plan.rank) for plan in plans}
    return Factored(student, layers, plans, lost, samples)


# -- ranks -----------------------------------------------------------------------------------------


def _ranked(
    model: nn.Module,
    layers: tuple[LayerPlan, ...],
    spectra: Mapping[str, Spectrum],
    sample: Mapping[str, torch.Tensor],
    config: CompressConfig,
    times: LayerTimes,
) -> tuple[LayerPlan, ...]:
    """One budget for all: what the paper's ranks would take of it."""
    free = [layer for layer in layers if layer.rank]
    tokens = tokens_by_layer(model, free, sample)
    cost = _cost(config, tokens, times)
    if config.budget == "time":
        _check_timed(free)
        for layer in free:
            ends = (layer.in_features, layer.out_features)
            times.measure(*ends, tokens[layer.name], candidates(layer, config.multiple))
        budget = sum(cost(layer, 0) for layer in free) / config.ratio
    else:
        budget = sum(cost(layer, layer.rank) for layer in free)
    ranks = allocate(free, spectra, cost, budget, multiple=config.multiple)
    return tuple(_with_rank(layer, ranks.get(layer.name)) for layer in layers)


def _check_timed(layers: Sequence[LayerPlan]) -> None:
    """Raise `UsageError` for a layer whose time is not measured."""
    if other := next((layer.name for layer in layers if not layer.is_timed), None):
        raise UsageError(
            f"budget must be parameters or macs where a convolution is factored, got time and "
            f"{other}, of which no time is measured; or keep it dense (--keep-dense)"
        )


def _suited(
    model: nn.Module,
    layers: tuple[LayerPlan, ...],
    sample: Mapping[str, torch.Tensor],
    config: CompressConfig,
    times: LayerTimes,
) -> tuple[LayerPlan, ...]:
    """Ranks near the paper's that are computed faster; convolutions keep the paper's."""
    free = [layer for layer in layers if layer.rank and layer.is_timed]
    if not free:
        return layers
    tokens = tokens_by_layer(model, free, sample)

    def shape(layer: LayerPlan) -> Shape:
        return _shape(layer, tokens)

    ranks = times.suited_ranks(Counter(map(shape, free)), config.multiple)
    return tuple(
        replace(layer, rank=ranks[shape(layer)]) if layer.rank and layer.is_timed else layer
        for layer in layers
    )


def _with_rank(layer: LayerPlan, rank: int | None) -> LayerPlan:
    if rank is None:
        return layer
    return replace(layer, rank=rank) if rank else layer.kept_dense("worth its cost")


def _shape(layer: LayerPlan, tokens: Mapping[str, int]) -> Shape:
    return (layer.in_features, layer.out_features, layer.rank, tokens[layer.name])


def _cost(config: CompressConfig, tokens: Mapping[str, int], times: LayerTimes) -> Cost:
    def parameters(layer: LayerPlan, rank: int) -> float:
        wide, high = layer.in_features, layer.out_features
        return rank * (wide + high) if rank else wide * high

    def macs(layer: LayerPlan, rank: int) -> float:
        return tokens[layer.name] * parameters(layer, rank)

    def milliseconds(layer: LayerPlan, rank: int) -> float:
        ends = (layer.in_features, layer.out_features)
        return times.milliseconds(*ends, rank, tokens[layer.name])

    return {"parameters": parameters, "macs": macs, "time": milliseconds}[config.budget]


def _fast(
    model: nn.Module,
    layers: tuple[LayerPlan, ...],
    sample: Mapping[str, torch.Tensor],
    config: CompressConfig,
    times: LayerTimes,
) -> tuple[LayerPlan, ...]:
    """Layers whose factors would be no faster stay dense, unless that is not wanted.

    Of convolutions no time is measured: they are factored.
    """
    if config.slow_layers == "factor":
        return layers
    free = [layer for layer in layers if layer.rank and layer.is_timed]
    tokens = tokens_by_layer(model, free, sample)
    slow = times.slower(_shape(layer, tokens) for layer in free)
    return tuple(
        layer.kept_dense("factors are no faster")
        if layer.rank and layer.is_timed and _shape(layer, tokens) in slow
        else layer
        for layer in layers
    )


# -- samples ---------------------------------------------------------------------------------------


def one_sample(data: Dataset) -> dict[str, torch.Tensor]:
    """The inputs of the first sample, without padding."""
    return trimmed({name: torch.from_numpy(array[:1]) for name, array in data.inputs.items()})


def tokens_by_layer(
    model: nn.Module, layers: Sequence[LayerPlan], sample: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """How many tokens of one sample each layer gets; of a made-up one where none is given."""
    names = [layer.name for layer in layers]
    inputs = dict(sample)
    if not inputs:
        inputs = {name: torch.zeros_like(x, device="cpu") for name, x in
                  example_inputs(model).items()}  # fmt: skip
    if not inputs:
        return dict.fromkeys(names, _NO_TOKENS)
    try:
        with quiet_if_loaded():
            found = tokens_of(model, names, inputs)
    except RegrowError:
        if sample:
            raise
        return dict.fromkeys(names, _NO_TOKENS)  # it takes more than what was made up
    return {name: count or _NO_TOKENS for name, count in found.items()}
