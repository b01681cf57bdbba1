"""Reading `.npz` files, without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, UsageError
from regrow_format.files import no_file

__all__ = ["read_arrays"]

MAX_BYTES = 16 << 30


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz`, by name.

    Raises:
        UsageError: there is no such file.
        FormatError: it is no `.npz`, holds Python objects, or unpacks to more than 16 GiB.
    """
    if not path.is_file():
        raise UsageError(f"input must be an .npz file, got {path}: {no_file(path)}")
    try:
        with ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_BYTES:
            raise FormatError(f"{path} must unpack to at most {MAX_BYTES} bytes, got {unpacked}")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (BadZipFile, ValueError, OSError, EOFError, KeyError, MemoryError) as error:
        if "allow_pickle" in str(error):
            error = ValueError("it holds Python objects; save text with astype(str)")
        raise FormatError(
            f"{path} must be an .npz of plain arrays (numpy.savez writes one), got another: {error}"
        ) from None
