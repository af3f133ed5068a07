"""`layertap render`: pictures from a store, by command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..capture.errors import LayertapError
from ..capture.machine import n_cores
from ..capture.printable import printable
from .cli_top import top
from .importance import RANKINGS
from .spec import OVER, SIGNS

_MANY = 400  # files from which on further processes pay, by what their start takes
_FILE_A_ROW, _ONE_FILE = "{row:05d}.png", "grid.png"


@click.group()
def render() -> None:
    """Draw pictures from a store, without the model.

    Example: layertap render grid run.zarr --rows 17 --out frog.png
    """


render.add_command(top)


Decorator = Callable[[Callable[..., None]], Callable[..., None]]

ROW_OPTIONS: tuple[Decorator, ...] = (
    click.argument("store"),
    click.option("--rows", metavar="ROWS", help="Rows such as 0,5,10:20; the first if none is named."),
    click.option("--class", "class_name", metavar="NAME", help="Rows of this class only."),
    click.option("--wrong", is_flag=True, help="Wrong predictions only."),
    click.option("--right", is_flag=True, help="Right predictions only."),
    click.option("--each-class", is_flag=True, help="The first of these rows for each class."),
)
LAYERS: Decorator = click.option(
    "--layers", metavar="NAMES", help="Names or patterns, with commas between them."
)
TITLE: Decorator = click.option("--title", help="Title of the figure.")
PAINTER: Decorator = click.option(
    "--painter", metavar="NAME", help="matplotlib or pillow; by the file if none."
)


def file_options(out: str | None, default: bool | str) -> tuple[Decorator, ...]:
    """Return what commands that draw rows are told of their files."""
    return (
        TITLE,
        PAINTER,
        click.option(
            "--out",
            default=out,
            show_default=default,
            metavar="FILE",
            help="A .png, .svg, .pdf or .html; with {row}, {label}, {class}, {predicted} or {id}, one a row.",
        ),
        click.option("--overwrite", is_flag=True, help="Draw a row anew whose file is there already."),
        click.option(
            "--jobs",
            type=click.IntRange(1),
            help=f"Processes that draw a file a row; all processors from {_MANY} files on if not given.",
        ),
    )


def with_options(*given: Decorator) -> Decorator:
    """Return what gives a command some options, in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def tile_options(out: str | None, default: bool | str, *, scope: str = "layer") -> Decorator:
    """Return what every kind of picture of tiles is told on the command line."""
    return with_options(
        *ROW_OPTIONS,
        LAYERS,
        click.option(
            "--channels",
            metavar="WHICH",
            help="all, first:9, top:9, top:9:variance, page:2:64, or numbers: 0,3,5:8.",
        ),
        click.option(
            "--by",
            type=click.Choice(RANKINGS),
            help="What top and page rank by; mean and index if nothing says.",
        ),
        click.option(
            "--over",
            type=click.Choice(OVER),
            default="drawn",
            show_default=True,
            help="Over which rows they rank: those drawn, or all captured ones (as f_ratio always does).",
        ),
        click.option(
            "--scope",
            default=scope,
            show_default=True,
            metavar="SCOPE",
            help="What shares a scale: layer, figure, row, channel, data (a layer, all rows), or -1:1.",
        ),
        click.option(
            "--clip",
            metavar="PERCENT",
            help="Percentile, or two such as 0.5:99.5, beyond which values are marked as over and under.",
        ),
        click.option(
            "--sign",
            type=click.Choice(SIGNS),
            default="auto",
            show_default=True,
            help="Colours from 0 or symmetric around it; by the data if auto.",
        ),
        click.option("--columns", type=click.IntRange(1), help="Tiles in a line."),
        click.option("--colormap", metavar="NAME", help="viridis, magma, gray or RdBu_r; by sign if none."),
        click.option("--magnification", type=click.IntRange(1), help="Pixels a value; by size if none."),
        click.option(
            "--numbers/--no-numbers",
            default=None,
            help="Whether tiles are numbered, further apart if need be; where there is room if not given.",
        ),
        *file_options(out, default),
    )


@render.command()
@tile_options(None, f"{_FILE_A_ROW}, or {_ONE_FILE} with --one-file")
@click.option("--one-file", is_flag=True, help="All rows in one figure.")
@click.option("--picture/--no-picture", default=True, help="Whether the row's picture is at the left.")
def grid(one_file: bool, **options: Any) -> None:
    """Draw rows: the picture at the left, then a block of channels for each layer.

    Example: layertap render grid run.zarr --rows 0,5,10:20 --layers conv1,conv2 --channels top:9
    """
    out = options["out"]
    if one_file and out is not None and "{" in out:
        raise click.UsageError(f"--one-file makes one file, but {out} names one a row; give a plain name")
    if out is None:
        options["out"] = _ONE_FILE if one_file else _FILE_A_ROW
    draw_kind("grid", one_file, options)


@render.command()
@tile_options("montage.png", True)
def montage(**options: Any) -> None:
    """Draw all channels of a layer for a row, or one channel over many rows.

    Example: layertap render montage run.zarr --rows 0:64 --layers conv1 --channels 5 --out channel5.png
    """
    draw_kind("montage", "{" not in options["out"], options)


def draw_kind(kind: str, one_file: bool, options: dict[str, Any], *, every: bool = False) -> None:
    """Draw a kind of picture as its command was told; without rows the first, or `every` one."""
    from ..capture.reader import open_run
    from .picture import check_options, draw, draw_many
    from .selection import select_rows

    wrong, right = options.pop("wrong"), options.pop("right")
    if wrong and right:
        raise click.UsageError("--wrong and --right together leave no row; give one of them")
    filters = {name: options.pop(name) for name in ("class_name", "each_class")}
    filters["outcome"] = "wrong" if wrong else "right" if right else None
    store, out, overwrite, rows = (options.pop(name) for name in ("store", "out", "overwrite", "rows"))
    jobs = options.pop("jobs")
    try:
        if "scope" in options:
            options["scope"] = _scope(options["scope"])
        if isinstance(options.get("clip"), str):
            options["clip"] = _clip(options["clip"])
        run = open_run(store)
        check_options(run, kind, **options)
        chosen = select_rows(run, rows, **filters)
        if rows is None and not every and not any(filters.values()):
            chosen = chosen[:1]
        if one_file or "{" not in out:
            if len(chosen) > 1 and not one_file:
                raise click.ClickException(
                    f"{len(chosen)} rows do not go into one {out}: name it with {{row}}, or add --one-file"
                )
            report(draw(run, kind, rows=chosen, **options).save(out), True)
        else:
            jobs = jobs or (n_cores() if len(chosen) >= _MANY else 1)
            draw_many(run, kind, chosen, out, overwrite=overwrite, jobs=jobs, report=report, **options)
    except LayertapError as error:
        raise click.ClickException(printable(error)) from error


def report(path: Path, drawn: bool) -> None:
    """Print the name of a file, and whether it was there before."""
    name = printable(path)
    click.echo(name if drawn else f"kept {name} (there already; --overwrite draws it anew)")


def _clip(text: str) -> str | tuple[str, ...]:
    """Return one percentile or two, as written: `99.5` or `0.5:99.5`."""
    return tuple(text.split(":")) if ":" in text else text


def _scope(text: str) -> str | tuple[str, ...]:
    """Return a scope's name, or limits as written: `-1:1`."""
    return tuple(text.split(":")) if ":" in text else text


from . import cli_again, cli_animation, cli_compare, cli_figures, cli_overlay  # noqa: E402, F401  add their commands
