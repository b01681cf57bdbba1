"""Every number that `regrow_format.mt19937` draws is torch's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.tuners.vera.model import _kaiming_init

from regrow_format.mt19937 import DTYPES, LONG, permutation_head, uniform_kaiming

_SEEDS = [0, 1, 777, 2**31, 2**32 + 5, 2**63 + 12345, 2**64 - 1]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without FMA torch rounds twice",
)
@pytest.mark.parametrize("seed", _SEEDS)
def test_kaiming(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        rank, wide, high = (int(size) for size in rng.integers(1, 300, 3))
        generator = torch.Generator().manual_seed(seed)
        wanted = [_kaiming_init(shape, generator) for shape in ((rank, wide), (high, rank))]
        for dtype in DTYPES:
            found = uniform_kaiming(seed, rank, wide, high, dtype)
            for ours, theirs in zip(found, wanted, strict=True):
                numbers = theirs.to(getattr(torch, dtype)).float().numpy()
                assert np.array_equal(ours.view(np.uint32), numbers.view(np.uint32))


@pytest.mark.parametrize("seed", _SEEDS)
def test_permutation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for total in (1, 2, 48 * 32, *map(int, rng.integers(3, 60_000, 4))):
        wanted = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).numpy()
        for count in (0, total // 7, total):
            assert np.array_equal(permutation_head(seed, count, total), wanted[:count])


@pytest.mark.slow
@pytest.mark.parametrize("total", [LONG - 1, LONG])
def test_permutation_where_torch_shuffles_otherwise(total: int) -> None:
    generator = torch.Generator().manual_seed(2024)
    wanted = torch.randperm(total, generator=generator, dtype=torch.int32).numpy()
    assert np.array_equal(permutation_head(2024, 3000, total), wanted[:3000])
