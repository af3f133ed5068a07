"""Rows that differ in shape, put into memory by torch; `ragged_arrays` says the same in numpy.

What shaped it:

* A batch is one copy, as it is, into the front of its rows' room, on the stream that computes. What tells the
  rows apart is a small table beside it, so nothing on the host depends on what lies on the device.
* A mask stays where it is: where the tokens of each row begin, and how many there are, is worked out there,
  and nobody waits for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.errors import CaptureError
from ..capture.pipeline import Piece
from ..capture.ragged import Form, checked_mask
from ..capture.taps import Path, TapName, follow, lists_of_rows
from .torch_reduce import Reducer

#: What a tap gave: rows of one shape, or one tensor for each row.
Given = Tensor | list[Tensor]


class Masks:
    """Finds the mask among the arguments of a model."""

    def __init__(self, model: nn.Module, name: str | None) -> None:
        self._name = name
        names = list(inspect.signature(model.forward).parameters)
        self._position = names.index(name) if name in names else -1

    def among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the mask of a batch, or None where it has none."""
        found = kwargs.get(self._name) if self._name is not None else None
        if found is None and 0 <= self._position < len(args):
            found = args[self._position]
        return found if isinstance(found, Tensor) else None

    def checked(self, mask: Tensor | None, n_rows: int) -> Tensor | None:
        """Return which tokens are a row's own.

        Raises:
            CaptureError: the mask does not say that.
        """
        if mask is None:
            return None
        checked_mask(str(self._name), mask.shape, n_rows)
        return mask.detach() if mask.dtype == torch.bool else mask.detach() != 0


def put(form: Form, views: Sequence[Tensor], piece: Piece, given: Given, mask: Tensor | None) -> None:
    """Put the rows of a batch that `piece` names where they belong in one slab.

    Args:
        form: how the tap's rows come.
        views: the tap's memory in the slab: its values, and the table or mask beside them.
        piece: which rows, and where.
        given: the rows of the whole batch, for which there is room, reduced by what is done to each place.
        mask: which tokens of each row are its own; None: all.
    """
    rows = given[piece.batch]
    mask = None if mask is None else mask[piece.batch]
    assert form.rule is not None
    if form.rule.pad is None:
        _put_ragged(form, views[0], views[1], piece, rows, mask)
    else:
        _put_padded(form, views[0][piece.rows], views[1][piece.rows], rows, mask)


def check_room(form: Form, piece: Piece, given: Given) -> None:
    """Refuse rows for which there is no room: those of a batch that `piece` names.

    Raises:
        CaptureError: there is none for one of them.
    """
    rows = given[piece.batch]
    shapes = [tuple(rows.shape[1:])] if isinstance(rows, Tensor) else [tuple(row.shape) for row in rows]
    form.checked(shapes, piece.row)


def reduced_rows(form: Form, reducer: Reducer, given: Given, mask: Tensor | None) -> tuple[Given, ...]:
    """Return the parts that rows that vary come to: of those that still do, as they were given.

    Args:
        form: how the tap's rows come.
        reducer: what reduces them.
        given: the rows of a whole batch.
        mask: which tokens of each row are its own; None: all.
    """
    if isinstance(given, Tensor):
        return reducer.made(given.detach(), form.mask_of(given.shape, mask))
    made = [reducer.made(row.detach()[None]) for row in given]
    if form.varies:
        return ([parts[0][0] for parts in made],)
    return tuple(map(torch.cat, zip(*made, strict=True)))


def put_mask(form: Form, beside: Tensor, piece: Piece, shape: tuple[int, ...], mask: Tensor) -> None:
    """Say of rows that were put which tokens are their own.

    Args:
        form: how the tap's rows come.
        beside: the table or mask beside its values in the slab.
        piece: which rows, and where.
        shape: of the whole batch.
        mask: of the whole batch.

    Raises:
        CaptureError: the mask is one of other tokens.
    """
    if not form.heeds(shape, mask.shape):
        return
    mine = mask[piece.batch]
    assert form.rule is not None
    if form.rule.pad is None:
        table = _table(form, (len(mine), *shape[1:]), piece.start * math.prod(form.stored.shape), mine)
        beside.view(torch.int64)[piece.rows].copy_(table)
    else:
        _leave_out(beside[piece.rows], mine)


def _put_ragged(
    form: Form, values: Tensor, table: Tensor, piece: Piece, rows: Given, mask: Tensor | None
) -> None:
    flat, there = values.view(-1), table.view(torch.int64)[piece.rows]
    at = piece.start * (flat.numel() // len(values))
    if isinstance(rows, Tensor):
        flat[at : at + rows.numel()].view(rows.shape).copy_(rows.detach())
        there.copy_(_table(form, tuple(rows.shape), at, mask))
        return
    lines = []
    for row in rows:
        flat[at : at + row.numel()].view(row.shape).copy_(row.detach())
        lines.append([at, *row.shape])
        at += row.numel()
    there.copy_(torch.tensor(lines, dtype=torch.int64))


def _table(form: Form, shape: tuple[int, ...], start: int, mask: Tensor | None) -> Tensor:
    n_rows, inner = shape[0], 1
    for n in shape[2:]:
        inner *= n
    if mask is not None and not form.heeds(shape, mask.shape):
        mask = None
    device = torch.device("cpu") if mask is None else mask.device
    table = torch.empty((n_rows, len(shape)), dtype=torch.int64, device=device)
    table[:, 0] = torch.arange(n_rows, device=device) * (shape[1] * inner) + start
    for axis, n in enumerate(shape[1:], start=1):
        table[:, axis] = n
    if mask is not None and shape[1]:
        kept = mask.sum(1)
        first = mask.int().argmax(1)
        last = shape[1] - 1 - mask.flip(1).int().argmax(1)
        whole = (kept == 0) | (last - first + 1 == kept)
        table[:, 0] = torch.where(whole, table[:, 0] + first * inner, -1)
        table[:, 1] = kept
    return table


def _put_padded(form: Form, values: Tensor, own: Tensor, rows: Given, mask: Tensor | None) -> None:
    assert form.rule is not None
    assert form.rule.pad is not None
    if not isinstance(rows, Tensor):
        for row, target, places in zip(rows, values, own, strict=True):
            _put_padded(form, target[None], places[None], row[None], None)
        return
    window = (slice(None), *map(slice, rows.shape[1:]))
    if rows.numel() < values.numel():
        values.fill_(form.rule.pad)
        own.fill_(False)
    values[window].copy_(rows.detach())
    own[(slice(None), *(window[1 + axis] for axis in form.axes))] = True
    if mask is not None and form.heeds(rows.shape, mask.shape):
        _leave_out(own, mask)


def _leave_out(own: Tensor, mask: Tensor) -> None:
    kept = mask.to(own.device)
    own[:, : kept.shape[1]] &= kept.reshape(*kept.shape, *[1] * (own.ndim - 2))


def row_tensors(value: Any, n_rows: int) -> list[tuple[Path, Path, list[Tensor]]]:
    """Return the tensors inside lists with one entry a row: the list's path, the path inside, one a row."""
    found = []
    for path, items in lists_of_rows(value, n_rows):
        for inside, _ in tensors_of(items[0]):
            try:
                tensors = [follow(item, inside) for item in items]
            except (LookupError, TypeError):
                continue
            if all(isinstance(tensor, Tensor) for tensor in tensors):
                found.append((path, inside, tensors))
    return found


def shape_of(given: Given) -> tuple[int, ...]:
    """Return the shape of a row; of rows that differ, the greatest size of each axis."""
    if isinstance(given, Tensor):
        return tuple(given.shape[1:])
    return tuple(map(max, *(row.shape for row in given), given[0].shape))


def check_rows(tap: TapName, tensors: Sequence[Tensor], n_rows: int, bare: bool) -> None:
    """Refuse rows that are not of one kind, or that may be something else.

    Raises:
        CaptureError: with the reason.
    """
    kinds = {(tensor.dtype, tensor.ndim) for tensor in tensors}
    if len(kinds) > 1:
        raise CaptureError(f"{tap} has rows of different types or numbers of axes: {sorted(map(str, kinds))}")
    if bare and n_rows > 1 and all(tensor.ndim and len(tensor) == n_rows for tensor in tensors):
        raise CaptureError(
            f"{tap} is a list of {n_rows} tensors of {n_rows} entries, which may be rows, or parts of the "
            "output that have all rows each. Name the parts ([0], [1], ...), or choose another batch size"
        )


def tensors_of(value: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors inside one row's value, with their paths."""
    from .torch_hooks import tensors_in

    return tensors_in(value)
