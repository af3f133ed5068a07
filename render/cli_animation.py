"""`layertap render animation`: pictures that move, by command."""

from __future__ import annotations

from typing import Any

import click

from ..capture.errors import LayertapError
from ..capture.printable import printable
from .cli import _clip, _scope, montage, render

_OTHERS = ("store", "painter", "overwrite", "jobs")  # what a montage is told and an animation is not


@render.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option(
    "--over",
    type=click.Choice(["rows", "layers", "channels", "stores"]),
    help="What differs from frame to frame; rows, or stores where there are several.",
)
@click.option(
    "--kind",
    default="grid",
    show_default=True,
    metavar="KIND",
    help="What a frame is: grid or montage; or, with --scope as limits, another kind of rows and layers.",
)
@click.option(
    "--rows",
    metavar="ROWS",
    help="Rows such as 0,5,10:20; the first 16 if the frames are rows and none are named, or else the first.",
)
@click.option("--seconds", type=float, help="How long a frame is shown; 0.8 if nothing says.")
@click.option("--loops", type=int, default=0, show_default=True, help="How often it is shown; 0 for ever.")
@click.option("--name", "names", multiple=True, metavar="TEXT", help="What a frame is called; once for each.")
@click.option(
    "--scope",
    metavar="SCOPE",
    help="What shares a scale over all frames: layer, figure, row, channel; or limits such as -1:1. "
    "Layer if nothing says, and figure over layers.",
)
@click.option(
    "--out",
    default="animation.gif",
    show_default=True,
    metavar="FILE",
    help="A .gif, .webp, .png or .apng, or .html; or a .svg or .pdf with all frames one below the other.",
)
def animation(stores: tuple[str, ...], **options: Any) -> None:
    """Draw a picture that moves: over rows, layers (depth), channels, or stores (checkpoints).

    Example: layertap render animation run.zarr --over layers --rows 17 --out depth.gif
    """
    from ..capture.reader import open_run
    from .animation import animate
    from .picture import Picture
    from .selection import select_rows

    wrong, right = options.pop("wrong"), options.pop("right")
    if wrong and right:
        raise click.UsageError("--wrong and --right together leave no row; give one of them")
    filters = {name: options.pop(name) for name in ("class_name", "each_class")}
    filters["outcome"] = "wrong" if wrong else "right" if right else None
    out, rows = options.pop("out"), options.pop("rows")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        if "scope" in given:
            given["scope"] = _scope(given["scope"])
        if "clip" in given:
            given["clip"] = _clip(given["clip"])
        runs = [open_run(store) for store in stores]
        if any(filters.values()):
            rows = select_rows(runs[0], rows, **filters)
        drawn = animate(runs, rows=rows, **given)
        still = out.lower().endswith((".svg", ".pdf"))
        path = (Picture(drawn.still(), drawn.spec) if still else drawn).save(out)
    except LayertapError as error:
        raise click.ClickException(printable(error)) from error
    click.echo(printable(path))


_OWN = {option.name for option in animation.params}
# Before --out, the options that choose and draw tiles.
animation.params[-1:-1] = [o for o in montage.params if o.name not in _OWN and o.name not in _OTHERS]
