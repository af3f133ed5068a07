"""Reductions: what is kept of a tap instead of all of it, and how far that is from the truth.

A reduction is a chain of small steps, each a value: it says what it makes of rows of a given shape, whether
something is lost, and how to write itself as text and as JSON. How it is computed is a framework's matter
(`reduce_arrays` is the reference in numpy), on the device, in the hook, before anything is transferred.

    pool:7 | pool:4x7,max | pool:global      the mean, or maximum, of windows of the axes beside the channels
    channels:0,3,5 | channels:stride=4       some of the channels; channels:random=16,seed=1
    crop:14 | crop:14x10@3,0                 the middle of each axis beside the channels, or from an offset on
    topk:5 | topk:5,space                    the largest values with their positions, over channels or space
    norm:l2 | norm:l1 | norm:max             one number for all channels of a place
    project:16,seed=0 | project:16,sparse    a random projection of the channels; its basis is stored
    pca:16 | pca:basis.npz                   their principal components, fitted to the first rows, or given
    tokens:last | tokens:first | tokens:mean one of the tokens of a sequence, or their mean
    float16 | bfloat16 | float8_e4m3fn | ... a cast
    int8                                     int8 with a scale for each row and channel
    file.py:function                         one's own function of a batch

A step that has nothing to do for a tap (a pool of a vector, a cast of whole numbers) is left out, and what is
recorded is what was done.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .dtypes import DType, dtype_name, is_float, named_dtype
from .errors import PlanError

Json = dict[str, Any]
Values = NDArray[Any]

#: What a step may cast to.
CASTS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")
#: The name of what a tap holds itself; its further parts are called `scale` and `positions`.
VALUES = "values"
#: Rows that a basis is fitted to where nothing is said.
FIT_ROWS = 1024

_CHANNELS = ("channel", "feature", "component", "head")
_HALF = 2.0**-24  # unit roundoff of float32


@dataclass(frozen=True)
class Rows:
    """The form of one row of a tap."""

    shape: tuple[int, ...]
    """Its shape."""
    dims: tuple[str, ...]
    """Names of its axes."""
    dtype: DType
    """Its element type."""

    @property
    def channel(self) -> int | None:
        """The axis of the channels (features, components), if it has one."""
        return next((i for i, dim in enumerate(self.dims) if dim in _CHANNELS), None)

    @property
    def space(self) -> tuple[int, ...]:
        """The axes beside the channels: y and x, tokens, time."""
        return tuple(i for i in range(len(self.shape)) if i != self.channel)

    @property
    def n_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def sized(self, sizes: Mapping[int, int]) -> Rows:
        """Return these rows with other lengths of some axes."""
        return replace(self, shape=tuple(sizes.get(i, n) for i, n in enumerate(self.shape)))

    def without(self, axes: Sequence[int]) -> Rows:
        """Return these rows without some axes."""
        kept = [i for i in range(len(self.shape)) if i not in axes]
        return replace(self, shape=_of(self.shape, kept), dims=_of(self.dims, kept))


@dataclass(frozen=True)
class Error:
    """How far a stored value lies from what it was computed from, at most.

    Where the latter is finite and `relative` and `absolute` are given, |stored - true| <= `relative` times
    `of` + `absolute`.
    """

    text: str
    """The same in words."""
    lossless: bool = False
    """Whether nothing at all is lost."""
    exact: bool = False
    """Whether what is kept is bit for bit what it was; the rest may be gone."""
    relative: float = 0.0
    """Share of `of`."""
    absolute: float = 0.0
    """Added to that."""
    of: str = "value"
    """What `relative` is a share of."""


_NOTHING_LOST = Error("lossless", lossless=True, exact=True)
_KEPT_EXACT = Error("exact in what it keeps", exact=True)

#: Gives the form that rows have after some steps; an own function is tried on the first batch for it.
Probe: TypeAlias = "Callable[[Chain], Rows]"


class Step(ABC):
    """One step of a reduction."""

    kind: ClassVar[str]
    """What it is called in text and JSON."""

    @abstractmethod
    def bind(self, rows: Rows) -> Step | None:
        """Return this step with all that follows from the form of its input; None: it has nothing to do.

        Raises:
            PlanError: it cannot be done to such rows.
        """

    @abstractmethod
    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return the form of what a bound step makes: `values`, and further parts."""

    @abstractmethod
    def error(self, rows: Rows) -> Error:
        """Return how far a bound step is from the truth, for such input."""

    @abstractmethod
    def arguments(self) -> str:
        """Return what stands behind the kind in text."""

    @abstractmethod
    def to_json(self) -> Json:
        """Return what `step_from_json` reads."""

    def constants(self, rows: Rows) -> dict[str, tuple[tuple[str, ...], Values]]:
        """Return the arrays that a reader needs beside the rows, with the names of their axes."""
        return {}

    def __str__(self) -> str:
        arguments = self.arguments()
        return f"{self.kind}:{arguments}" if arguments else self.kind

    def __or__(self, other: Any) -> Chain:
        return Chain((self, *as_chain(other).steps))

    def __ror__(self, other: Any) -> Chain:
        return Chain((*as_chain(other).steps, self))


@dataclass(frozen=True)
class Chain:
    """Steps, one after the other; none of them: the values as they are."""

    steps: tuple[Step, ...] = ()
    """The steps."""

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps)) or "none"

    def __or__(self, other: Any) -> Chain:
        return Chain((*self.steps, *as_chain(other).steps))

    def __ror__(self, other: Any) -> Chain:
        return Chain((*as_chain(other).steps, *self.steps))

    def bind(self, rows: Rows, probe: Probe | None = None) -> Chain:
        """Return the steps that have something to do for `rows`, and all that follows from their form.

        Raises:
            PlanError: a step cannot be done to them.
        """
        bound = Chain()
        for step in self.steps:
            last = bound.steps[-1] if bound.steps else None
            if isinstance(last, Int8) or (
                not isinstance(step, Cast | Int8) and any(isinstance(s, TopK) for s in bound.steps)
            ):
                raise PlanError(
                    f"nothing can be done after {last} but a cast, and after int8 nothing: {self}"
                )
            if isinstance(step, Own):
                if probe is None:
                    raise PlanError(f"what {step.name} makes is not known before it ran")
                made = probe(Chain((*bound.steps, step)))
                bound = Chain((*bound.steps, replace(step, rows=made)))
            elif (one := step.bind(bound.after(rows)[VALUES])) is not None:
                bound = Chain((*bound.steps, one))
        return bound

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return the form of each part of what the bound steps make of `rows`, `values` first."""
        parts = {VALUES: rows}
        for step in self.steps:
            parts |= step.after(parts[VALUES])
        return parts

    def each(self, rows: Rows) -> list[tuple[Step, Rows]]:
        """Return each bound step with the form of its input."""
        found: list[tuple[Step, Rows]] = []
        for step in self.steps:
            if found:
                rows = found[-1][0].after(rows)[VALUES]
            found.append((step, rows))
        return found

    def errors(self, rows: Rows) -> list[Error]:
        """Return how far each bound step is from its own input; such errors add up along the chain."""
        return [step.error(form) for step, form in self.each(rows)]

    def lossless(self, rows: Rows) -> bool:
        """Return whether nothing at all is lost of `rows`."""
        return all(error.lossless for error in self.errors(rows))

    def said(self, rows: Rows) -> str:
        """Return in words what is lost of `rows`, step by step."""
        lines = [f"{step}: {step.error(form).text}" for step, form in self.each(rows)]
        return "; ".join(lines) or _NOTHING_LOST.text

    def constants(self, rows: Rows) -> dict[str, tuple[tuple[str, ...], Values]]:
        """Return the arrays that a reader needs beside the rows.

        Raises:
            PlanError: two steps bring the same.
        """
        found: dict[str, tuple[tuple[str, ...], Values]] = {}
        for step, form in self.each(rows):
            more = step.constants(form)
            if found.keys() & more.keys():
                raise PlanError(f"two projections in one chain are one too many: {self}")
            found |= more
        return found

    def to_json(self) -> list[Json]:
        """Return what `chain_from_json` reads."""
        return [{"kind": step.kind, **step.to_json()} for step in self.steps]


@dataclass(frozen=True)
class Cast(Step):
    """Round to another floating-point type, to the nearest, ties to even.

    float8 goes by way of float32. What is too large becomes infinite (NaN in float8_e4m3fn, which has no
    infinity) and is counted as such. Values that are not floating-point stay what they are.
    """

    kind: ClassVar[str] = "cast"

    to: str
    """`float16`, `bfloat16`, `float32`, `float8_e4m3fn` or `float8_e5m2`."""

    def __post_init__(self) -> None:
        if self.to not in CASTS:
            raise PlanError(f"there is no cast to {self.to!r}; choose one of {', '.join(CASTS)}")

    def __str__(self) -> str:
        return self.to

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
        target, source = (_finfo(dtype) for dtype in (named_dtype(self.to), rows.dtype))
        if _holds(target, source):
            return _NOTHING_LOST
        relative, absolute = 2.0 ** -(target.nmant + 1), float(target.smallest_subnormal) / 2
        if rows.dtype.itemsize == 8 and target.bits < 32:  # it is rounded twice
            relative, absolute = relative * (1 + _HALF) + _HALF, absolute * (1 + _HALF) + 2.0**-149
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
            relative=1 / 252 + 4 * _HALF,
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
        _check_real(rows, self)
        if self.size is None:
            return self
        sizes = _sizes(self.size, rows, self)
        sizes = tuple(min(size, rows.shape[axis]) for size, axis in zip(sizes, rows.space, strict=True))
        return None if sizes == _of(rows.shape, rows.space) else replace(self, size=sizes)

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
            return _KEPT_EXACT
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
        n = rows.shape[_channel(rows, self)]
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
        return {VALUES: rows.sized({_channel(rows, self): len(self.indices or ())})}

    def error(self, rows: Rows) -> Error:
        """Return that what is kept is exact."""
        return _KEPT_EXACT


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
        lengths = _of(rows.shape, rows.space)
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
        return _KEPT_EXACT


@dataclass(frozen=True)
class TopK(Step):
    """The k largest values, the largest first, with their positions.

    Over channels: of each place the largest channels. Over space: of each channel the places, counted along
    the axes beside the channels as C does (`y * width + x`). NaN counts as largest; of equals the first wins,
    so that the same values give the same bytes anywhere.
    """

    kind: ClassVar[str] = "topk"

    k: int
    """How many; all, where there are fewer."""
    over: str = "channels"
    """`channels` or `space`."""

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1 or self.over not in ("channels", "space"):
            raise PlanError(
                f"topk is over channels or space, of one value at least: not {self.k}, {self.over}"
            )

    def arguments(self) -> str:
        """Return how many, and over what."""
        return f"{self.k}" + (",space" if self.over == "space" else "")

    def to_json(self) -> Json:
        """Return how many, and over what."""
        return {"k": self.k, "over": self.over}

    def bind(self, rows: Rows) -> Step | None:
        """Work out how many there are."""
        _check_real(rows, self)
        axes = self.axes(rows)
        return replace(self, k=min(self.k, math.prod(_of(rows.shape, axes)))) if axes else None

    def axes(self, rows: Rows) -> tuple[int, ...]:
        """Return the axes that it is over."""
        return rows.space if self.over == "space" else (_channel(rows, self),)

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
        return _KEPT_EXACT


@dataclass(frozen=True)
class Norm(Step):
    """One number for all channels of a place, computed in float64, kept in float32 (float64 of float64)."""

    kind: ClassVar[str] = "norm"

    by: str = "l2"
    """`l1`, `l2`, or `max`, the largest magnitude."""

    def __post_init__(self) -> None:
        if self.by not in ("l1", "l2", "max"):
            raise PlanError(f"a norm is l1, l2 or max, not {self.by!r}")

    def arguments(self) -> str:
        """Return which."""
        return self.by

    def to_json(self) -> Json:
        """Return which."""
        return {"by": self.by}

    def bind(self, rows: Rows) -> Step | None:
        """Hold it to rows with channels."""
        _check_real(rows, self)
        _channel(rows, self)
        return self

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return rows of one channel."""
        return {VALUES: replace(rows.sized({_channel(rows, self): 1}), dtype=_computed(rows.dtype))}

    def error(self, rows: Rows) -> Error:
        """Return the rounding to float32; the sum in float64 is within n * 2^-53 (Higham, section 4.2)."""
        n, double = rows.shape[_channel(rows, self)], rows.dtype.itemsize == 8
        if self.by == "max":
            return Error("exact", exact=True)
        relative = (n + 2) * 2.0**-53 + (0.0 if double else _HALF)
        return Error(
            f"within {relative:.2g} of each norm, and beyond the largest float32 it overflows",
            relative=relative,
            absolute=0.0 if double else 2.0**-150,
        )


class Projection(Step):
    """What projects channels by a matrix: `project` and `pca`."""

    @property
    @abstractmethod
    def d(self) -> int:
        """Components."""

    @abstractmethod
    def matrix(self, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return the basis (components, channels) and what is taken away from rows of `n` channels first."""

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return components in place of channels."""
        axis = _channel(rows, self)
        dims = tuple("component" if i == axis else dim for i, dim in enumerate(rows.dims))
        return {VALUES: Rows(rows.sized({axis: self.d}).shape, dims, _computed(rows.dtype))}

    def constants(self, rows: Rows) -> dict[str, tuple[tuple[str, ...], Values]]:
        """Return the basis, and the mean where there is one."""
        axis = _channel(rows, self)
        basis, mean = self.matrix(rows.shape[axis])
        dim = "projected" if rows.dims[axis] == "component" else rows.dims[axis]
        found: dict[str, tuple[tuple[str, ...], Values]] = {"basis": (("component", dim), basis)}
        return found if mean is None else found | {"mean": ((dim,), mean)}


@dataclass(frozen=True)
class Project(Projection):
    """A random projection of the channels, which keeps distances: coefficients = basis @ channels."""

    kind: ClassVar[str] = "project"

    n: int
    """Components."""
    seed: int = 0
    """What the basis is made from."""
    sparse: bool = False
    """Entries of 0 and +-sqrt(3 / n) at 2/3 and 1/6 each, and not Gaussian ones."""

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise PlanError(f"a projection has at least one component, not {self.n}")

    @property
    def d(self) -> int:
        """Components."""
        return self.n

    def arguments(self) -> str:
        """Return the number of components, and how."""
        return f"{self.n},seed={self.seed}" + (",sparse" if self.sparse else "")

    def to_json(self) -> Json:
        """Return the number of components, and how."""
        return {"n": self.n, "seed": self.seed, "sparse": self.sparse}

    def bind(self, rows: Rows) -> Step | None:
        """Hold it to rows with channels."""
        _check_real(rows, self)
        _channel(rows, self)
        return self

    def matrix(self, n: int) -> tuple[NDArray[np.float32], None]:
        """Return the basis."""
        return _random_basis(self.n, n, self.seed, self.sparse), None

    def error(self, rows: Rows) -> Error:
        """Return that of a sum of products (Higham, section 3.1); how well distances are kept is chance.

        Of m points, all squared distances are kept within 1 +- e with a probability of at least
        1 - m^2 exp(-n (e^2 - e^3) / 4) (Dasgupta and Gupta, An elementary proof of a theorem of Johnson and
        Lindenstrauss, 2003; Achlioptas, Database-friendly random projections, 2003, for sparse ones).
        """
        e = min(1.0, math.sqrt(16 / self.n))
        text = (
            f"coefficients within {{:.2g}} of the sum of magnitudes, distances within {e:.0%} mostly"
            if e < 1
            else "coefficients within {:.2g} of the sum of magnitudes, and too few to keep distances"
        )
        return _product(text, rows, self)


@dataclass(frozen=True)
class Pca(Projection):
    """Principal components of the channels: coefficients = basis @ (channels - mean).

    Give a basis, or only how many components: `record_dataset` then fits them to the first rows, and
    `layertap.fit_pca` does so beforehand.
    """

    kind: ClassVar[str] = "pca"

    n: int | None = None
    """Components."""
    basis: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """Shape (components, channels), its rows orthonormal; None: to be fitted."""
    mean: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """Shape (channels,); None: nothing is taken away."""
    rows: int | None = None
    """Rows that it is, or was, fitted to."""
    explained: float | None = field(default=None, compare=False)
    """Share of the variance of these rows that the components hold."""

    def __post_init__(self) -> None:
        if self.basis is not None:
            basis = np.ascontiguousarray(self.basis, np.float32)
            mean = None if self.mean is None else np.ascontiguousarray(self.mean, np.float32)
            if basis.ndim != 2 or 0 in basis.shape or (mean is not None and mean.shape != basis.shape[1:]):
                raise PlanError("a basis has the shape (components, channels), its mean (channels,)")
            for name, value in (("basis", basis), ("mean", mean), ("n", len(basis))):
                object.__setattr__(self, name, value)
        if self.n is None or type(self.n) is not int or self.n < 1:
            raise PlanError("PCA takes a number of components, or a basis")

    @property
    def d(self) -> int:
        """Components."""
        assert self.n is not None
        return self.n

    def arguments(self) -> str:
        """Return the number of components, and to how many rows they are fitted."""
        return f"{self.n}" + (f",rows={self.rows}" if self.rows is not None else "")

    def to_json(self) -> Json:
        """Return the number of components; the basis is an array of the store."""
        return {"n": self.n, "rows": self.rows, "explained": self.explained}

    def bind(self, rows: Rows) -> Step | None:
        """Hold the basis to the channels."""
        _check_real(rows, self)
        n = rows.shape[_channel(rows, self)]
        if self.basis is None:
            raise PlanError(
                "PCA has no basis yet, and a loop of your own cannot be run beforehand: fit it with "
                "layertap.fit_pca, and give what that returns"
            )
        if self.basis.shape[1] != n:
            raise PlanError(f"the basis is of {self.basis.shape[1]} channels, and the rows have {n}")
        return self

    def matrix(self, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return basis and mean."""
        assert self.basis is not None
        return self.basis, self.mean

    def error(self, rows: Rows) -> Error:
        """Return that of a sum of products (Higham, section 3.1), and what the components leave out.

        The mean squared error of what `basis` gives back is the variance that is not explained (Eckart and
        Young, 1936), of the rows that it was fitted to.
        """
        lost = "" if self.explained is None else f", and {1 - self.explained:.2%} of the variance is left out"
        return _product(f"coefficients within {{:.2g}} of the sum of magnitudes{lost}", rows, self)


@dataclass(frozen=True)
class Tokens(Step):
    """One token of a sequence (token, feature), or their mean; what is no sequence stays as it is."""

    kind: ClassVar[str] = "tokens"

    which: str
    """`first`, `last` or `mean`."""

    def __post_init__(self) -> None:
        if self.which not in ("first", "last", "mean"):
            raise PlanError(f"of tokens, first, last or mean can be kept, not {self.which!r}")

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
            _check_real(rows, self)
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
            return _KEPT_EXACT
        n = rows.shape[self.axis(rows)]
        dtype = self.after(rows)[VALUES].dtype
        return _summed(f"within {{:.2g}} of the mean magnitude of {n} tokens", n, rows.dtype, dtype)


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
        """Return itself: `Chain.bind` tries it."""
        return self

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return what it made of the first batch."""
        assert self.rows is not None
        return {VALUES: self.rows}

    def error(self, rows: Rows) -> Error:
        """Return that nothing is known."""
        return Error(f"{self.name} is a function of the user's: what it loses is not known")


# Which tap is reduced how

Reduction: TypeAlias = "str | Step | Chain | Callable[[Any], Any] | None"
#: What `reduce=` takes: one for all taps, texts as on the command line, or one for each pattern.
Reductions: TypeAlias = "Reduction | Sequence[str] | Mapping[str, Reduction]"


def as_chain(value: Any) -> Chain:
    """Return a chain for a text, a step, a function of one's own, or None.

    Raises:
        PlanError: it is none of these.
    """
    if value is None:
        return Chain()
    if isinstance(value, Chain):
        return value
    if isinstance(value, Step):
        return Chain((value,))
    if isinstance(value, str):
        from .reduce_text import parse

        return parse(value)
    if callable(value):
        return Chain((Own(value),))
    raise PlanError(f"{value!r} is no reduction; give text such as 'pool:7', a layertap.reduce step or chain")


# Parts of the above


def _of(values: Sequence[Any], axes: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[axis] for axis in axes)


def _listed(values: Any) -> Any:
    if values is None:
        return None
    return list(values) if isinstance(values, tuple) else [values]


def _check_real(rows: Rows, step: Step) -> None:
    if rows.dtype.kind == "c":
        raise PlanError(f"{step} is of real numbers, and the tap holds {rows.dtype}")


def _channel(rows: Rows, step: Step) -> int:
    if rows.channel is None:
        dims = ", ".join(f"{d}={n}" for d, n in zip(rows.dims, rows.shape, strict=True)) or "one number"
        raise PlanError(f"{step} needs channels, and a row has none: it is ({dims})")
    return rows.channel


def _check_sizes(size: int | tuple[int, ...], what: str) -> None:
    sizes = size if isinstance(size, tuple) else (size,)
    if not sizes or not all(type(n) is int and n > 0 for n in sizes):
        raise PlanError(f"{what} has whole sizes of at least 1, not {size!r}")


def _sizes(size: int | tuple[int, ...] | None, rows: Rows, step: Step) -> tuple[int, ...]:
    n = len(rows.space)
    sizes = size if isinstance(size, tuple) and len(size) != 1 else (_first(size),) * n
    if len(sizes) != n:
        names = ", ".join(_of(rows.dims, rows.space))
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


def _computed(dtype: DType) -> DType:
    """Return the type of what is computed from values of `dtype`: no half type, whose range is too small."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def _finfo(dtype: DType) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _holds(target: Any, source: Any) -> bool:
    """Return whether every value of one type is one of the other's."""
    return bool(
        target.nmant >= source.nmant
        and target.maxexp >= source.maxexp
        and target.smallest_subnormal <= source.smallest_subnormal
    )


def _summed(text: str, n: int, source: DType, stored: DType) -> Error:
    unit = 2.0**-53 if source == np.float64 else _HALF
    to = _finfo(stored)
    relative = (n + 1) * unit + (2.0 ** -(to.nmant + 1) if to.bits < 32 else unit)
    absolute = float(to.smallest_subnormal) if n else 0.0
    return Error(text.format(relative), relative=relative, absolute=absolute, of="mean magnitude")


def _product(text: str, rows: Rows, step: Projection) -> Error:
    unit = 2.0**-53 if rows.dtype == np.float64 else _HALF
    relative = (rows.shape[_channel(rows, step)] + 4) * unit
    return Error(text.format(relative), relative=relative, absolute=2.0**-126, of="sum of magnitudes")


@lru_cache(maxsize=64)
def _random_basis(d: int, n: int, seed: int, sparse: bool) -> NDArray[np.float32]:
    """Return a basis (d, n) with rows of expected length sqrt(n / d).

    Made of raw bits, which numpy promises to keep for a seed; its distributions may change.
    """
    raw = np.random.PCG64(seed).random_raw(2 * d * n)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    if sparse:
        sign = np.where(raw[::2] & np.uint64(2**10), 1.0, -1.0)
        entries = np.where(uniform[1::2] < 1 / 3, sign * math.sqrt(3.0), 0.0)
    else:  # Box and Muller
        entries = np.sqrt(-2 * np.log(uniform[::2])) * np.cos(2 * np.pi * uniform[1::2])
    basis = (entries.reshape(d, n) / math.sqrt(d)).astype(np.float32)
    basis.flags.writeable = False
    return basis


def _fingerprint(function: Any) -> str | None:
    target = function if inspect.isroutine(function) else type(function)
    try:
        return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:32]
    except (OSError, TypeError):
        return None
