"""`layertap view` and `layertap export`: the web page of a store."""

from __future__ import annotations

from typing import Any

import click

from ..capture.cli import reports_errors
from ..capture.printable import printable


@click.command()
@click.argument("store")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of 127.0.0.1; 0 is a free one.")
@click.option("--open/--no-browser", "browser", default=True, help="Whether to open a browser.")
@reports_errors
def view(store: str, port: int, browser: bool) -> None:
    """Show a store as a web page: rows by layers by channels.

    STORE is a folder, a zip file or a URL. The page is for this machine alone (127.0.0.1), and only reads.

    \b
    layertap view run.zarr
    layertap view s3://bucket/run.zarr --no-browser --port 8080
    """
    from ..capture.reader import open_run
    from .serve import view as serve

    serve(open_run(store), port, browser=browser, say=click.echo)


@click.group()
def export() -> None:
    """Write what others can open without layertap.

    \b
    layertap export html run.zarr --rows 0:20 --out page.html
    """


@export.command()
@click.argument("store")
@click.option("--rows", metavar="ROWS", help="Rows such as 0,5,10:20; the first nine if none is named.")
@click.option("--class", "class_name", metavar="NAME", help="Rows of this class only.")
@click.option("--wrong", is_flag=True, help="Wrong predictions only.")
@click.option("--right", is_flag=True, help="Right predictions only.")
@click.option("--each-class", is_flag=True, help="The first of these rows for each class.")
@click.option("--layers", metavar="NAMES", help="Names or patterns, with commas between them.")
@click.option(
    "--channels", default="all", show_default=True, help="all, first:9, top:9, top:9:variance, or 0,3,5:8."
)
@click.option(
    "--out", default="page.html", show_default=True, metavar="PATH", help="A file named .html, or a folder."
)
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@reports_errors
def html(store: str, out: str, wrong: bool, right: bool, **options: Any) -> None:
    """Write the web page of some rows, to be opened without a server or a network.

    \b
    layertap export html run.zarr --rows 0:20 --layers conv1,conv2 --out page.html
    layertap export html run.zarr --wrong --each-class --out wrong-ones
    """
    from ..capture.reader import open_run
    from .offline import N_ROWS, export_html
    from .selection import select_rows

    if wrong and right:
        raise click.UsageError("--wrong and --right together leave no row; give one of them")
    filters = {name: options.pop(name) for name in ("class_name", "each_class")}
    filters["outcome"] = "wrong" if wrong else "right" if right else None
    run = open_run(store)
    rows = options.pop("rows")
    chosen = select_rows(run, rows, **filters)
    if rows is None and not any(filters.values()):
        chosen = chosen[:N_ROWS]
    click.echo(printable(export_html(run, out, chosen, **options)))
