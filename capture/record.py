"""The two ways to capture: `record` around a loop of the user's own, `record_dataset` over a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .backend import Backend, backend_for, backend_named
from .data import Preprocess, Source
from .errors import DataError, PlanError
from .marking import found_fields
from .parts import Part
from .pca import fitted, is_fitted
from .place import PathLike, place_of
from .plan import DEFAULT_MEMORY, Settings
from .progress import Progress
from .ragged import Padded, Ragged, Varying, varying
from .reader import Run, open_run
from .recorder import Facts, Recorder
from .reduce import Reductions
from .report import StageReport
from .score import Score, check_score
from .statistics import Choice
from .store import Manifest
from .taps import Patterns


def record(
    model: Any,
    path: PathLike,
    layers: Patterns,
    *,
    reduce: Reductions = None,
    ragged: Ragged = None,
    pad: Padded = None,
    mask: str | None = "attention_mask",
    dtype: str | None = None,
    codec: str = "none",
    memory: str | int = DEFAULT_MEMORY,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    backend: str | None = None,
    writers: int | None = None,
    stats: str | Sequence[str] | None = None,
    values: bool = True,
    storage: Mapping[str, Any] | None = None,
) -> Recorder:
    """Capture `layers` of `model` while a loop of your own runs it.

    Args:
        model: what runs; a `torch.nn.Module`, a Flax module (NNX; Linen with its variables), a Keras model,
            the path of a `.onnx` file, or a function from a batch to a dict of arrays. Compiled models (Flax,
            ONNX, Keras on JAX) and functions are run by `rec(...)` in the loop.
        path: the store to make, a folder or a URL (`s3://bucket/run.zarr`, `gs://`, `az://`). One whose
            capture was killed is gone on with: run the same loop again, and rows that are committed are not
            captured again.
        layers: names, globs, `re:` expressions, `type:` names or callables; see
            `layertap.capture.taps.select`. Gradients (`layer4:grad`) are captured as the loop calls
            `backward()`, once in each step.
        reduce: what is kept of each tap instead of all of it, computed where the tensor lies: text such as
            `pool:7` or `channels:stride=4|pool:7|float16`, a step or chain of `layertap.reduce`, a function
            of your own from a batch to a batch, or a dict from patterns to these (the last that matches
            counts). See `layertap.capture.reduce` for all kinds and their errors.
        ragged: taps whose rows differ in shape from batch to batch or row to row, each kept in a shape of its
            own: `encoder.*:512` or `{"encoder.*": 512}`, where the number is the greatest size of the axes
            that vary (`conv1:224x320` for each of these, `attn:12x128x128` for all axes of a row); memory is
            reserved for it. Of an output that is a list with one entry a row, `.[boxes]` names a part.
        pad: likewise, and kept in the one size that is given, with an array beside it that says which places
            are the row's own: `encoder.*:512` or, with another value than 0, `encoder.*:512,-1`.
        mask: which of the model's arguments says of each token of a padded batch whether it is one of the
            row's own. Ragged taps then leave the others out, padded ones mark them, and `tokens:last`,
            `first` and `mean` do not see them. None: every token counts.
        dtype: cast floating-point values, after any other reduction, to `float16`, `bfloat16`, `float32`,
            `float8_e4m3fn` or `float8_e5m2`.
        codec: `none`, `lz4` (bit-shuffled) or `zstd`.
        memory: host memory that the engine may hold, `1GiB` for example.
        mean: what inputs were normalised with, for each channel in units of 0..1, to make pictures of them.
        std: likewise.
        classes: class names by label.
        name: what the store calls the model.
        overwrite: replace a store that is there.
        backend: name of the backend, where it does not follow from the model.
        writers: writer threads.
        stats: statistics to compute while streaming: `cheap`, `all`, or names of
            `layertap.capture.statistics.NAMES`; none by default.
        values: whether activations are written; False keeps statistics alone, `cheap` if none are named.
        storage: for a URL: options of obstore's `from_url`; what is not said comes from the environment.

    Returns:
        A context manager, a `Recorder`: call the model inside it, and `annotate` after each batch.

    Raises:
        SelectionError: a layer is not there.
        StoreExistsError: a finished store is there, or one of another plan.
        PlanError: what is asked for does not fit the memory.
        CaptureError: a tap did not fire, or its shape changed between batches.
    """
    return Recorder(
        model,
        place_of(path, storage),
        layers,
        settings=settings_of(
            dtype, codec, memory, writers, stats, values, reduce, varying(ragged, pad, mask)
        ),
        facts=Facts(
            Preprocess(_floats(mean), _floats(std)),
            None if classes is None else tuple(classes),
            model_name=name,
        ),
        backend=backend_named(backend) if backend else backend_for(model),
        overwrite=overwrite,
    )


def record_dataset(
    model: Any,
    data: Any,
    path: PathLike,
    layers: Patterns,
    *,
    batch_size: int = 64,
    part: str | None = None,
    workers: int | None = None,
    ragged: Ragged = None,
    pad: Padded = None,
    mask: str | None = "attention_mask",
    score: Score | None = None,
    reduce: Reductions = None,
    dtype: str | None = None,
    codec: str = "none",
    memory: str | int = DEFAULT_MEMORY,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    backend: str | None = None,
    writers: int | None = None,
    stats: str | Sequence[str] | None = None,
    values: bool = True,
    storage: Mapping[str, Any] | None = None,
    fields: bool = False,
    progress: bool = False,
    on_plan: Callable[[Manifest, int], None] | None = None,
    on_report: Callable[[StageReport], None] | None = None,
) -> Run:
    """Run `model` over a whole data set and capture `layers`, with labels, predictions and pictures.

    Predictions are kept where the model returns logits (rows, classes), alone or as `logits`, and their
    number is that of the class names, where those are known.

    The model runs without gradients and in evaluation mode, and gets its own mode back. A capture that was
    killed goes on where it stopped when the same call is made again; on a finished store the call changes
    nothing.

    Args:
        model: what runs; see `record`.
        data: a folder of pictures, numpy arrays (inputs, or inputs and labels), a `Source`, a torch
            `Dataset`, or anything with `len` and `[]`.
        path: the store.
        layers: see `record`.
        batch_size: rows of one forward.
        part: `K/N`: capture part K of N alone, so that N processes on any number of machines make one store
            together; by `RANK` and `WORLD_SIZE` under torchrun. The store is the same for any N.
        workers: threads (processes for a torch `Dataset`) that load batches ahead.
        ragged: see `record`. Inputs of a data set that differ in size then go to the model as a list.
        pad: see `record`.
        mask: see `record`.
        score: where gradients are tapped (`layer4:grad`), what they are gradients of: the logit of the
            `prediction` (the default), of the `label` or of a class, by its number; or a callable that makes
            one value a row of the model's output. The backward pass runs down to the tapped layers, and no
            parameter's `.grad` is touched.
        reduce: see `record`. `pca:16` is fitted to the first rows before the capture.
        dtype: see `record`.
        codec: see `record`.
        memory: see `record`.
        mean: what pictures are normalised with (for a folder) or were normalised with (for arrays and
            data sets of tensors); found by itself in a torchvision `Normalize`.
        std: likewise.
        classes: class names by label, where the data do not bring them.
        name: what the store calls the model.
        overwrite: replace a store that is there.
        backend: name of the backend, where it does not follow from the model.
        writers: writer threads.
        stats: see `record`.
        values: see `record`.
        storage: see `record`.
        fields: find out beforehand which part of the picture each place of each tap depends on, from some
            forwards of the first picture with its edges marked by NaN (`run[...].field`).
        progress: show a bar with rows, rate, bytes, the slowest stage and the time left.
        on_plan: called once, with the manifest and the rows that are committed already, when the first batch
            has shown what there is and before anything is written.
        on_report: called at the end with where the time went, unless all rows were captured before.

    Returns:
        The store, open for reading; finished once all parts are.

    Raises:
        NoSpaceError: the disk is too small.
        DataError: a sample cannot be used.
        Exception: and what `record` raises.
    """
    chosen = backend_named(backend) if backend else backend_for(model)
    if score is not None:
        check_score(score)
    if batch_size < 1:
        raise PlanError(f"a batch has at least one row; {batch_size} were asked for")
    source, place = source_of(chosen, data, mean, std, lists=bool(ragged or pad)), place_of(path, storage)
    batch_size = min(batch_size, source.n_rows)
    going_on = None if overwrite else place
    how = varying(ragged, pad, mask)
    if not is_fitted(reduce):
        reduce = fitted(reduce, chosen, model, source, layers, batch_size, going_on, score, how)
    found = found_fields(chosen, model, source, layers, batch_size, going_on, score) if fields else {}
    recorder = Recorder(
        model,
        place,
        layers,
        settings=settings_of(
            dtype, codec, memory, writers, stats, values, reduce, varying(ragged, pad, mask)
        ),
        facts=Facts(
            source.preprocess,
            tuple(classes) if classes is not None else source.classes,
            {"name": source.name, "fingerprint": source.fingerprint()},
            name,
            source.text_bytes(),
            found,
        ),
        backend=chosen,
        score=score,
        n_rows=source.n_rows,
        batch_size=batch_size,
        part=Part.parse(part) if part is not None else Part.of_environment(),
        overwrite=overwrite,
        progress=Progress() if progress else None,
        on_plan=on_plan,
    )
    with recorder:
        recorder.run(source, source.default_workers if workers is None else workers)
    if on_report is not None and recorder.stages.n_rows:
        on_report(recorder.report)
    return open_run(recorder.place)


def settings_of(
    dtype: str | None,
    codec: str,
    memory: str | int,
    writers: int | None,
    stats: str | Sequence[str] | None,
    values: bool,
    reduce: Reductions,
    how: Varying,
) -> Settings:
    """Return the settings of a capture from what the user gave.

    Raises:
        PlanError: there is nothing to keep, or no such statistics.
    """
    choice = Choice.parse("cheap" if stats is None and not values else stats)
    if not (values or choice.names):
        raise PlanError(
            "without values and without statistics there is nothing to keep; give stats= another choice"
        )
    return Settings(
        dtype, codec, memory, writers, statistics=choice, values=values, reduce=reduce, varying=how
    )


def source_of(
    backend: Backend,
    data: Any,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    lists: bool = False,
) -> Source:
    """Return a source for `data`, with what it was, or is to be, normalised with.

    `lists`: inputs that differ in size go to the model as a list.

    Raises:
        DataError: it cannot be used so.
    """
    source = backend.source(data)
    if mean is not None or std is not None:
        source.preprocess = replace(source.preprocess, mean=_floats(mean), std=_floats(std))
    if (source.preprocess.resize or source.preprocess.crop) and not source.resizes:
        raise DataError(
            f"{source.name} gives arrays, and only pictures are resized and cropped; give arrays of the "
            "right size"
        )
    source.lists = lists
    return source


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
