"""Tiny images of digits as PNG data URIs, written by hand: no image library is needed."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

__all__ = ["data_uri"]


def data_uri(image: Sequence[Sequence[int]]) -> str:
    """An image of ink [height, width], 0 (paper) to 255 (full ink), as a PNG of paper and ink."""
    height, width = len(image), len(image[0])
    rows = (bytes([0, *(255 - min(255, max(0, int(value))) for value in row)]) for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
