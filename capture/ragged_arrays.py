"""Rows that differ in shape, put into memory by numpy: the reference for what backends do on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .ragged import Form, runs, table_of
from .reduce_arrays import apply

Values = NDArray[Any]
#: What a tap gave: rows of one shape, or one array for each row.
Given: TypeAlias = Values | list[Values]


def put_rows(form: Form, views: Sequence[Values], start: int, given: Given, mask: Values | None) -> None:
    """Put rows where they belong in one slab.

    Args:
        form: how the tap's rows come.
        views: the tap's memory in the slab, all rows of it: its values, and the table or mask beside them.
        start: the first row in the slab.
        given: the rows, for which there is room, reduced by what is done to each place.
        mask: which tokens of each row are its own; None: all.
    """
    assert form.rule is not None
    with np.errstate(all="ignore"):  # a cast that overflows stores an infinity, which is counted
        if form.rule.pad is None:
            _put_ragged(form, views[0], views[1], start, given, mask)
        else:
            rows = slice(start, start + len(given))
            _put_padded(form, views[0][rows], views[1][rows], given, mask)


def check_rows(form: Form, row: int, given: Given) -> None:
    """Refuse rows for which there is no room; the first is `row` of the data set.

    Raises:
        CaptureError: there is none for one of them.
    """
    form.checked([given.shape[1:]] if isinstance(given, np.ndarray) else [one.shape for one in given], row)


def reduced_rows(form: Form, given: Given, mask: Values | None) -> tuple[Given, ...]:
    """Return the parts that rows that vary come to: of those that still do, as they were given.

    Args:
        form: how the tap's rows come.
        given: the rows of a whole batch.
        mask: which tokens of each row are its own; None: all.
    """
    if not form.chain.steps:
        return (given,)
    if isinstance(given, np.ndarray):
        return apply(form.chain, given, form.room, form.mask_of(given.shape, mask), varying=True)
    made = [apply(form.chain, row[None], form.room, varying=True) for row in given]
    if form.varies:
        return ([parts[0][0] for parts in made],)
    return tuple(map(np.concatenate, zip(*made, strict=True)))


def put_mask(form: Form, beside: Values, start: int, shape: tuple[int, ...], mask: Values) -> None:
    """Say of rows that were put which tokens are their own.

    Args:
        form: how the tap's rows come.
        beside: the table or mask beside its values in the slab.
        start: the first row in the slab.
        shape: shape of the batch.
        mask: of the rows.

    Raises:
        CaptureError: the mask is one of other tokens.
    """
    if not form.heeds(shape, mask.shape):
        return
    assert form.rule is not None
    mine = beside[start : start + len(mask)]
    if form.rule.pad is None:
        at = start * math.prod(form.stored.shape)
        mine.view(np.int64)[:] = table_of(shape[1:], at, len(mask), *runs(mask))
    else:
        _leave_out(mine, mask)


def _put_ragged(
    form: Form, values: Values, table: Values, start: int, given: Given, mask: Values | None
) -> None:
    flat = values.reshape(-1)
    at = start * (flat.size // len(values))
    there = table[start : start + len(given)].view(np.int64)
    if isinstance(given, np.ndarray):
        np.copyto(flat[at : at + given.size].reshape(given.shape), given, casting="unsafe")
        kept = runs(mask) if mask is not None and form.heeds(given.shape, mask.shape) else ()
        there[:] = table_of(given.shape[1:], at, len(given), *kept)
        return
    for i, row in enumerate(given):
        np.copyto(flat[at : at + row.size].reshape(row.shape), row, casting="unsafe")
        there[i] = at, *row.shape
        at += row.size


def _put_padded(form: Form, values: Values, own: Values, given: Given, mask: Values | None) -> None:
    assert form.rule is not None
    if not isinstance(given, np.ndarray):
        for row, target, places in zip(given, values, own, strict=True):
            _put_padded(form, target[None], places[None], row[None], None)
        return
    window = (slice(None), *map(slice, given.shape[1:]))
    if given.size < values.size:
        values[...] = form.rule.pad
        own[...] = False
    np.copyto(values[window], given, casting="unsafe")
    own[(slice(None), *(window[1 + axis] for axis in form.axes))] = True
    if mask is not None and form.heeds(given.shape, mask.shape):
        _leave_out(own, mask)


def _leave_out(own: Values, mask: Values) -> None:
    kept = mask.astype(bool)
    own[:, : kept.shape[1]] &= kept.reshape(*kept.shape, *[1] * (own.ndim - 2))
