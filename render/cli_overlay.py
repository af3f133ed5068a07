"""`layertap render overlay`: heat maps over pictures, by command."""

from __future__ import annotations

from typing import Any

import click

from .cli import draw_kind, render, tile_options


class _Numbers(click.ParamType):
    """Numbers with commas between them, as many as are asked for."""

    name = "numbers"

    def __init__(self, n: int, words: tuple[str, ...] = ()) -> None:
        self.n, self.words = n, words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of numbers, or the word."""
        if value in self.words or not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(part) if "." in part else int(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != self.n:
            or_words = "".join(f", or {word}" for word in self.words)
            self.fail(f"{value!r} is not {self.n} numbers with commas between them{or_words}", param, ctx)
        return numbers


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
    "--cell", type=_Numbers(2), metavar="Y,X", help="A cell of the layers, outlined on the picture."
)
@click.option(
    "--query",
    type=_Numbers(2, ("class", "mean")),
    metavar="WHICH",
    help="Whose attention: class, mean, or the patch Y,X, which is outlined.",
)
@click.option("--prefix", type=click.IntRange(0), help="Tokens before the patches; by their number if none.")
@click.option(
    "--region",
    type=_Numbers(4),
    metavar="T,L,B,R",
    help="What the model saw of the picture: top, left, bottom, right in pixels.",
)
@click.option("--original/--no-original", default=True, help="Whether the picture is at the left.")
def overlay(**options: Any) -> None:
    """Draw rows: the picture at the left, then the same below a heat map for each layer.

    Example: layertap render overlay run.zarr --rows 0:4 --layers layer4 --heat gradcam
    """
    draw_kind("overlay", "{" not in options["out"], options)
