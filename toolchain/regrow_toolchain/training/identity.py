"""What decides the bytes that a training ends in: a state of another one is not gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from regrow_export.quantization import INT8_ROUNDING
from regrow_format.errors import UsageError
from regrow_toolchain.data import Dataset

__all__ = ["TrainingIdentity", "training_identity"]

_INT8 = f"{INT8_ROUNDING.scheme}, codes {INT8_ROUNDING.range}, a scale per {INT8_ROUNDING.axis}"


@dataclass(frozen=True)
class TrainingIdentity:
    """Compared field by field, so that a refusal says what to do.

    Attributes:
        digest: SHA-256 of the settings, the backbone and the samples.
        threads: torch's while it trains; sums round otherwise with another number.
        rounding: how int8 weights are rounded; "" where the precision is another.
    """

    digest: str
    threads: int
    rounding: str = ""

    def to_fields(self) -> dict[str, str]:
        """As a state has it in its metadata."""
        threads = str(self.threads)
        return {"identity": self.digest, "threads": threads, "rounding": self.rounding}

    def check(self, state: Path, found: Mapping[str, str], *, of: str) -> None:
        """Compare to what a state was written with.

        Args:
            found: its metadata; what is not there is as if it was empty.
            of: what the digest is of, in words.

        Raises:
            UsageError: it is of another training, rounding, or number of threads.
        """
        way_out = f"remove {state} to start anew"
        if found.get("identity") != self.digest:
            raise UsageError(
                f"{state} must be of the same training ({of}) to be resumed, got another; {way_out}"
            )
        if (before := found.get("rounding", "")) != self.rounding:
            raise UsageError(
                f"{state} must be resumed with the int8 rounding it was begun with, got "
                f"{self.rounding!r} for {before!r}: {way_out}, or go on with the version of regrow "
                "that wrote it"
            )
        if (threads := found.get("threads", "")) != str(self.threads):
            raise UsageError(
                f"{state} must be resumed with as many threads as it was begun with, as sums round "
                f"otherwise with others, got {self.threads} for {threads}: give --threads "
                f"{threads}, or {way_out}"
            )


def training_identity(
    config: Any, backbone_id: str, *more: object, samples: Iterable[tuple[str, Dataset]] = ()
) -> TrainingIdentity:
    """The identity of a training by `config`, all of whose settings count that decide anything.

    Args:
        config: of a command, its `threads` those of the training.
        more: what decides it besides, such as the name of a loss; by `repr`.
        samples: all that is learnt from, each part with a name, in order.
    """
    digest = hashlib.sha256(repr([_settings(config), backbone_id, *more]).encode())
    for part, data in samples:
        for name, array in {"": data.labels, **data.inputs}.items():
            digest.update(f"{part} {name} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    rounding = _INT8 if config.precision == "int8" else ""
    return TrainingIdentity(digest.hexdigest(), config.threads, rounding)


def _settings(config: Any) -> list[tuple[str, object]]:
    """Names and values; those of pairs as text, as the command line has them."""
    found = []
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Mapping):
            value = sorted((name, str(own)) for name, own in value.items())
        if item.metadata["decides"]:
            found.append((item.name, value))
    return found
