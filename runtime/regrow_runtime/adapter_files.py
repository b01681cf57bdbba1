"""The files of a store: each named by the hash of its content, durable before anything names it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

from regrow_format.adapter import MAX_FILE_BYTES, Adapter
from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import read_bytes, sync, write_bytes

__all__ = ["AdapterFiles"]

_ENDING = ".safetensors"


class AdapterFiles:
    """Adapter files in `objects`; a mark in `pending` for each that comes or goes.

    A mark is set before a file is written, and before an entry of the index is deleted. So `tidy`
    finds what is left over wherever a program was killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._objects, self._pending = folder / "objects", folder / "pending"

    def make_folders(self) -> None:
        """Make what is not there yet, durably."""
        for path in (self._objects, self._pending):
            path.mkdir(exist_ok=True)
        sync(self._folder)

    def path(self, digest: str) -> Path:
        """Where the content with this hash lies."""
        return self._objects / f"{digest}{_ENDING}"

    def mark(self, digest: str) -> None:
        """Have `tidy` look at a file."""
        (self._pending / digest).touch()

    def put(self, digest: str, data: bytes) -> None:
        """Make a file durable; it stays marked.

        Raises:
            RegrowError: what was written reads otherwise.
        """
        self.mark(digest)
        if not self._is_whole(digest):
            write_bytes(self.path(digest), data, scratch=self._pending)
        sync(self._objects)  # a process that wrote it before may have been killed just then
        if not self._is_whole(digest):
            raise RegrowError(f"{self.path(digest)} could not be written: it reads otherwise")

    def _is_whole(self, digest: str) -> bool:
        try:
            self._bytes(digest)
        except FormatError:
            return False
        return True

    def _bytes(self, digest: str) -> bytes:
        path = self.path(digest)
        try:
            if not S_ISREG(path.lstat().st_mode):
                raise FormatError(f"{path} must be a file, got a link: add the adapter again")
            data = read_bytes(path, limit=MAX_FILE_BYTES, what="an adapter")
        except (OSError, UsageError):
            raise FormatError(f"{path} is missing: add the adapter again") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise FormatError(
                f"{path}: content must have the hash in its name, got another: add it again"
            )
        return data

    def read(self, digest: str) -> Adapter:
        """The adapter; `FormatError` if the file is missing or not what was written."""
        return Adapter.from_bytes(self._bytes(digest), str(self.path(digest)))

    def are_tidy(self) -> bool:
        """Whether no file is marked."""
        return not os.listdir(self._pending)

    def tidy(self, is_named: Callable[[str], bool], *, everything: bool) -> None:
        """Remove files that no entry names: the marked ones, or any. Nobody may write meanwhile.

        Args:
            is_named: whether an entry names the content with this hash.
        """
        marks = os.listdir(self._pending)
        files = os.listdir(self._objects) if everything else [mark + _ENDING for mark in marks]
        for name in files:
            digest, ending = os.path.splitext(name)
            if ending == _ENDING and not is_named(digest):
                (self._objects / name).unlink(missing_ok=True)
        for mark in marks:
            (self._pending / mark).unlink(missing_ok=True)
