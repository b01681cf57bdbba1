"""The identity of a backbone: SHA-256 over its checkpoint's tensors. `docs/backbone-id.md`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow_format.errors import FormatError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INDEX", "StoredTensor", "backbone_id", "memory_id", "stored_tensors"]

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20
_PIECE = 1 << 20

# torch's names of dtypes in the words of safetensors.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: name, dtype, shape, first byte, byte count."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def backbone_id(files: Sequence[Path], head: Sequence[str]) -> str:
    """ "sha256:" and the hex digest over all tensors but the head's.

    The preimage: for each tensor, sorted by the UTF-8 bytes of its name in the file, the line
    `name TAB dtype TAB shape LF` (shape as decimal numbers with commas between, dtype as
    safetensors writes it, such as F32), then its little-endian bytes.
    """
    tensors = (t for file in files for t in stored_tensors(file))
    return _digest(((t.name, t.dtype, t.shape, _bytes_of(t)) for t in tensors), head)


def memory_id(tensors: Mapping[str, Tensor], head: Sequence[str]) -> str:
    """The id that `tensors` would have if they were saved, tied ones once.

    Raises:
        UsageError: a tensor has a dtype that safetensors does not write.
    """
    return _digest(((name, *_parts(name, tensor)) for name, tensor in tensors.items()), head)


def _digest(
    tensors: Iterable[tuple[str, str, Sequence[int], Iterable[Any]]], head: Sequence[str]
) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, pieces in sorted(tensors, key=lambda part: part[0].encode()):
        if any(name.startswith(f"{layer}.") for layer in head):
            continue
        sizes = ",".join(str(size) for size in shape)
        digest.update(f"{name}\t{dtype}\t{sizes}\n".encode())
        for piece in pieces:
            digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def _parts(name: str, tensor: Tensor) -> tuple[str, Sequence[int], Iterable[Any]]:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _DTYPES:
        raise UsageError(f"weights must be of a dtype that safetensors has, got {name} in {kind}")
    return _DTYPES[kind], tuple(tensor.shape), _memory(tensor)


def _memory(tensor: Tensor) -> Iterator[Any]:
    """The tensor's bytes, little-endian; made when they are asked for."""
    import torch

    yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        FormatError: the header is broken, or points outside of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise FormatError(
                f"{path} must be a whole safetensors file, got a broken header: copy it again"
            )
        try:
            header = json.loads(stream.read(length))
            return [
                _entry(path, name, entry, 8 + length, size)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{path} must be a whole safetensors file, got a broken one: copy it again "
                f"({error})"
            ) from None


def _entry(
    path: Path, name: str, entry: dict[str, list[int]], base: int, size: int
) -> StoredTensor:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= size - base:
        raise FormatError(f"{path}: tensor {name} must lie in the file, which is cut short")
    shape = tuple(entry["shape"])
    return StoredTensor(path, name, str(entry["dtype"]), shape, base + start, end - start)


def _bytes_of(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left > 0:
            piece = stream.read(min(left, _PIECE))
            if not piece:
                raise FormatError(f"{tensor.path}: tensor {tensor.name} is cut short")
            left -= len(piece)
            yield piece
