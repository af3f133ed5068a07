"""A forecast as text: a table that fits a terminal of 80 columns, and what it comes to."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .forecast import Forecast, TapForecast
from .plan import show_bytes
from .printable import printable

WIDTH = 80
_HEADER = ("tap", "row as stored", "as it is", "reduced", "on disk")
_LONGEST_FORM = 24


def show(forecast: Forecast, width: int = WIDTH) -> str:
    """Return the table of the taps, the reductions with their errors, the totals and the estimate."""
    return "\n".join(
        [*_taps(forecast, width), *_reductions(forecast.taps, width), "", *_totals(forecast, width)]
    )


def show_seconds(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _taps(forecast: Forecast, width: int) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEADER]
    for tap in forecast.taps:
        sizes = (tap.source_bytes, tap.reduced_bytes, tap.disk_bytes)
        rows.append((printable(tap.name), cut(_form(tap), _LONGEST_FORM), *map(show_bytes, sizes)))
    totals = (forecast.source_bytes, forecast.reduced_bytes, forecast.disk_bytes)
    rows.append(("", f"all {forecast.n_rows:,} rows", *map(show_bytes, totals)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    widths[0] = min(widths[0], width - sum(widths[1:]) - 2 * (len(_HEADER) - 1))
    return [lined(row, widths) for row in rows]


def lined(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of a table: two columns of words, then numbers at the right."""
    cells = [cut(row[0], widths[0]).ljust(widths[0]), row[1].ljust(widths[1])]
    cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(cells).rstrip()


def _form(tap: TapForecast) -> str:
    return f"{' x '.join(map(str, tap.shape)) or '1'} {tap.dtype}"


def cut(text: str, width: int) -> str:
    """Return a text without its middle where it is too long: ends tell layers apart."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _reductions(taps: Sequence[TapForecast], width: int) -> list[str]:
    """Return each reduction once, with the taps that it is done to and its errors."""
    lines: list[str] = []
    kinds: dict[str, list[TapForecast]] = {}
    for tap in taps:
        if tap.reduction != "none":
            kinds.setdefault(tap.reduction, []).append(tap)
    for reduction, found in kinds.items():
        # Errors of sums grow with what is summed: the largest tap's are shown.
        largest = max(found, key=lambda tap: tap.source_bytes)
        names = largest.name + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        lines += ["", *wrapped(printable(f"{names}: {reduction}"), width, "")]
        for part in largest.error.split("; "):
            lines += wrapped(printable(part), width, "  ")
    return lines


def _totals(forecast: Forecast, width: int) -> list[str]:
    disk = "not tried" if forecast.durable_rate is None else f"{show_bytes(forecast.durable_rate)}/s"
    room = "" if forecast.free_bytes is None else f" of {show_bytes(forecast.free_bytes)} free"
    fits = "" if forecast.fits_disk else ": DOES NOT FIT"
    loading = f"{forecast.workers} workers" if forecast.workers else "no workers"
    stages = forecast.stages_s
    lines = [
        f"disk        {show_bytes(forecast.disk_bytes)}{room}{fits}, "
        f"{show_bytes(forecast.column_bytes)} a row of it columns",
        _memory(forecast),
        f"data        {show_seconds(stages['data'])}: {_each(forecast.load_s)} a batch, {loading}",
        f"forward     {show_seconds(stages['forward'])}: {_each(forecast.forward_s)} a batch of "
        f"{forecast.step_rows}, hooks and copies in it",
        f"write       {show_seconds(stages['write'])}: prepared at {show_bytes(forecast.encode_rate)}/s by "
        f"each of {forecast.n_writers} writers, disk {disk}",
        *_statistics(forecast),
        f"estimate    {show_seconds(forecast.seconds)} by one process; {_pace(forecast)} sets the pace",
    ]
    lines = [line for text in lines for line in wrapped(text, width, "", " " * 12)]
    if forecast.memory_problem is not None:
        lines += wrapped(forecast.memory_problem, width, " " * 12)
    return [*lines, "", "An estimate from a few steps: nothing was stored."]


def _statistics(forecast: Forecast) -> list[str]:
    its = forecast.statistics
    if its is None:
        return []
    alone = "" if forecast.values else ", and no activations"
    return [
        f"statistics  {', '.join(its.names)}: {its.n_files:,} files of {show_bytes(its.disk_bytes)}{alone}; "
        f"computed at {show_bytes(its.rate)}/s by each writer, which is part of write"
    ]


def _memory(forecast: Forecast) -> str:
    if forecast.block_rows is None:
        return f"memory      {show_bytes(forecast.memory_bytes)} DO NOT HOLD IT"
    return (
        f"memory      {show_bytes(forecast.held_bytes)} of {show_bytes(forecast.memory_bytes)} in blocks of "
        f"{forecast.block_rows:,} rows"
    )


def _pace(forecast: Forecast) -> str:
    pace = {"data": "loading", "forward": "the model", "write": "writing"}[forecast.bottleneck]
    shared = forecast.seconds == forecast.processors_s
    return f"{pace}, slowed by what shares its {forecast.n_cores} processors," if shared else pace


def _each(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def wrapped(text: str, width: int, indent: str, following: str | None = None) -> list[str]:
    """Return a text in lines of `width`, of which those after the first are indented by `following`."""
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent if following is None else following
    )
