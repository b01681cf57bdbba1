"""Decisions by measured time: each made once per shape, from interleaved repeats.

Two factors are compared with the dense layer round by round. The median of the 15 ratios says what
they take; the fourth lowest whether a layer stays dense, only if 12 rounds of 15 agree that it
should. Were both equally fast, each round would be a coin flip, and noise alone would agree so in
1.8 % of the cases: noise falls to the side of factoring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .kernel_timing import Times, Widths, timed

__all__ = ["LayerTimes", "Shape", "Timer"]

Timer = Callable[[tuple[Widths, ...], int, str], Times]  # candidates, tokens, precision
Shape = tuple[int, int, int, int]  # in, out, rank, tokens
_Key = tuple[int, int, int]  # in, out, tokens

_AGREE = 0.8  # of the rounds
# A layer with fewer multiplications takes under a tenth of a millisecond: its time is the node's
# own, and noise would decide. For others the factors may take this share longer.
_SMALL_MACS, _SMALL_SHARE = 5_000_000, 0.05
_AT_ONCE = 6  # ranks that are timed in turns beside the dense layer: they are in RAM together
_MEASURED = 17  # ranks of one shape; between two of them time is a straight line

_KEPT = (0.955, 1.01)  # of the paper's parameters, with ranks that suit kernels
# Products have 16 columns in a tile (ONNX Runtime's MLAS), and two threads share whole tiles: of
# 304 columns one has 160, which takes as long as 320.
_TILES = 32
_COMBINATIONS = 100_000


class LayerTimes:
    """What layers of one model take in ONNX Runtime, dense and in factors.

    Equal shapes are decided alike: whatever is asked of a shape rests on its first measurement, and
    a layer never stays dense where one of a higher rank would be factored.

    Args:
        timer: times [rounds, candidates] in milliseconds, see `kernels.timed`.
    """

    def __init__(self, precision: str = "fp32", timer: Timer = timed) -> None:
        self.precision, self.timer = precision, timer
        self._tables: dict[_Key, _Table] = {}

    def measure(
        self, in_features: int, out_features: int, tokens: int, ranks: Iterable[int]
    ) -> None:
        """Time a shape at these ranks, or at 17 of them, but for those between what is known."""
        key = (in_features, out_features, tokens)
        known = self._tables.get(key)
        wanted = sorted(rank for rank in set(ranks) if not (known and known.covers(rank)))
        if wanted:
            found = self._timed(key, _spread(wanted))
            self._tables[key] = known.joined(found) if known else found

    def _timed(self, key: _Key, ranks: Sequence[int]) -> _Table:
        wide, high, tokens = key
        dense, ratios = [], []
        for start in range(0, len(ranks), _AT_ONCE):
            factors = ((wide, rank, high) for rank in ranks[start : start + _AT_ONCE])
            times = self.timer(((wide, high), *factors), tokens, self.precision)
            dense.append(np.median(times[:, 0]))
            ratios.append(times[:, 1:] / times[:, :1])
        return _Table(float(np.median(dense)), ranks, np.concatenate(ratios, axis=1))

    def milliseconds(self, in_features: int, out_features: int, rank: int, tokens: int) -> float:
        """Of a layer at a rank, 0 for dense; its shape was measured."""
        table = self._tables[in_features, out_features, tokens]
        return table.dense * (table.share(rank) if rank else 1.0)

    def slower(self, shapes: Iterable[Shape]) -> set[Shape]:
        """Those (in, out, rank, tokens) whose factors clearly take longer than the dense layer.

        Where the factors need as many multiplications, or the layer is small, that alone decides.
        """
        all_shapes = set(shapes)
        found = {s for s in all_shapes if s[2] * (s[0] + s[1]) >= s[0] * s[1]}
        timed = {s for s in all_shapes - found if s[3] * s[0] * s[1] >= _SMALL_MACS}
        self._measure_all(timed)
        return found | {
            s for s in timed if self._tables[s[0], s[1], s[3]].surely(s[2]) > 1 + _SMALL_SHARE
        }

    def _measure_all(self, shapes: Iterable[Shape]) -> None:
        """All ranks of a width in one go."""
        ranks: dict[_Key, set[int]] = {}
        for wide, high, rank, tokens in shapes:
            ranks.setdefault((wide, high, tokens), set()).add(rank)
        for key in sorted(ranks):
            self.measure(*key, ranks[key])

    def suited_ranks(self, shapes: Mapping[Shape, int], multiple: int) -> dict[Shape, int]:
        """For each shape (in, out, rank, tokens) a rank near its own that is computed faster.

        Candidates lie between 8 % below and 3 % above it: multiples of 32, two threads' tiles, or
        if there is none the rank itself and `multiple`s. Of all combinations that together keep
        95.5 to 101 % of the parameters, that of the least time.

        Args:
            shapes: how many layers have each.
        """
        options = {shape: _candidates(shape, multiple) for shape in shapes}
        while math.prod(map(len, options.values())) > _COMBINATIONS:
            widest = max(options, key=lambda shape: len(options[shape]))
            options[widest] = options[widest][:1]
        self._measure_all(
            (wide, high, rank, tokens)
            for (wide, high, _, tokens), ranks in options.items()
            for rank in ranks
        )
        times = {
            (shape, rank): self.milliseconds(*shape[:2], rank, shape[3]) * count
            for shape, count in shapes.items()
            for rank in options[shape]
        }
        return _least(shapes, options, times)


class _Table:
    """A shape's times: dense in milliseconds, and at some ranks as shares of that.

    Args:
        ratios: [rounds, ranks] of the dense layer's time.
    """

    def __init__(self, dense: float, ranks: Sequence[int], ratios: Times) -> None:
        self.dense, self.ranks, self.ratios = dense, ranks, ratios
        rising = np.sort(ratios, axis=0)
        self._shares = _monotone(np.median(rising, axis=0))
        self._sure = _monotone(rising[len(rising) - math.ceil(_AGREE * len(rising))])

    def covers(self, rank: int) -> bool:
        """Whether it lies among the measured ranks."""
        return self.ranks[0] <= rank <= self.ranks[-1]

    def joined(self, other: _Table) -> _Table:
        """Both measurements, each in shares of its own dense time."""
        ranks = [*self.ranks, *other.ranks]
        order = np.argsort(ranks)
        ratios = np.concatenate([self.ratios, other.ratios], axis=1)
        return _Table(self.dense, [ranks[i] for i in order], ratios[:, order])

    def share(self, rank: int) -> float:
        """Of the dense layer's time; between measured ranks on a straight line."""
        return float(np.interp(rank, self.ranks, self._shares))

    def surely(self, rank: int) -> float:
        """The share that four fifths of the rounds reach."""
        return float(np.interp(rank, self.ranks, self._sure))


def _monotone(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """A lower rank takes no longer than a higher one: where it seems to, it met noise."""
    found: NDArray[np.float64] = np.minimum.accumulate(shares[::-1])[::-1]
    return found


def _spread(ranks: Sequence[int]) -> list[int]:
    """All, or some of them at even distances, the ends included."""
    if len(ranks) <= _MEASURED:
        return list(ranks)
    places = np.linspace(0, len(ranks) - 1, _MEASURED).round().astype(int)
    return [ranks[place] for place in places]


# -- ranks that suit kernels -----------------------------------------------------------------------


def _least(
    shapes: Mapping[Shape, int],
    options: Mapping[Shape, Sequence[int]],
    times: Mapping[tuple[Shape, int], float],
) -> dict[Shape, int]:
    """The combination of least time that keeps the parameters; the shapes' own ranks if none."""
    sizes = {key: key[1] * (key[0][0] + key[0][1]) * shapes[key[0]] for key in times}
    whole = sum(s[2] * (s[0] + s[1]) * count for s, count in shapes.items())
    best, least = {shape: shape[2] for shape in shapes}, math.inf
    for chosen in itertools.product(*options.values()):
        keys = list(zip(options, chosen, strict=True))
        share = sum(sizes[key] for key in keys) / whole
        # Of equal times the larger ranks.
        total = sum(times[key] for key in keys) * (1.1 - 0.1 * share)
        if _KEPT[0] <= share <= _KEPT[1] and total < least:
            best, least = dict(keys), total
    return best


def _candidates(shape: Shape, multiple: int) -> list[int]:
    rank = shape[2]
    if whole := _multiples(rank, math.lcm(multiple, _TILES)):
        return whole
    return [rank, *(found for found in _multiples(rank, multiple) if found != rank)]


def _multiples(rank: int, step: int) -> list[int]:
    """The nearest first."""
    low, high = math.ceil(0.92 * rank / step), math.floor(1.03 * rank / step)
    found = [number * step for number in range(max(low, 1), high + 1)]
    return sorted(found, key=lambda near: abs(near - rank))
