"""FourierFT in training (arXiv 2405.03003); see `regrow_format.methods.fourierft`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_format.adapter import Target
from regrow_format.basis import BasisSpec, locations
from regrow_format.errors import UsageError

from .base import Changes, TrainableAdapter, parse_settings

__all__ = ["Fourierft", "FourierftSettings", "biased_indices"]


@dataclass(frozen=True)
class FourierftSettings:
    """n coefficients a layer; scale alpha; init zero or paper (N(0, 1), delta W is not 0 then).

    bias_width W > 0 draws the places around the frequency bias_frequency f_c with the paper's
    eq. 5 (both in units of the grid's own frequencies) and stores them; 0 draws them uniformly
    from the seed.
    """

    n: int = 128
    alpha: float = 64.0
    init: str = "zero"
    bias_frequency: float = 0.0
    bias_width: float = 0.0


class Fourierft:
    """See `TrainableMethod`."""

    name = "fourierft"
    default_lr = 5e-2
    settings = FourierftSettings

    def init(
        self,
        targets: Sequence[Target],
        settings: Mapping[str, Any],
        seed: int,
        users: int = 1,
        *,
        model: nn.Module | None = None,
    ) -> TrainableAdapter:
        """c = 0: delta W is 0 and its gradient is not. `init=paper` starts at N(0, 1)."""
        parsed = parse_settings(FourierftSettings, settings, self.name, kept=("n", "alpha"))
        config = {name: parsed[name] for name in ("n", "alpha")}
        _check(parsed, targets)
        start = torch.zeros(len(targets), config["n"])
        if parsed["init"] == "paper":
            draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(start.shape))
            start = torch.from_numpy(draw.astype(np.float32))
        grids = sorted({(t.out_features, t.in_features) for t in targets})
        indices = {grid: _indices(parsed, grid, seed) for grid in grids}
        trained = _TrainedFourierft(self.name, config, targets, {"c": start}, users, indices)
        if parsed["bias_width"]:
            trained.basis = BasisSpec("stored", 1)
            trained.stored_basis = {
                f"places.{high}x{wide}": found.astype(np.uint32)
                for (high, wide), found in indices.items()
            }
        return trained


def _check(settings: Mapping[str, Any], targets: Sequence[Target]) -> None:
    if settings["init"] not in ("zero", "paper"):
        raise UsageError(f"fourierft's init must be zero or paper, got {settings['init']!r}")
    frequency, width = settings["bias_frequency"], settings["bias_width"]
    if not (0 <= frequency < math.inf and 0 <= width < math.inf):
        raise UsageError(
            "fourierft's bias_frequency and bias_width must be 0 or more, "
            f"got {frequency:g} and {width:g}"
        )
    if frequency and not width:
        raise UsageError(
            f"fourierft's bias_frequency must come with a bias_width, got {frequency:g} alone"
        )
    for target in targets:
        if settings["n"] > (grid := target.in_features * target.out_features):
            raise UsageError(
                f"n must be at most {grid}, the size of {target.name}, got {settings['n']}"
            )


def _indices(settings: Mapping[str, Any], grid: tuple[int, int], seed: int) -> NDArray[np.int64]:
    if not settings["bias_width"]:
        return locations(seed, settings["n"], *grid)
    frequency, width = settings["bias_frequency"], settings["bias_width"]
    return biased_indices(grid, settings["n"], frequency, width, seed)


def biased_indices(
    grid: tuple[int, int], count: int, frequency: float, width: float, seed: int
) -> NDArray[np.int64]:
    """Distinct places with weight exp(-((D^2 - f_c^2) / (D W))^2), eq. 5 of the paper.

    D is a place's distance to frequency 0 on the grid that repeats (the centre of the shifted
    spectrum). Drawn without repeats by the exponential race (Efraimidis and Spirakis 2006).

    Returns:
        int64 [count], places row * columns + column, in the order of the race.

    Raises:
        UsageError: fewer than `count` places have any weight.
    """
    rows, columns = (np.fft.fftfreq(size, 1 / size) for size in grid)
    distance = np.hypot(rows[:, None], columns[None, :]).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = (distance**2 - frequency**2) / (distance * width)
        # At D = 0 the formula has its limit: weight 1 if f_c is 0, else none.
        log_weight = np.where(distance > 0, -(ratio**2), 0.0 if frequency == 0 else -np.inf)
    draw = np.random.Generator(np.random.PCG64(seed)).standard_exponential(len(distance))
    key = log_weight - np.log(draw)
    if np.isfinite(key).sum() < count:
        raise UsageError(
            f"bias_width must leave {count} places on a grid of {grid[0]} x {grid[1]}, got "
            f"{width:g}: widen it or lower n"
        )
    order: NDArray[np.int64] = np.argsort(-key, kind="stable")[:count].astype(np.int64)
    return order


class _TrainedFourierft(TrainableAdapter):
    def __init__(self, *arguments: Any) -> None:
        *rest, indices = arguments
        super().__init__(*rest)
        self._grids: dict[tuple[int, int], list[int]] = {}
        for index, target in enumerate(self.targets):
            grid = (target.out_features, target.in_features)
            self._grids.setdefault(grid, []).append(index)
        for grid in self._grids:
            folded, weight = _folded(indices[grid], grid)
            self.register_buffer(f"places_{grid[0]}_{grid[1]}", torch.from_numpy(folded))
            self.register_buffer(f"weight_{grid[0]}_{grid[1]}", torch.from_numpy(weight))

    def changes(self) -> Changes:
        c = self.rows("c")
        found: Changes = {}
        for grid, group in self._grids.items():
            delta = self._deltas(c[:, group], grid)  # [users, targets, out, in]
            for position, index in enumerate(group):
                found[self.targets[index].name] = {"delta": {"D": delta[:, position].mT}}
        return found

    def _deltas(self, c: Tensor, grid: tuple[int, int]) -> Tensor:
        """Half-spectrum inverse: [users, targets, n] to [users, targets, out, in]."""
        high, wide = grid
        half = wide // 2 + 1
        index = self.get_buffer(f"places_{high}_{wide}")
        weight = self.get_buffer(f"weight_{high}_{wide}")
        spectrum = c.new_zeros(*c.shape[:2], high * half)
        spectrum = spectrum.index_add(2, index, c * weight).view(*c.shape[:2], high, half)
        halves = torch.complex(spectrum, torch.zeros_like(spectrum))
        deltas: Tensor = torch.fft.irfft2(halves, s=grid, norm="forward")
        return deltas


def _folded(
    indices: NDArray[np.int64], grid: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Each place in the half of the spectrum that `irfft2` reads, and its weight there.

    A real coefficient at (j, k) counts half at (j, k) and half at its mirror (-j, -k), one of which
    the half has; in the columns that are their own mirrors the real part alone is read, all of it.
    """
    high, wide = grid
    j, k = indices // wide, indices % wide
    mirrored = 2 * k > wide
    j, k = np.where(mirrored, -j % high, j), np.where(mirrored, wide - k, k)
    weight = np.where((k == 0) | (2 * k == wide), 1.0, 0.5)
    return j * (wide // 2 + 1) + k, weight.astype(np.float32)
