"""How wide words will be, without a font at hand: on the safe side for what browsers take."""

from __future__ import annotations

__all__ = ["shorten", "text_width"]

SIZE = 12.5  # points of the largest text in a chart, that of a phone
# Advance in hundredths of the size, at most: DejaVu Sans's, the widest of the usual system fonts.
_CLASSES = {
    32: "ijlIJ' ,.\N{NO-BREAK SPACE}", 41: "/:;\\|f-()[]tr!", 55: '"*_`–szc?', 62: "LFkvxyPTYaoe",
    66: "ESbdghnpqu$0123456789{}µK", 73: "AVBRXZCU", 86: "HNDG&OQw#+<=>^~→±−×M",
}  # fmt: skip
_ADVANCE = {letter: share / 100 for share, letters in _CLASSES.items() for letter in letters}
_STRONG = 1.16  # bold is so much wider


def text_width(words: str, *, strong: bool = False) -> float:
    """Points that the words take at most; letters of other scripts count as square."""
    width = SIZE * sum(_ADVANCE.get(letter, 1.0) for letter in words)
    return width * (_STRONG if strong else 1.0)


def shorten(words: str, width: float, *, strong: bool = False) -> str:
    """Words that fit into `width` points, with "…" for what does not.

    Words are cut at their end. A path, which has no spaces, loses its middle: it says where it is
    at its start and what it is at its end.
    """
    if text_width(words, strong=strong) <= width:
        return words
    for kept in range(len(words) - 1, 0, -1):
        tail = 0 if " " in words else kept // 2
        short = f"{words[: kept - tail].rstrip()}…{words[len(words) - tail :]}"
        if text_width(short, strong=strong) <= width:
            return short
    return "…"
