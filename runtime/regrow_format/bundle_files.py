"""The files of a bundle: their entries in the manifest, and are they what was exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from .errors import FormatError
from .fields import Fields
from .files import sha256_file
from .record import Record

__all__ = ["FileEntry", "check_files", "parse_files"]

_MAX_PATH = 255


class FileEntry(Record):
    """Size in bytes and hex SHA-256 of a file of the bundle."""

    size: int
    sha256: str


def parse_files(fields: Fields) -> dict[str, FileEntry]:
    """Read and check the manifest's `files`: every path stays in the bundle."""
    part = Fields(fields.take("files", dict), f"{fields.where}: files")
    found = {}
    for name in part.names():
        _check_name(name, part.where)
        entry = Fields(part.take(name, dict), f"{part.where}: {name}")
        found[name] = FileEntry(entry.number("size", 0, 2**53), entry.take("sha256", str))
        entry.done()
    return found


def _check_name(name: str, where: str) -> None:
    """A path of the bundle stays in the bundle."""
    path = PurePosixPath(name)
    if (
        not 0 < len(name) <= _MAX_PATH
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or ":" in name
    ):
        raise FormatError(f"{where}: a file must lie in the bundle, got {name!r:.80}")


def check_files(folder: Path, files: Mapping[str, FileEntry], *, hashes: bool) -> None:
    """Compare every file's size, and with `hashes` its content, to its entry.

    Raises:
        FormatError: a file is missing or not the one that was exported.
    """
    for name, entry in files.items():
        path = folder / name
        if _is_linked(folder, name):
            raise FormatError(f"{path} must be a file of the bundle, got a link: copy the file")
        if not path.is_file():
            raise FormatError(f"{folder}: {name} is missing; export the bundle again")
        size = path.stat().st_size
        if size != entry.size:
            raise FormatError(f"{path} must have {entry.size} bytes, got {size}: copy it again")
        if hashes and sha256_file(path) != entry.sha256:
            raise FormatError(f"{path}: content must have the manifest's SHA-256, got another")


def _is_linked(folder: Path, name: str) -> bool:
    """Whether the file, or a folder between it and the bundle, is a symbolic link."""
    parts = (PurePosixPath(name), *PurePosixPath(name).parents[:-1])
    return any((folder / part).is_symlink() for part in parts)
