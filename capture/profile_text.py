"""A profile as text: what was measured, in tables that fit a terminal of 80 columns, and what follows."""

from __future__ import annotations

from collections.abc import Sequence

from .forecast_text import WIDTH, cut, lined, show_seconds, wrapped
from .ladder import CONTROL, COPY, DATA, ENCODE, NO_OP, OFF, TRANSFER, WRITE
from .left_out import told
from .paired import Estimate
from .plan import show_bytes
from .printable import printable
from .profile import Profile, TapProfile

_MOST_TAPS = 20
_DOES = {
    OFF: "model alone",
    CONTROL: "once more",
    NO_OP: "empty hooks",
    COPY: "hooks copy",
    TRANSFER: "to the host",
    ENCODE: "encoded too",
    WRITE: "durable too",
    DATA: "data loaded",
}


def show(profile: Profile, width: int = WIDTH) -> str:
    """Return all of a profile as text."""
    lines: list[str] = []
    for part in (_head, _taps, _about_taps, _ladder, _about_ladder, _machine, _pace, _advice, _store, _real):
        found = part(profile, width)
        is_table = part in (_taps, _ladder)
        if lines and found and part not in (_about_taps, _about_ladder, _pace, _store, _real):
            lines.append("")
        lines += (
            found
            if is_table
            else [line for text in found for line in wrapped(text, width, "", _indent(text))]
        )
    return "\n".join(lines)


def _indent(text: str) -> str:
    if text.startswith("  "):
        return " " * 4
    return " " * 10 if text[:1].islower() else ""


def _head(profile: Profile, width: int) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    return [
        f"{printable(profile.model)} on {printable(profile.data)}, {profile.batch_size} rows a step, "
        f"{profile.n_cores} processors ({packages})"
    ]


def _taps(profile: Profile, width: int) -> list[str]:
    header = ("tap", "row", "bytes", "copy", "encode", "write", "share", "costs")
    shown = {tap.name for tap in sorted(profile.taps, key=lambda tap: -tap.share)[:_MOST_TAPS]}
    rows = [header, *(_tap(tap) for tap in profile.taps if tap.name in shown)]
    widths = _columns(rows)
    widths[0] = max(12, min(widths[0], width - sum(widths[1:]) - 2 * (len(header) - 1)))
    return [lined(row, widths) for row in rows]


def _about_taps(profile: Profile, width: int) -> list[str]:
    lines, n_taps = [], len(profile.taps)
    others = sorted(profile.taps, key=lambda tap: -tap.share)[_MOST_TAPS:]
    if others:
        rest = 100 * sum(tap.share for tap in others)
        lines.append(f"And {len(others)} taps more, {rest:.0f} % of the cost of all.")
    types = ", ".join(dict.fromkeys(tap.dtype for tap in profile.taps))
    lines.append(
        f"Of a row as stored ({types}): copy in the hook, encode and write by one thread alone; share of "
        "these; and how much shorter a row of the capture would be without it."
    )
    overwritten = [tap.name for tap in profile.taps if tap.overwritten]
    if overwritten:
        lines.append(
            f"* {len(overwritten)} of {n_taps} outputs are overwritten in place later in the forward: a hook "
            "that keeps references would hold other values."
        )
    compiled = sum(tap.compiled for tap in profile.taps)
    if compiled:
        lines.append(f"In compiled code lie {compiled} of {n_taps} taps; they stay in its graph.")
    return [*lines, *profile.remarks, *(printable(text.strip()) for text in told(profile.left_out))]


def _tap(tap: TapProfile) -> tuple[str, ...]:
    stages = [short(tap.stages_s.get(stage, 0.0)) for stage in (COPY, ENCODE, WRITE)]
    return (
        printable(tap.name) + ("*" if tap.overwritten else ""),
        cut("x".join(map(str, tap.shape)) or "1", 14),
        show_bytes(tap.stored_bytes),
        *stages,
        f"{100 * tap.share:.0f} %",
        short(tap.marginal_s),
    )


def _ladder(profile: Profile, width: int) -> list[str]:
    off = profile.rung(OFF).step_s.median
    unit, scale = ("ms", 1e3) if off >= 1e-3 else ("us", 1e6)
    header = ("ladder", "", "a step", f"more, in {unit}", "more", "cpu")
    rows: list[tuple[str, ...]] = [header]
    for rung in profile.rungs:
        is_first = rung.name == OFF
        more = "" if is_first else _between(rung.more_s.scaled(scale))
        share = "" if is_first else f"{100 * rung.more_s.median / off:+.1f} %"
        rows.append((rung.name, _DOES[rung.name], short(rung.step_s.median), more, share, short(rung.cpu_s)))
    return [lined(row, _columns(rows)) for row in rows]


def _about_ladder(profile: Profile, width: int) -> list[str]:
    control = profile.rung(CONTROL).more_s
    nothing = short(max(abs(control.low), abs(control.high)))
    return [
        f"Medians of {profile.n_rounds} interleaved rounds of {profile.n_steps} steps, with intervals of 90 "
        "%: how much more than with a stage less (control and no-op: than off). "
        f"Up to {nothing} means nothing: so far two arms lie apart that do the same."
    ]


def _machine(profile: Profile, width: int) -> list[str]:
    its = profile.calibration
    disk = "not tried" if its.disk_rate is None else f"{show_bytes(its.disk_rate)}/s durable"
    codecs = ", ".join(f"{name} {show_bytes(rate)}/s" for name, rate in its.codecs.items())
    transfer = ", ".join(f"{name} {show_bytes(rate)}/s" for name, rate in its.transfer_rates.items())
    return [
        f"machine   copy {show_bytes(its.copy_rate)}/s; {codecs} a thread, checksums included; disk {disk}; "
        f"{transfer or 'no device: nothing is transferred'}"
    ]


def _pace(profile: Profile, width: int) -> list[str]:
    s = profile.costs.stages_s
    stages = ", ".join(f"{name} {short(value)}" for name, value in s.items() if value)
    return [
        f"pace      a row takes {short(profile.capture_s)}, {profile.slowdown:.2f} times the model alone; "
        f"each stage by itself: {stages}. What sets the pace: {profile.costs.bound}"
    ]


def _advice(profile: Profile, width: int) -> list[str]:
    if not profile.advice:
        return ["advice    nothing that was tried would be quicker by 5 %"]
    return [
        "advice    predicted from what was measured:",
        *(f"  {printable(str(one))}" for one in profile.advice),
    ]


def _store(profile: Profile, width: int) -> list[str]:
    if profile.read_s is None:
        return []
    read, forward = short(profile.read_s), short(profile.forward_s)
    if profile.n_readings is None:
        return [
            f"store     reading a row of all taps takes {read}, the model {forward}: run the model again "
            "rather than store all of this; fewer taps or a reduction turn that round"
        ]
    times = "once" if profile.n_readings == 1 else f"{profile.n_readings} times"
    return [
        f"store     reading a row of all taps takes {read}, the model {forward}: storing is cheaper for who "
        f"looks at all of it {times} or more; at single taps or rows, sooner"
    ]


def _real(profile: Profile, width: int) -> list[str]:
    real = profile.real
    if real is None:
        return []
    return [
        f"real      {real.n_rows:,} rows took {show_seconds(real.measured_s)}, foretold were "
        f"{show_seconds(real.predicted_s)} ({real.ratio:.2f} of it); what set the pace: {real.slowest}"
    ]


def _between(estimate: Estimate) -> str:
    middle, low, high = (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        for value in (estimate.median, estimate.low, estimate.high)
    )
    return f"{middle} ({low} to {high})"


def short(seconds: float) -> str:
    """Return a duration in three digits."""
    if seconds == 0:
        return "0"
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _columns(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
