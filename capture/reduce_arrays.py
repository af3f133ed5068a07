"""Reductions in numpy: the reference that every backend's own way is held to, and what reads them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import CODE_INF, CODE_MINUS_INF, CODE_NAN, LARGEST_CODE, is_float, named_dtype
from .errors import CaptureError
from .reduce import (
    Cast,
    Chain,
    Channels,
    ChannelsFirst,
    Crop,
    Int8,
    Norm,
    Own,
    Pool,
    Projection,
    Rows,
    Step,
    Tokens,
    TopK,
)

Values = NDArray[Any]


def apply(
    chain: Chain, values: Values, rows: Rows, mask: Values | None = None, varying: bool = False
) -> tuple[Values, ...]:
    """Return the parts that `chain`, bound to `rows`, makes of `values` (n_rows, *rows.shape), values first.

    Where they are `varying`, rows have places of their own, as many as `rows` at most, of which `mask` says
    which are theirs: what is of a whole row is of these.

    Raises:
        CaptureError: an own function gave something else than in the first batch; `mask`, which says of
            tokens whether they are a row's own, does not fit.
    """
    extras: list[Values] = []
    with np.errstate(all="ignore"):  # what overflows is stored as an infinity, and counted
        for step, form in chain.each(rows):
            if varying and step.of_whole_row:
                values, *more = whole_rows(step, values, form, mask)
            elif mask is not None and isinstance(step, Tokens):
                values, *more = masked_tokens(step, values, form, mask)
            else:
                values, *more = _STEPS[_kind(step)](step, values, form)
            extras += more
    return (values, *extras)


def dequantized(codes: Values, scale: Values) -> NDArray[np.float32]:
    """Return what int8 `codes` mean; `scale` is broadcast against them."""
    with np.errstate(all="ignore"):  # the largest float32 over 126 is rounded down: no product overflows
        values = np.multiply(codes, scale, dtype=np.float32)
    values[codes == CODE_NAN] = np.nan
    values[codes == CODE_INF] = np.inf
    values[codes == CODE_MINUS_INF] = -np.inf
    return values


def windows(n: int, size: int) -> Iterator[slice]:
    """Yield the windows that an axis of `n` entries is pooled by to `size`."""
    for i in range(size):
        yield slice(i * n // size, -(-(i + 1) * n // size))


def check_own(step: Own, shape: tuple[int, ...], dtype: str, n_rows: int) -> None:
    """Hold what an own function gave to what it gave of the first batch.

    Raises:
        CaptureError: it is something else.
    """
    assert step.rows is not None
    expected = (n_rows, *step.rows.shape)
    if shape != expected or dtype != str(step.rows.dtype):
        raise CaptureError(
            f"{step.name} gave {dtype} of shape {shape}; {step.rows.dtype} of {expected} follows from the "
            "first batch. A reduction keeps the rows, and the form of each"
        )


def _cast(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    if values.dtype.itemsize == 8 and named_dtype(step.to).itemsize == 1:
        values = values.astype(np.float32)
    return (values.astype(named_dtype(step.to)),)


def _int8(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    wide = values.astype(np.float32, copy=False)
    finite = np.isfinite(wide)
    axes = tuple(1 + axis for axis in step.scaled(rows))
    magnitude = np.where(finite, np.abs(wide), np.float32(0))
    scale = magnitude.max(axes, keepdims=True, initial=0) / np.float32(LARGEST_CODE)
    codes = np.rint(wide / np.where(scale == 0, np.float32(1), scale))
    codes = codes.clip(-LARGEST_CODE, LARGEST_CODE)
    codes[wide == np.inf], codes[wide == -np.inf] = CODE_INF, CODE_MINUS_INF
    codes[np.isnan(wide)] = CODE_NAN
    return codes.astype(np.int8), scale.reshape([n for i, n in enumerate(scale.shape) if i not in axes])


def _pool(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    wide = values if step.by == "max" else _wide(values)
    reduce: Callable[..., Any] = np.max if step.by == "max" else np.mean
    if step.size is None:
        pooled = reduce(wide, tuple(1 + axis for axis in rows.space))
    else:
        pooled = wide
        for axis, size in zip(rows.space, step.size, strict=True):
            along = np.moveaxis(pooled, 1 + axis, 0)
            parts = [reduce(along[window], 0) for window in windows(len(along), size)]
            pooled = np.stack(parts, 1 + axis)
    return (pooled.astype(step.after(rows)["values"].dtype, copy=False),)


def _channels(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    assert rows.channel is not None
    return (values.take(list(step.indices), 1 + rows.channel),)


def _channels_first(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    assert rows.channel is not None
    return (np.moveaxis(values, 1 + rows.channel, 1),)


def _crop(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    return (values[(slice(None), *step.window(rows))],)


def _topk(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    axes = step.axes(rows)
    if len(axes) == 1:
        along = 1 + axes[0]
    else:
        values = np.moveaxis(values, [1 + axis for axis in axes], range(-len(axes), 0))
        values = values.reshape(*values.shape[: -len(axes)], -1)
        along = values.ndim - 1
    keys = values.astype(np.float32) if values.dtype.itemsize <= 2 else values
    # NaN sorts last, and equals in their order: turned round twice, the largest come first, equals in theirs.
    order = np.argsort(np.flip(keys, along), axis=along, kind="stable")
    order = np.flip(values.shape[along] - 1 - order, along)
    positions = order.take(range(step.k), along)
    return np.take_along_axis(values, positions, along), positions.astype(np.int32)


def _norm(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    assert rows.channel is not None
    magnitude, axis = np.abs(values.astype(np.float64)), 1 + rows.channel
    if step.by == "max":
        found = magnitude.max(axis, keepdims=True)
    elif step.by == "l1":
        found = magnitude.sum(axis, keepdims=True)
    else:
        found = np.sqrt((magnitude**2).sum(axis, keepdims=True))
    return (found.astype(step.after(rows)["values"].dtype),)


def _project(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    assert rows.channel is not None
    basis, mean = step.matrix(rows.shape[rows.channel])
    along = np.moveaxis(values, 1 + rows.channel, -1).astype(np.float64)
    found = along @ basis.T.astype(np.float64)
    if mean is not None:
        found = found - basis.astype(np.float64) @ mean
    return (np.moveaxis(found, -1, 1 + rows.channel).astype(step.after(rows)["values"].dtype),)


def _tokens(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    axis = 1 + step.axis(rows)
    if step.which == "mean":
        return (_wide(values).mean(axis).astype(step.after(rows)["values"].dtype),)
    return (values.take(0 if step.which == "first" else -1, axis),)


def masked_tokens(step: Any, values: Values, rows: Rows, mask: Values) -> tuple[Values, ...]:
    """Return one token of each row, or their mean, of those for which `mask` is true.

    Of rows without any it is NaN, or 0 of integers.

    Raises:
        CaptureError: the mask is one of another number of tokens.
    """
    axis = 1 + step.axis(rows)
    n_tokens, own = values.shape[axis], mask.astype(bool)
    check_tokens(n_tokens, mask.shape)
    shape = (len(values), *[n_tokens if i == axis else 1 for i in range(1, values.ndim)])
    kept, dtype = own.reshape(shape), step.after(rows)["values"].dtype
    if step.which == "mean":
        with np.errstate(invalid="ignore"):
            return ((np.where(kept, _wide(values), 0).sum(axis) / kept.sum(axis)).astype(dtype),)
    at = own.argmax(1) if step.which == "first" else n_tokens - 1 - own[:, ::-1].argmax(1)
    index = at.reshape(-1, *[1] * (values.ndim - 1))
    found = np.take_along_axis(values, index, axis).squeeze(axis)
    return (np.where(kept.any(axis), found, dtype.type(math.nan if is_float(dtype) else 0)).astype(dtype),)


def whole_rows(step: Any, values: Values, rows: Rows, mask: Values | None) -> tuple[Values, ...]:
    """Return what a step that is of whole rows makes of rows with any places, of those that `mask` leaves.

    Of no places it is NaN, or 0 of integers; a position that is not there is -1. Positions are counted among
    the row's own tokens, else as in a row of the greatest shape.
    """
    axes, n = [1 + axis for axis in rows.space], len(values)
    if 0 in [values.shape[axis] for axis in axes]:
        shape = [1 if axis in axes else size for axis, size in enumerate(values.shape)]
        values, mask = np.zeros(shape, values.dtype), np.zeros((n, *[1] * len(axes)), np.bool_)
    sizes = [values.shape[axis] for axis in axes]
    if isinstance(step, Tokens):
        mask = np.ones((n, *sizes), np.bool_) if mask is None else mask
        return masked_tokens(step, values, rows, mask)
    if mask is not None and len(axes) == 1:
        check_tokens(sizes[0], mask.shape)
    own = np.ones((n, *sizes), np.bool_) if mask is None else mask.astype(np.bool_)
    flat = np.moveaxis(values, axes, range(values.ndim - len(axes), values.ndim))
    flat = flat.reshape(*flat.shape[: -len(axes)], -1)
    kept = np.broadcast_to(own.reshape(n, *[1] * (flat.ndim - 2), -1), flat.shape)
    form = step.after(rows)["values"]
    nothing = form.dtype.type(math.nan if is_float(form.dtype) else 0)
    if isinstance(step, TopK):
        found, positions = _top_of(
            step.k, flat, kept, places(own, [rows.shape[a] for a in rows.space]), nothing
        )
        if len(axes) == 1:
            return np.moveaxis(found, -1, axes[0]), np.moveaxis(positions, -1, axes[0])
        return found, positions
    if step.by == "mean":
        with np.errstate(invalid="ignore"):
            made = np.where(kept, _wide(flat), 0).sum(-1) / kept.sum(-1)
    else:
        made = np.where(kept, flat, _least(flat.dtype)).max(-1)
    return (np.where(kept.any(-1), made, nothing).astype(form.dtype),)


def places(own: Values, bound: Sequence[int]) -> Values:
    """Return the number of each place among a row's own tokens, or as in the greatest row; (rows, places)."""
    if own.ndim == 2:
        return np.asarray(own.cumsum(1) - 1)
    grid = np.ravel_multi_index(np.indices(own.shape[1:]), tuple(bound)).reshape(1, -1)
    return np.broadcast_to(grid, (len(own), grid.size))


def _top_of(k: int, flat: Values, kept: Values, numbers: Values, nothing: Any) -> tuple[Values, Values]:
    """Return the k largest values on the last axis of those that are kept, and their numbers."""
    keys = flat.astype(np.float32) if flat.dtype.itemsize <= 2 else flat
    order = np.flip(keys.shape[-1] - 1 - np.argsort(np.flip(keys, -1), axis=-1, kind="stable"), -1)
    there = np.take_along_axis(kept, order, -1)
    order = np.take_along_axis(order, np.argsort(~there, axis=-1, kind="stable"), -1)[..., :k]
    there = np.take_along_axis(kept, order, -1)
    numbers = np.broadcast_to(numbers.reshape(len(flat), *[1] * (flat.ndim - 2), -1), flat.shape)
    found = np.where(there, np.take_along_axis(flat, order, -1), nothing).astype(flat.dtype)
    positions = np.where(there, np.take_along_axis(numbers, order, -1), -1).astype(np.int32)
    lacking = [(0, 0)] * (flat.ndim - 1) + [(0, k - found.shape[-1])]
    return (
        np.pad(found, lacking, constant_values=nothing),
        np.pad(positions, lacking, constant_values=-1),
    )


def _least(dtype: Any) -> Any:
    if is_float(dtype):
        return dtype.type(-math.inf)
    return False if dtype.kind == "b" else np.iinfo(dtype).min


def check_tokens(n_tokens: int, shape: tuple[int, ...]) -> None:
    """Refuse a mask of other tokens than a tap's.

    Raises:
        CaptureError: with both numbers.
    """
    if len(shape) != 2 or shape[1] != n_tokens:
        raise CaptureError(
            f"the batch's mask has shape {shape}, and a tap that is reduced by its tokens has {n_tokens}. "
            "Name the argument that is its mask with mask= (--mask), or none at all"
        )


def _own(step: Any, values: Values, rows: Rows) -> tuple[Values, ...]:
    made = np.asarray(step.function(values))
    if step.rows is not None:
        check_own(step, made.shape, str(made.dtype), len(values))
    return (made,)


def _wide(values: Values) -> Values:
    return values.astype(np.float64) if is_float(values.dtype) or values.dtype.kind in "iub" else values


def _kind(step: Step) -> type:
    return Projection if isinstance(step, Projection) else type(step)


_STEPS: dict[type, Callable[[Any, Values, Rows], tuple[Values, ...]]] = {
    Cast: _cast,
    Int8: _int8,
    Pool: _pool,
    Channels: _channels,
    Crop: _crop,
    TopK: _topk,
    Norm: _norm,
    Projection: _project,
    Tokens: _tokens,
    ChannelsFirst: _channels_first,
    Own: _own,
}
