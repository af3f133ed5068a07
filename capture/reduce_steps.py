"""The steps of a reduction, but for those that project channels by a matrix (`reduce_projections`)."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from .dtypes import DType, dtype_name, is_float, named_dtype
from .errors import PlanError
from .reduce_base import (
    HALF,
    KEPT_EXACT,
    NOTHING_LOST,
    VALUES,
    Chain,
    Error,
    Json,
    Probe,
    Rows,
    Step,
    channel_of,
    check_real,
    computed,
    finfo,
    picked,
)

#: What a step may cast to.
CASTS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")

#: Names of the axes of places that a map has beside its channels.
_PLACES = ("t", "z", "y", "x")


@dataclass(frozen=True)
class Cast(Step):
    """Round to another floating-point type, to the nearest, ties to even.

    float8 goes by way of float32. What is too large becomes infinite (NaN in float8_e4m3fn, which has no
    infinity) and is counted as such. Values that are not floating-point stay what they are.
    """

    kind: ClassVar[str] = "cast"
    is_cast: ClassVar[bool] = True

    to: str
    """`float16`, `bfloat16`, `float32`, `float8_e4m3fn` or `float8_e5m2`."""

    def __post_init__(self) -> None:
        if self.to not in CASTS:
            raise PlanError(f"there is no cast to {self.to!r}; choose one of {', '.join(CASTS)}")

    def __str__(self) -> str:
        return self.to

    @property
    def by_place(self) -> bool:
        """True."""
        return True

    def arguments(self) -> str:
        """Return the type."""
        return self.to

    def to_json(self) -> Json:
        """Return the type."""
        return {"to": self.to}

    def bind(self, rows: Rows) -> Step | None:
        """Leave other than real floating-point types alone."""
        return self if is_float(rows.dtype) and rows.dtype != named_dtype(self.to) else None

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return the same rows of that type."""
        return {VALUES: replace(rows, dtype=named_dtype(self.to))}

    def error(self, rows: Rows) -> Error:
        """Return the rounding error: relative 2^-p of a significand of p bits, half of the least subnormal.

        Higham, Accuracy and Stability of Numerical Algorithms, theorem 2.2; the parameters are those of
        IEEE 754 and of Micikevicius et al., FP8 Formats for Deep Learning (2022).
        """
        target, source = (finfo(dtype) for dtype in (named_dtype(self.to), rows.dtype))
        if _holds(target, source):
            return NOTHING_LOST
        relative, absolute = 2.0 ** -(target.nmant + 1), float(target.smallest_subnormal) / 2
        if rows.dtype.itemsize == 8 and target.bits < 32:  # it is rounded twice
            relative, absolute = relative * (1 + HALF) + HALF, absolute * (1 + HALF) + 2.0**-149
        return Error(
            f"within {relative:.2g} of each value or {absolute:.2g}, and beyond "
            f"{float(target.max):.4g} it overflows",
            relative=relative,
            absolute=absolute,
        )


@dataclass(frozen=True)
class Int8(Step):
    """Whole numbers from -126 to 126 times a scale: the largest finite magnitude over 126.

    There is one scale for each row and channel (for each row of vectors and of what has no channels). NaN
    and infinities have codes of their own, so they come back.
    """

    kind: ClassVar[str] = "int8"
    is_cast: ClassVar[bool] = True
    is_last: ClassVar[bool] = True

    def arguments(self) -> str:
        """Return nothing."""
        return ""

    def to_json(self) -> Json:
        """Return nothing."""
        return {}

    def bind(self, rows: Rows) -> Step | None:
        """Leave other than real floating-point types alone."""
        return self if is_float(rows.dtype) else None

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return int8 rows and their scales."""
        scales = rows.without(self.scaled(rows))
        return {
            VALUES: replace(rows, dtype=np.dtype(np.int8)),
            "scale": replace(scales, dtype=np.dtype(np.float32)),
        }

    def scaled(self, rows: Rows) -> tuple[int, ...]:
        """Return the axes that share a scale."""
        return rows.space if rows.channel is not None and rows.space else tuple(range(len(rows.shape)))

    def error(self, rows: Rows) -> Error:
        """Return half a step of the scale.

        Uniform quantisation rounds to the nearest multiple of s = m / 126, m the largest magnitude: s / 2 =
        m / 252. The quotient, the product and s itself are rounded to float32, 3 * 2^-24 of m at most. A
        subnormal s is off by up to 2^-150, times 126 codes, and so is what lies beyond the last code.
        """
        return Error(
            "within 1/252 of the largest magnitude of its row and channel",
            relative=1 / 252 + 4 * HALF,
            absolute=2.0**-142,
            of="largest magnitude",
        )


@dataclass(frozen=True)
class Pool(Step):
    """Mean or maximum of windows of the axes beside the channels.

    Window i of n entries pooled to s is i * n // s to -(-(i + 1) * n // s), as in torch's adaptive pooling.
    An axis that is no longer than the size stays what it is. A mean is computed in float32 (float64 of
    float64) and has the type of the values, float32 where these are whole numbers.
    """

    kind: ClassVar[str] = "pool"

    size: int | tuple[int, ...] | None
    """Entries of each axis, or one number for all; None: one value for all places, and the axes are gone."""
    by: str = "mean"
    """`mean` or `max`."""

    def __post_init__(self) -> None:
        if self.by not in ("mean", "max"):
            raise PlanError(f"a pool is by mean or max, not {self.by!r}")
        if self.size is not None:
            _check_sizes(self.size, "a pool")

    @property
    def of_whole_row(self) -> bool:
        """Whether it is of all places."""
        return self.size is None

    def arguments(self) -> str:
        """Return the size and how."""
        return _show_sizes(self.size) + (",max" if self.by == "max" else "")

    def to_json(self) -> Json:
        """Return the size and how."""
        return {"size": _listed(self.size), "by": self.by}

    def bind(self, rows: Rows) -> Step | None:
        """Work out the sizes."""
        if not rows.space:
            return None
        check_real(rows, self)
        if self.size is None:
            return self
        sizes = _sizes(self.size, rows, self)
        sizes = tuple(min(size, rows.shape[axis]) for size, axis in zip(sizes, rows.space, strict=True))
        return None if sizes == picked(rows.shape, rows.space) else replace(self, size=sizes)

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return smaller rows."""
        whole = self.by == "mean" and not is_float(rows.dtype)
        dtype = np.dtype(np.float32) if whole else rows.dtype
        if self.size is None:
            return {VALUES: replace(rows.without(rows.space), dtype=dtype)}
        sizes = zip(rows.space, _sizes(self.size, rows, self), strict=True)
        return {VALUES: replace(rows.sized(dict(sizes)), dtype=dtype)}

    def error(self, rows: Rows) -> Error:
        """Return that of a mean of n: (n + 1) u of the mean magnitude, and the rounding to its type.

        Higham, section 4.2: a sum in any order is within (n - 1) u of the sum of magnitudes; one more for
        the quotient, one for the second order.
        """
        if self.by == "max":
            return KEPT_EXACT
        sizes = (1,) * len(rows.space) if self.size is None else _sizes(self.size, rows, self)
        n = math.prod(
            -(-rows.shape[axis] // size) + (rows.shape[axis] % size > 0)
            for axis, size in zip(rows.space, sizes, strict=True)
        )
        dtype = self.after(rows)[VALUES].dtype
        return _summed(f"within {{:.2g}} of the mean magnitude of its {n} values", n, rows.dtype, dtype)


@dataclass(frozen=True)
class Channels(Step):
    """Some of the channels, in their order, as they are."""

    kind: ClassVar[str] = "channels"

    indices: tuple[int, ...] | None = None
    """Which; negative ones count from the end."""
    stride: int | None = None
    """Every so manieth, from the first on."""
    random: int | None = None
    """So many, chosen at random."""
    seed: int = 0
    """What chooses these."""

    def __post_init__(self) -> None:
        if self.indices is not None:
            object.__setattr__(self, "indices", tuple(int(i) for i in self.indices))
        ways = [self.indices is not None and self.stride is None, self.stride is not None]
        n_ways = sum(way is not None for way in (self.stride, self.random)) or int(ways[0])
        if (
            n_ways != 1
            or self.indices == ()
            or not all(n is None or n > 0 for n in (self.stride, self.random))
        ):
            raise PlanError(
                "channels are chosen by a list, a stride or a number of random ones, one of these"
            )

    @property
    def by_place(self) -> bool:
        """True."""
        return True

    def arguments(self) -> str:
        """Return how they are chosen."""
        if self.stride is not None:
            return f"stride={self.stride}"
        if self.random is not None:
            return f"random={self.random},seed={self.seed}"
        return ",".join(map(str, self.indices or ()))

    def to_json(self) -> Json:
        """Return which they are, and how they were chosen."""
        how = {"stride": self.stride, "random": self.random, "seed": self.seed if self.random else None}
        return {"indices": _listed(self.indices), **{key: n for key, n in how.items() if n is not None}}

    def bind(self, rows: Rows) -> Step | None:
        """Work out which they are."""
        n = rows.shape[channel_of(rows, self)]
        if self.stride is not None:
            chosen: Sequence[int] = range(0, n, self.stride)
        elif self.random is not None:
            keys = np.random.PCG64(self.seed).random_raw(n)
            chosen = sorted(np.argsort(keys, kind="stable")[: self.random].tolist())
        else:
            chosen = self.indices or ()
            bad = next((i for i in chosen if not -n <= i < n), None)
            if bad is not None:
                raise PlanError(f"there is no channel {bad}: the rows have {n}")
        indices = tuple(i % n for i in chosen)
        return None if indices == tuple(range(n)) else replace(self, indices=indices)

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return rows of fewer channels."""
        return {VALUES: rows.sized({channel_of(rows, self): len(self.indices or ())})}

    def error(self, rows: Rows) -> Error:
        """Return that what is kept is exact."""
        return KEPT_EXACT


@dataclass(frozen=True)
class Crop(Step):
    """A window of the axes beside the channels; an axis that is no longer than it stays whole."""

    kind: ClassVar[str] = "crop"

    size: int | tuple[int, ...]
    """Entries of each axis, or one number for all."""
    at: tuple[int, ...] | None = None
    """First entry of each axis; None: the window lies in the middle."""

    def __post_init__(self) -> None:
        _check_sizes(self.size, "a crop")

    def arguments(self) -> str:
        """Return size and place."""
        at = "" if self.at is None else "@" + ",".join(map(str, self.at))
        return _show_sizes(self.size) + at

    def to_json(self) -> Json:
        """Return size and place."""
        return {"size": _listed(self.size), "at": _listed(self.at)}

    def bind(self, rows: Rows) -> Step | None:
        """Work out where the window lies."""
        lengths = picked(rows.shape, rows.space)
        sizes = tuple(map(min, _sizes(self.size, rows, self), lengths)) if lengths else ()
        if sizes == lengths:
            return None
        at = self.at
        if at is None:
            at = tuple((n - size) // 2 for n, size in zip(lengths, sizes, strict=True))
        if len(at) != len(sizes) or any(
            not 0 <= a <= n - s for a, n, s in zip(at, lengths, sizes, strict=True)
        ):
            raise PlanError(f"{self} lies outside of {' x '.join(map(str, lengths))}")
        return replace(self, size=sizes, at=at)

    def window(self, rows: Rows) -> tuple[slice, ...]:
        """Return the slice of each axis of a row."""
        slices = [slice(None)] * len(rows.shape)
        for axis, at, size in zip(rows.space, self.at or (), _sizes(self.size, rows, self), strict=True):
            slices[axis] = slice(at, at + size)
        return tuple(slices)

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return smaller rows."""
        return {VALUES: rows.sized(dict(zip(rows.space, _sizes(self.size, rows, self), strict=True)))}

    def error(self, rows: Rows) -> Error:
        """Return that what is kept is exact."""
        return KEPT_EXACT


@dataclass(frozen=True)
class TopK(Step):
    """The k largest values, the largest first, with their positions.

    Over channels: of each place the largest channels. Over space: of each channel the places, counted along
    the axes beside the channels as C does (`y * width + x`). NaN counts as largest; of equals the first wins,
    so that the same values give the same bytes anywhere.
    """

    kind: ClassVar[str] = "topk"
    only_casts_follow: ClassVar[bool] = True

    k: int
    """How many; all, where there are fewer."""
    over: str = "channels"
    """`channels` or `space`."""

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1 or self.over not in ("channels", "space"):
            raise PlanError(
                f"topk is over channels or space, of one value at least: not {self.k}, {self.over}"
            )

    @property
    def of_whole_row(self) -> bool:
        """Whether it is over all places."""
        return self.over == "space"

    def arguments(self) -> str:
        """Return how many, and over what."""
        return f"{self.k}" + (",space" if self.over == "space" else "")

    def to_json(self) -> Json:
        """Return how many, and over what."""
        return {"k": self.k, "over": self.over}

    def bind(self, rows: Rows) -> Step | None:
        """Work out how many there are."""
        check_real(rows, self)
        axes = self.axes(rows)
        return replace(self, k=min(self.k, math.prod(picked(rows.shape, axes)))) if axes else None

    def axes(self, rows: Rows) -> tuple[int, ...]:
        """Return the axes that it is over."""
        return rows.space if self.over == "space" else (channel_of(rows, self),)

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return values and positions: the axis `rank` stands where the only one was, or last."""
        axes = self.axes(rows)
        if len(axes) == 1:
            dims = tuple("rank" if i in axes else dim for i, dim in enumerate(rows.dims))
            values = replace(rows.sized({axes[0]: self.k}), dims=dims)
        else:
            rest = rows.without(axes)
            values = replace(rest, shape=(*rest.shape, self.k), dims=(*rest.dims, "rank"))
        return {VALUES: values, "positions": replace(values, dtype=np.dtype(np.int32))}

    def error(self, rows: Rows) -> Error:
        """Return that what is kept is exact."""
        return KEPT_EXACT


@dataclass(frozen=True)
class Norm(Step):
    """One number for all channels of a place, computed in float64, kept in float32 (float64 of float64)."""

    kind: ClassVar[str] = "norm"

    by: str = "l2"
    """`l1`, `l2`, or `max`, the largest magnitude."""

    def __post_init__(self) -> None:
        if self.by not in ("l1", "l2", "max"):
            raise PlanError(f"a norm is l1, l2 or max, not {self.by!r}")

    @property
    def by_place(self) -> bool:
        """True."""
        return True

    def arguments(self) -> str:
        """Return which."""
        return self.by

    def to_json(self) -> Json:
        """Return which."""
        return {"by": self.by}

    def bind(self, rows: Rows) -> Step | None:
        """Hold it to rows with channels."""
        check_real(rows, self)
        channel_of(rows, self)
        return self

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return rows of one channel."""
        return {VALUES: replace(rows.sized({channel_of(rows, self): 1}), dtype=computed(rows.dtype))}

    def error(self, rows: Rows) -> Error:
        """Return the rounding to float32; the sum in float64 is within n * 2^-53 (Higham, section 4.2)."""
        n, double = rows.shape[channel_of(rows, self)], rows.dtype.itemsize == 8
        if self.by == "max":
            return Error("exact", exact=True)
        relative = (n + 2) * 2.0**-53 + (0.0 if double else HALF)
        return Error(
            f"within {relative:.2g} of each norm, and beyond the largest float32 it overflows",
            relative=relative,
            absolute=0.0 if double else 2.0**-150,
        )


@dataclass(frozen=True)
class Tokens(Step):
    """One token of a sequence (token, feature), or their mean; what is no sequence stays as it is."""

    kind: ClassVar[str] = "tokens"

    which: str
    """`first`, `last` or `mean`."""

    def __post_init__(self) -> None:
        if self.which not in ("first", "last", "mean"):
            raise PlanError(f"of tokens, first, last or mean can be kept, not {self.which!r}")

    @property
    def of_whole_row(self) -> bool:
        """True."""
        return True

    @property
    def minds_mask(self) -> bool:
        """True."""
        return True

    def arguments(self) -> str:
        """Return which."""
        return self.which

    def to_json(self) -> Json:
        """Return which."""
        return {"which": self.which}

    def bind(self, rows: Rows) -> Step | None:
        """Find the tokens."""
        if "token" not in rows.dims:
            return None
        if self.which == "mean":
            check_real(rows, self)
        return self

    def axis(self, rows: Rows) -> int:
        """Return the axis of the tokens."""
        return rows.dims.index("token")

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return rows without that axis."""
        whole = self.which == "mean" and not is_float(rows.dtype)
        dtype = np.dtype(np.float32) if whole else rows.dtype
        return {VALUES: replace(rows.without([self.axis(rows)]), dtype=dtype)}

    def error(self, rows: Rows) -> Error:
        """Return that of a mean; a token is kept as it is. See `Pool.error`."""
        if self.which != "mean":
            return KEPT_EXACT
        n = rows.shape[self.axis(rows)]
        dtype = self.after(rows)[VALUES].dtype
        return _summed(f"within {{:.2g}} of the mean magnitude of {n} tokens", n, rows.dtype, dtype)


@dataclass(frozen=True)
class ChannelsFirst(Step):
    """The channels before the places: rows (y, x, feature) become (channel, y, x), and nothing is lost.

    Stores of frameworks that put channels last are then laid out as those of the others. What has its
    channels first already, and what is no map (vectors, tokens), stays as it is.
    """

    kind: ClassVar[str] = "channels_first"

    def arguments(self) -> str:
        """Return nothing."""
        return ""

    def to_json(self) -> Json:
        """Return nothing."""
        return {}

    def bind(self, rows: Rows) -> Step | None:
        """Leave alone what is no map, and maps whose channels come first."""
        places = picked(rows.dims, rows.space)
        return self if rows.channel and not set(places) - set(_PLACES) else None

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return rows whose first axis is that of the channels."""
        axis = channel_of(rows, self)
        name = "channel" if rows.dims[axis] == "feature" else rows.dims[axis]
        shape = (rows.shape[axis], *picked(rows.shape, rows.space))
        return {VALUES: replace(rows, shape=shape, dims=(name, *picked(rows.dims, rows.space)))}

    def error(self, rows: Rows) -> Error:
        """Return that nothing is lost."""
        return NOTHING_LOST


@dataclass(frozen=True)
class Own(Step):
    """One's own function: from a batch of values, rows first, to another with the same rows.

    The store keeps its name and a fingerprint of its source, and says that what it does is not known.
    """

    kind: ClassVar[str] = "own"

    function: Callable[[Any], Any] | None = field(compare=False)
    """The function; None where a store was read."""
    name: str = ""
    """Its name."""
    source: str | None = None
    """Half of the SHA-256 of its source text, where Python has that."""
    rows: Rows | None = None
    """The form of what it makes, once it ran."""

    def __post_init__(self) -> None:
        if self.function is not None and not self.name:
            made: Any = self.function
            name = getattr(made, "__qualname__", type(made).__name__)
            object.__setattr__(self, "name", name)
            object.__setattr__(self, "source", _fingerprint(made))

    def __str__(self) -> str:
        return f"own:{self.name}"

    def arguments(self) -> str:
        """Return its name."""
        return self.name

    def to_json(self) -> Json:
        """Return its name, fingerprint, and the form of what it makes."""
        made = self.rows
        form = made and {"shape": [*made.shape], "dims": [*made.dims], "dtype": dtype_name(made.dtype)}
        return {"name": self.name, "source": self.source, "opaque": True, "makes": form}

    def bind(self, rows: Rows) -> Step | None:
        """Return itself: `bind_after` tries it."""
        return self

    def bind_after(self, before: Chain, rows: Rows, probe: Probe | None) -> Step | None:
        """Try it on the first batch.

        Raises:
            PlanError: there is none.
        """
        if probe is None:
            raise PlanError(f"what {self.name} makes is not known before it ran")
        return replace(self, rows=probe(Chain((*before.steps, self))))

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return what it made of the first batch."""
        assert self.rows is not None
        return {VALUES: self.rows}

    def error(self, rows: Rows) -> Error:
        """Return that nothing is known."""
        return Error(f"{self.name} is a function of the user's: what it loses is not known")


# Parts of the above


def _listed(values: Any) -> Any:
    if values is None:
        return None
    return list(values) if isinstance(values, tuple) else [values]


def _check_sizes(size: int | tuple[int, ...], what: str) -> None:
    sizes = size if isinstance(size, tuple) else (size,)
    if not sizes or not all(type(n) is int and n > 0 for n in sizes):
        raise PlanError(f"{what} has whole sizes of at least 1, not {size!r}")


def _sizes(size: int | tuple[int, ...] | None, rows: Rows, step: Step) -> tuple[int, ...]:
    n = len(rows.space)
    sizes = size if isinstance(size, tuple) and len(size) != 1 else (_first(size),) * n
    if len(sizes) != n:
        names = ", ".join(picked(rows.dims, rows.space))
        raise PlanError(
            f"{step} gives {len(sizes)} sizes, and the rows have {n} axes beside channels: {names}"
        )
    return sizes


def _first(size: int | tuple[int, ...] | None) -> int:
    assert size is not None
    return size[0] if isinstance(size, tuple) else size


def _show_sizes(size: int | tuple[int, ...] | None) -> str:
    if size is None:
        return "global"
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def _holds(target: Any, source: Any) -> bool:
    """Return whether every value of one type is one of the other's."""
    return bool(
        target.nmant >= source.nmant
        and target.maxexp >= source.maxexp
        and target.smallest_subnormal <= source.smallest_subnormal
    )


def _summed(text: str, n: int, source: DType, stored: DType) -> Error:
    unit = 2.0**-53 if source == np.float64 else HALF
    to = finfo(stored)
    relative = (n + 1) * unit + (2.0 ** -(to.nmant + 1) if to.bits < 32 else unit)
    absolute = float(to.smallest_subnormal) if n else 0.0
    return Error(text.format(relative), relative=relative, absolute=absolute, of="mean magnitude")


def _fingerprint(function: Any) -> str | None:
    target = function if inspect.isroutine(function) else type(function)
    try:
        return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:32]
    except (OSError, TypeError):
        return None
