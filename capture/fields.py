"""Receptive fields: the part of a model's input that each place of a tap depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import trust
from .axes import places_of
from .errors import FormatError

Json = dict[str, Any]
Pixels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """Where each place of a layer looks, in pixels of the model's input, clipped to it."""

    input: tuple[int, int]
    """Height and width of the input."""
    y: Pixels
    """First pixel of each line of places, and the one behind its last; of a sequence, of each token.

    0 and 0: it sees nothing.
    """
    x: Pixels
    """The same of each column of places; of a sequence, of each token."""

    def box(self, ys: slice, xs: slice) -> tuple[int, int, int, int] | None:
        """Return top, left, bottom and right of what some lines and columns of places see together."""
        lines, columns = (of[of[:, 1] > 0] for of in (self.y[ys], self.x[xs]))
        if not (lines.size and columns.size):
            return None
        top, bottom = int(lines[:, 0].min()), int(lines[:, 1].max())
        return top, int(columns[:, 0].min()), bottom, int(columns[:, 1].max())

    def to_json(self) -> Json:
        """Return what the manifest says of it."""
        return {"input": list(self.input), "y": self.y.tolist(), "x": self.x.tolist()}

    @classmethod
    def from_json(cls, said: Any, source_shape: Sequence[int]) -> ReceptiveField:
        """Read what `to_json` returned of a layer whose rows have `source_shape`.

        Raises:
            FormatError: it is not of this form, or speaks of other places or of pixels that are not there.
        """
        if not isinstance(said, dict) or not {"input", "y", "x"} <= set(said):
            raise FormatError("a receptive field has an 'input', and 'y' and 'x'")
        sizes = trust.listed(said["input"], "the input of a receptive field")
        lengths = places_of(source_shape)
        if len(sizes) != 2 or not lengths:
            raise FormatError("a receptive field is of a picture, and of places on one or two axes")
        height, width = (trust.whole(n, "a side of the input", 1, trust.LONGEST_AXIS) for n in sizes)
        y = _pixels(said["y"], lengths[0], height)
        return cls((height, width), y, _pixels(said["x"], lengths[-1], width))


def _pixels(said: Any, n_places: int, size: int) -> Pixels:
    pairs = trust.listed(said, "an axis of a receptive field")
    if len(pairs) != n_places or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise FormatError(f"a receptive field has no first and last pixel for each of {n_places} places")
    for first, stop in pairs:
        if type(first) is type(stop) is int and first == stop == 0:
            continue
        trust.whole(first, "the first pixel of a receptive field", 0, size - 1)
        trust.whole(stop, "the end of a receptive field", first + 1, size)
    return np.array(pairs, np.int64)
