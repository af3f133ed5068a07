"""The command `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .cli import reports_errors


@click.command()
@click.option(
    "--out", default="demo-out", show_default=True, type=click.Path(), help="Where everything goes."
)
@click.option(
    "--backend",
    default="torch",
    show_default=True,
    type=click.Choice(("torch", "jax", "keras", "onnx")),
    help="What runs the network that is captured.",
)
@reports_errors
def demo(out: str, backend: str) -> None:
    """Train a small network on digits, capture it and draw it.

    Needs no download: the digits come with scikit-learn. Takes about half a minute on two cores.

    \b
    layertap demo --out demo-out
    layertap demo --backend jax
    """
    from .demo import run_demo

    run_demo(Path(out), backend, click.echo)
