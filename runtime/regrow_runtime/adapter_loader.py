"""From a file, an adapter in memory or a blend to an adapter that is ready to be activated."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path

from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import UsageError
from regrow_format.manifest import Manifest

from .fit import check_fit
from .health import SwapStats
from .loaded_adapters import LoadedAdapters
from .mixed_batches import BaseHead
from .slots import LoadedAdapter, expand

__all__ = ["AdapterLoader", "Source"]

# A file, an adapter in memory, or a blend: weights by the names of loaded adapters.
Source = str | Path | Adapter | Mapping[str, float]


class AdapterLoader:
    """Reads, checks and expands adapters for a bundle; keeps none of them.

    Args:
        basis: what was made of bases, kept between adapters.
        loaded: where the parts of a blend are found by name.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        basis: BasisCache,
        loaded: LoadedAdapters,
        base_head: BaseHead,
    ) -> None:
        self._folder, self._manifest, self._basis = folder, manifest, basis
        self._loaded, self._base_head = loaded, base_head

    def load(
        self, source: Source, name: str | None, *, any_backbone: bool = False, scale: float = 1.0
    ) -> tuple[LoadedAdapter, SwapStats]:
        """The adapter, and what it cost; arguments and errors are those of `Bundle.load`."""
        start, scale = time.perf_counter(), _as_weight(scale, "scale")
        if isinstance(source, Mapping):
            weights = {key: _as_weight(w, f"weight of {key}") for key, w in source.items()}
            return self._blend({key: scale * w for key, w in weights.items()}, name, start)
        adapter, name = _read(source, name)
        read = time.perf_counter()
        check_fit(adapter, self._manifest, any_backbone=any_backbone)
        checked = time.perf_counter()
        misses = self._basis.misses
        loaded = self._expand(adapter, name, scale)
        end = time.perf_counter()
        return loaded, SwapStats(
            kind="cached" if self._basis.misses == misses else "cold",
            name=name,
            total_ms=(end - start) * 1e3,
            read_ms=(read - start) * 1e3,
            check_ms=(checked - read) * 1e3,
            expand_ms=(end - checked) * 1e3,
            resident_bytes=loaded.nbytes,
        )

    def _expand(self, adapter: Adapter, name: str, scale: float) -> LoadedAdapter:
        feeds = expand(adapter, self._manifest, self._basis, self._folder)
        labels = adapter.head.labels if adapter.head else self._manifest.labels
        loaded = LoadedAdapter(name, feeds, labels, probe=adapter.probe)
        if scale == 1:
            return loaded
        from .blend import blend  # few programs need it

        return blend(name, [(loaded, scale)], self._manifest, {})

    def _blend(
        self, weights: Mapping[str, float], name: str | None, start: float
    ) -> tuple[LoadedAdapter, SwapStats]:
        if name is None:
            raise UsageError("name must be given with a blend, got None")
        if name in weights:
            raise UsageError(f"name of a blend must not be that of one of its adapters, got {name}")
        parts = [(self._loaded.get(key), weight) for key, weight in weights.items()]
        head = self._base_head.feeds([part for part, _ in parts])
        from .blend import blend

        loaded = blend(name, parts, self._manifest, head)
        total = (time.perf_counter() - start) * 1e3
        return loaded, SwapStats("blend", name, total, resident_bytes=loaded.nbytes)


def _read(source: str | Path | Adapter, name: str | None) -> tuple[Adapter, str]:
    if isinstance(source, Adapter):
        if name is None:
            raise UsageError("name must be given with an adapter in memory, got None")
        return source, name
    return Adapter.load(source), name or Path(source).stem


def _as_weight(weight: object, what: str) -> float:
    """The weight as a float; `UsageError` if it is no finite number."""
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise UsageError(f"{what} must be a finite number, got {weight!r:.40}")
    return float(weight)
