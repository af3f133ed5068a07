"""`layertap render pca` and `layertap render statistics`."""

from __future__ import annotations

from typing import Any

import click

from ..capture.errors import LayertapError
from ..capture.printable import printable
from .cli import LAYERS, PAINTER, ROW_OPTIONS, TITLE, draw_kind, file_options, render, report, with_options

_SEED = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="What a sample is drawn by."
)


@render.command()
@with_options(*ROW_OPTIONS, LAYERS)
@click.option(
    "--fit",
    type=click.Choice(["sample", "rows"]),
    default="sample",
    show_default=True,
    help="What components are fitted to: places of all captured rows, or all places of the drawn rows.",
)
@click.option(
    "--places", type=click.IntRange(2), default=8192, show_default=True, help="Places of a sample, at most."
)
@_SEED
@click.option(
    "--clip",
    type=click.FloatRange(50, 100),
    default=99.0,
    show_default=True,
    help="Percentile of a component's size at which its colour ends.",
)
@click.option("--picture/--no-picture", default=True, help="Whether the row's picture is at the left.")
@with_options(*file_options("pca.png", True))
def pca(**options: Any) -> None:
    """Draw the first three principal components of layers as red, green and blue.

    Example: layertap render pca run.zarr --rows 0:6 --layers conv1,layer1 --out pca.png
    """
    draw_kind("pca", "{" not in options["out"], options)


@render.command()
@click.argument("store")
@click.argument("what", default="overview")
@click.option(
    "--rows", metavar="ROWS", help="Rows such as 0,5,10:20; all that are captured if none is named."
)
@with_options(LAYERS)
@click.option(
    "--log", metavar="WHICH", help="Logarithmic: counts, values or both; none of them if not given."
)
@click.option(
    "--order",
    type=click.Choice(["index", "clusters"]),
    default="index",
    show_default=True,
    help="How the channels of a correlation are ordered.",
)
@click.option(
    "--page", type=click.IntRange(1), default=1, show_default=True, help="Which part of many layers."
)
@click.option(
    "--sample", type=click.IntRange(1), help="Rows that are read where no statistics were kept, at most."
)
@_SEED
@with_options(TITLE, PAINTER)
@click.option(
    "--out", default="statistics.png", show_default=True, metavar="FILE", help="A .png, .svg or .pdf."
)
def statistics(**options: Any) -> None:
    """Draw statistics of layers: WHAT is overview, histograms, sparsity, dead, ranges, cka or correlation.

    Example: layertap render statistics run.zarr cka --layers 'layer*' --out cka.png
    """
    from ..capture.reader import open_run
    from .picture import draw

    store, out = options.pop("store"), options.pop("out")
    try:
        report(draw(open_run(store), "statistics", **options).save(out), True)
    except LayertapError as error:
        raise click.ClickException(printable(error)) from error
