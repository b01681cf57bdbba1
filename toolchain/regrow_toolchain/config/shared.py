"""Settings of all training, and the check of every config."""

from __future__ import annotations

from typing import Any

from regrow_export import check_settings, setting

__all__ = ["Checked", "accumulate", "device", "mixed_precision", "threads"]


def accumulate() -> Any:
    """The field `accumulate`."""
    return setting(1, "Pieces that a step's samples are cut into, to save memory.", low=1)


def device() -> Any:
    """The field `device`."""
    return setting("auto", "Where to train.", choices=("auto", "cpu"), decides=False)


def mixed_precision() -> Any:
    """The field `mixed_precision`."""
    return setting("no", "Compute in half precision (accelerate).", choices=("no", "bf16", "fp16"))


def threads() -> Any:
    """The field `threads`."""
    return setting(
        0,
        "CPU threads. By default one for every 1e9 multiply-adds of a step's forward pass, up to "
        "one per core: small models train as fast with 1, and leave the machine to others.",
        shown="by a step's work",
        decides=False,
    )


class Checked:
    """A config whose settings are looked at once, when it is made."""

    def __post_init__(self) -> None:
        check_settings(self)
