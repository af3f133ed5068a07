"""CRC-32C, as Zarr v3's `crc32c` codec uses it (Castagnoli's polynomial, RFC 3720, appendix B.4)."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np

CRC_BYTES = 4

Bytes = bytes | bytearray | memoryview


def crc32c(data: Bytes, crc: int = 0) -> int:
    """Return the CRC-32C of what `crc` stands for followed by `data`."""
    if isinstance(data, bytes):
        return int(google_crc32c.extend(crc, data))
    view = np.frombuffer(data, np.uint8)
    view.flags.writeable = False  # the C function takes nothing that could be written to meanwhile
    return int(google_crc32c.extend(crc, view))


def crc_bytes(crc: int) -> bytes:
    """Return a checksum as it is stored: little-endian uint32."""
    return struct.pack("<I", crc)


def sealed(data: bytes) -> bytes:
    """Return `data` with its checksum behind it."""
    return data + crc_bytes(crc32c(data))


def unsealed(stored: bytes) -> memoryview | None:
    """Return what was sealed as `stored`, or None where the checksum is not that of the data."""
    view = memoryview(stored)
    data, crc = view[:-CRC_BYTES], view[-CRC_BYTES:]
    return data if crc_bytes(crc32c(data)) == crc else None
