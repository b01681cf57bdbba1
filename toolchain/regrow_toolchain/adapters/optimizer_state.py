"""Trainable parameters and Adam's moments of them, for a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regrow_toolchain.training import State

__all__ = ["optimizer_state", "restore_optimizer"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def optimizer_state(parameters: Mapping[str, Tensor], optimizer: Any) -> State:
    """Every parameter's value, and its moments once it has had a gradient."""
    state = {f"value.{name}": value for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, moment in optimizer.state[value].items():
            state[f"adam.{key}.{name}"] = moment
    return state


def restore_optimizer(
    parameters: Mapping[str, Tensor], optimizer: Any, state: State, device: torch.device
) -> None:
    """Put back what `optimizer_state` gave."""
    for name, value in parameters.items():
        with torch.no_grad():
            value.copy_(state[f"value.{name}"])
        moments = {
            key: _moment(key, state[f"adam.{key}.{name}"], device)
            for key in _MOMENTS
            if f"adam.{key}.{name}" in state
        }
        if moments:  # none for what has had no gradient yet
            optimizer.state[value] = moments


def _moment(key: str, value: Tensor, device: torch.device) -> Tensor:
    return value if key == "step" else value.to(device)  # Adam keeps its step on the CPU
