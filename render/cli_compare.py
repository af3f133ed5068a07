"""`layertap render layers`, `classes`, `stores` and `outcomes`: comparisons, by command."""

from __future__ import annotations

from typing import Any

import click

from .cli import draw_kind, render, tile_options


def _draw(kind: str, options: dict[str, Any], *, every: bool, one_file: bool) -> None:
    if options.pop("over") != "drawn":
        raise click.UsageError("channels of a comparison are ranked by what is compared; leave --over out")
    draw_kind(kind, one_file or "{" not in options["out"], options, every=every)


@render.command()
@tile_options("layers.png", True, scope="figure")
@click.option("--measured", metavar="ROWS", help="Rows that layers are measured over.")
@click.option("--picture/--no-picture", default=True, help="Whether the row's picture is at the left.")
def layers(**options: Any) -> None:
    """Draw layers side by side under one scale, with what changes with depth: zeros, correlation, rank.

    Of several rows the mean is drawn. Example: layertap render layers run.zarr --rows 17 --channels top:9
    """
    _draw("layers", options, every=False, one_file=False)


@render.command()
@tile_options("classes.png", True)
@click.option("--classes", metavar="NAMES", help="Names or numbers, with commas between them; else ten.")
@click.option("--minus", metavar="NAME", help="The class taken from the others; the second of two if none.")
@click.option("--exact", is_flag=True, help="Read the values also where statistics have coarser means.")
def classes(**options: Any) -> None:
    """Draw the mean maps of classes, and their signed differences.

    Example: layertap render classes run.zarr --classes cat,dog --layers layer2,layer3 --channels top:9
    """
    _draw("classes", options, every=True, one_file=True)


@render.command()
@tile_options("outcomes.png", True)
@click.option("--classes", metavar="NAMES", help="Classes within which right and wrong are compared too.")
def outcomes(**options: Any) -> None:
    """Draw the mean maps of right and of wrong predictions, and their signed difference.

    Example: layertap render outcomes run.zarr --classes cat --layers layer3 --channels top:9
    """
    _draw("outcomes", options, every=True, one_file=True)


@render.command()
@tile_options("stores.png", True)
@click.option("--other", required=True, metavar="STORE", help="The store to compare with, a path or a URL.")
@click.option("--mean", is_flag=True, help="Compare the means over all rows, not each row.")
@click.option("--picture/--no-picture", default=True, help="Whether each row's picture is at the left.")
def stores(**options: Any) -> None:
    """Draw the same rows of two stores, and their signed difference.

    A layer with another name in the other store is a pair: --layers conv1=stem.conv. Example: layertap
    render stores before.zarr --other after.zarr --rows 17 --layers layer3 --channels top:9
    """
    _draw("stores", options, every=options["mean"], one_file=False)
