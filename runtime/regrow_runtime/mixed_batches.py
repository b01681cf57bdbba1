"""Batches in which every sample has its own adapter, or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regrow_format.errors import UsageError
from regrow_format.manifest import Manifest

from .loaded_adapters import LoadedAdapters
from .slots import Feeds, LoadedAdapter, load_head, stack

__all__ = ["BaseHead", "MixedBatches"]


class BaseHead:
    """The backbone's own head, for mixes with adapters that have heads; its file is read once."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._inputs = {name for slot in manifest.head_slots for name in slot.inputs.values()}
        self._feeds: Feeds | None = None

    def feeds(self, adapters: Sequence[LoadedAdapter | None]) -> Feeds:
        """What the head's slots take from the base; empty unless some of `adapters` have a head
        and others have none.
        """
        with_head = [bool(one and self._inputs & one.feeds.keys()) for one in adapters]
        if not any(with_head) or all(with_head):
            return {}
        if self._feeds is None:
            self._feeds = load_head(self._folder, self._manifest)
        return self._feeds


class MixedBatches:
    """What a bundle's slots take for a batch with an adapter per sample."""

    def __init__(self, manifest: Manifest, loaded: LoadedAdapters, base_head: BaseHead) -> None:
        self._manifest, self._loaded, self._base_head = manifest, loaded, base_head

    def adapters(
        self, names: Sequence[str | None], samples: set[int]
    ) -> list[LoadedAdapter | None]:
        """The loaded adapter of each sample, None for the base.

        Args:
            samples: the sizes of the batch, which must be one.

        Raises:
            UsageError: the bundle takes one adapter for all samples, a name is not loaded, or
                there is not one for each sample.
        """
        self._check_slots()
        if samples != {len(names)}:
            raise UsageError(
                f"adapters must be one per sample ({sorted(samples)}), got {len(names)}"
            )
        return [None if name is None else self._loaded.get(name) for name in names]

    def feeds(self, adapters: Sequence[LoadedAdapter | None]) -> Feeds:
        """Graph input name to array, the samples first."""
        return stack(adapters, self._manifest.slots, self._base_head.feeds(adapters))

    def _check_slots(self) -> None:
        if self._manifest.mode != "swappable":
            raise UsageError(
                f"adapters per sample need a swappable bundle, got {self._manifest.mode}"
            )
        if fixed := next((slot for slot in self._manifest.slots if slot.fixed), None):
            raise UsageError(
                "adapters per sample need slots whose n is the batch size, got fixed ones (such as "
                f"{fixed.target}, {fixed.kind}): run the samples of each adapter by themselves"
            )
