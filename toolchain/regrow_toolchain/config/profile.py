"""Settings of `regrow profile`."""

from __future__ import annotations

from dataclasses import dataclass

from regrow_export import setting

from .shared import Checked

__all__ = ["ProfileConfig"]


@dataclass(frozen=True)
class ProfileConfig(Checked):
    """What to measure of a bundle, and for how long. Lists have commas between."""

    batch: str = setting("1", "Batch sizes, such as 1,4.")
    length: str = setting(
        "", "Sequence lengths, such as 16,197; by default that of the bundle's probe."
    )
    threads: str = setting("", "Thread counts, such as 1,2; by default one per core.")
    runs: int = setting(100, "Runs of each case at least.", low=1)
    seconds: float = setting(2.0, "Seconds of each case at least.")
    rounds: int = setting(5, "Fresh processes that share the runs of each case.", low=1)
    residents: str = setting("1,10,100,1000", "Numbers of adapters, installed and resident.")
    tokens: int = setting(16, "Language models: tokens to decode.", low=1)
    sustained: str = setting("", "Run without a pause for so long, such as 10m; p99 over time.")
    memory_limit: str = setting("", "Does it fit in so much private memory, such as 128MB?")
    profile: str = setting(
        "speed", "What the bundle is to save: time, or RAM.", choices=("speed", "memory")
    )
