"""The samples of several users as one batch after another, each user's as if alone.

What a step sees depends on the seed, the step and the user's own samples, on nothing else: users
trained together get what they would get one by one, and training that was interrupted goes on with
the same samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow_toolchain.data import Dataset

from .batching import shifted

__all__ = ["Augmentation", "Batch", "MultiUserBatches", "mixed"]


@dataclass(frozen=True)
class Augmentation:
    """For images [n, c, h, w]: shifts of up to `shift` pixels, noise of a standard deviation."""

    shift: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Batch:
    """`U` users with `S` samples each.

    Attributes:
        inputs: [U * S, ...] by argument name, a user's samples together.
        labels: [U, S, ...].
        weights: float32 [U, S], 0 for rows that only fill up; each user's sum to 1.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weights: Tensor


class MultiUserBatches:
    """Users whose adapters are trained together.

    Args:
        parts: each user's training samples.
        size: samples of a user in a step; all of them if there are fewer.
    """

    def __init__(
        self,
        parts: Sequence[Dataset],
        *,
        size: int,
        seed: int,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
    ) -> None:
        self.counts = [len(part) for part in parts]
        self.sizes = [min(size, count) for count in self.counts]
        self.size, self.seed, self.device = size, seed, torch.device(device)
        self.augmentation = augmentation or Augmentation()
        self._starts = np.cumsum([0, *self.counts])[:-1]
        names = parts[0].inputs
        self._inputs = {
            name: torch.from_numpy(np.concatenate([p.inputs[name] for p in parts])).to(self.device)
            for name in names
        }
        self._labels = torch.from_numpy(np.concatenate([p.labels for p in parts])).to(self.device)
        self._passes: dict[tuple[int, int], NDArray[np.int64]] = {}

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The samples of a step, or the `part`-th of `parts` pieces of them."""
        rows = np.stack([self._rows(user, step) for user in range(len(self.counts))])
        pieces = np.array_split(np.arange(rows.shape[1]), parts)
        piece = pieces[part]
        index = torch.from_numpy(rows[:, piece]).to(self.device)
        flat = index.flatten()
        inputs = {name: value[flat] for name, value in self._inputs.items()}
        if self.augmentation.shift or self.augmentation.noise:
            inputs = self._augmented(inputs, step, piece)
        return Batch(inputs, self._labels[index], self._weights[:, torch.from_numpy(piece)])

    @property
    def repeats(self) -> bool:
        """Whether a sample is the same whenever it is seen: no augmentation touches it."""
        used = self.augmentation.shift or self.augmentation.noise
        return not used or not any(map(_is_picture, self._inputs.values()))

    def mapped(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> MultiUserBatches:
        """The same batches with `change(inputs)` for inputs, a user's samples apart from others'.

        For samples that repeat: nothing is augmented afterwards.
        """
        found = copy.copy(self)
        found.augmentation = Augmentation()
        parts = []
        for start, count in zip(self._starts.tolist(), self.counts, strict=True):
            for first in range(start, start + count, self.size):
                rows = slice(first, min(first + self.size, start + count))
                parts.append(change({name: x[rows] for name, x in self._inputs.items()}))
        found._inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return found

    @cached_property
    def _weights(self) -> Tensor:
        sizes = torch.tensor(self.sizes)[:, None]
        used = torch.arange(max(self.sizes))[None] < sizes
        return (used / sizes).to(self.device)

    def _rows(self, user: int, step: int) -> NDArray[np.int64]:
        """[S]: a user's samples of a step; what only fills up is the first of them."""
        size, count = self.sizes[user], self.counts[user]
        places = np.arange(step * size, (step + 1) * size)
        order = np.concatenate(
            [self._order(user, p) for p in range(places[0] // count, places[-1] // count + 1)]
        )
        rows = order[places - places[0] // count * count]
        filling = np.full(max(self.sizes) - size, rows[0])
        found: NDArray[np.int64] = np.concatenate([rows, filling]) + self._starts[user]
        return found

    def _order(self, user: int, number: int) -> NDArray[np.int64]:
        """The order of a user's samples in a pass; users with as many have the same."""
        count = self.counts[user]
        if (count, number) not in self._passes:
            if len(self._passes) > 4 * len(self.counts) + 16:
                self._passes.clear()
            draw = np.random.Generator(np.random.PCG64([self.seed, number]))
            self._passes[count, number] = draw.permutation(count)
        return self._passes[count, number]

    def _augmented(
        self, inputs: Mapping[str, Tensor], step: int, piece: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Place `i` of every user's batch is moved alike: what one user sees needs no other."""
        found = dict(inputs)
        users = len(self.counts)
        for name, x in inputs.items():
            if not _is_picture(x):
                continue
            generator = torch.Generator().manual_seed(mixed(self.seed, step))
            if self.augmentation.shift:
                pixels = torch.rand(self.size, 2, generator=generator) * 2 - 1
                pixels = pixels[piece].repeat(users, 1) * self.augmentation.shift
                x = shifted(x, pixels.to(x.device, x.dtype))
            if self.augmentation.noise:
                noise = torch.randn(self.size, *x.shape[1:], generator=generator)[piece]
                noise = (noise * self.augmentation.noise).to(x.device, x.dtype)
                x = (x.reshape(users, -1, *x.shape[1:]) + noise).flatten(0, 1)
            found[name] = x
        return found


def _is_picture(x: Tensor) -> bool:
    """Whether augmentation applies to an input."""
    return x.dim() == 4 and x.is_floating_point()


def mixed(seed: int, step: int) -> int:
    """A seed of its own for every step, below 2**63."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) % 2**63
