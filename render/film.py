"""Writes moving pictures, frame by frame, as GIF, APNG and WebP.

Pillow's writers of GIF and APNG hold every frame until the last one is there, so these two are written here,
with its encoder for the data of a GIF's frame: no more than two frames are in memory. Of WebP, libwebp holds
what it has encoded. In each, a frame holds only the part that differs from the one before.

APNG and WebP (lossless) keep every colour. So does a GIF of one palette; where pictures stand beside maps, it
has 256 colours for both, see `shared_palette`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image

from ..capture.errors import DrawError
from .colormaps import BLACK, N_COLOURS, WHITE, Mark, palette
from .png import SIGNATURE, chunk, header, packed
from .sheet import Ink

Pixels = NDArray[np.uint8]

_LARGEST = {"gif": 65_535, "webp": 16_383, "png": 2**31 - 1}  # pixels across or down
_INK_STEPS = 6


@dataclass(frozen=True)
class Film:
    """What every format is told of a moving picture."""

    width: int
    height: int
    n_frames: int
    milliseconds: int
    """How long each frame is shown."""
    loops: int
    """How often it is shown; 0 is for ever."""
    about: str
    """ASCII text that the file carries; empty is none."""


def check_film(film: Film, format: str) -> None:
    """Raise DrawError where the frames are too large for a format."""
    most = _LARGEST[format]
    if max(film.width, film.height) > most:
        raise DrawError(
            f"a frame would have {film.width} x {film.height} pixels, and {format} holds {most} in each "
            "direction; draw fewer layers, rows or channels a frame, or save it as .png (APNG)"
        )


def gif(film: Film, frames: Iterable[Pixels], colours: Pixels) -> Iterator[bytes]:
    """Yield the pieces of a GIF file of frames in palette entries, shape (height, width)."""
    yield b"GIF89a" + struct.pack("<HHBBB", film.width, film.height, 0xF7, 0, 0) + colours.tobytes()
    if film.loops != 1:
        # It is said how often it is shown again.
        yield b"\x21\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<HB", max(film.loops - 1, 0), 0)
    if film.about:
        yield b"\x21\xfe" + _sub_blocks(film.about.encode("ascii"))
    for (x, y), part in _changes(frames):
        data = GifImagePlugin.getdata(Image.fromarray(part), (x, y), duration=film.milliseconds, interlace=0)
        yield b"".join(data)
    yield b"\x3b"


def _sub_blocks(data: bytes) -> bytes:
    """Return data as a GIF has it; the first block is the prefix that tells what it is."""
    first = data.index(b":") + 1
    pieces = [data[:first], *(data[i : i + 255] for i in range(first, len(data), 255))]
    return b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"


def apng(film: Film, frames: Iterable[Pixels], colours: Pixels | None) -> Iterator[bytes]:
    """Yield the pieces of an APNG file, of palette entries or, without `colours`, of RGB."""
    yield SIGNATURE + chunk(b"IHDR", header(film.width, film.height, palette=colours is not None))
    if film.about:
        keyword, _, text = film.about.partition(":")
        yield chunk(b"tEXt", f"{keyword}\0{text}".encode("ascii"))
    yield chunk(b"acTL", struct.pack(">II", film.n_frames, film.loops))
    if colours is not None:
        yield chunk(b"PLTE", colours.tobytes())
    number = 0
    for (x, y), part in _changes(frames):
        height, width = part.shape[:2]
        shown = struct.pack(">IIIIIHHBB", number, width, height, x, y, film.milliseconds, 1000, 0, 0)
        yield chunk(b"fcTL", shown)
        data = packed(part)
        yield chunk(b"IDAT", data) if number == 0 else chunk(b"fdAT", struct.pack(">I", number + 1) + data)
        number += 1 if number == 0 else 2
    yield chunk(b"IEND", b"")


def webp(film: Film, frames: Iterator[Pixels], xmp: bytes) -> Iterator[bytes]:
    """Yield a WebP file of frames in RGB, shape (height, width, 3), without loss."""
    out = io.BytesIO()
    how: dict[str, Any] = {"lossless": True, "quality": 40, "method": 2, "minimize_size": False}
    _Reel(frames, film.n_frames, (film.width, film.height)).save(
        out, "WEBP", save_all=True, duration=film.milliseconds, loop=film.loops, xmp=xmp, **how
    )
    yield out.getvalue()


class _Reel(Image.Image):
    """An image of many frames that are made while Pillow goes through them, once."""

    def __init__(self, frames: Iterator[Pixels], n_frames: int, size: tuple[int, int]) -> None:
        super().__init__()
        self._frames, self.n_frames, self._at = frames, n_frames, -1
        self._mode, self._size = "RGB", size

    def tell(self) -> int:
        return max(self._at, 0)

    def seek(self, frame: int) -> None:
        if frame == self._at + 1 and frame < self.n_frames:
            self.im = Image.fromarray(next(self._frames)).im
            self._at = frame


def _changes(frames: Iterable[Pixels]) -> Iterator[tuple[tuple[int, int], Pixels]]:
    """Yield of each frame the part that differs from the one before, and where it is; never nothing."""
    before: Pixels | None = None
    for frame in frames:
        if before is None:
            yield (0, 0), frame
        else:
            differs = frame != before if frame.ndim == 2 else (frame != before).any(axis=2)
            ys, xs = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
            y, x = (int(found[0]) if found.size else 0 for found in (ys, xs))
            bottom, right = (int(found[-1]) + 1 if found.size else 1 for found in (ys, xs))
            yield (x, y), np.ascontiguousarray(frame[y:bottom, x:right])
        before = frame


def shared_palette(colormaps: Sequence[str], frames: Iterable[Pixels], inks: Iterable[Ink]) -> Pixels:
    """Return 256 colours for frames in RGB that one palette cannot show.

    Marks and the darkest and lightest colour are as they are. Of what is left, half goes to the colour maps,
    of which every second colour or so is kept, and half to what else the frames show: pictures, and maps
    blended with them.
    """
    greys = palette("gray")[BLACK : WHITE + 1]
    tints = [_tints(ink) for ink in inks if not ink.is_grey]
    marks = [palette(name)[Mark.ZERO : Mark.UNDER + 1] for name in colormaps]
    fixed = np.concatenate([greys, *tints, *marks])
    maps = [palette(name)[:N_COLOURS] for name in colormaps]
    others = _besides(frames, np.concatenate([fixed, *maps]))
    room = 256 - len(fixed)
    each = (room // 2 if len(others) else room) // max(len(maps), 1)
    at = np.rint(np.linspace(0, N_COLOURS - 1, min(max(each, 2), N_COLOURS))).astype(np.intp)
    chosen = np.concatenate([fixed, *(colours[at] for colours in maps)])[:256]
    left = 256 - len(chosen)
    if len(others) and left:
        some = Image.fromarray(others[None]).quantize(
            left, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        found = np.array(some.getpalette() or [], np.uint8).reshape(-1, 3)[:left]
        chosen = np.concatenate([chosen, found])
    return np.concatenate([chosen, np.repeat(chosen[:1], 256 - len(chosen), axis=0)])


def _besides(images: Iterable[Pixels], known: Pixels) -> Pixels:
    """Return each colour of some images that is none of the known ones, once, shape (n, 3)."""
    numbers = [np.unique(_numbers(pixels)) for pixels in images]
    found = np.unique(np.concatenate(numbers)) if numbers else np.empty(0, np.uint32)
    return _colours(np.setdiff1d(found, _numbers(known)))


def _numbers(pixels: Pixels) -> NDArray[np.uint32]:
    """Return one number for each colour, shape (n,)."""
    shifts = np.array([16, 8, 0], np.uint32)
    numbers: NDArray[np.uint32] = (pixels.reshape(-1, 3).astype(np.uint32) << shifts).sum(1, dtype=np.uint32)
    return numbers


def _colours(numbers: NDArray[np.uint32]) -> Pixels:
    """Return the colours that `_numbers` made into numbers, shape (n, 3)."""
    return np.stack([numbers >> 16, (numbers >> 8) & 255, numbers & 255], axis=1).astype(np.uint8)


def _tints(ink: Ink) -> Pixels:
    """Return the colours of ink that covers white more or less."""
    share = np.linspace(0, 1, _INK_STEPS + 1)[1:, None]
    return np.rint(255 * (1 - share) + np.array(ink.value) * share).astype(np.uint8)


def nearest(rgb: Pixels, colours: Pixels) -> Pixels:
    """Return for each pixel of an image, shape (height, width, 3), the entry of the nearest of `colours`."""
    distinct, where = np.unique(_numbers(rgb), return_inverse=True)
    values = _colours(distinct).astype(np.float32)
    table = colours.astype(np.float32)
    # The square of each value itself is the same for every entry.
    entries = np.concatenate(
        [
            ((table**2).sum(axis=1) - 2 * values[i : i + 4096] @ table.T).argmin(axis=1)
            for i in range(0, len(values), 4096)
        ]
    )
    return entries.astype(np.uint8)[where].reshape(rgb.shape[:2])
