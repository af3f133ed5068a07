"""A profile as a web page of one file: tables, the roofline, what follows. No script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..capture.plan import show_bytes
from ..capture.printable import printable
from . import roofline

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #d9dce1; --soft: #f3f4f6; --grey: #5c636c; --bar: #0072b2 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --line: #383d44; --soft: #22262b; --grey: #a2a9b3; --bar: #56b4e9 }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem; margin: 0 }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem }}
p {{ max-width: 46rem }}
.grey {{ color: var(--grey) }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }}
th, td {{ padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); \
white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; white-space: normal }}
td.words {{ text-align: left }}
.bar {{ display: inline-block; height: .6rem; background: var(--bar); vertical-align: baseline }}
img {{ max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px }}
li {{ margin: .2rem 0 }}
</style>
</head>
<body>
"""


def save(profile: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of a profile's JSON to a file."""
    Path(path).write_text(page(profile), encoding="utf-8")


def page(profile: Mapping[str, Any]) -> str:
    """Return the page of what `Profile.to_json` gave."""
    picture = base64.b64encode(roofline.encoded(profile)).decode()
    title = f"{_text(profile['model'])}: what a capture costs"
    parts = [
        _PAGE.format(title=title),
        f"<h1>{title}</h1>",
        f'<p class="grey">{_about(profile)}</p>',
        f"<p>{_pace(profile)}</p>",
        "<h2>What would make it cheaper</h2>",
        _advice(profile),
        "<h2>Roofline</h2>",
        f'<img alt="rows a second against bytes of a row" src="data:image/png;base64,{picture}">',
        "<h2>What each stage costs a step</h2>",
        _ladder(profile),
        "<h2>Taps</h2>",
        _taps(profile),
        "<h2>This machine, alone</h2>",
        _machine(profile),
    ]
    return "\n".join([*parts, "</body>", "</html>", ""])


def _text(value: Any) -> str:
    return escape(printable(str(value)))


def _about(profile: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in profile["versions"].items())
    return (
        f"{_text(profile['data']['name'])}, {profile['batch_size']} rows a step, {profile['n_cores']} "
        f"processors ({_text(packages)})"
    )


def _pace(profile: Mapping[str, Any]) -> str:
    forward, capture = profile["forward_s"], profile["capture_s"]
    text = (
        f"A row takes {_s(capture)}, {capture / forward:.2f} times the model alone ({_s(forward)}). What "
        f"sets the pace: <b>{_text(profile['bottleneck'])}</b>."
    )
    real = profile["real"]
    if real is not None:
        text += (
            f" A real capture of {real['n_rows']:,} rows took {_s(real['measured_s'])}; foretold were "
            f"{_s(real['predicted_s'])}, {real['ratio']:.2f} of it."
        )
    if profile["read_s"] is not None:
        text += f" Reading a row of all taps back takes {_s(profile['read_s'])}: "
        n = profile["n_readings"]
        text += (
            "running the model again is cheaper than storing all of this."
            if n is None
            else f"storing is cheaper for who looks at all of it {n} times or more."
        )
    return text


def _advice(profile: Mapping[str, Any]) -> str:
    if not profile["advice"]:
        return "<p>Nothing that was tried would be quicker by 5 %.</p>"
    items = "\n".join(f"<li>{_text(one['text'])}</li>" for one in profile["advice"])
    return f'<ol>\n{items}\n</ol>\n<p class="grey">Predicted from what was measured.</p>'


def _ladder(profile: Mapping[str, Any]) -> str:
    its = profile["ladder"]
    off = its["arms"][0]["step_s"]["median"]
    longest = max(arm["step_s"]["median"] for arm in its["arms"])
    rows = []
    for arm in its["arms"]:
        step, more = arm["step_s"]["median"], arm["more_s"]
        low, high = more["interval_90"]
        is_first = arm["arm"] == "off"
        rows.append(
            [
                _text(arm["arm"]),
                _s(step),
                f'<span class="bar" style="width: {10 * step / longest:.2f}rem"></span>',
                "" if is_first else f"{_s(more['median'])} ({_s(low)} to {_s(high)})",
                "" if is_first else f"{100 * more['median'] / off:+.1f} %",
                _s(arm["cpu_s"]),
            ]
        )
    header = ("arm", "a step", "", "more than with a stage less", "of the model", "processors")
    return _table(header, rows, words=(2,)) + (
        f'<p class="grey">{its["n_rounds"]} interleaved rounds of {its["n_steps"]} steps; intervals of 90 %. '
        "The control is the model alone once more: what lies within its interval means nothing.</p>"
    )


def _taps(profile: Mapping[str, Any]) -> str:
    stages = list(profile["taps"][0]["stages_s"])
    rows = [
        [
            _text(tap["name"]) + (" *" if tap["overwritten"] else ""),
            f"{_text(' x '.join(map(str, tap['shape'])) or '1')} {_text(tap['dtype'])}",
            show_bytes(tap["stored_bytes"]),
            *(_s(tap["stages_s"][stage]) for stage in stages),
            f"{100 * tap['share']:.0f} %",
            _s(tap["marginal_s"]),
        ]
        for tap in profile["taps"]
    ]
    header = ("tap", "row as stored", "bytes", *stages, "share", "a row without it is shorter by")
    note = (
        "A row in each stage, by one thread alone. * is overwritten in place later in the forward: a hook "
        "that keeps references would hold other values."
    )
    remarks = "".join(f"<p>{_text(remark)}</p>" for remark in profile["remarks"])
    return _table(header, rows) + f'<p class="grey">{note}</p>' + remarks


def _machine(profile: Mapping[str, Any]) -> str:
    its = profile["calibration"]
    rows = [["copy in memory", f"{show_bytes(its['copy_bytes_a_s'])}/s"]]
    rows += [
        [f"{_text(name)}, with checksums, a thread", f"{show_bytes(rate)}/s"]
        for name, rate in its["codec_bytes_a_s"].items()
    ]
    rows += [
        [f"from the device, {_text(name)}", f"{show_bytes(rate)}/s"]
        for name, rate in its["transfer_bytes_a_s"].items()
    ]
    if its["disk_bytes_a_s"] is not None:
        rows.append(["disk, durable", f"{show_bytes(its['disk_bytes_a_s'])}/s"])
    return _table(("", "rate"), rows)


def _table(header: Iterable[str], rows: Iterable[Sequence[str]], words: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="words">{cell}</td>' if i in words else f"<td>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>\n'


def _s(seconds: float) -> str:
    """Return a duration in three digits."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= unit:
            return f"{seconds / unit:.3g} {name}"
    return "0" if seconds == 0 else f"{seconds / 1e-9:.3g} ns"
