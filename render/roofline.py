"""The roofline of a capture: what bounds rows a second, by the bytes of a row, and where plans lie below it.

After Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore
architectures", with rows in place of operations: the model is a level, whatever moves or encodes bytes falls
with them. Both axes are logarithmic.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..capture.errors import DrawError, MissingPackageError
from ..capture.plan import show_bytes

try:
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise MissingPackageError(
        "drawing this takes matplotlib, which is not installed: pip install 'layertap[matplotlib]'"
    ) from error

# Okabe and Ito's colours, which the colour-blind tell apart, and dashes, which print in black.
_LINES = (
    ("#0072B2", "-"),
    ("#56B4E9", "--"),
    ("#D55E00", "-"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
)
_PLAN, _OTHERS, _GREY = "#111111", "#6b7280", "#6b7280"
_SIZE, _DPI = (8.6, 5.2), 100


def save(profile: Mapping[str, Any], path: str | Path) -> None:
    """Draw the roofline of a profile's JSON.

    Args:
        profile: what `Profile.to_json` gave.
        path: a .png, .svg or .pdf.

    Raises:
        DrawError: the file has another suffix.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg", "pdf"):
        raise DrawError(f"a roofline is drawn as .png, .svg or .pdf, not {path}")
    Path(path).write_bytes(encoded(profile, suffix))


def encoded(profile: Mapping[str, Any], format: str = "png") -> bytes:
    """Return the picture's bytes."""
    out = io.BytesIO()
    with rc_context(dict(rcParamsDefault) | {"svg.fonttype": "none"}):
        figure(profile).savefig(out, format=format, dpi=_DPI)
    return out.getvalue()


def figure(profile: Mapping[str, Any]) -> Figure:
    """Return the roofline as a figure."""
    made = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    axes = made.subplots()
    roofs, points = profile["roofs"], profile["points"]
    left, right = _span([x for x, _ in points.values()])
    xs = np.geomspace(left, right, 400)
    levels = {name: np.full_like(xs, y) for name, y in roofs["rows_a_s"].items()}
    slopes = {name: rate / xs for name, rate in roofs["bytes_a_s"].items()}
    bound = np.min([*levels.values(), *slopes.values()], axis=0)
    top = 4 * max(roofs["rows_a_s"].values())
    bottom = min(min(y for _, y in points.values()), float(bound.min())) / 3
    axes.fill_between(xs, bottom, bound, color="#f3f4f6", linewidth=0)
    for (name, ys), (colour, dashes) in zip({**levels, **slopes}.items(), _LINES * 2, strict=False):
        axes.plot(xs, ys, dashes, color=colour, linewidth=1.8)
        _name(axes, name, xs, ys, (bottom, top), colour, is_level=name in levels)
    for i, (x, y) in enumerate(points.values()):
        first = i == 0
        axes.plot(
            x, y, "o" if first else "D", color=_PLAN if first else _OTHERS, markersize=9 if first else 6
        )
    _name_points(axes, points)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel("bytes of a row on disk")
    axes.set_ylabel("rows a second")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show_bytes(x) if x >= 1 else ""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.3g}"))
    axes.set_xticks([1024.0**0 * 4**k for k in range(31) if left <= 4.0**k <= right])
    axes.minorticks_off()
    axes.grid(color="#e5e7eb", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"{profile['model']}: {profile['batch_size']} rows a step, {profile['n_cores']} processors. "
        f"What sets the pace: {profile['bottleneck']}",
        loc="left",
        fontsize=11,
    )
    return made


def _span(xs: list[float]) -> tuple[float, float]:
    """Return the ends of the axis: around the points, and four decades at least."""
    low, high = min(xs), max(xs)
    middle, decades = np.sqrt(low * high), max(4.0, np.log10(high / low) + 2)
    return float(middle / 10 ** (decades / 2)), float(middle * 10 ** (decades / 2))


def _name(
    axes: Any, name: str, xs: Any, ys: Any, limits: tuple[float, float], colour: str, *, is_level: bool
) -> None:
    """Write what a roof is along it, where it enters the picture."""
    if is_level:
        below = name != "the model alone"
        axes.annotate(
            name,
            (xs[4], ys[4]),
            xytext=(0, -5 if below else 5),
            textcoords="offset points",
            color=colour,
            va="top" if below else "bottom",
        )
        return
    inside = np.flatnonzero((ys < limits[1] / 1.3) & (ys > limits[0] * 1.3))
    if len(inside):
        at = inside[-1] if name == "disk" else inside[0]
        axes.annotate(
            name,
            (xs[at], ys[at]),
            xytext=(-6, 0) if name == "disk" else (6, 0),
            textcoords="offset points",
            color=colour,
            ha="right" if name == "disk" else "left",
            va="center",
        )


def _name_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of plans beside them, apart from each other where they lie near."""
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        at = np.log10(x), np.log10(y)
        # Names stand at the left, where no roof falls, and below each other where points lie near.
        n_near = sum(abs(at[0] - one[0]) < 1.2 and abs(at[1] - one[1]) < 0.06 for one in placed)
        placed.append(at)
        axes.annotate(
            name,
            (x, y),
            xytext=(-9, -4 - 13 * n_near),
            textcoords="offset points",
            ha="right",
            color=_PLAN if name == "this plan" else _GREY,
            fontweight="bold" if name == "this plan" else "normal",
            fontsize=9,
        )
