"""Writes tables of results: pages of `docs/` of all that are kept, or of one file beside it.

    python benchmarks/performance.py                          # all results -> docs/, README.md
    python benchmarks/performance.py benchmarks/latest.json   # -> benchmarks/latest.md

Every number comes from the JSON that pytest-benchmark wrote, and every explanation from the docstring of the
benchmark that made it.
"""

from __future__ import annotations

import ast
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "performance.md"
AGAINST = HERE.parent / "docs" / "against.md"
README, SHORT = HERE.parent / "README.md", "cpu-2-cores"
BEGIN, END = "<!-- measured: written by benchmarks/performance.py -->", "<!-- end -->"
PARTS = {
    "compute": "compute-bound: ResNet-18, one late tap",
    "disk": "disk-bound: 4 GB, 1 MiB a row from a model that computes nothing",
    "few-large-taps": "few large taps: ResNet-18, `conv1` and `layer1.0`",
    "zstd-float16": "zstd of float16: five taps of ResNet-18",
    "many-small-taps": "all 60 leaf layers of ResNet-18: 7 MiB a row",
}
HEAD = """# Performance

What was measured, on which machine, by which command. `python benchmarks/performance.py` writes this page
from [benchmarks/results](../benchmarks/results); none of its numbers is typed. Arms of a benchmark are run
in turn, in random order, and compared round by round: a ratio is the median of the rounds, with its
interval of 90 % by the bootstrap in brackets. An arm that is run twice (`again`, `control`) tells how far
two arms lie apart that do not differ. Nothing here was measured on a GPU yet.
"""
AGAINST_HEAD = """# Against what one would pick instead

One job, done by layertap and by other ways, and four questions that each way was asked.
`python benchmarks/performance.py` writes this page from [benchmarks/results](../benchmarks/results); none of
its numbers or words about a way is typed. thingsvision is not among them: it pins torch 2.0.1, torchvision
0.15.2 and numpy 1.26, which are older than what the others run on here.

Ways that write each batch as it comes hold one batch, and need less memory than layertap, which holds two or
three blocks, of 64 MiB or more if nothing is said (`memory=` makes that less): the model fills one while
another is written.
"""
Figures = Mapping[str, Any]


def pages() -> dict[Path, str]:
    """Return the pages that are written from results."""
    files = sorted(RESULTS.glob("*.json"))
    against = [file for file in files if file.stem.startswith("against")]
    found = {PAGE: page([file for file in files if file not in against])}
    return found | ({AGAINST: page(against, AGAINST_HEAD)} if against else {})


def page(files: Sequence[Path], head: str = HEAD) -> str:
    """Return results as one page."""
    parts = [head]
    for file in files:
        parts += [f"## {file.stem}", *sections(json.loads(file.read_text()))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def short(files: Sequence[Path]) -> str:
    """Return what the README says of the results of one kind of machine."""
    results = [json.loads(file.read_text()) for file in files]
    entries = {entry["name"]: entry for data in results for entry in data["benchmarks"]}

    def figures(name: str) -> Figures:
        found: Figures = entries[name]["extra_info"]
        return found

    capture = figures("test_capture_over_the_forward_alone")
    peaks = [figures(f"test_peak_memory_over_what_the_forward_had[{n}-128MiB]") for n in (2500, 5000, 10000)]
    figure, montage = figures("test_figure[3x9-of-32px]")["ms"], figures("test_montage[1x512-of-14px]")["ms"]
    export = figures("test_export")["grids_a_second"]
    rows = {
        "a capture over the forward alone on the same cores: ResNet-20, 10,000 pictures of 32 x 32 in "
        f"memory, batch 64, four stages in float32 ({number(capture['store_MB'] / 1000)} GB); control "
        f"{cell(capture['control'])}": cell(capture["capture_over_forward"]),
        'peak memory that it adds with `memory="128MiB"`, at 2,500, 5,000 and 10,000 rows': ", ".join(
            number(peak["peak_MiB"]) for peak in peaks
        )
        + " MiB",
        "figure of three layers by nine channels, from the store to PNG (one matplotlib axes a channel: "
        f"{number(figure['inset_axes_png'])} ms)": f"{number(figure['png'])} ms",
        "montage of 512 channels of 14 x 14, from the store to PNG (`skimage.util.montage` to PNG: "
        f"{number(montage['skimage_png'])} ms, without scale or words)": f"{number(montage['png'])} ms",
        "figures a second drawn into files, by one process and by two": " and ".join(
            number(export[jobs]["median"]) for jobs in ("one_process", "two_processes")
        ),
        "`layertap --help`": seconds(entries["test_help"]["stats"]["median"]),
    }
    lines = [machine(results[0]).split("\n")[0], "", "| what | measured |", "| --- | --- |"]
    lines += [f"| {what} | {value} |" for what, value in rows.items()]
    lines += [
        "",
        "Wall of a capture over the slowest of forward, copy and write alone, start and end included:",
        "",
    ]
    lines += [
        "| case | model on both cores | floor | model on one, a core to spare |",
        "| --- | --- | --- | --- |",
    ]
    for case, what in PARTS.items():
        both, one = (figures(f"test_wall_over_the_slowest_part[{case}-{how}]") for how in ("shared", "spare"))
        ratios = [cell(both["wall_over_slowest"]), number(max(1.0, both["cpu_floor"]["median"]))]
        lines.append(f"| {what} | {' | '.join([*ratios, cell(one['wall_over_slowest'])])} |")
    return "\n".join(lines)


def readme() -> str:
    """Return the README with what was measured."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{short(sorted(RESULTS.glob(f'*{SHORT}.json')))}\n{END}{rest.partition(END)[2]}"


def sections(data: Figures) -> Iterator[str]:
    """Yield the machine, then what each benchmark says of itself and its tables."""
    yield machine(data)
    modules: dict[str, list[Figures]] = {}
    for entry in data["benchmarks"]:
        modules.setdefault(entry["fullname"].split("::")[0], []).append(entry)
    for module, entries in modules.items():
        title, text = told(HERE / Path(module).name)
        yield f"### {title}"
        yield text
        yield from tables(entries)


def machine(data: Figures) -> str:
    """Return what it ran on, and how."""
    info = data["machine_info"]
    cpu = info["cpu"]
    parts = [f"{cpu['cores']} x {cpu['model']}", f"{info['system']} {info['machine']}"]
    if info.get("memory_GiB"):
        parts.append(f"{info['memory_GiB']} GiB")
    if info.get("gpu"):
        parts.append(info["gpu"])
    packages = ", ".join(f"{name} {version}" for name, version in info["packages"].items())
    lines = [f"On {', '.join(parts)}; Python {info['python_version']}, {packages}."]
    if data.get("command"):
        lines.append(f"By `{data['command']}`.")
    return "\n".join(lines)


def told(module: Path) -> tuple[str, str]:
    """Return the first line of a module's docstring and the rest, without the lines that run it."""
    text = ast.get_docstring(ast.parse(module.read_text())) or module.stem
    title, _, rest = text.partition("\n")
    kept = [line for line in rest.splitlines() if not line.startswith("    ")]
    return title.rstrip(".:"), "\n".join(kept).strip()


def tables(entries: Sequence[Figures]) -> Iterator[str]:
    """Yield a table for each group of arms, and one for each test that has figures of its own."""
    groups: dict[str, list[Figures]] = {}
    tests: dict[str, dict[str, Figures]] = {}
    for entry in entries:
        if "arm" in entry["extra_info"]:
            groups.setdefault(entry["group"], []).append(entry)
        else:
            test, _, case = entry["name"].partition("[")
            figures = entry["extra_info"] or {"median": seconds(entry["stats"]["median"])}
            tests.setdefault(test, {})[case.rstrip("]") or "measured"] = figures
    for group, arms in groups.items():
        yield arms_table(group, arms)
    for test, cases in tests.items():
        name = test.removeprefix("test_").replace("_", " ")
        if all(nested(figures) for figures in cases.values()):
            for case, figures in cases.items():
                yield table([f"{name}: {case}" if len(cases) > 1 else name], figures)
        else:
            flat = {case: dict(flattened(figures)) for case, figures in cases.items()}
            yield table([name], transposed(flat))


def arms_table(group: str, entries: Sequence[Figures]) -> str:
    """Return the arms of a case, as they were told to pytest-benchmark."""
    rows = {}
    for entry in entries:
        info = entry["extra_info"]
        beside = {k: v for k, v in info.items() if k not in ("arm", "over", "ratio", "cpu_s")}
        rows[info["arm"]] = {
            "median": seconds(statistics.median(entry["stats"]["data"])),
            f"over {info['over']}": info["ratio"],
            "processor": seconds(info["cpu_s"]),
            **beside,
        }
    return table([group], rows)


def table(corner: Sequence[str], rows: Mapping[str, Figures]) -> str:
    """Return rows of figures as a table; a column is there where any row has it."""
    columns = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    lines = [[*corner, *map(words, columns)], ["---"] * (1 + len(columns))]
    for name, figures in rows.items():
        lines.append([words(name), *(cell(figures.get(column)) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def nested(figures: Figures) -> bool:
    """Return whether each figure is a row of others."""
    return all(isinstance(value, dict) and "median" not in value for value in figures.values())


def flattened(figures: Figures, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield figures, those inside others by both names."""
    for key, value in figures.items():
        if isinstance(value, dict) and "median" not in value:
            yield from flattened(value, f"{before}{key}, ")
        elif not isinstance(value, list):
            yield f"{before}{key}", value


def transposed(rows: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    turned: dict[str, dict[str, Any]] = {}
    for name, figures in rows.items():
        for key, value in figures.items():
            turned.setdefault(key, {})[name] = value
    return turned


def cell(value: Any) -> str:
    """Return a figure as text."""
    if value is None:
        return ""
    if isinstance(value, dict):
        if len(value["all"]) == 1:  # one round has no interval
            return number(value["median"])
        low, high = value["interval_90"]
        return f"{number(value['median'])} ({number(low)} to {number(high)})"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def number(value: float) -> str:
    """Return a number with three digits, or all that stand before the point."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def words(key: str) -> str:
    return key.replace("_", " ").replace("|", "\\|")


def main(arguments: Sequence[str]) -> None:
    """Write the page of all results, or beside each file that is named."""
    if not arguments:
        for file, text in {**pages(), README: readme()}.items():
            file.write_text(text)
            print(file)
    for argument in arguments:
        file = Path(argument)
        target = file.with_suffix(".md")
        target.write_text("\n\n".join([f"# {file.stem}", *sections(json.loads(file.read_text()))]) + "\n")
        print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
