"""The adapters that a bundle keeps in RAM, and which of them is active."""

from __future__ import annotations

import itertools
import time

from regrow_format.errors import UsageError

from .slots import LoadedAdapter

__all__ = ["LoadedAdapters"]


class LoadedAdapters:
    """Loaded adapters by name, bounded in bytes: least recently used first out.

    Any number of threads may read. Whoever changes what is loaded or active holds a lock of his
    own, for a change is made of several steps.

    Args:
        limit: bytes that all of them may take; the active one and the newest stay beyond it.

    Attributes:
        active: the one that serves runs without names; None for the base. It may be loaded no more.
    """

    def __init__(self, limit: int) -> None:
        self.active: LoadedAdapter | None = None
        self._limit = limit
        self._by_name: dict[str, LoadedAdapter] = {}
        self._uses = itertools.count()

    def snapshot(self) -> dict[str, LoadedAdapter]:
        """Those that are loaded now, by name; it counts as no use of them."""
        return dict(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def find(self, name: str) -> LoadedAdapter | None:
        """The adapter of that name, which is used now; None if it is not loaded."""
        found = self._by_name.get(name)  # one look-up: another thread may unload it
        if found is not None:
            found.used, found.last_use = next(self._uses), time.time()
        return found

    def get(self, name: str) -> LoadedAdapter:
        """As `find`; `UsageError` if it is not loaded."""
        found = self.find(name)
        if found is None:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise UsageError(
                f"adapter must be resident ({known}), got {name!r}: load or swap it first"
            )
        return found

    def add(self, adapter: LoadedAdapter) -> None:
        """Keep it, and drop others that are too many bytes together."""
        adapter.used, adapter.last_use = next(self._uses), time.time()
        self._by_name[adapter.name] = adapter
        others = sorted(self._by_name.values(), key=lambda other: other.used)
        left = sum(other.nbytes for other in others) - self._limit
        for other in others:
            if left > 0 and other not in (adapter, self.active):
                del self._by_name[other.name]
                left -= other.nbytes

    def remove(self, name: str) -> None:
        """Drop it; `UsageError` if it is not loaded. If it is active it stays so."""
        self.get(name)
        del self._by_name[name]
