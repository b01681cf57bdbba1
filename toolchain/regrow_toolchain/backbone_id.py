"""The identity of a backbone: SHA-256 over its checkpoint's tensors. `docs/backbone-id.md`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regrow_runtime.errors import FormatError

__all__ = ["INDEX", "StoredTensor", "backbone_id", "stored_tensors"]

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20
_PIECE = 1 << 20


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
    digest = hashlib.sha256()
    tensors = sorted(
        (t for file in files for t in stored_tensors(file)), key=lambda t: t.name.encode()
    )
    for tensor in tensors:
        if any(tensor.name.startswith(f"{layer}.") for layer in head):
            continue
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{tensor.name}\t{tensor.dtype}\t{shape}\n".encode())
        for piece in _bytes_of(tensor):
            digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        FormatError: the header is broken, or points outside of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise FormatError(f"{path} must be a whole safetensors file, got a broken header")
        try:
            header = json.loads(stream.read(length))
            return [
                _entry(path, name, entry, 8 + length, size)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path} must be a whole safetensors file: {error}") from None


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
