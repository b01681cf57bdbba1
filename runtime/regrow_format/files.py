"""Writing so that nothing is lost: a temporary neighbour first, then one rename.

What only writing needs is imported there: loading it takes longer than loading the runtime may.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import FormatError, RegrowError, UsageError

__all__ = [
    "check_output",
    "new_folder",
    "no_file",
    "no_folder",
    "read_bytes",
    "sha256_file",
    "sync",
    "write_bytes",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What stands in a file that marks a folder as regrow's.
_KEYS = {"manifest.json": "backbone_id", "regrow.json": "backbone_id", "report.json": "regrow"}


def check_output(path: Path, *, force: bool, marker: str | None = None) -> None:
    """Raise `UsageError` if `path` cannot become an output; call it before any long work.

    What exists needs `force`. Even then a folder is replaced only by one of its kind, or if it is
    empty: a slip of the pen must not cost somebody's models.

    Args:
        marker: the file that tells the kind of folder that will be written, such as
            manifest.json; None if the output is a file.
    """
    if path.is_dir() and marker is None:
        raise UsageError(f"output must be a file, got {path}: it is a folder")
    if path.exists() and not force:
        raise UsageError(
            f"output must be a new path, got {path}, which exists (--force replaces it)"
        )
    if marker and path.is_dir() and any(path.iterdir()) and not _is_ours(path / marker):
        raise UsageError(
            f"output must be a new path or a folder with {marker} that regrow wrote, got {path}: "
            "remove it yourself if nothing in it is needed"
        )
    if not path.absolute().parent.is_dir():
        found = no_folder(path.absolute().parent)
        raise UsageError(f"output must lie in an existing folder, got {path}: {found}")


def _is_ours(marker: Path) -> bool:
    """Others write files of these names too: every web app has a manifest.json."""
    if not marker.is_file():
        return False
    key = _KEYS.get(marker.name)
    return key is None or f'"{key}":'.encode() in marker.read_bytes()[: 1 << 26]


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    if os.name == "nt" and path.is_dir():  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, *, scratch: Path | None = None) -> None:
    """Write a file whole or not at all; an existing one is replaced in one step.

    The temporary file is in the folder `scratch`, by default beside `path`.
    """
    import tempfile

    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", dir=scratch or path.absolute().parent
        )
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise RegrowError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _exchange(fresh: Path, path: Path, old: Path) -> None:
    """Put `fresh` in the place of `path`; if that fails, what was there comes back."""
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(fresh, path)
    except BaseException as error:  # an interrupt too
        if old.exists() and not path.exists():
            os.replace(old, path)
        if not isinstance(error, OSError):
            raise
        raise RegrowError(f"{path} could not be written: {error.strerror or error}") from error


@contextmanager
def new_folder(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        UsageError: as `check_output`.
        RegrowError: the folder could not be written.
    """
    import shutil
    import tempfile

    path = Path(path).absolute()
    check_output(path, force=force, marker=marker)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise RegrowError(f"{path} could not be written: {error.strerror or error}") from error
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        for name in fresh.rglob("*"):
            if name.is_file():
                os.chmod(name, 0o644)  # some libraries write files that only their owner may read
                sync(name)
        _exchange(fresh, path, scratch / "old")
    except SafetensorError as error:  # how its writer says that the disk is full
        raise RegrowError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RegrowError(
            f"{path} could not be written: {error.strerror}: free space, or write elsewhere"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_bytes(path: Path, *, limit: int, what: str) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        UsageError: there is no such file.
        FormatError: it is larger than `limit`, or cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{what} must be a file, got {path}: {no_file(path)}")
    try:
        with path.open("rb") as stream:
            # No more than the file has: `read` allocates what it is asked for.
            data = stream.read(min(limit, os.fstat(stream.fileno()).st_size) + 1)
    except OSError as error:
        raise FormatError(f"{path} could not be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise FormatError(f"{path} must be at most {limit} bytes for {what}, got more")
    return data


def no_file(path: Path) -> str:
    """What is at `path`, where a file should be and none is."""
    return "it is a folder" if path.is_dir() else "no such file"


def no_folder(path: Path) -> str:
    """What is at `path`, where a folder should be and none is."""
    return "it is a file" if path.is_file() else "no such folder"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
