"""What was measured when a bundle was exported, for the device's own checks and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from .fields import Fields
from .record import Record

__all__ = ["Checks", "Score", "parse_checks", "parse_score"]


class Checks(Record):
    """What the device's own checks need.

    Attributes:
        probe: fingerprint of the probe's input; "" if adapters cannot know that input.
        spread: largest difference of the variant's outputs to those of exact weights and inputs, as
            a share of the largest output.
        partitions: pieces that a mobile accelerator would cut the graph into, by accelerator.
    """

    probe: str = ""
    spread: float = 0.0
    partitions: Mapping[str, int] = field(default_factory=dict)


class Score(Record):
    """What the variant costs on samples: `fp32` is torch's score, `variant` the bundle's."""

    metric: str
    higher_is_better: bool
    samples: int
    fp32: float
    variant: float


def parse_checks(part: Fields | None) -> Checks | None:
    """Read and check the manifest's `checks`."""
    if part is None:
        return None
    counts = Fields(part.take("partitions", dict, {}), f"{part.where}: partitions")
    checks = Checks(
        probe=part.take("probe", str, ""),
        spread=part.take("spread", float, 0.0),
        partitions={name: counts.number(name, 0, 2**31) for name in counts.names()},
    )
    part.done()
    return checks


def parse_score(part: Fields | None) -> Score | None:
    """Read and check the manifest's `score`."""
    if part is None:
        return None
    score = Score(
        metric=part.take("metric", str),
        higher_is_better=part.take("higher_is_better", bool),
        samples=part.number("samples", 1, 2**53),
        fp32=part.take("fp32", float),
        variant=part.take("variant", float),
    )
    part.done()
    return score
