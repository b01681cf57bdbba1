"""Inputs to time a model with: the bundle's probe, cut and repeated, or made from the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.fields import parse_json
from regrow_format.files import read_bytes
from regrow_format.manifest import Manifest, TensorSpec

__all__ = ["Feeds", "has_length", "make_feeds", "probe_length"]

Feeds = dict[str, NDArray[Any]]

_PROBE = "probe.safetensors"
_MOST_BYTES = 1 << 30
_LENGTH, _SIDE = 16, 32  # of what neither the manifest nor the probe tells


def make_feeds(folder: Path, manifest: Manifest, batch: int, length: int | None) -> Feeds:
    """An array per input of the first graph.

    Args:
        length: of the sequence; None takes the probe's, or what is fixed.

    Raises:
        UsageError: the model's shapes do not allow it.
    """
    specs = manifest.graphs[0].inputs
    _check(specs, batch, length)
    probe, config = _probe(folder), _config(folder)
    wanted = {spec.name: _shape(spec, probe, config, batch, length) for spec in specs}
    total = sum(
        np.dtype(spec.dtype).itemsize * np.prod(wanted[spec.name], dtype=float) for spec in specs
    )
    if total > _MOST_BYTES:
        raise UsageError(f"inputs must be at most 1 GiB, got {total / 2**30:.1f}: a smaller batch")
    return {spec.name: _array(spec, wanted[spec.name], probe, config) for spec in specs}


def has_length(manifest: Manifest) -> bool:
    """Whether an input has a sequence whose length may vary."""
    return any(_length_axis(spec) is not None for spec in manifest.graphs[0].inputs)


def probe_length(folder: Path, manifest: Manifest) -> int | None:
    """The length that `make_feeds` takes by default; None if the model has none."""
    probe, config = _probe(folder), _config(folder)
    for spec in manifest.graphs[0].inputs:
        if (axis := _length_axis(spec)) is not None:
            return _shape(spec, probe, config, 1, None)[axis]
    return None


def _length_axis(spec: TensorSpec) -> int | None:
    """Of ids and masks it is axis 1; of others, the one whose name says so."""
    for axis, dim in enumerate(spec.shape):
        if axis and isinstance(dim, str):
            named = any(word in dim.lower() for word in ("seq", "length", "time", "frames"))
            if named or (axis == 1 and spec.dtype.startswith("int")):
                return axis
    return None


def _check(specs: tuple[TensorSpec, ...], batch: int, length: int | None) -> None:
    axes = {spec.name: _length_axis(spec) for spec in specs}
    told = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
    if length is not None and all(axis is None for axis in axes.values()):
        raise UsageError(
            f"length must be left out for a model without sequences of any length, got {length}: "
            f"its inputs are {told}"
        )
    fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    if fixed - {batch}:
        raise UsageError(
            f"batch must be {min(fixed - {batch})} for this model, got {batch}: {told}"
        )


def _probe(folder: Path) -> Feeds:
    """What the bundle was checked with, if it is there and can be read."""
    if not (folder / _PROBE).is_file():
        return {}
    try:
        return load_safetensors(read_bytes(folder / _PROBE, limit=_MOST_BYTES, what="a probe"))
    except (SafetensorError, FormatError):
        return {}


def _config(folder: Path) -> dict[str, int]:
    """Numbers of the model's config.json."""
    path = folder / "config.json"
    try:
        fields = parse_json(read_bytes(path, limit=1 << 24, what="a config"), str(path))
    except RegrowError:
        return {}
    found = {name: fields.plain(name, int) for name in fields.names()}
    return {name: value for name, value in found.items() if value is not None}


def _shape(
    spec: TensorSpec, probe: Feeds, config: Mapping[str, int], batch: int, length: int | None
) -> tuple[int, ...]:
    known, axis = probe.get(spec.name), _length_axis(spec)
    like = known.shape if known is not None and known.ndim == len(spec.shape) else None
    shape = []
    for number, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            shape.append(dim)
        elif number == 0:
            shape.append(batch)
        elif number == axis and length is not None:
            shape.append(length)
        elif like is not None:
            shape.append(like[number])
        else:
            shape.append(_guess(dim, len(spec.shape), number, axis, config))
    return tuple(shape)


def _guess(dim: str, rank: int, number: int, axis: int | None, config: Mapping[str, int]) -> int:
    if number == axis:
        return _LENGTH
    if rank == 4 and number == 1:
        return config.get("num_channels", 3)
    return config.get("image_size", _SIDE)


def _array(
    spec: TensorSpec, shape: tuple[int, ...], probe: Feeds, config: Mapping[str, int]
) -> NDArray[Any]:
    """The probe's numbers, repeated and cut; without a probe, drawn with a fixed seed."""
    dtype, known = np.dtype(spec.dtype), probe.get(spec.name)
    if known is not None and known.ndim == len(shape) and known.size:
        for axis, wanted in enumerate(shape):
            known = np.take(known, np.arange(wanted) % known.shape[axis], axis=axis)
        return np.ascontiguousarray(known.astype(dtype))
    draw = np.random.default_rng(0)
    if dtype.kind == "f":
        return draw.standard_normal(shape).astype(dtype)
    if "mask" in spec.name or dtype.kind == "b":
        return np.ones(shape, dtype)
    if "position" in spec.name:
        return np.ascontiguousarray(np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape))
    if "type" in spec.name:
        return np.zeros(shape, dtype)
    return draw.integers(0, max(1, config.get("vocab_size", 2)), shape).astype(dtype)
