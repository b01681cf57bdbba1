"""What regrow raises. Every message is one clear line, or one line per finding."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FormatError", "MismatchError", "RegrowError", "UsageError"]


class RegrowError(Exception):
    """The work failed; the command line prints the message and exits with 1."""

    exit_code = 1


class UsageError(RegrowError):
    """What was asked for makes no sense; the command line exits with 2."""

    exit_code = 2


class FormatError(RegrowError):
    """A file is broken, truncated, or of a version that this reader does not know."""


class MismatchError(RegrowError):
    """Two good files do not belong together.

    Args:
        head: what was compared, one line.
        findings: every mismatch, one line each; the first `show` stand indented under `head`.
    """

    def __init__(self, head: str, findings: Sequence[str] = (), *, show: int = 20) -> None:
        self.findings = tuple(findings)
        hidden = len(self.findings) - show
        more = [f"… {hidden} more"] if show and hidden > 0 else []
        super().__init__("\n  ".join([head, *self.findings[:show], *more]))
