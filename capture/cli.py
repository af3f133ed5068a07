"""The commands that capture and describe: thin over the public API."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .errors import CaptureError, DataError, FormatError, LayertapError, PlanError, StoreExistsError
from .printable import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .reader import Run

Command = TypeVar("Command", bound=Callable[..., Any])


def reports_errors(command: Command) -> Command:
    """Turn errors into a message and exit code 1; with LAYERTAP_TRACEBACK=1, into a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LayertapError as error:
            if os.environ.get("LAYERTAP_TRACEBACK"):
                raise
            # Others speak of what a store says, which must not make up lines of its own.
            has_lines = isinstance(error, CaptureError | DataError | PlanError | StoreExistsError)
            raise click.ClickException(printable(error, keep="\n" if has_lines else "")) from error

    return run  # type: ignore[return-value]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Return a table of text, its columns as wide as need be; those numbered in `right` are right-aligned."""
    cells = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def input_options(command: Command) -> Command:
    """Add what says how pictures become inputs."""
    options = (
        click.option("--mean", help="Mean for each channel in units of 0..1: 0.485,0.456,0.406."),
        click.option("--std", help="Standard deviation for each channel, like --mean."),
        click.option(
            "--resize",
            type=click.IntRange(1),
            help="Scale the shorter side to this many pixels, crop the middle.",
        ),
        click.option(
            "--crop",
            type=click.IntRange(1),
            help="Side of the middle square to crop, where not that of --resize.",
        ),
        click.option("--skip-bad", is_flag=True, help="Leave out pictures that do not decode."),
        click.option("--device", help="cpu, cuda, cuda:1; by default CUDA where there is some."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@click.argument("data", required=False)
@click.option(
    "--size", help="Shape of one input, without DATA; by default what the model tells, or 3,224,224."
)
@input_options
@reports_errors
def layers(model: str, data: str | None, size: str | None, **inputs: Any) -> None:
    """List what can be captured of a model.

    MODEL is what capture takes. The model runs once, on three rows of DATA or on noise. The last column says
    what else of a layer can be captured, with that behind its name: conv1:input.

    \b
    layertap layers torchvision:resnet18
    layertap layers model.py:build folder:pictures --resize 224
    """
    from .backend import backend_for
    from .dtypes import named_dtype
    from .plan import show_bytes
    from .specs import load_model
    from .taps import OUTPUT

    loaded = load_model(model)
    backend = backend_for(loaded.model)
    network = backend.place(loaded.model, inputs.pop("device"))
    if data is not None:
        source = load_source(data, backend, loaded.preprocess, **inputs)
        batch = source.batch(range(min(loaded.batch_rows or 3, source.n_rows)))
    else:
        batch = (None if size else backend.example(network, 3)) or _noise(size or "3,224,224")
    try:
        found = backend.survey(network, batch)
    except LayertapError:
        raise
    except Exception as error:
        shapes = [",".join(map(str, v.shape[1:])) for v in (*batch.inputs, *batch.kwargs.values())]
        what = f"the first rows of {data}" if data else f"an input of shape {' and '.join(shapes)}"
        raise PlanError(
            f"{model} does not run on {what}: {error}. Name DATA that fits it, or another --size"
        ) from error
    rows: list[tuple[Any, ...]] = []
    for one in found:
        also = " ".join(f":{kind}" for kind in one.kinds if kind != OUTPUT)
        if not one.outputs:
            note = "no tensor" if one.calls else "not called"
            rows.append((one.layer.name, one.layer.type, note, "", one.calls, also))
        for i, (tap, shape, dtype) in enumerate(one.outputs):
            if (reason := one.refused.get(tap)) is not None:
                rows.append(
                    (str(tap), one.layer.type, f"not captured: {reason}", "", one.calls, "" if i else also)
                )
                continue
            per_row = shape[1:]
            text = " x ".join(map(str, per_row)) or "1"
            try:
                size = show_bytes(math.prod(per_row) * named_dtype(dtype).itemsize)
            except FormatError:  # a type that a store cannot hold
                size = ""
            rows.append((str(tap), one.layer.type, f"{text} {dtype}", size, one.calls, "" if i else also))
        rows += [(alias, one.layer.type, f"is {one.layer.name}", "", "", "") for alias in one.layer.aliases]
    header = ("name", "type", "output of one row", "bytes a row", "calls", "also")
    click.echo(table(header, rows, right=(3, 4)))


@click.command()
@click.argument("model")
@click.argument("data")
@click.argument("store")
@click.option(
    "--layers",
    "patterns",
    multiple=True,
    required=True,
    help="Names, globs, re:..., type:..., and :input, :grad or :attention behind them; commas.",
)
@click.option(
    "--batch-size",
    show_default="64, or what MODEL needs",
    type=click.IntRange(1),
    help="Rows of a forward.",
)
@click.option("--score", help="What NAME:grad is the gradient of: prediction (default), label, or a class.")
@click.option(
    "--reduce",
    "reductions",
    multiple=True,
    help="Keep less: pool:7, int8, 'channels:stride=4|pool:7|float16', 'layer4=topk:9'; see below.",
)
@click.option("--ragged", multiple=True, help="PATTERN:SIZE: rows that vary in shape, each in its own.")
@click.option("--pad", multiple=True, help="PATTERN:SIZE[,VALUE]: rows that vary in shape, in one size.")
@click.option("--mask", default="attention_mask", show_default=True, help="The model's mask, or none.")
@click.option("--tokens", type=click.Choice(("last", "first", "mean")), help="As --reduce tokens:...")
@click.option("--dtype", help="Cast floating-point values: float16, bfloat16, float32, float8_e4m3fn, ...")
@click.option("--codec", default="none", show_default=True, help="none, lz4 (bit-shuffled), zstd.")
@click.option("--stats", help="Statistics to compute: cheap, all, or names: pooled,top:16,histogram,gram.")
@click.option(
    "--stats-only", is_flag=True, help="Write no activations, only statistics (cheap, unless --stats)."
)
@click.option("--fields", is_flag=True, help="Find the receptive field of each place, for render top.")
@click.option("--memory", default="2GiB", show_default=True, help="Host memory that the engine may hold.")
@click.option("--part", help="K/N: capture part K of N alone; by RANK and WORLD_SIZE under torchrun.")
@click.option("--workers", type=click.IntRange(0), help="Threads or processes that load batches ahead.")
@click.option("--overwrite", is_flag=True, help="Replace a store that is there.")
@click.option("--dry-run", is_flag=True, help="Run a few steps, store nothing, and say what it would take.")
@input_options
@reports_errors
def capture(
    model: str,
    data: str,
    store: str,
    patterns: tuple[str, ...],
    batch_size: int | None,
    score: str | None,
    reductions: tuple[str, ...],
    ragged: tuple[str, ...],
    pad: tuple[str, ...],
    mask: str,
    tokens: str | None,
    dtype: str | None,
    codec: str,
    stats: str | None,
    stats_only: bool,
    fields: bool,
    memory: str,
    part: str | None,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    device: str | None,
    **inputs: Any,
) -> None:
    """Capture layers of a model over a data set into a store.

    MODEL is torchvision:NAME, timm:NAME, hf:REPO (or hf:FOLDER), a .onnx or .pt2 file, file.py:factory, or
    weights with what builds their model: weights.safetensors?model=timm:NAME. DATA is folder:PATH, a .npy or
    .npz file, torchvision:NAME?root=PATH or file.py:factory. A capture that was killed goes on when the same
    command is run again.

    \b
    layertap capture torchvision:resnet18 folder:pictures run.zarr --layers 'conv1,layer*.1' --resize 224
    layertap capture model.py:build test.npz run.zarr --layers type:Conv2d --dtype float16
    layertap capture model.py:build test.npz run.zarr --layers type:Conv2d --part 3/16
    layertap capture 'timm:vit_tiny_patch16_224?weights=true' folder:pictures run.zarr --layers 'blocks.*'
    layertap capture hf:bert-base-uncased tokens.npz run.zarr --layers '**.layer.*' --ragged '**:512'
    layertap capture 'best.pt?model=model.py:build' test.npz run.zarr --layers type:Conv2d
    layertap capture torchvision:resnet18 folder:pictures run.zarr --layers layer4,layer4:grad --score label
    layertap capture model.py:build test.npz run.zarr --layers '**' --reduce 'pool:7|float16' --dry-run

    --reduce is worked out where the tensor lies, before it is moved. Steps follow each other with | between
    them; PATTERN=steps is for some layers alone, the last that matches counts, and none is nothing.

    
    pool:7  pool:4x7,max  pool:global         mean or maximum of windows
    channels:0,3,5  channels:stride=4         some channels; channels:random=16,seed=1
    crop:14  crop:14x10@3,0                   the middle, or from an offset on
    topk:5  topk:5,space                      the largest values and their positions
    norm:l1  norm:l2  norm:max                one number for all channels of a place
    project:16,seed=1  project:16,sparse      a random projection of the channels
    pca:16  pca:16,rows=500  pca:basis.npz    principal components, fitted or given
    tokens:first  tokens:last  tokens:mean    of a sequence
    channels_first                            maps (y, x, feature) as (channel, y, x)
    float16  bfloat16  float8_e4m3fn  float8_e5m2  int8
    file.py:function                          your own, from a batch to a batch

    Rows that differ in shape are kept with --ragged 'encoder.*:512', each in its own shape, or with --pad, in
    one; SIZE is the greatest that comes, for each axis that varies (224x320) or for every axis of a row
    (12x128x128). --mask names the argument of the model that says which tokens are a row's own.
    """
    from .backend import backend_for
    from .record import record_dataset
    from .score import read_score
    from .specs import load_model

    loaded = load_model(model)
    backend = backend_for(loaded.model)
    network = backend.place(loaded.model, device)
    source = load_source(data, backend, loaded.preprocess, **inputs)
    if skipped := getattr(source, "skipped", None):
        names = printable(", ".join(skipped[:5]))
        click.echo(f"left out {len(skipped)} pictures that do not decode: {names}", err=True)
    classes = loaded.classes if source.classes is None else None
    options: dict[str, Any] = {
        "batch_size": loaded.rows_of_a_step(batch_size, source.n_rows),
        "workers": workers,
        "score": None if score is None else read_score(score),
        "reduce": (*([f"tokens:{tokens}"] if tokens else ()), *reductions) or None,
        "ragged": ragged or None,
        "pad": pad or None,
        "mask": None if mask == "none" else mask,
        "dtype": dtype,
        "codec": codec,
        "memory": memory,
    }
    if dry_run:
        from .forecast import plan

        if fields:
            raise PlanError("--dry-run finds no fields: leave --fields out")
        options |= {"stats": stats, "values": not stats_only, "classes": classes}
        click.echo(str(plan(network, source, store, split_patterns(patterns), **options)))
        return
    try:
        with _stopped_by_sigterm():
            run = record_dataset(
                network,
                source,
                store,
                split_patterns(patterns),
                **options,
                part=part,
                stats=stats,
                values=not stats_only,
                fields=fields,
                classes=classes,
                name=loaded.name,
                overwrite=overwrite,
                progress=True,
                on_plan=lambda manifest, n_done: _announce(store, manifest, n_done, memory),
                on_report=lambda report: click.echo(f"\n{report}\n", err=True),
            )
    except LayertapError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model or its data failed: {type(error).__name__}: {error}. {_named(source)}What is "
            "committed is kept; LAYERTAP_TRACEBACK=1 shows where"
        ) from error
    except (KeyboardInterrupt, _Terminated) as stop:
        click.echo(
            f"\nstopped; what is committed is in {store}: the same command goes on from there", err=True
        )
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from None
    click.echo(_summary(run))


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as JSON.")
@click.option("--stats", "statistics", is_flag=True, help="Print a table of the statistics.")
@reports_errors
def info(store: str, as_json: bool, statistics: bool) -> None:
    """Say what a store holds.

    \b
    layertap info run.zarr
    layertap info run.zarr --stats
    """
    from .left_out import told
    from .plan import show_bytes
    from .reader import open_run

    run = open_run(store)
    if as_json:
        click.echo(printable(json.dumps(run.info, indent=2, ensure_ascii=False), keep="\n"))
        return
    if statistics:
        click.echo(_statistics_table(run))
        return
    model, data = run.info.get("model", {}), run.info.get("data", {})
    lines = [
        f"{store}: {_state(run)}",
        f"model    {model.get('name')} ({model.get('type')}, {model.get('backend')})",
        f"data     {data.get('name', 'a loop of your own')}, {run.n_rows:,} rows",
    ]
    if run.classes:
        names = ", ".join(run.classes[:10]) + (", ..." if len(run.classes) > 10 else "")
        lines.append(f"classes  {len(run.classes)}: {names}")
    if run.mean or run.std:
        lines.append(f"input    (x - {list(run.mean or ())}) / {list(run.std or ())}")
    lines.append(f"columns  {', '.join(run.rows) or 'none'}")
    lines.append(f"on disk  {show_bytes(run.n_bytes)}")
    for line in lines:
        click.echo(printable(line))
    click.echo()
    click.echo(
        _tap_table(
            [
                (
                    t.name,
                    f"{t.type}, ragged" if t.is_ragged else t.type,
                    t.bound if t.is_ragged else t.raw.shape[1:],
                    t.raw.dtype,
                    run.info["taps"][i]["codec"],
                )
                for i, t in enumerate(run.taps.values())
            ]
        )
    )
    for tap in run.taps.values():
        if tap.reduction.steps:
            error = tap.error.replace("; ", "\n  ")
            click.echo(printable(f"\n{tap.name} is reduced, {tap.reduction}:\n  {error}", keep="\n"))
    for line in told(run.left_out):
        click.echo(printable(line))
    click.echo()
    click.echo(_summary(run))


@click.command()
@click.argument("store")
@click.option("--repair", is_flag=True, help="Drop what is damaged, so that the same capture makes it again.")
@reports_errors
def verify(store: str, repair: bool) -> None:
    """Read all of a store and name what is damaged.

    Every checksum is held against its bytes. Exits with 1 where something is damaged and was not repaired.

    \b
    layertap verify run.zarr
    layertap verify run.zarr --repair
    """
    from . import verify as verifying
    from .reader import open_run

    damages = []
    for damage in verifying.verify(store):
        click.echo(printable(damage))
        damages.append(damage)
    run = open_run(store)
    if not damages:
        click.echo(f"{store}: {run.n_committed:,} of {run.n_rows:,} rows captured, all sound")
        return
    if not repair:
        click.echo(
            f"{len(damages)} damages; layertap verify {store} --repair drops what they are in", err=True
        )
        raise SystemExit(1)
    blocks = verifying.repair(store, damages)
    if blocks:
        n_rows = sum(run.manifest.rows_of(block) for block in blocks)
        click.echo(f"dropped {len(blocks)} blocks ({n_rows:,} rows); the same capture makes them again")
    else:
        click.echo("wrote the metadata anew; no row was lost")


@click.command()
@click.argument("store")
@click.argument("file", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@reports_errors
def pack(store: str, file: str, overwrite: bool) -> None:
    """Pack a finished store into one zip file.

    Every command reads it where it lies, without unpacking.

    \b
    layertap pack run.zarr run.zip
    """
    from .plan import show_bytes
    from .zipped import pack as pack_store

    made = pack_store(store, file, overwrite=overwrite)
    click.echo(f"{made}: {show_bytes(made.stat().st_size)}")


class _Terminated(BaseException):
    """A job scheduler wants the process to end."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a capture as Ctrl-C does: what is full is still written, and the lock is let go."""
    owner = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a worker of a data loader, forked meanwhile
            os._exit(128 + number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second one ends it at once
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def split_patterns(patterns: Sequence[str]) -> list[str]:
    """Split lists at commas; a regular expression keeps its own."""
    split = []
    for pattern in patterns:
        parts = [pattern] if pattern.startswith("re:") else pattern.split(",")
        split += [part.strip() for part in parts if part.strip()]
    return split


def load_source(
    data: str,
    backend: Any,
    preprocess: Any,
    *,
    mean: str | None,
    std: str | None,
    resize: int | None,
    crop: int | None,
    skip_bad: bool,
) -> Any:
    """Return the source that DATA names, with what is said of how pictures become inputs."""
    from dataclasses import replace

    from .data import Preprocess
    from .specs import load_data

    said = {
        "mean": numbers(mean, "--mean", float) if mean else None,
        "std": numbers(std, "--std", float) if std else None,
        "resize": resize,
        "crop": crop,
    }
    said = {key: value for key, value in said.items() if value is not None}
    if resize is not None:
        said["stretch"] = None
    chosen = replace(preprocess or Preprocess(), **said)
    source = backend.source(load_data(data, chosen, skip_bad=skip_bad))
    # A model's own preprocessing gives way to one that the data set's transform has done already.
    base = source.preprocess if source.preprocess != Preprocess() else chosen
    if not source.resizes:
        base = replace(base, resize=None, crop=None)
    source.preprocess = replace(base, **said)
    return source


def _named(source: Any) -> str:
    """Return a sentence on arrays that go to the model by name, which may be why it failed."""
    from .named_arrays import NamedArrays

    if not isinstance(source, NamedArrays):
        return ""
    return (
        f"{source.name} holds {', '.join(source.arrays)}, which the model got by these names; its one input "
        "is to be called x, inputs or images. "
    )


def _noise(size: str) -> Any:
    """Return a batch of three rows of noise."""
    import numpy as np

    from .data import Batch

    shape = numbers(size, "--size", int)
    return Batch(range(3), (np.random.default_rng(0).standard_normal((3, *shape), np.float32),))


def numbers(text: str, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Return the numbers of an option that takes several, with commas between them.

    Raises:
        PlanError: it is something else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise PlanError(f"{option} takes numbers with commas between them; it got {text!r}") from None


def _announce(store: str, manifest: Any, n_done: int, memory: str) -> None:
    from .left_out import told
    from .place import place_of
    from .plan import show_bytes, store_bytes

    layout = manifest.layout
    about = manifest.facts["taps"]
    rows = [
        (t.name, about[t.name]["type"] + (", ragged" if t.is_ragged else ""), t.shape, t.dtype, t.codec)
        for t in layout.taps
    ]
    click.echo(_tap_table(rows), err=True)
    for line in told(manifest.facts.get("left_out", {})):
        click.echo(printable(line), err=True)
    click.echo(err=True)
    if n_done == manifest.n_rows:
        click.echo(f"{store} is complete already; nothing is changed", err=True)
        return
    total, free = store_bytes(layout, manifest.n_rows), place_of(store).free_bytes()
    room = "" if free is None else f"; {show_bytes(free)} free"
    most = "up to " if any(tap.codec != "none" or tap.is_ragged for tap in layout.taps) else ""
    click.echo(
        f"{manifest.n_rows:,} rows: writes {most}{show_bytes(total)}{room}. "
        f"Blocks of {layout.block_rows} rows ({show_bytes(layout.block_bytes)}) in {memory} of memory.",
        err=True,
    )
    if n_done:
        click.echo(f"goes on after {n_done:,} rows that are committed", err=True)
    sys.stderr.flush()


def _tap_table(taps: Sequence[tuple[str, str, tuple[int, ...], Any, str]]) -> str:
    from .plan import show_bytes

    rows = []
    for name, kind, shape, dtype, codec in taps:
        n_bytes = dtype.itemsize
        for size in shape:
            n_bytes *= size
        rows.append((name, kind, " x ".join(map(str, shape)) or "1", dtype, show_bytes(n_bytes), codec))
    return table(("tap", "type", "row", "dtype", "bytes a row", "codec"), rows, right=(4,))


def _statistics_table(run: Run) -> str:
    """Return a line for each tap that sums up its channels."""
    import numpy as np

    if not run.stats.names:
        raise PlanError(f"{run.path} keeps no statistics; capture with --stats cheap, or all")
    rows = []
    for name in run.taps:
        its = run.stats[name]
        assert its.count is not None
        assert its.n_zero is not None
        assert its.dead is not None
        assert its.minimum is not None
        assert its.maximum is not None
        assert its.mean is not None
        n = int(its.count.sum())
        numbers = ["", "", ""]
        if n:
            mean = float(np.where(its.count > 0, its.mean * its.count, 0).sum() / n)
            numbers = [f"{v:.4g}" for v in (np.nanmin(its.minimum), np.nanmax(its.maximum), mean)]
        zeros = f"{100 * its.n_zero.sum() / n:.1f} %" if n else ""
        rows.append((name, len(its.count), int(its.dead.sum()), zeros, *numbers, its.nan, its.inf))
    header = ("tap", "channels", "dead", "zeros", "minimum", "maximum", "mean", "NaN", "infinite")
    state = f"statistics of {run.n_committed:,} rows: {', '.join(run.stats.names)}"
    return "\n".join([state, "", table(header, rows, right=range(1, 9))])


def _state(run: Any) -> str:
    if run.complete:
        return "complete"
    return f"unfinished, {run.n_committed:,} rows are captured; run the same capture again to go on"


def _summary(run: Run) -> str:
    """Return what is worth knowing of a store at a glance."""
    lines = [f"{run.path}: {run.n_rows:,} rows x {len(run.taps)} taps, {_state(run)}"]
    right = _right(run)
    if right is not None:
        lines.append(f"accuracy {100 * right.mean():.1f} % ({int(right.sum()):,} of {right.size:,})")
    for name in run.taps:
        nan, inf = run.stats.not_finite(name)
        if nan or inf:
            tap = run[name]
            cast = tap.source_dtype != str(tap.dtype)
            why = f"after the cast from {tap.source_dtype} to {tap.dtype}" if cast else "stored as they are"
            lines.append(f"{name}: {nan:,} NaN and {inf:,} infinite values, {why}")
    return "\n".join(map(printable, lines))


def _right(run: Run) -> NDArray[np.bool_] | None:
    """Return for each captured row whether its class was predicted, or None where that is not known."""
    import numpy as np

    columns = [run.rows[name] for name in ("label", "prediction") if name in run.rows]
    if not run.n_committed or sum(c.ndim == 1 and c.dtype.kind in "biu" for c in columns) < 2:
        return None
    done = run.committed()
    label, prediction = (np.asarray(column[done]) for column in columns)
    return np.asarray(label == prediction)
