"""A painter for layertap that writes a sheet as characters."""

from __future__ import annotations

from typing import Any

import numpy as np
from layertap.capture.errors import DrawError
from layertap.render import Sheet
from layertap.render.paint_pillow import PillowPainter

_SHADES = " .:-=+*#%@"
_WIDE, _HIGH = 4, 8  # pixels of a character


class AsciiPainter:
    """Paints a sheet as text: darker characters for darker pixels."""

    formats = ("txt",)

    def array(self, sheet: Sheet) -> Any:
        """Return the sheet as RGB, shape (height, width, 3)."""
        return PillowPainter().array(sheet)

    def encode(self, sheet: Sheet, format: str) -> bytes:
        """Return the bytes of a file."""
        if format != "txt":
            raise DrawError(f"the ascii painter writes txt, not {format}")
        grey = self.array(sheet).mean(2)
        height, width = grey.shape[0] // _HIGH, grey.shape[1] // _WIDE
        cells = grey[: height * _HIGH, : width * _WIDE].reshape(height, _HIGH, width, _WIDE).mean((1, 3))
        shade = ((255 - cells) / 256 * len(_SHADES)).astype(np.intp)
        return "\n".join("".join(_SHADES[i] for i in line) for line in shade).encode() + b"\n"
