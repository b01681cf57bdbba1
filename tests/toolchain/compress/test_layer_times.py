"""Decisions by measured time: on a clock of the tests' own, quiet, noisy and hostile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_toolchain.compress import factored_layers, kernel_timing
from regrow_toolchain.compress.factorization import Factored, factor
from regrow_toolchain.compress.kernel_timing import ROUNDS, Times, Widths
from regrow_toolchain.compress.layer_selection import LayerPlan
from regrow_toolchain.compress.layer_times import LayerTimes, Timer
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone

Data = Callable[..., Dataset]
_LARGE = (768, 768, 160, 197)  # in, out, rank, tokens: enough to be timed


class _Made:
    """A timer: milliseconds by a rule, times noise; notes what it was asked."""

    def __init__(
        self, rule: Callable[[Widths], float], noise: Callable[[int, int], Times] | None = None
    ) -> None:
        self.rule, self.noise = rule, noise
        self.asked: list[tuple[tuple[Widths, ...], int, str]] = []

    def __call__(self, candidates: tuple[Widths, ...], tokens: int, precision: str) -> Times:
        self.asked.append((candidates, tokens, precision))
        times = np.tile([self.rule(widths) for widths in candidates], (ROUNDS, 1))
        return times * self.noise(*times.shape) if self.noise else times


def _macs(widths: Widths) -> float:
    return sum(a * b for a, b in pairwise(widths)) / 1e6


def _factors(share: float) -> Callable[[Widths], float]:
    """Two factors take this share of the dense layer's time, whatever their rank."""
    return lambda widths: share if len(widths) == 3 else 1.0


# -- the measurement -------------------------------------------------------------------------------


class _Machine:
    """A clock that moves as candidates run, more slowly or faster from one moment to the next."""

    def __init__(self, slowness: Callable[[float], float]) -> None:
        self.now, self.slowness = 0.0, slowness
        self.ran: list[str] = []

    def program(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds * self.slowness(self.now)

        return run


def test_candidates_take_turns_forwards_and_backwards() -> None:
    machine = _Machine(lambda _now: 1.0)
    runs = [machine.program(name, 0.004) for name in "abc"]
    times = kernel_timing.interleaved(runs, clock=lambda: machine.now)
    assert "".join(machine.ran[6:18]) == "abccbaabccba"  # two runs of each tell how many to repeat
    assert times.shape == (ROUNDS, 3)
    assert times == pytest.approx(np.full((ROUNDS, 3), 4.0))


def test_short_runs_are_repeated_within_a_turn() -> None:
    machine = _Machine(lambda _now: 1.0)
    runs = [machine.program("a", 0.0003), machine.program("b", 0.03)]
    times = kernel_timing.interleaved(runs, clock=lambda: machine.now)
    assert Counter(machine.ran) == {"a": 2 + 10 * ROUNDS, "b": 2 + ROUNDS}
    assert times[0] == pytest.approx([0.3, 30.0])


def test_a_machine_that_gets_busy_slows_all_alike() -> None:
    """From its middle on all takes eight times as long: ratios by rounds do not see it."""
    machine = _Machine(lambda now: 1.0 if now < 0.1 else 8.0)
    runs = [machine.program("dense", 0.005), machine.program("factored", 0.004)]
    times = kernel_timing.interleaved(runs, clock=lambda: machine.now)
    assert times.max() > 7 * times.min()
    ratios = times[:, 1] / times[:, 0]
    assert np.mean(np.isclose(ratios, 0.8)) > 0.9


def test_what_onnx_runtime_takes() -> None:
    both = ((32, 48), (32, 8, 48))
    times = kernel_timing.timed(both, 4, "fp32")
    assert times.shape == (ROUNDS, 2)
    assert (times > 0).all()
    assert kernel_timing.latency(32, 48, 8, 4) == tuple(np.median(times, axis=0))
    assert kernel_timing.timed(both, 4, "fp32") is times  # a report shows what decided


# -- a layer that is no faster ---------------------------------------------------------------------


@pytest.mark.parametrize(("share", "slow"), [(0.7, False), (1.04, False), (1.06, True)])
def test_small_differences_do_not_count(share: float, slow: bool) -> None:
    times = LayerTimes("int8", made := _Made(_factors(share)))
    assert times.slower([_LARGE]) == ({_LARGE} if slow else set())
    assert made.asked == [(((768, 768), (768, 160, 768)), 197, "int8")]


def test_what_multiplies_as_much_or_little_is_not_timed() -> None:
    times = LayerTimes("fp32", made := _Made(_factors(2.0)))
    as_much, small = (640, 640, 320, 100), (64, 64, 16, 10)
    assert times.slower([as_much, small]) == {as_much}
    assert made.asked == []


@pytest.mark.parametrize("rounds", [11, 12])
def test_twelve_rounds_of_fifteen_must_agree(rounds: int) -> None:
    noise = np.ones((ROUNDS, 2))
    noise[:rounds, 1] = 1e3
    noise[rounds:, 1] = 1.0
    times = LayerTimes(timer=_Made(_factors(1.0), lambda *_shape: noise))
    assert times.slower([_LARGE]) == ({_LARGE} if rounds == 12 else set())


def test_noise_falls_to_the_side_of_factoring() -> None:
    """Equally fast, with noise of a fifth of the time: 1.8 % of the shapes or fewer stay dense.

    Clearly faster or slower, noise decides nothing.
    """
    draw = np.random.default_rng(0)

    def noise(*shape: int) -> Times:
        return np.exp(0.2 * draw.standard_normal(shape))

    def dense(share: float) -> float:
        rule = _factors(share)
        return float(np.mean([bool(LayerTimes(timer=_Made(rule, noise)).slower([_LARGE]))
                              for _ in range(1000)]))  # fmt: skip

    assert dense(1.0) <= 0.018
    assert dense(0.8) == 0
    assert dense(2.0) == 1


# -- whole models ----------------------------------------------------------------------------------


class _Alike(nn.Module):
    """Twelve blocks of two layers of one shape, large enough to be timed, and two small ones."""

    def __init__(self, spread: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)) for _ in range(12)]
        )
        for index, block in enumerate(self.layers):  # unlike spectra, for unlike ranks
            for layer in block:
                with torch.no_grad():
                    scale = torch.arange(1, 97) ** -(spread * index / 12)
                    layer.weight.copy_(0.1 * layer.weight * scale[:, None])

        self.small = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = x + block(x)
        for layer in self.small:
            x = x + layer(x[..., :16]).repeat(1, 1, 6)
        return x


@pytest.fixture
def samples() -> Dataset:
    x = np.random.default_rng(0).standard_normal((8, 600, 96)).astype(np.float32)
    return Dataset({"x": x}, np.full(8, -1), named=False)


def _hostile(seed: int) -> Callable[[int, int], Times]:
    """Noise of a factor of ten either way, another at every call."""
    draw = np.random.default_rng(seed)
    return lambda *shape: (
        np.exp(draw.uniform(-2.3, 2.3, (1, shape[1]))) * np.exp(draw.uniform(-2.3, 2.3, shape))
    )


def _wide(found: Factored) -> list[LayerPlan]:
    return [layer for layer in found.layers if layer.in_features == 96]


def _factored(samples: Dataset, timer: Timer, spread: float = 0.0, **settings: Any) -> Factored:
    config = CompressConfig(epochs=0, multiple=8, calibration=8)
    model = _Alike(spread).eval().requires_grad_(False)
    return factor(model, samples, replace(config, **settings), timer=timer)


@pytest.mark.parametrize("ranks", ["paper", "kernels"])
def test_equal_shapes_are_decided_alike(samples: Dataset, ranks: str) -> None:
    """However wrong the timer is, of 24 equal layers all or none stay dense, at one rank."""
    outcomes = set()
    for seed in range(12):
        timer = _Made(_factors(1.0), _hostile(seed))
        layers = _wide(_factored(samples, timer, ranks=ranks, slow_layers="dense"))
        assert len(layers) == 24
        assert len({(layer.rank, layer.skip_reason) for layer in layers}) == 1
        outcomes.add(layers[0].skip_reason)
    assert "" in outcomes


def test_of_one_width_the_lower_ranks_are_factored(samples: Dataset) -> None:
    """Where a layer is factored, so is every one of its width with a lower rank."""
    free = _wide(_factored(samples, _Made(_macs), 2.0, ranks="global", slow_layers="factor"))
    ranks, mixed = {layer.name: layer.rank for layer in free}, 0
    for seed in range(12):
        timer = _Made(_factors(1.05), _hostile(seed))
        layers = _wide(_factored(samples, timer, 2.0, ranks="global", slow_layers="dense"))
        slow = [ranks[x.name] for x in layers if x.skip_reason == "factors are no faster"]
        fast = [x.rank for x in layers if x.rank]
        assert len({*slow, *fast}) > 2
        assert not slow or not fast or min(slow) > max(fast)
        mixed += bool(slow and fast)
    assert mixed


def test_ranks_of_one_width_are_timed_in_one_go(samples: Dataset) -> None:
    timer = _Made(_macs)
    found = _factored(samples, timer, 2.0, ranks="global", slow_layers="dense")
    ranks = sorted({layer.rank for layer in _wide(found) if layer.rank})
    asked = [widths for candidates, _, _ in timer.asked for widths in candidates]
    assert [widths[1] for widths in asked if len(widths) == 3] == ranks
    assert all(candidates[0] == (96, 96) for candidates, _, _ in timer.asked)  # dense beside them


def test_a_budget_of_time(backbone: Backbone, dataset: Data) -> None:
    """The MLP costs ten times as much, so its ranks are lower than from a budget of MACs."""
    timer = _Made(lambda widths: _macs(widths) * (10 if max(widths) == 64 else 1))
    config = CompressConfig(
        budget="macs", epochs=0, multiple=1, slow_layers="factor", precision="int8"
    )

    def mlp(found: Factored) -> int:
        return sum(p.rank for p in found.plans if max(p.in_features, p.out_features) == 64)

    plain = factored_layers(backbone.model, 2)
    by_macs = factor(backbone.model, dataset(60, 1), config, timer=timer)
    assert timer.asked == []
    by_time = factor(backbone.model, dataset(60, 1), replace(config, budget="time"), timer=timer)
    assert {precision for _, _, precision in timer.asked} == {"int8"}
    assert mlp(by_time) < sum(p.rank for p in plain if max(p.in_features, p.out_features) == 64)
    for found in (by_macs, by_time):
        spent = sum(p.rank * (p.in_features + p.out_features) for p in found.plans)
        assert spent <= sum(p.in_features * p.out_features for p in plain)


def test_a_budget_of_time_measures_each_shape_once(samples: Dataset) -> None:
    """Of the ranks that equal layers may have 17 are timed; between them it is a straight line."""
    timer = _Made(_macs)
    found = _factored(samples, timer, 2.0, ranks="global", budget="time", slow_layers="factor",
                      multiple=1)  # fmt: skip
    widths = [w for candidates, _, _ in timer.asked for w in candidates if len(w) == 3]
    assert Counter(w[0] for w in widths) == {96: 17, 16: 8}
    assert len(widths) == len(set(widths))
    assert len(_wide(found)) == 24


def test_times_between_measured_ranks() -> None:
    times = LayerTimes(timer=_Made(_macs))
    times.measure(768, 3072, 197, range(8, 601, 8))
    for rank in (8, 17, 304, 600):
        wanted = _macs((768, rank, 3072))
        assert times.milliseconds(768, 3072, rank, 197) == pytest.approx(wanted, rel=1e-6)
    assert times.milliseconds(768, 3072, 0, 197) == pytest.approx(_macs((768, 3072)))


def test_seven_rounds_of_fifteen_may_be_anything() -> None:
    """Whatever others did to them, dense or factored: the median is that of the rest."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        noise = np.ones((ROUNDS, 4))
        spoilt = draw.permutation(ROUNDS)[:7]
        noise[spoilt] = np.exp(draw.uniform(-5, 5, (7, 1))) * np.ones(4)
        noise[spoilt, 0] *= np.exp(draw.uniform(-5, 5))
        times = LayerTimes(timer=_Made(_macs, lambda *_shape, made=noise: made))
        times.measure(96, 96, 600, [8, 16, 24])
        share = times.milliseconds(96, 96, 16, 600) / times.milliseconds(96, 96, 0, 600)
        assert share == pytest.approx(16 * 2 / 96)


def test_a_rank_outside_of_what_is_known_is_timed_too() -> None:
    times = LayerTimes(timer=(made := _Made(_macs)))
    times.measure(96, 96, 600, [16, 24])
    times.measure(96, 96, 600, [8, 20, 32])
    asked = [[w[1] for w in candidates[1:]] for candidates, _, _ in made.asked]
    assert asked == [[16, 24], [8, 32]]
    for rank in (8, 16, 20, 24, 32):
        assert times.milliseconds(96, 96, rank, 600) == pytest.approx(_macs((96, rank, 96)))


# -- ranks that suit kernels -----------------------------------------------------------------------


def _suited(
    shapes: dict[tuple[int, int, int, int], int], rule: Callable[[Widths], float]
) -> list[int]:
    return list(LayerTimes(timer=_Made(rule)).suited_ranks(shapes, 8).values())


def test_ranks_that_suit_kernels() -> None:
    """Two threads share whole tiles of 16 columns: multiples of 32, where there are any near."""
    shapes = {(768, 768, 192, 197): 48, (768, 3072, 307, 197): 12, (3072, 768, 307, 197): 12}
    found = _suited(shapes, _macs)
    assert found == [192, 288, 288]
    # A ViT-Base's parameters stay within 3 % of what the ratio says.
    counts = list(zip(shapes.items(), found, strict=True))
    factors = sum(rank * (s[0] + s[1]) * n for (s, n), rank in counts)
    dense = sum(s[0] * s[1] * n for s, n in shapes.items())
    whole = 86_567_656
    assert abs((whole - dense + factors) / (whole / 2) - 1) < 0.03


def test_ranks_where_no_multiple_of_32_is_near() -> None:
    def tiles(widths: Sequence[int]) -> float:
        return float(-(-widths[1] // 16))

    # Tiles of 16: of the multiples of 8 near 80, 80 is as good as it gets.
    assert _suited({(320, 320, 81, 50): 1}, tiles) == [80]
    # Too few parameters would be left: the paper's.
    assert _suited({(768, 768, 208, 197): 1}, tiles) == [208]
    assert _suited({(8, 8, 2, 4): 1}, tiles) == [2]
