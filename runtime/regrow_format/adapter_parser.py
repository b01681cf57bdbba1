"""From an adapter file's bytes to what it holds, everything checked before it is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .adapter_contents import (
    FORMAT,
    STORAGE,
    AdapterContents,
    Coefficients,
    Head,
    HeadLayer,
    Probe,
    Validated,
)
from .basis import PHILOX_SIGN, BasisSpec
from .errors import FormatError
from .fields import Fields, parse_json
from .methods import Method, get_method
from .quantize import packed_width, scale_shape, unpack
from .stored_tensors import StoredTensors
from .target_rows import MAX_FEATURES, targets_of

__all__ = ["parse_adapter"]

# Bounds of the format, far above any real adapter: they stop a hostile header, not a user.
_MAX_CLASSES = 1 << 20
_MAX_PROBE = 64
_FLOATS = ("F16", "F32")

A = TypeVar("A", bound=AdapterContents)


def parse_adapter(data: bytes, where: str, kind: type[A]) -> A:
    """Parse and check a file's bytes.

    Args:
        where: what errors call it.
        kind: the class to make.

    Raises:
        FormatError: it is broken, of another version, or its parts do not fit one another.
    """
    fields, tensors = _open(data, where)
    _check_version(fields)
    method = get_method(fields.take("method", str), where)
    storage = fields.choice("storage", tuple(STORAGE))
    group = fields.number("group", 8, MAX_FEATURES) if fields.has("group") else None
    config = method.check_config(fields.take("config", dict), where)
    targets = targets_of(fields.take("targets", list), where)
    basis = _basis(fields, method)
    adapter = kind(
        method=method.name,
        config=config,
        seed=_seed(fields),
        backbone_id=fields.take("backbone_id", str),
        targets=targets,
        coefficients={
            name: _coefficients(tensors, name, shape, storage, group)
            for name, shape in method.layout(config, targets).items()
        },
        storage=storage,
        basis=basis,
        head=_head(fields, tensors),
        validated=_validated(fields),
        user=_user(fields),
        group=group,
        stored_basis={
            name: tensors.take(name, dtypes, shape)
            for name, (dtypes, shape) in method.stored_basis(config, targets).items()
            if basis.kind == "stored"
        },
        extra=_extra(fields, tensors),
        probe=_probe(fields, tensors),
    )
    fields.done()
    tensors.done()
    method.check(adapter, where)
    return adapter


def _open(data: bytes, where: str) -> tuple[Fields, StoredTensors]:
    tensors = StoredTensors(data, where)
    size = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + size], f"{where}: header")
    metadata = header.take("__metadata__", dict, {})
    text = metadata.get("regrow")
    if not isinstance(text, str):
        raise FormatError(f"{where} must be a regrow adapter, got safetensors without its metadata")
    return parse_json(text, where), tensors


def _check_version(fields: Fields) -> None:
    version = fields.take("format", int)
    if version != FORMAT:
        raise FormatError(
            f"{fields.where}: format must be {FORMAT}, the version read here, got {version}; "
            "a newer regrow may read it"
        )


def _sorted(names: Sequence[str], where: str) -> Sequence[str]:
    """By their UTF-8 bytes, each once, and nothing that would disturb a terminal."""
    encoded = [name.encode() for name in names]
    if encoded != sorted(set(encoded)) or not all(name.isprintable() for name in names):
        raise FormatError(f"{where} must be sorted, each named once, in characters that print")
    return names


def _seed(fields: Fields) -> int:
    text = fields.take("seed", str)
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 2**64):
        raise FormatError(f"{fields.where}: seed must be a uint64 in a string, got {text!r:.40}")
    return int(text)


def _basis(fields: Fields, method: Method) -> BasisSpec:
    part = Fields(fields.take("basis", dict), f"{fields.where}: basis")
    kind, version = part.take("kind", str), part.take("version", int)
    if kind not in method.bases or version != PHILOX_SIGN.version:
        raise FormatError(
            f"{fields.where}: basis of {method.name} must be {' or '.join(method.bases)}, "
            f"version {PHILOX_SIGN.version}, got {kind!r:.40} version {version}"
        )
    spec = BasisSpec(kind, version, method.read_basis(kind, part))
    part.done()
    return spec


def _coefficients(
    tensors: StoredTensors, name: str, shape: tuple[int, int], storage: str, group: int | None
) -> Coefficients:
    rows, length = shape
    bits = STORAGE[storage]
    if bits < 8:
        packed = tensors.take(name, ("U8",), (rows, packed_width(length, bits)))
        values: NDArray[Any] = unpack(packed, length, bits)
    elif bits == 8:
        values = tensors.take(name, ("I8",), shape)
    else:
        values = tensors.take(name, ("F16" if bits == 16 else "F32",), shape).astype(np.float32)
    scale = tensors.take(f"{name}.scale", ("F32",), scale_shape(shape, group))
    return Coefficients(values, scale, group)


def _extra(fields: Fields, tensors: StoredTensors) -> dict[str, NDArray[Any]]:
    names = _sorted(fields.strings("extra"), f"{fields.where}: extra")
    shapes = {name: tensors.shape(f"extra.{name}", range(9)) for name in names}
    return {name: tensors.take(f"extra.{name}", _FLOATS, shapes[name]) for name in names}


def _probe(fields: Fields, tensors: StoredTensors) -> Probe | None:
    part = fields.optional("probe")
    if part is None:
        return None
    tolerance, used = part.take("tolerance", float), part.take("input", str, "")
    part.done()
    shape = tensors.shape("probe", range(1, 2))
    if tolerance < 0 or not 1 <= shape[0] <= _MAX_PROBE:
        raise FormatError(
            f"{fields.where}: probe must have 1 to {_MAX_PROBE} numbers and a tolerance that is "
            f"not negative, got {shape[0]} and {tolerance}"
        )
    return Probe(tensors.take("probe", ("F16",), shape), tolerance, used)


def _head(fields: Fields, tensors: StoredTensors) -> Head | None:
    part = fields.optional("head")
    if part is None:
        return None
    labels, names = part.strings("labels"), part.strings("layers")
    part.done()
    if not names or not 0 < len(labels) <= _MAX_CLASSES:
        raise FormatError(f"{fields.where}: head must have layers and labels")
    wide = any(tensors.holds(f"head.{name}.weight", "F32") for name in names)
    layers = tuple(_head_layer(tensors, name) for name in names)
    if layers[-1].bias.shape != (len(labels),):
        raise FormatError(
            f"{fields.where}: head must have one output per label, "
            f"got {layers[-1].bias.size} outputs and {len(labels)} labels"
        )
    return Head(layers, labels, "fp32" if wide else "fp16")


def _head_layer(tensors: StoredTensors, name: str) -> HeadLayer:
    shape = tensors.shape(f"head.{name}.weight", range(2, 3))
    weight = tensors.take(f"head.{name}.weight", _FLOATS, shape).astype(np.float32)
    bias = tensors.take(f"head.{name}.bias", _FLOATS, shape[:1]).astype(np.float32)
    return HeadLayer(name, weight, bias)


def _validated(fields: Fields) -> tuple[Validated, ...]:
    found = []
    for part in fields.objects("validated"):
        found.append(
            Validated(
                part.take("variant", str),
                part.take("metric", str),
                part.take("before", float),
                part.take("after", float),
                part.number("samples", 0, 2**31),
            )
        )
        part.done()
    return tuple(found)


def _user(fields: Fields) -> dict[str, str]:
    user = fields.take("user", dict, {})
    if not all(isinstance(value, str) for value in user.values()):
        raise FormatError(f"{fields.where}: user metadata must be strings")
    return user
