"""What regrow raises. Every message is one clear line, or one line per finding."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FormatError", "MismatchError", "RegrowError", "UsageError"]


_LONGEST = 2000


def _plain(text: str) -> str:
    """Text of what prints: messages quote files from strangers, and terminals obey them."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class RegrowError(Exception):
    """The work failed; the command line prints the message and exits with 1."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(_plain, message.split("\n"))))


class UsageError(RegrowError):
    """What was asked for makes no sense; the command line exits with 2."""

    exit_code = 2


class FormatError(RegrowError):
    """A file is broken, truncated, or of a version that this reader does not know."""

    def __init__(self, message: str) -> None:
        super().__init__(_plain(message))


class MismatchError(RegrowError):
    """Two good files do not belong together.

    Args:
        head: what was compared, one line.
        findings: every mismatch, one line each; the first `show` stand indented under `head`.
    """

    def __init__(self, head: str, findings: Sequence[str] = (), *, show: int = 20) -> None:
        self.findings = tuple(map(_plain, findings))
        hidden = len(self.findings) - show
        more = [f"… {hidden} more"] if show and hidden > 0 else []
        super().__init__("\n  ".join([_plain(head), *self.findings[:show], *more]))
