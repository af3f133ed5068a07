"""An axis of numbers: where a value stands in whole pixels, and round numbers that are written below it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import NUMBER, Page
from .lettering import text_width
from .sheet import Ink, Line, Text

Floats = NDArray[np.float64]

ROOM = 18  # below a plot for an axis and its numbers
_APART = 10  # pixels between two numbers, at least
_DECADES = 3  # that a logarithmic axis resolves on each side of zero


@dataclass(frozen=True)
class Axis:
    """Values from left to right, evenly or, far from zero, by their logarithm."""

    low: float
    high: float
    """Values at its ends, the low one below the high one."""
    x: int
    width: int
    """Its first pixel, and how many it has."""
    log: bool = False
    """Whether it is logarithmic beyond `threshold`, on both sides of zero, by the inverse hyperbolic sine."""
    unit: str = ""
    """What is written behind its numbers."""

    @property
    def threshold(self) -> float:
        """About where a logarithmic axis turns even, towards zero."""
        return max(abs(self.low), abs(self.high)) / 10.0**_DECADES

    def share(self, value: Any) -> Any:
        """Return how far along the axis a value is, 0 to 1 between the ends."""
        low, high, value = (self._scaled(one) / 4 for one in (self.low, self.high, value))  # no overflow
        return (value - low) / (high - low)

    def at(self, value: float) -> int:
        """Return the pixel of a value, one of the axis' own."""
        return self.x + round(min(max(float(self.share(value)), 0.0), 1.0) * (self.width - 1))

    def edges(self, n: int) -> Floats:
        """Return the values between which `n` bins of equal width lie, shape (n + 1,)."""
        low, high = self._scaled(self.low) / 4, self._scaled(self.high) / 4
        edges = np.linspace(low, high, n + 1) * 4
        if self.log:
            edges = np.sinh(edges) * self.threshold
        edges[0], edges[-1] = self.low, self.high
        return np.asarray(edges, np.float64)

    def ticks(self) -> list[tuple[float, str]]:
        """Return round values and how they are written, as close as they can be read."""
        for ticks in self._decades() if self.log else self._steps():
            if len(ticks) > 1 and self._readable(ticks):
                return ticks
        return []

    def _scaled(self, value: Any) -> Any:
        return np.arcsinh(np.asarray(value) / self.threshold) if self.log else np.asarray(value, np.float64)

    def _readable(self, ticks: Sequence[tuple[float, str]]) -> bool:
        spans = []
        for value, text in ticks:
            half = text_width(text, NUMBER) / 2
            spans.append((self.at(value) - half, self.at(value) + half))
        return all(right + _APART <= left for (_, right), (left, _) in pairwise(spans))

    def _steps(self) -> Iterator[list[tuple[float, str]]]:
        """Yield ticks at multiples of 1, 2 and 5 times powers of ten, from close ones to far ones."""
        power = math.floor(math.log10(self.high / self.width - self.low / self.width))
        for exponent in range(power, min(power + 5, 308)):
            for factor in (1, 2, 5):
                step = factor * 10.0**exponent
                first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
                if last - first < self.width:
                    yield [(i * step, written(i * step, step) + self.unit) for i in range(first, last + 1)]

    def _decades(self) -> Iterator[list[tuple[float, str]]]:
        """Yield ticks at zero and at powers of ten, every one, every second, and so on."""
        largest = max(abs(self.low), abs(self.high))
        top = math.floor(math.log10(largest) + 1e-9)
        for apart in range(1, _DECADES + 1):
            sizes = [10.0**exponent for exponent in range(top, top - _DECADES, -apart)]
            values = sorted({0.0, *sizes, *(-size for size in sizes)})
            yield [(v, written(v, abs(v) or 1) + self.unit) for v in values if self.low <= v <= self.high]


def written(value: float, step: float) -> str:
    """Return a multiple of `step` with the digits that tell it from the next one: 0, 0.05, 1500, 2e-7."""
    size = abs(value)
    if size < step / 2:
        return "0"
    if step >= 1e-3 and size < 1e5:
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    digits = max(0, math.floor(math.log10(size) + 1e-9) - math.floor(math.log10(step) + 1e-9))
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def draw_axis(page: Page, axis: Axis, y: int) -> int:
    """Draw an axis below `y` with its ticks and numbers; return where it ends."""
    last = axis.x + axis.width - 1
    page.shapes.append(Line(((axis.x, y), (last, y)), Ink.GREY))
    for value, text in axis.ticks():
        x = axis.at(value)
        page.shapes.append(Line(((x, y), (x, y + 3)), Ink.GREY))
        page.texts.append(Text(x, y + 13, text, NUMBER, "center", Ink.GREY))
    return y + ROOM


def moved(axis: Axis, x: int) -> Axis:
    """Return the same axis `x` pixels to the right."""
    return replace(axis, x=axis.x + x)


def limits_of(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis that has zero, and all values from `low` to `high`."""
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if low < high else (low, low + 1.0)
