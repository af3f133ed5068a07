"""What tells one model's weights from another's: a checksum over their names, types, shapes and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksum import crc32c


def fingerprint(weights: Iterable[tuple[str, str, tuple[int, ...], NDArray[Any]]]) -> str:
    """Return half of the SHA-256 over a line for each weight: name, type, shape, and CRC-32C of its bytes.

    Args:
        weights: of each its name, the framework's word for its type, its shape, and its values on the host;
            they are asked for one after the other.
    """
    digest = hashlib.sha256()
    for name, dtype, shape, values in weights:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        crc = crc32c(data.data) if data.size else 0
        digest.update(f"{name}:{dtype}:{shape}:{crc:08x}\n".encode())
    return digest.hexdigest()[:32]
