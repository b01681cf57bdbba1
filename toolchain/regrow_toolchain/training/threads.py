"""How many threads torch trains with where nobody says: a rule, no measurement.

Sums round otherwise with another number of threads, so the number has to follow from the work and
the machine alone, and stands in the state that a training is resumed from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from regrow_toolchain.data import Dataset
from regrow_toolchain.measurement import read_cpu
from regrow_toolchain.models import outputs_of

__all__ = [
    "MACS_PER_THREAD",
    "cgroup_cores",
    "step_macs",
    "step_threads",
    "suited_threads",
    "torch_threads",
    "usable_cores",
]

# Two threads of two free cores take 0.74 of one's time for a step of 0.15e9 multiply-adds, and 0.58
# from 1e9 on; where others have the second core, 3.1 of it at 0.15e9, 1.9 at 4e9, 1.8 at 70e9, as
# threads that wait for each other spin (docs/adapters.md). Below 2e9 a step takes a sixth of a
# second at most, and little is to be won.
MACS_PER_THREAD = 1_000_000_000
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def step_threads(model: nn.Module, data: Dataset, samples: int, device: str = "cpu") -> int:
    """Threads for a training whose steps see `samples` samples of `data` at a time.

    Args:
        device: of a config; where it trains on an accelerator, threads matter little.

    Raises:
        RegrowError: the model does not take the data's inputs.
    """
    cores = usable_cores()
    elsewhere = device != "cpu" and torch.accelerator.is_available()
    if cores == 1 or elsewhere or not len(data):
        return cores
    return suited_threads(step_macs(model, data, samples), cores)


def suited_threads(macs: int, cores: int) -> int:
    """One thread for every 1e9 multiply-adds of a step's forward pass, up to `cores`."""
    return max(1, min(cores, macs // MACS_PER_THREAD))


@torch.no_grad()
def step_macs(model: nn.Module, data: Dataset, samples: int) -> int:
    """Multiply-adds of a forward pass over `samples` samples, counted while the first one runs.

    Not on tensors without numbers, as `count_macs`: a model may keep what it made for later.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    first = {name: torch.from_numpy(array[:1]) for name, array in data.inputs.items()}
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
        outputs_of(model, first)
    return samples * int(counter.get_total_flops()) // 2


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch has so many threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Cores that this process may use: affinity, a container's quota, and what torch was told
    (OMP_NUM_THREADS, `torch.set_num_threads`).
    """
    return max(1, min(read_cpu().cores, cgroup_cores(), torch.get_num_threads()))


def cgroup_cores(own: Path = _CGROUP, top: Path = _CGROUPS) -> int:
    """Whole cores that cgroups (version 2) allow; a very large number without a limit."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 1 << 30
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = top / path.lstrip("/")
    limits = [_cpu_max(place / "cpu.max") for place in (folder, *folder.parents)
              if place.is_relative_to(top)]  # fmt: skip
    return max(1, math.floor(min(limits)))


def _cpu_max(path: Path) -> float:
    """Of a file such as "150000 100000": microseconds of processor time per period."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return float(quota) / float(period) if quota != "max" else 1 << 30
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 30
