"""Colour maps as small tables, and what is drawn where a value has no colour.

A palette has 256 entries, so that a picture of it is one byte a pixel and goes into a PNG as it is:

    0..230    the colour map; their number is odd, so that a diverging map has an entry for exactly zero
    231..246  greys from black to white, for text and the page
    247..253  marks: values and channels that the colour map must not show as if they were ordinary

Sources: viridis, magma (N. Smith and S. van der Walt 2015, CC0), here as 33 control points with linear
interpolation, within 2/255 of the full tables; RdBu (C. Brewer, ColorBrewer 2.0, 11 classes), reversed so
that red is positive. All sequential maps rise in lightness without a turn; RdBu stays readable with any
colour blindness, which red-white-green does not.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError

N_COLOURS = 231
BLACK = 231
WHITE = 246
N_GREYS = WHITE - BLACK + 1


class Mark(IntEnum):
    """Palette entries of what is not an ordinary value."""

    ZERO = 247  # a map that is zero everywhere
    CONSTANT = 248  # a map of one value, not zero
    NAN = 249
    POSITIVE_INFINITY = 250
    NEGATIVE_INFINITY = 251
    OVER = 252  # above the limits that were given
    UNDER = 253  # below them


_POINTS = {
    "viridis": (
        "440154 470d60 48186a 482374 472d7b 453681 424086 3f4989 3b528b 375a8d 33638d 2f6a8e 2c728e 297a8e "
        "26818e 23898e 21908c 1f988b 1f9f88 21a685 28ae80 31b57b 3ebc74 4cc26c 5dc963 6ece58 82d34c 96d83f "
        "abdc32 c0df24 d5e21a eae51a fde725"
    ),
    "magma": (
        "000004 030311 0a0822 130d33 1d1146 28115a 36106a 430f76 50127c 5d177f 691c81 762181 822681 8f2a81 "
        "9c2e7f a9327d b63779 c33b75 cf4170 db486a e65163 ee5c5e f5695c f9785d fb8761 fd9668 fea571 feb47b "
        "fec387 fed194 fde0a2 fceeb0 fcfdbf"
    ),
    "gray": "000000 ffffff",
    "RdBu_r": "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
}

# In the order of Mark. Each is at least 10 away (CIEDE2000) from every colour of its map, from the page and
# from every other mark, for normal sight and for three kinds of colour blindness; found by search. The one
# of a zero map is the quietest of these: near the lightness of the colour of zero, and as grey as can be.
_MARKS = {
    "viridis": "201820 a06020 c000ff 606060 002000 ff80ff 60ffc0",
    "magma": "302018 60a0c0 c0ff00 4020ff 802000 a0c0c0 a060ff",
    "gray": "382008 8080e0 ff8000 804000 600080 ffc080 8000ff",
    "RdBu_r": "b0b0b0 806060 808080 804060 000020 00ff00 0000ff",
}

COLORMAPS = tuple(_POINTS)
DIVERGING = ("RdBu_r",)


def check_colormap(name: str) -> None:
    """Raise DrawError where there is no colour map `name`."""
    if name not in _POINTS:
        *names, last = _POINTS
        raise DrawError(f"there is no colour map {name!r}; there are {', '.join(names)} and {last}")


@lru_cache(maxsize=16)
def palette(name: str) -> NDArray[np.uint8]:
    """Return the palette of colour map `name`, RGB, shape (256, 3).

    Raises:
        DrawError: there is no such colour map.

    """
    check_colormap(name)
    table = np.zeros((256, 3), np.uint8)
    points = _colours(_POINTS[name]).astype(np.float64)
    at = np.linspace(0, len(points) - 1, N_COLOURS)
    for channel in range(3):
        colours = np.interp(at, np.arange(len(points)), points[:, channel])
        table[:N_COLOURS, channel] = np.rint(colours)
    table[BLACK : WHITE + 1] = np.rint(np.linspace(0, 255, N_GREYS))[:, None]
    table[Mark.ZERO : Mark.UNDER + 1] = _colours(_MARKS[name])
    table.flags.writeable = False
    return table


def _colours(hexes: str) -> NDArray[np.uint8]:
    return np.array([list(bytes.fromhex(colour)) for colour in hexes.split()], np.uint8)
