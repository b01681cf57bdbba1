"""The adapter file: one safetensors file with the method, the seed, and a few numbers.

`docs/adapter-format.md` describes it for other clients. Everything is checked before anything is
allocated: sizes against the header, shapes against what the method's config says, finite values.
"""

from __future__ import annotations

from pathlib import Path

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
from .adapter_parser import parse_adapter
from .errors import FormatError
from .files import read_bytes, write_bytes
from .target_rows import Target

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

MAX_FILE_BYTES = 1 << 30  # far above any real adapter: it stops a hostile file, not a user


class Adapter(AdapterContents):
    """An adapter, with its file. Its fields are those of `AdapterContents`."""

    def to_bytes(self) -> bytes:
        """The file's bytes; the same adapter always gives the same ones.

        Raises:
            RegrowError: the file could not be read again, such as with a number that is not finite.
        """
        from .adapter_writer import adapter_bytes  # not above: a device that reads never needs it

        data = adapter_bytes(self)
        if self.from_bytes(data).targets != tuple(self.targets):
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
        return parse_adapter(data, where, cls)

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
