"""The adapter file: one safetensors file with the method, the seed, and a few numbers.

`docs/adapter-format.md` describes it for other clients. Everything is checked before anything is
allocated: sizes against the header, shapes against what the method's config says, finite values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_safetensors

from .adapter_contents import (
    STORAGE,
    AdapterContents,
    Coefficients,
    Head,
    HeadLayer,
    Probe,
    Validated,
    narrow,
)
from .basis import PHILOX_SIGN, BasisSpec
from .errors import FormatError
from .fields import Fields, dump_json, parse_json
from .files import read_bytes, write_bytes
from .methods import Method, get_method
from .philox import check_seed
from .quantize import pack, packed_width, scale_shape, unpack
from .target_rows import MAX_FEATURES, Target, target_rows, targets_of

__all__ = [
    "FORMAT",
    "MAX_FILE_BYTES",
    "STORAGE",
    "Adapter",
    "Coefficients",
    "Head",
    "HeadLayer",
    "Probe",
    "Target",
    "Validated",
]

FORMAT = 1

# Bounds of the format, far above any real adapter: they stop a hostile header, not a user.
MAX_FILE_BYTES = 1 << 30
_MAX_CLASSES = 1 << 20
_MAX_PROBE = 64

_DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "U32": "<u4"}
_FLOATS = ("F16", "F32")


class Adapter(AdapterContents):
    """An adapter, with its file. Its fields are those of `AdapterContents`."""

    def to_bytes(self) -> bytes:
        """The file's bytes; the same adapter always gives the same ones.

        Raises:
            RegrowError: the file could not be read again, such as with a number that is not finite.
        """
        tensors: dict[str, NDArray[Any]] = dict(self.stored_basis)
        for name, part in self.coefficients.items():
            tensors[name] = _stored(part.values, self.storage)
            tensors[f"{name}.scale"] = part.scale
        if self.head:
            for layer in self.head.layers:
                tensors[f"head.{layer.name}.weight"] = _stored(layer.weight, self.head.storage)
                tensors[f"head.{layer.name}.bias"] = _stored(layer.bias, self.head.storage)
        tensors.update({f"extra.{name}": array for name, array in self.extra.items()})
        if self.probe:
            tensors["probe"] = self.probe.expected
        data = save_safetensors(tensors, {"regrow": dump_json(_metadata(self))})
        if _parse(data, "adapter").targets != tuple(self.targets):
            raise FormatError("adapter: targets must be sorted by the UTF-8 bytes of their names")
        return data

    def save(self, path: str | Path) -> int:
        """Write the file atomically; returns its size in bytes."""
        data = self.to_bytes()
        write_bytes(Path(path), data)
        return len(data)

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "adapter") -> Adapter:
        """Parse and check; raises `FormatError` with `where` in its message."""
        return _parse(data, where)

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read, parse and check a file."""
        path = Path(path)
        data = read_bytes(path, limit=MAX_FILE_BYTES, what="an adapter")
        return cls.from_bytes(data, str(path))

    def digest(self) -> str:
        """Hex SHA-256 of the file's bytes."""
        import hashlib  # not above: it loads OpenSSL, for milliseconds

        return hashlib.sha256(self.to_bytes()).hexdigest()


def _stored(values: NDArray[Any], storage: str) -> NDArray[Any]:
    bits = STORAGE[storage]
    if bits < 8:
        return pack(values, bits)
    return narrow(values, {8: np.int8, 16: np.float16, 32: np.float32}[bits])


def _metadata(adapter: Adapter) -> dict[str, Any]:
    data: dict[str, Any] = {
        "format": FORMAT,
        "method": adapter.method,
        "config": dict(adapter.config),
        "seed": str(check_seed(adapter.seed)),  # a string: JavaScript rounds large numbers
        "basis": {
            "kind": adapter.basis.kind,
            "version": adapter.basis.version,
            **adapter.basis.fields,
        },
        "backbone_id": adapter.backbone_id,
        "storage": adapter.storage,
        "targets": target_rows(adapter.targets),
    }
    if adapter.group is not None:
        data["group"] = adapter.group
    if adapter.extra:
        data["extra"] = sorted(adapter.extra, key=str.encode)
    if adapter.probe:
        named = {"input": adapter.probe.input} if adapter.probe.input else {}
        data["probe"] = {"tolerance": adapter.probe.tolerance, **named}
    if adapter.head:
        names = [layer.name for layer in adapter.head.layers]
        data["head"] = {"layers": names, "labels": list(adapter.head.labels)}
    if adapter.validated:
        data["validated"] = [vars(v) for v in adapter.validated]
    if adapter.user:
        data["user"] = dict(adapter.user)
    return data


def _parse(data: bytes, where: str) -> Adapter:
    fields, tensors = _open(data, where)
    _check_version(fields)
    method = get_method(fields.take("method", str), where)
    storage = fields.choice("storage", tuple(STORAGE))
    group = fields.number("group", 8, MAX_FEATURES) if fields.has("group") else None
    config = method.check_config(fields.take("config", dict), where)
    targets = targets_of(fields.take("targets", list), where)
    basis = _basis(fields, method)
    adapter = Adapter(
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


class _Tensors:
    """The tensors of a file; each is taken once, with the dtype and shape that it must have."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            self._left: dict[str, dict[str, Any]] = dict(deserialize(data))  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            if len(data) > 8 and data[8:9] != b"{":  # where the header of every such file begins
                raise FormatError(
                    f"{where} must be a whole safetensors file, got another kind of file, which is "
                    "no regrow adapter: give what regrow adapt or import wrote"
                ) from None
            raise FormatError(
                f"{where} must be a whole safetensors file, got a broken one: copy it again "
                f"({error})"
            ) from None

    def take(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        dtype, found = self._entry(name)["dtype"], tuple(self._entry(name)["shape"])
        if dtype not in dtypes or found != shape:
            raise FormatError(
                f"{self.where}: tensor {name} must be {'/'.join(dtypes)} {list(shape)}, "
                f"got {dtype} {list(found)}"
            )
        entry = self._left.pop(name)
        values = np.frombuffer(entry["data"], dtype=_DTYPES[dtype]).reshape(shape)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FormatError(f"{self.where}: tensor {name} must be finite, got NaN or infinity")
        return values

    def shape(self, name: str, dimensions: range) -> tuple[int, ...]:
        """Of a tensor that has so many dimensions."""
        shape = tuple(self._entry(name)["shape"])
        if len(shape) not in dimensions:
            least = "" if len(dimensions) == 1 else "at most "
            raise FormatError(
                f"{self.where}: dimensions of tensor {name} must be {least}{dimensions[-1]}, "
                f"got {len(shape)}"
            )
        return shape

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._left:
            raise FormatError(f"{self.where}: tensor {name} is missing")
        return self._left[name]

    def holds(self, name: str, dtype: str) -> bool:
        entry = self._left.get(name)
        return entry is not None and entry["dtype"] == dtype

    def done(self) -> None:
        if self._left:
            raise FormatError(f"{self.where}: unknown tensors {', '.join(sorted(self._left))}")


def _open(data: bytes, where: str) -> tuple[Fields, _Tensors]:
    tensors = _Tensors(data, where)
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
    tensors: _Tensors, name: str, shape: tuple[int, int], storage: str, group: int | None
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


def _extra(fields: Fields, tensors: _Tensors) -> dict[str, NDArray[Any]]:
    names = _sorted(fields.strings("extra"), f"{fields.where}: extra")
    shapes = {name: tensors.shape(f"extra.{name}", range(9)) for name in names}
    return {name: tensors.take(f"extra.{name}", _FLOATS, shapes[name]) for name in names}


def _probe(fields: Fields, tensors: _Tensors) -> Probe | None:
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


def _head(fields: Fields, tensors: _Tensors) -> Head | None:
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


def _head_layer(tensors: _Tensors, name: str) -> HeadLayer:
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
