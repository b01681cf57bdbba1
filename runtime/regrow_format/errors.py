"""What regrow raises. Every message is one clear line, or one line per finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["FormatError", "MismatchError", "RegrowError", "SettingError", "UsageError"]


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


class SettingError(UsageError):
    """Settings that make no sense, alone or together.

    Args:
        text: a format string; `{name}` is a setting, which callers have other names for (the
            command line says `--fixed-rank`), `{0}` is the first of `values`.
    """

    def __init__(self, text: str, *values: object) -> None:
        self.text, self.values = text, values
        super().__init__(self.named({}))

    def named(self, names: Mapping[str, str]) -> str:
        """The message, settings called by `names`; those that are not there as they are."""
        from string import Formatter

        found = (name for _, name, _, _ in Formatter().parse(self.text) if name)
        own = {name: names.get(name, name) for name in found if not name.isdigit()}
        return self.text.format(*self.values, **own)


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
