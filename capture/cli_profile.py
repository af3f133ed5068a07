"""The command `profile`: what a capture costs here, and what would make it cheaper."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from .cli import input_options, load_source, numbers, reports_errors, split_patterns
from .printable import printable

_WIDEST = 120


@click.command()
@click.argument("model")
@click.argument("data", required=False)
@click.option("--layers", "patterns", multiple=True, help="As for capture; all that can be, if none.")
@click.option(
    "--size", help="Shape of one input, without DATA; by default what the model tells, or 3,224,224."
)
@click.option(
    "--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Rows of a forward."
)
@click.option("--score", help="As for capture.")
@click.option("--reduce", "reductions", multiple=True, help="As for capture.")
@click.option("--dtype", help="As for capture.")
@click.option("--codec", default="none", show_default=True, help="none, lz4 (bit-shuffled), zstd.")
@click.option("--stats", help="As for capture.")
@click.option("--memory", default="2GiB", show_default=True, help="Host memory that the engine may hold.")
@click.option("--workers", type=click.IntRange(0), help="Threads or processes that load batches ahead.")
@click.option(
    "--at", default=".", show_default=True, type=click.Path(), help="Folder whose disk the store would be on."
)
@click.option("--rows", type=click.IntRange(1), help="Rows of the real capture; about five seconds if none.")
@click.option(
    "--seconds", default=20.0, show_default=True, type=click.FloatRange(0), help="How long the ladder takes."
)
@click.option("--no-run", is_flag=True, help="Leave out the real capture.")
@click.option("--json", "json_file", type=click.Path(), metavar="FILE", help="Write all of it as JSON.")
@click.option("--html", "html_file", type=click.Path(), metavar="FILE", help="Write it as a web page.")
@click.option("--png", "png_file", type=click.Path(), metavar="FILE", help="Draw the roofline.")
@click.option(
    "--trace", "trace_file", type=click.Path(), metavar="FILE", help="Write a timeline of the real capture."
)
@input_options
@reports_errors
def profile(
    model: str,
    data: str | None,
    patterns: tuple[str, ...],
    size: str | None,
    reductions: tuple[str, ...],
    no_run: bool,
    score: str | None,
    json_file: str | None,
    html_file: str | None,
    png_file: str | None,
    trace_file: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Measure what a capture costs, and what would help.

    MODEL and DATA are those of capture; without DATA it is noise. Runs the model with one stage of a capture
    more at a time, in interleaved rounds, then a real capture, and leaves nothing behind. Takes about a
    minute. --trace is for Perfetto (ui.perfetto.dev) or chrome://tracing.

    \b
    layertap profile torchvision:resnet18
    layertap profile torchvision:resnet18 folder:pictures --layers 'layer*' --resize 224 --html cost.html
    """
    from .backend import backend_for
    from .errors import PlanError
    from .forecast_text import WIDTH
    from .profile import profile as measure
    from .profile_text import show
    from .score import read_score
    from .spans import Spans
    from .specs import load_model

    if trace_file and no_run:
        raise PlanError("--trace is a timeline of the real capture: leave --no-run out")
    inputs = {name: options.pop(name) for name in ("mean", "std", "resize", "crop", "skip_bad")}
    loaded = load_model(model)
    if loaded.batch_rows is not None:
        raise PlanError(
            f"{loaded.name} takes batches of exactly {loaded.batch_rows} rows, and profile tries others: "
            "make it anew for any number of rows (torch.export.export(..., dynamic_shapes=...))"
        )
    backend = backend_for(loaded.model)
    network = backend.place(loaded.model, device)
    source = None if data is None else load_source(data, backend, loaded.preprocess, **inputs)
    spans = Spans() if trace_file else None
    found = measure(
        network,
        source,
        split_patterns(patterns) or "**",
        size=numbers(size, "--size", int) if size else None,
        reduce=reductions or None,
        score=None if score is None else read_score(score),
        name=loaded.name,
        run=not no_run,
        trace=spans,
        say=lambda text: click.echo(printable(text), err=True),
        **options,
    )
    width = max(WIDTH, min(_WIDEST, shutil.get_terminal_size((WIDTH, 24)).columns))
    click.echo(f"\n{show(found, width)}")
    told = found.to_json()
    if json_file:
        Path(json_file).write_text(json.dumps(told, indent=1) + "\n")
    if png_file:
        import_module("layertap.render.roofline").save(told, png_file)
    if html_file:
        import_module("layertap.render.profile_page").save(told, html_file)
    if trace_file:
        assert spans is not None
        spans.save(trace_file)
    for file in (json_file, png_file, html_file, trace_file):
        if file:
            click.echo(printable(file))
