"""Numbers as a reader wants them."""

from __future__ import annotations

__all__ = ["NOT_MEASURED", "count", "duration", "percent", "ram", "ratio", "size"]

NOT_MEASURED = "not measured"
# Between a number and its unit: no line ends there.
GAP = "\N{NO-BREAK SPACE}"


def count(value: float) -> str:
    """A whole number with separators: 204,000."""
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share 0..1 as a percentage: 98.1%."""
    return f"{100 * share:.1f}%"


def size(value: float | None) -> str:
    """Bytes in decimal units (1 KB is 1,000 bytes); None was not measured."""
    if value is None:
        return NOT_MEASURED
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(value) >= scale:
            scaled = value / scale
            number = f"{scaled:.1f}" if abs(scaled) < 9.95 else f"{scaled:,.0f}"
            return f"{number}{GAP}{unit}"
    return f"{value:.0f}{GAP}bytes"


def ram(value: float | None) -> str:
    """Bytes of RAM, to a tenth of a megabyte: 28.4 MB."""
    if value is None or abs(value) >= 1e9 or abs(value) < 1e5:
        return size(value)
    return f"{value / 1e6:.1f}{GAP}MB"


def duration(milliseconds: float) -> str:
    """Milliseconds in the unit that needs the fewest zeros: 3 µs, 1.9 ms, 4.2 s."""
    if milliseconds >= 1000:
        return f"{_three_digits(milliseconds / 1000)}{GAP}s"
    if milliseconds >= 1:
        return f"{_three_digits(milliseconds)}{GAP}ms"
    return f"{_three_digits(1000 * milliseconds)}{GAP}µs"


def _three_digits(value: float) -> str:
    """Three significant digits, no exponent, no zeros at the end: 0.31, 1.9, 93.1, 1,204."""
    if value >= 99.95:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")


def ratio(part: float, whole: float) -> str:
    """How many times `part` goes into `whole`: 266, 7.7, 0.6."""
    if part <= 0:
        return "∞"
    times = whole / part
    return f"{times:,.0f}" if times >= 9.95 else f"{times:.1f}"
