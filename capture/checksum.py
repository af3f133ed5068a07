"""CRC-32C, as Zarr v3's `crc32c` codec uses it (Castagnoli's polynomial, RFC 3720, appendix B.4).

The package `crc32c` gives up the interpreter's lock for more than 32 KiB. One that keeps it (google-crc32c is
as fast) lets the thread that runs the model wait for Python's switch interval, 5 ms, again and again.
"""

from __future__ import annotations

import struct

import crc32c as _crc32c

CRC_BYTES = 4

Bytes = bytes | bytearray | memoryview


def crc32c(data: Bytes, crc: int = 0) -> int:
    """Return the CRC-32C of what `crc` stands for followed by `data`."""
    return int(_crc32c.crc32c(data, crc))


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
