"""`layertap render again`: a picture from the file of another one."""

from __future__ import annotations

from pathlib import Path

import click

from ..capture.errors import LayertapError
from ..capture.printable import printable
from .cli import render


@render.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--from", "source", required=True, metavar="FILE", help="A file that layertap drew.")
@click.option("--out", required=True, metavar="FILE", help="What to draw; its suffix says the format.")
def again(stores: tuple[str, ...], source: str, out: str) -> None:
    """Draw what a file shows once more, in another format or from another store.

    Files that layertap draws carry what they were drawn from. An animation over stores takes them all.

    Example: layertap render again run.zarr --from frog.png --out frog.svg
    """
    from ..capture.reader import open_run
    from .animation import FORMATS, AnimationSpec, animate
    from .carried import read_spec
    from .picture import draw

    try:
        spec = read_spec(source)
        runs = [open_run(store) for store in stores]
        # A PNG may move as well; of what was an animation it does.
        if isinstance(spec, AnimationSpec) and Path(out).suffix.lower().removeprefix(".") in FORMATS:
            path = animate(runs, spec).save(out)
        elif len(runs) > 1:
            raise click.UsageError(f"a {spec.kind} is drawn from one store, not from {len(runs)}")
        else:
            path = draw(runs[0], spec).save(out)
    except LayertapError as error:
        raise click.ClickException(printable(error)) from error
    click.echo(printable(path))
