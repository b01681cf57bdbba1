"""How the weights of integer products were rounded, as the manifest says it."""

from __future__ import annotations

from .errors import FormatError
from .fields import Fields
from .integers import SAFE_CODES
from .record import Record

__all__ = ["Rounding", "parse_rounding"]

SCHEMES = ("symmetric",)
AXES = ("out",)
_INT8 = (-128, 127)


class Rounding(Record):
    """Weight = code x scale, with int8 codes.

    Attributes:
        scheme: "symmetric": the zero point is 0.
        range: the smallest and the largest code that the scheme uses.
        axis: which weights share a scale: "out", those of an output channel.
    """

    scheme: str
    range: tuple[int, int]
    axis: str

    @property
    def safe(self) -> bool:
        """Whether sums are exact on every processor: see `regrow_format.integers`."""
        return SAFE_CODES[0] <= self.range[0] and self.range[1] <= SAFE_CODES[1]


def parse_rounding(part: Fields) -> Rounding:
    """Raises `FormatError` unless every field is there and makes sense, and no other."""
    rounding = Rounding(
        scheme=part.choice("scheme", SCHEMES),
        range=_range(part),
        axis=part.choice("axis", AXES),
    )
    part.done()
    return rounding


def _range(part: Fields) -> tuple[int, int]:
    found = part.take("range", list)
    whole = len(found) == 2 and all(type(code) is int for code in found)
    if not whole or not _INT8[0] <= found[0] < 0 < found[1] <= _INT8[1]:
        raise FormatError(
            f"{part.where}: range must be a code below 0 and one above, of int8, got {found!r:.80}"
        )
    return found[0], found[1]
