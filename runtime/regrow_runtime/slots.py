"""From an adapter to what the graph's slots take, for one adapter and for a batch of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from regrow_format.adapter import Adapter, HeadLayer, Probe
from regrow_format.basis import BasisCache
from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import read_bytes
from regrow_format.manifest import Manifest, Slot
from regrow_format.philox import key_of
from regrow_format.slot_kinds import SLOT_KINDS

from .slot_feeds import Feeds, slot_feeds

__all__ = [
    "HEAD_FILE",
    "Feeds",
    "LoadedAdapter",
    "expand",
    "load_head",
    "stack",
]

HEAD_FILE = "head.safetensors"
_MAX_HEAD_BYTES = 1 << 30


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that is expanded and in RAM: swapping to it changes one pointer.

    Attributes:
        feeds: graph input name to array [1, rows, columns], as `SLOT_KINDS` say.
        labels: class names, the adapter's own or the bundle's.
        used: when it was used last, counted in uses.
        probe: what the model gives with it, if its file says so.
        last_use: when it was activated or asked for last, in seconds of `time.time`.
    """

    name: str
    feeds: Feeds
    labels: tuple[str, ...]
    used: int = 0
    probe: Probe | None = None
    last_use: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that the arrays take."""
        return sum(array.nbytes for array in self.feeds.values())


def expand(adapter: Adapter, manifest: Manifest, basis: BasisCache, folder: Path) -> Feeds:
    """The feeds of an adapter that fits the bundle in `folder`; see `LoadedAdapter.feeds`.

    Raises:
        RegrowError: its numbers, finite each, are not so together, or it expands to gigabytes.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # found here, by name
        feeds = (
            slot_feeds(adapter, manifest, basis, folder)
            if manifest.seeded is None
            else _seeded_feeds(adapter, manifest.seeded.inputs)
        )
        # Targets are views of few arrays: these are looked at first, and by name only to blame one.
        wholes = {id(whole): whole for whole in map(_whole, feeds.values())}
        if not all(map(_is_finite, wholes.values())):
            for name, array in feeds.items():
                if not _is_finite(array):
                    raise RegrowError(
                        f"adapter: {name} must be finite when expanded, its scale is too large"
                    )
    if adapter.head is not None:
        for layer in adapter.head.layers:
            feeds.update(_head_feeds(layer, manifest, folder))
    return feeds


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    whole = array.base
    return whole if isinstance(whole, np.ndarray) and whole.dtype == array.dtype else array


def _is_finite(array: NDArray[Any]) -> bool:
    if array.dtype.kind != "f":
        return True
    # A finite sum of squares has finite parts only, and takes no array of flags. It may overflow.
    flat = array.reshape(-1)
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(array).all())


def _seeded_feeds(adapter: Adapter, inputs: Mapping[str, str]) -> Feeds:
    feeds: Feeds = {inputs["seed"]: np.array(key_of(adapter.seed), dtype=np.uint32)}
    for name, part in adapter.coefficients.items():
        feeds[inputs[name]] = part.values
        feeds[inputs[f"{name}.scale"]] = part.scale
    return feeds


def _head_feeds(layer: HeadLayer, manifest: Manifest, folder: Path) -> Feeds:
    slot = next((slot for slot in manifest.head_slots if slot.target == layer.name), None)
    if slot is None:
        raise UsageError(f"{layer.name} must be a head slot of the bundle, got none")
    parts = {"weight": layer.weight, "bias": layer.bias}
    fed = SLOT_KINDS[slot.kind].feed(slot, parts, folder)
    return {slot.inputs[part]: array[None] for part, array in fed.items()}


def load_head(folder: Path, manifest: Manifest) -> Feeds:
    """The backbone's own head as feeds, for batches in which only some samples have their own."""
    path = folder / HEAD_FILE
    try:
        tensors = load_safetensors(read_bytes(path, limit=_MAX_HEAD_BYTES, what="the base's head"))
    except SafetensorError as error:
        raise FormatError(f"{path} must be a whole safetensors file: {error}") from None
    feeds: Feeds = {}
    for slot in manifest.head_slots:
        wide, high = slot.in_features, slot.out_features
        weight = _head_tensor(tensors, f"{slot.target}.weight", (high, wide), path)
        bias = _head_tensor(tensors, f"{slot.target}.bias", (high,), path)
        feeds.update(_head_feeds(HeadLayer(slot.target, weight, bias), manifest, folder))
    return feeds


def _head_tensor(
    tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], path: Path
) -> NDArray[np.float32]:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
        raise FormatError(f"{path}: {name} must be float32 {list(shape)}")
    return tensor


def stack(
    residents: Sequence[LoadedAdapter | None], slots: Sequence[Slot], base_head: Feeds
) -> Feeds:
    """Feeds in which every sample of a batch has its own adapter, or None for the base.

    What a sample lacks is filled up with values that change nothing: ranks, deltas and biases with
    zeros, classes with zero weights and a bias of -inf.
    """
    used = {name for resident in residents if resident for name in resident.feeds}
    feeds: Feeds = {}
    for slot in slots:
        if used.isdisjoint(slot.inputs.values()):
            continue
        kind = SLOT_KINDS[slot.kind]
        for part, name in slot.inputs.items():
            found = [_fed(resident, name, base_head) for resident in residents]
            rows = [kind.empty(part, slot) if array is None else array[0] for array in found]
            feeds[name] = _stack_padded(rows, kind.padding(part))
    return feeds


def _fed(resident: LoadedAdapter | None, name: str, base_head: Feeds) -> NDArray[Any] | None:
    if resident is not None and name in resident.feeds:
        return resident.feeds[name]
    return base_head.get(name)


def _stack_padded(rows: Sequence[NDArray[Any]], fill: float) -> NDArray[Any]:
    shape = tuple(max(row.shape[axis] for row in rows) for axis in range(2))
    stacked = np.full((len(rows), *shape), fill, dtype=np.float32)
    for index, row in enumerate(rows):
        stacked[index, : row.shape[0], : row.shape[1]] = row
    return stacked
