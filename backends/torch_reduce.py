"""Reductions in torch: in the hook, on the device, straight into the memory that was prepared for them.

What shaped it:

* The hook runs inside whatever the user's forward is inside of: autocast, which would halve the precision of
  a projection, is switched off for it.
* Where the last step's operation can write to `out` and the types are equal, it does, so the reduced values
  are written once. What only selects or turns (crop, channels by a stride or first, a token) is a view: one
  copy moves it.
* `torch.topk` leaves the order of equals open, and zeros are equal by the thousand behind a ReLU: a stable
  sort gives the same bytes on every run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture.dtypes import CODE_INF, CODE_MINUS_INF, CODE_NAN, LARGEST_CODE, dtype_name
from ..capture.errors import CaptureError
from ..capture.reduce import (
    VALUES,
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
from ..capture.reduce_arrays import check_own, check_tokens, windows
from .torch_slabs import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Half-way from float8_e4m3fn's largest number to what would be the next; itself it rounds to even, down.
_OVERFLOWS = 464.0

#: Makes the parts of a batch; the values may be written to the second argument, and are returned then.
_Operation = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


class Reducer:
    """A chain that is bound to the rows of one tap.

    Args:
        chain: the chain.
        rows: the form of the rows.
        varying: whether they have places of their own, as many as `rows` at most; see `whole_rows`.
    """

    def __init__(self, chain: Chain, rows: Rows, varying: bool = False) -> None:
        steps = chain.each(rows)
        # What is left for the copy into the views, which casts and fuses it.
        self._casts = bool(steps) and isinstance(steps[-1][0], Cast) and _fuses(steps[-1])
        self._operations = [
            _WholeRows(step, form) if varying and step.of_whole_row else _OPERATIONS[_kind(step)](step, form)
            for step, form in (steps[:-1] if self._casts else steps)
        ]
        # What an operation computed in a wider type is what its step says before the next one sees it.
        self._types = [_dtype(step, form) if not isinstance(step, Own) else None for step, form in steps]

    @property
    def only_copies(self) -> bool:
        """Whether a copy into the tap's view does all that there is to do."""
        return not self._operations

    def into(self, views: Sequence[Tensor], tensor: Tensor, mask: Tensor | None = None) -> None:
        """Write what is made of the batch `tensor` to `views`: the values, then the further parts.

        Raises:
            CaptureError: an own function gave something else than in the first batch; a mask does not fit.
        """
        view = views[0]
        with _precisely(tensor):
            values, *extras = self._run(tensor, view if _takes(view, tensor) else None, mask)
            if values is not view:
                view.copy_(values)
            for part, more in zip(views[1:], extras, strict=True):
                part.copy_(more)

    def stored(self, tensor: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the parts by themselves, as they will be stored."""
        values, *extras = self.made(tensor, mask)
        dtype = self._types[-1] if self._types else None
        return (values if dtype is None else values.to(dtype), *extras)

    def made(self, tensor: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the parts by themselves, the values before a cast that the copy would do."""
        with _precisely(tensor):
            return self._run(tensor, None, mask)

    def _run(self, tensor: Tensor, out: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
        extras: list[Tensor] = []
        for i, (operation, dtype) in enumerate(zip(self._operations, self._types, strict=False)):
            last = i == len(self._types) - 1
            into = out if i == len(self._operations) - 1 else None
            if isinstance(operation, _WholeRows) or (mask is not None and isinstance(operation, _Tokens)):
                tensor, *more = operation.masked(tensor, mask)
            else:
                tensor, *more = operation(tensor, into)
            if dtype is not None and not (last and out is not None):
                tensor = tensor.to(dtype)
            extras += more
        return (tensor, *extras)


def _precisely(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which types are what they say, where the forward's is another."""
    kind = tensor.device.type
    with contextlib.suppress(RuntimeError):  # a device that knows no autocast
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _takes(view: Tensor, tensor: Tensor) -> bool:
    """Return whether an operation on `tensor` can write to `view`; of another device, only a copy can."""
    return view.is_contiguous() and view.device == tensor.device


def _fuses(last: tuple[Step, Rows]) -> bool:
    """Return whether `copy_` casts as the step does."""
    step, rows = last
    assert isinstance(step, Cast)
    if step.to == "float8_e4m3fn":
        return False  # torch has changed its mind on what overflows
    return not (rows.dtype.itemsize == 8 and step.to == "float8_e5m2")


def _same(out: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `out` where values of `dtype` can be written to it as they are computed."""
    return out if out is not None and out.dtype == dtype else None


def _dtype(step: Step, rows: Rows) -> torch.dtype:
    return TORCH_DTYPES[dtype_name(step.after(rows)[VALUES].dtype)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _cast(step: Any, rows: Rows) -> _Operation:
    to = TORCH_DTYPES[step.to]
    by_float32 = step.to.startswith("float8")

    def cast(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        x = x.float() if by_float32 else x
        if to == torch.float8_e4m3fn:  # has no infinity
            x = x.masked_fill(x.abs() > _OVERFLOWS, math.nan)
        return (x.to(to),)

    return cast


def _int8(step: Any, rows: Rows) -> _Operation:
    axes = [1 + axis for axis in step.scaled(rows)]

    def quantize(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        wide = x.float()
        # Of what is finite alone; all of a row that has no axes is its own largest.
        magnitude = torch.where(torch.isfinite(wide), wide.abs(), 0.0)
        scale = (magnitude.amax(axes, keepdim=True) if axes else magnitude) / LARGEST_CODE
        codes = (wide / torch.where(scale == 0, 1.0, scale)).round_()
        codes = codes.clamp_(-LARGEST_CODE, LARGEST_CODE)
        codes.masked_fill_(wide == math.inf, CODE_INF).masked_fill_(wide == -math.inf, CODE_MINUS_INF)
        codes.masked_fill_(wide.isnan(), CODE_NAN)
        scale = scale.reshape([n for i, n in enumerate(scale.shape) if i not in axes])
        return (codes if out is not None else codes.to(torch.int8)), scale

    return quantize


def _pool(step: Any, rows: Rows) -> _Operation:
    axes = [1 + axis for axis in rows.space]
    sizes = (1,) * len(axes) if step.size is None else step.size
    dtype = _dtype(step, rows)
    shape = step.after(rows)[VALUES].shape
    lengths = [rows.shape[axis] for axis in rows.space]
    even = all(n % size == 0 for n, size in zip(lengths, sizes, strict=True))
    if step.by == "max":
        return lambda x, out: (_pool_max(x, axes, sizes).reshape(len(x), *shape),)
    if even:
        return lambda x, out: (_mean(x, axes, sizes, shape, dtype, out),)
    first = axes == list(range(2, 2 + len(axes)))
    adaptive: dict[int, Callable[..., Tensor]] = {
        1: F.adaptive_avg_pool1d,
        2: F.adaptive_avg_pool2d,
        3: F.adaptive_avg_pool3d,
    }
    if not first or len(axes) not in adaptive:
        return lambda x, out: (_pool_mean(x, axes, sizes),)

    def pool(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        pooled: Tensor = adaptive[len(axes)](_wide(x), sizes if len(axes) > 1 else sizes[0])
        return (pooled,)

    return pool


def _mean(
    x: Tensor,
    axes: Sequence[int],
    sizes: Sequence[int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """Return the means of windows that are equal and do not overlap: one operation over a view."""
    for axis, size in sorted(zip(axes, sizes, strict=True), reverse=True):
        x = _windowed(x, axis, size)
    dims = [axis + 1 + i for i, axis in enumerate(sorted(axes))]
    wide = dtype if dtype == torch.float64 else torch.float32
    target = _same(out, wide)
    if target is None:
        return x.mean(dims, dtype=wide).reshape(len(x), *shape)
    merged = [n for i, n in enumerate(x.shape) if i not in dims]
    torch.mean(x, dims, dtype=wide, out=target.view(merged))
    return target


def _windowed(x: Tensor, axis: int, size: int) -> Tensor:
    """Return a view of `x` in which `axis` is `size` windows of equal length."""
    view: Tensor = x.unflatten(axis, (size, x.shape[axis] // size))  # type: ignore[no-untyped-call]
    return view


def _pool_mean(x: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    x = _wide(x)
    for axis, size in zip(axes, sizes, strict=True):
        parts = [x.narrow(axis, w.start, w.stop - w.start).mean(axis) for w in windows(x.shape[axis], size)]
        x = torch.stack(parts, axis)
    return x


def _pool_max(x: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    if all(size == 1 for size in sizes):
        return x.amax(list(axes), keepdim=True)
    for axis, size in zip(axes, sizes, strict=True):
        n = x.shape[axis]
        if n % size == 0:
            x = _windowed(x, axis, size).amax(axis + 1)
        else:
            parts = [x.narrow(axis, w.start, w.stop - w.start).amax(axis) for w in windows(n, size)]
            x = torch.stack(parts, axis)
    return x


def _channels(step: Any, rows: Rows) -> _Operation:
    assert rows.channel is not None
    axis, indices = 1 + rows.channel, np.array(step.indices)
    strides = np.diff(indices)
    stride = int(strides[0]) if len(strides) and strides[0] > 0 else 1
    if (strides == stride).all():
        window = (slice(None),) * axis + (slice(int(indices[0]), int(indices[-1]) + 1, stride),)
        return lambda x, out: (x[window],)
    where = _on_device(torch.from_numpy(indices))

    def take(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        target = _same(out, x.dtype)
        if target is None:
            return (x.index_select(axis, where(x)),)
        torch.index_select(x, axis, where(x), out=target)
        return (target,)

    return take


def _channels_first(step: Any, rows: Rows) -> _Operation:
    assert rows.channel is not None
    axis = 1 + rows.channel
    return lambda x, out: (x.movedim(axis, 1),)


def _crop(step: Any, rows: Rows) -> _Operation:
    window = (slice(None), *step.window(rows))
    return lambda x, out: (x[window],)


def _topk(step: Any, rows: Rows) -> _Operation:
    axes = [1 + axis for axis in step.axes(rows)]

    def largest(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        axis = axes[0]
        if len(axes) > 1:
            x = x.movedim(axes, tuple(range(x.ndim - len(axes), x.ndim))).flatten(x.ndim - len(axes))
            axis = x.ndim - 1
        values, order = x.sort(dim=axis, descending=True, stable=True)
        return values.narrow(axis, 0, step.k), order.narrow(axis, 0, step.k).to(torch.int32)

    return largest


def _norm(step: Any, rows: Rows) -> _Operation:
    assert rows.channel is not None
    axis, power = 1 + rows.channel, {"l1": 1, "l2": 2, "max": math.inf}[step.by]

    def norm(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        x = x if x.is_floating_point() else x.double()
        return (torch.linalg.vector_norm(x, power, axis, keepdim=True, dtype=torch.float64),)

    return norm


def _project(step: Any, rows: Rows) -> _Operation:
    assert rows.channel is not None
    basis, mean = step.matrix(rows.shape[rows.channel])
    dtype = torch.float64 if rows.dtype == np.float64 else torch.float32
    matrix = _on_device(torch.from_numpy(basis.copy()).to(dtype))
    offset = None
    if mean is not None:
        offset = _on_device(torch.from_numpy(basis.astype(np.float64) @ mean).to(dtype))
    last = rows.channel == len(rows.shape) - 1

    def project(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        target = _same(out, dtype)
        wide = x.to(dtype)
        if last:
            found = torch.matmul(wide, matrix(x).T, out=target)
            if offset is not None:
                found -= offset(x)
            return (found if target is None else target,)
        # Channels come first in a row: (components, channels) @ (rows, channels, places).
        flat = None if target is None else target.flatten(2)
        found = torch.matmul(matrix(x), wide.flatten(2), out=flat)
        if offset is not None:
            found -= offset(x)[:, None]
        return (found.view(len(x), step.d, *x.shape[2:]) if target is None else target,)

    return project


class _Tokens:
    """One token of each row, or their mean; by a mask, of the tokens that are the row's own."""

    def __init__(self, step: Any, rows: Rows) -> None:
        self._which, self._axis = step.which, 1 + step.axis(rows)
        self._dtype, self._shape = _dtype(step, rows), step.after(rows)[VALUES].shape

    def __call__(self, x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        if self._which == "mean":
            return (_mean(x, [self._axis], [1], self._shape, self._dtype, out),)
        return (x.select(self._axis, 0 if self._which == "first" else -1),)

    def masked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return them, of the tokens for which `mask` is true; of rows without any, NaN, or 0 of integers.

        Raises:
            CaptureError: the mask is one of another number of tokens.
        """
        if mask is None:
            return self(x, None)
        n_tokens = x.shape[self._axis]
        check_tokens(n_tokens, tuple(mask.shape))
        own = mask.to(x.device) != 0
        kept = own.reshape(len(x), *[n_tokens if i == self._axis else 1 for i in range(1, x.ndim)])
        some = kept.any(self._axis)
        if self._which == "mean":
            n_own = kept.sum(self._axis)
            found = torch.where(kept, _wide(x), 0).sum(self._axis) / n_own
        else:
            last = n_tokens - 1 - own.flip(1).int().argmax(1)
            at = own.int().argmax(1) if self._which == "first" else last
            index = at.reshape(-1, *[1] * (x.ndim - 1)).expand(
                *[1 if i == self._axis else n for i, n in enumerate(x.shape)]
            )
            found = x.gather(self._axis, index).squeeze(self._axis)
        return (torch.where(some, found, math.nan if found.is_floating_point() else 0).to(self._dtype),)


class _WholeRows:
    """A step that is of whole rows, for rows with any places; `reduce_arrays.whole_rows` says the same."""

    def __init__(self, step: Any, rows: Rows) -> None:
        self._step, self._axes = step, [1 + axis for axis in rows.space]
        self._bound = [rows.shape[axis] for axis in rows.space]
        self._dtype = _dtype(step, rows)
        self._tokens = _Tokens(step, rows) if isinstance(step, Tokens) else None

    def __call__(self, x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        return self.masked(x, None)

    def masked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return what is made of the places that `mask` leaves; None: of all.

        Raises:
            CaptureError: the mask is one of another number of tokens.
        """
        n, axes = len(x), self._axes
        if 0 in [x.shape[axis] for axis in axes]:
            x = x.new_zeros([1 if axis in axes else size for axis, size in enumerate(x.shape)])
            mask = torch.zeros((n, *[1] * len(axes)), dtype=torch.bool, device=x.device)
        sizes = [x.shape[axis] for axis in axes]
        if mask is not None and len(axes) == 1:
            check_tokens(sizes[0], tuple(mask.shape))
        if self._tokens is not None:
            return self._tokens.masked(x, mask)
        own = torch.ones((n, *sizes), dtype=torch.bool, device=x.device)
        if mask is not None:
            own = mask.to(x.device) != 0
        flat = x.movedim(axes, list(range(x.ndim - len(axes), x.ndim))).flatten(x.ndim - len(axes))
        kept = own.reshape(n, *[1] * (flat.ndim - 2), -1).expand(flat.shape)
        if isinstance(self._step, TopK):
            return self._largest(flat, kept, own)
        if self._step.by == "mean":
            found = torch.where(kept, _wide(flat), 0).sum(-1) / kept.sum(-1)
        else:
            found = torch.where(kept, flat, _least(flat.dtype)).amax(-1)
        nothing = math.nan if self._dtype.is_floating_point else 0
        return (torch.where(kept.any(-1), found, nothing).to(self._dtype),)

    def _largest(self, flat: Tensor, kept: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        k, lacking = self._step.k, (0, max(0, self._step.k - flat.shape[-1]))
        order = flat.sort(dim=-1, descending=True, stable=True).indices
        there = kept.gather(-1, order).to(torch.uint8)
        order = order.gather(-1, there.sort(dim=-1, descending=True, stable=True).indices)[..., :k]
        some = kept.gather(-1, order)
        numbers = self._numbers(own).reshape(len(flat), *[1] * (flat.ndim - 2), -1).expand(flat.shape)
        nothing = math.nan if flat.is_floating_point() else 0
        values = torch.where(some, flat.gather(-1, order), nothing).to(flat.dtype)
        values = F.pad(values, lacking, value=nothing)
        positions = F.pad(torch.where(some, numbers.gather(-1, order), -1), lacking, value=-1)
        if len(self._axes) == 1:
            values, positions = (part.movedim(-1, self._axes[0]) for part in (values, positions))
        return values, positions.to(torch.int32)

    def _numbers(self, own: Tensor) -> Tensor:
        """Return the number of each place among a row's own tokens, or as in the greatest row."""
        if own.ndim == 2:
            return own.cumsum(1) - 1
        number = torch.zeros((1,) * (own.ndim - 1), dtype=torch.int64, device=own.device)
        for axis, n in enumerate(own.shape[1:]):
            at = torch.arange(n, device=own.device) * math.prod(self._bound[axis + 1 :])
            number = number + at.reshape([-1 if i == axis else 1 for i in range(own.ndim - 1)])
        return number.reshape(1, -1).expand(len(own), -1)


def _least(dtype: torch.dtype) -> float | int:
    """Return what no value of `dtype` is less than."""
    if dtype.is_floating_point:
        return -math.inf
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _own(step: Any, rows: Rows) -> _Operation:
    def own(x: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        made = step.function(x)
        if not isinstance(made, Tensor) or made.dtype not in _NAMES:
            what = made.dtype if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise CaptureError(f"{step.name} gave {what}; a reduction gives a tensor that a store can hold")
        if step.rows is not None:
            check_own(step, tuple(made.shape), _NAMES[made.dtype], len(x))
        return (made.detach(),)

    return own


def _on_device(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what gives `tensor` where another lies, copied there once."""
    copies: dict[torch.device, Tensor] = {tensor.device: tensor}

    def beside(x: Tensor) -> Tensor:
        if x.device not in copies:
            copies[x.device] = tensor.to(x.device)
        return copies[x.device]

    return beside


def _kind(step: Step) -> type:
    return Projection if isinstance(step, Projection) else type(step)


_OPERATIONS: dict[type, Callable[[Any, Rows], _Operation]] = {
    Cast: _cast,
    Int8: _int8,
    Pool: _pool,
    Channels: _channels,
    Crop: _crop,
    TopK: _topk,
    Norm: _norm,
    Projection: _project,
    Tokens: _Tokens,
    ChannelsFirst: _channels_first,
    Own: _own,
}
