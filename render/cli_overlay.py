"""`layertap render overlay`: heat maps over pictures, by command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .cli import draw_kind, render, tile_options


def _numbers(n: int, *words: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return what reads `n` numbers with commas between them, or one of some words."""

    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        if text is None or text in words:
            return text
        try:
            numbers = tuple(float(part) if "." in part else int(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != n:
            others = "".join(f", or {word}" for word in words)
            raise click.BadParameter(f"{text!r} is not {n} numbers with commas between them{others}")
        return numbers

    return read


@render.command()
@tile_options("overlay.png", True)
@click.option(
    "--heat",
    metavar="WHAT",
    help="mean, maximum or l2 of the channels, channel, gradcam, head or rollout; what suits if none.",
)
@click.option(
    "--alpha", type=click.FloatRange(0, 1, min_open=True), default=0.6, show_default=True, help="Opacity."
)
@click.option(
    "--fade/--no-fade",
    default=None,
    help="Whether colours fade towards 0; those of signed maps if not given.",
)
@click.option(
    "--beneath", default="grey", show_default=True, metavar="WHICH", help="The picture in grey, or in colour."
)
@click.option(
    "--resize",
    default="bilinear",
    show_default=True,
    metavar="HOW",
    help="bilinear or nearest, before scaling.",
)
@click.option(
    "--cell", callback=_numbers(2), metavar="Y,X", help="A cell of the layers, outlined on the picture."
)
@click.option(
    "--query",
    callback=_numbers(2, "class", "mean"),
    metavar="WHICH",
    help="Whose attention: class, mean, or the patch Y,X, which is outlined.",
)
@click.option("--prefix", type=click.IntRange(0), help="Tokens before the patches; by their number if none.")
@click.option(
    "--region",
    callback=_numbers(4),
    metavar="T,L,B,R",
    help="What the model saw of the picture: top, left, bottom, right in pixels.",
)
@click.option("--original/--no-original", default=True, help="Whether the picture is at the left.")
def overlay(**options: Any) -> None:
    """Draw rows: the picture at the left, then the same below a heat map for each layer.

    Example: layertap render overlay run.zarr --rows 0:4 --layers layer4 --heat gradcam
    """
    draw_kind("overlay", "{" not in options["out"], options)
