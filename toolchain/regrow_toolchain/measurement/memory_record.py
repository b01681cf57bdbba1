"""Figures of memory, from whichever system."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes; None for what the system does not tell.

    Attributes:
        rss_anon: private memory in RAM.
        rss_file: mapped files in RAM, of which other processes may use the same pages.
        pss: all of it, with shared pages divided by the processes that share them.
        peak: the most that was in RAM at once, mapped files included.
        data: private writable memory that was asked for, in RAM or not: what RLIMIT_DATA counts.
        source: which figures these are; on other systems than Linux they are the nearest.
    """

    rss_anon: int | None
    rss_file: int | None
    peak: int | None
    pss: int | None = None
    data: int | None = None
    source: str = "/proc: RssAnon, RssFile, Pss, VmHWM"
