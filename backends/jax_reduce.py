"""Reductions in JAX: part of the compiled function, so that only what is kept leaves the device.

Each step is that of `capture.reduce_arrays` in the operations of JAX. Selections, casts and maxima are
bit for bit the same; sums are of float64, whatever JAX is set to, in an order that the compiler chooses. On
processors XLA takes numbers below the smallest normal one (1.2e-38) for zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..capture.dtypes import CODE_INF, CODE_MINUS_INF, CODE_NAN, LARGEST_CODE, named_dtype
from ..capture.reduce import (
    Cast,
    Chain,
    Channels,
    ChannelsFirst,
    Crop,
    Int8,
    Norm,
    Pool,
    Projection,
    Rows,
    Step,
    Tokens,
    TopK,
)
from ..capture.reduce_arrays import windows


def can_reduce(chain: Chain) -> bool:
    """Return whether every step of `chain` has a way in JAX; functions of the user's own run on the host."""
    return all(_kind(step) in _STEPS for step in chain.steps)


def reduced(chain: Chain, values: jax.Array, rows: Rows) -> tuple[jax.Array, ...]:
    """Return the parts that `chain`, bound to `rows`, makes of values (n_rows, *rows.shape), values first."""
    extras: list[jax.Array] = []
    with jax.enable_x64(True):
        for step, form in chain.each(rows):
            values, *more = _STEPS[_kind(step)](step, values, form)
            extras += more
    return (values, *extras)


def _cast(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    to = named_dtype(step.to)
    return ((values.astype(jnp.float32) if to.itemsize == 1 else values).astype(to),)


def _int8(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    wide = values.astype(jnp.float32)
    finite = jnp.isfinite(wide)
    axes = tuple(1 + axis for axis in step.scaled(rows))
    magnitude = jnp.where(finite, jnp.abs(wide), 0)
    largest = magnitude.max(axes, keepdims=True, initial=0)
    # XLA makes a product of a division by a constant, which rounds otherwise unless it is wider.
    scale = (_wide(largest) / LARGEST_CODE).astype(jnp.float32)
    codes = jnp.rint(wide / jnp.where(scale == 0, 1, scale)).clip(-LARGEST_CODE, LARGEST_CODE)
    codes = jnp.where(wide == jnp.inf, CODE_INF, jnp.where(wide == -jnp.inf, CODE_MINUS_INF, codes))
    codes = jnp.where(jnp.isnan(wide), CODE_NAN, codes).astype(jnp.int8)
    return codes, scale.reshape([n for i, n in enumerate(scale.shape) if i not in axes])


def _pool(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    reduce: Callable[..., Any] = jnp.max if step.by == "max" else jnp.mean
    pooled = values if step.by == "max" else _wide(values)
    if step.size is None:
        pooled = reduce(pooled, tuple(1 + axis for axis in rows.space))
    else:
        for axis, size in zip(rows.space, step.size, strict=True):
            pooled = _pooled(pooled, 1 + axis, size, reduce)
    return (pooled.astype(step.after(rows)["values"].dtype),)


def _pooled(values: Any, axis: int, size: int, reduce: Callable[..., Any]) -> Any:
    n = values.shape[axis]
    if n % size == 0:
        shape = (*values.shape[:axis], size, n // size, *values.shape[axis + 1 :])
        return reduce(values.reshape(shape), axis + 1)
    parts = [
        reduce(jax.lax.slice_in_dim(values, one.start, one.stop, axis=axis), axis) for one in windows(n, size)
    ]
    return jnp.stack(parts, axis)


def _channels(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    assert rows.channel is not None
    return (values.take(np.asarray(step.indices), 1 + rows.channel),)


def _channels_first(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    assert rows.channel is not None
    return (jnp.moveaxis(values, 1 + rows.channel, 1),)


def _crop(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    return (values[(slice(None), *step.window(rows))],)


def _topk(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    axes = step.axes(rows)
    along = 1 + axes[0]
    if len(axes) > 1:
        values = jnp.moveaxis(values, [1 + axis for axis in axes], range(-len(axes), 0))
        values = values.reshape(*values.shape[: -len(axes)], -1)
        along = values.ndim - 1
    keys = values.astype(jnp.float32) if values.dtype.itemsize <= 2 else values
    # NaN sorts last, and equals in their order: turned round twice, the largest come first, equals in theirs.
    order = jnp.argsort(jnp.flip(keys, along), axis=along, stable=True)
    order = jnp.flip(values.shape[along] - 1 - order, along)
    positions = jax.lax.slice_in_dim(order, 0, step.k, axis=along)
    return jnp.take_along_axis(values, positions, along), positions.astype(jnp.int32)


def _norm(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    assert rows.channel is not None
    magnitude, axis = jnp.abs(_wide(values)), 1 + rows.channel
    if step.by == "max":
        found = magnitude.max(axis, keepdims=True)
    elif step.by == "l1":
        found = magnitude.sum(axis, keepdims=True)
    else:
        found = jnp.sqrt((magnitude**2).sum(axis, keepdims=True))
    return (found.astype(step.after(rows)["values"].dtype),)


def _project(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    assert rows.channel is not None
    basis, mean = step.matrix(rows.shape[rows.channel])
    along = _wide(jnp.moveaxis(values, 1 + rows.channel, -1))
    found = jnp.matmul(along, jnp.asarray(basis.T, along.dtype), precision=jax.lax.Precision.HIGHEST)
    if mean is not None:
        found = found - jnp.asarray(basis.astype(np.float64) @ mean, along.dtype)
    return (jnp.moveaxis(found, -1, 1 + rows.channel).astype(step.after(rows)["values"].dtype),)


def _tokens(step: Any, values: Any, rows: Rows) -> tuple[Any, ...]:
    axis = 1 + step.axis(rows)
    if step.which == "mean":
        return (_wide(values).mean(axis).astype(step.after(rows)["values"].dtype),)
    return (values.take(0 if step.which == "first" else -1, axis),)


def _wide(values: Any) -> Any:
    return values.astype(jnp.float64)


def _kind(step: Step) -> type:
    return Projection if isinstance(step, Projection) else type(step)


_STEPS: dict[type, Callable[[Any, Any, Rows], tuple[Any, ...]]] = {
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
}
