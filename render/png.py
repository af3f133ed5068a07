"""Writes palette PNGs.

Pillow's encoder cannot choose a filter line by line. Magnified pictures repeat each line: where a line equals
the one above, PNG's "up" filter makes it zeros, which zlib's run-length strategy swallows. Of 512 maps at
factor 2 to 9 this makes a file of a quarter to a half of the size in less time.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BITS, _PALETTE = 8, 3
_UP = 2


def palette_png(entries: NDArray[np.uint8], colours: NDArray[np.uint8]) -> bytes:
    """Return a PNG file of palette entries, shape (height, width), in `colours`, RGB, shape (256, 3)."""
    height, width = entries.shape
    repeats = np.zeros(height, np.bool_)
    repeats[1:] = (entries[1:] == entries[:-1]).all(axis=1)
    lines = np.zeros((height, 1 + width), np.uint8)
    lines[repeats, 0] = _UP
    lines[~repeats, 1:] = entries[~repeats]
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    data = deflate.compress(lines.data) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, _EIGHT_BITS, _PALETTE, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", colours.tobytes()), (b"IDAT", data), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
