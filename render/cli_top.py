"""`layertap render top`: the rows that excite channels most, by command."""

from __future__ import annotations

from typing import Any

import click

from ..capture.errors import LayertapError
from ..capture.printable import printable


@click.command()
@click.argument("store")
@click.option("--layers", metavar="NAMES", help="Names or patterns, with commas between them; the first.")
@click.option(
    "--channels", metavar="WHICH", help="all, first:9 (the default), top:9:mean, page:2:9, or 0,3,5:8."
)
@click.option(
    "--by",
    type=click.Choice(["index", "maximum", "mean", "variance", "sparsity"]),
    help="What top and page rank by; maximum, and index, if nothing says.",
)
@click.option("--k", default=9, show_default=True, type=click.IntRange(1), help="Rows for each channel.")
@click.option("--rows", metavar="ROWS", help="Among rows such as 0,5,10:20; all that are captured if none.")
@click.option("--class", "class_name", metavar="NAME", help="Among rows of this class.")
@click.option("--wrong", is_flag=True, help="Among wrong predictions.")
@click.option("--right", is_flag=True, help="Among right predictions.")
@click.option(
    "--crop/--no-crop",
    default=None,
    help="Whether pictures are cut to where they excite, or it is outlined; if none, by its size.",
)
@click.option(
    "--magnification", type=click.IntRange(1), help="Pixels a pixel of the picture; by size if none."
)
@click.option("--title", help="Title of the figure.")
@click.option("--painter", metavar="NAME", help="matplotlib or pillow; by the file if none.")
@click.option("--out", default="top.png", show_default=True, metavar="FILE", help="A .png, .svg or .pdf.")
def top(
    store: str,
    rows: str | None,
    class_name: str | None,
    wrong: bool,
    right: bool,
    out: str,
    **options: Any,
) -> None:
    """Draw for each channel the rows that excite it most, cut to where they do.

    Example: layertap render top run.zarr --layers layer4.1 --channels top:9 --out top.png
    """
    from ..capture.reader import open_run
    from .picture import draw
    from .selection import select_rows

    if wrong and right:
        raise click.UsageError("--wrong and --right together leave no row; give one of them")
    outcome = "wrong" if wrong else "right" if right else None
    try:
        run = open_run(store)
        among = None
        if rows is not None or class_name is not None or outcome is not None:
            among = select_rows(run, rows, class_name=class_name, outcome=outcome)
        path = draw(run, "top", rows=among, **options).save(out)
    except LayertapError as error:
        raise click.ClickException(printable(error)) from error
    click.echo(printable(path))
