"""What all steps of a reduction have in common: the form of rows, the error of a value, and chains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .dtypes import DType
from .errors import PlanError

Json = dict[str, Any]
Values = NDArray[Any]

#: The name of what a tap holds itself; its further parts are called `scale` and `positions`.
VALUES = "values"

_CHANNELS = ("channel", "feature", "component", "head")
#: Unit roundoff of float32.
HALF = 2.0**-24


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
        return replace(self, shape=picked(self.shape, kept), dims=picked(self.dims, kept))


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


NOTHING_LOST = Error("lossless", lossless=True, exact=True)
KEPT_EXACT = Error("exact in what it keeps", exact=True)

#: Gives the form that rows have after some steps; an own function is tried on the first batch for it.
Probe: TypeAlias = "Callable[[Chain], Rows]"


class Step(ABC):
    """One step of a reduction."""

    kind: ClassVar[str]
    """What it is called in text and JSON."""
    is_cast: ClassVar[bool] = False
    """Whether it changes how each number is held, and nothing else."""
    only_casts_follow: ClassVar[bool] = False
    """Whether what it makes can only be cast, by steps behind it."""
    is_last: ClassVar[bool] = False
    """Whether nothing at all can follow it."""

    @property
    def by_place(self) -> bool:
        """Whether it does the same to each place by itself, so that rows may have other places."""
        return False

    @property
    def of_whole_row(self) -> bool:
        """Whether it makes one thing of all places of a row, so that rows come to one shape."""
        return False

    @property
    def minds_mask(self) -> bool:
        """Whether it always matters to it which tokens of a padded batch are the rows' own."""
        return False

    @abstractmethod
    def bind(self, rows: Rows) -> Step | None:
        """Return this step with all that follows from the form of its input; None: it has nothing to do.

        Raises:
            PlanError: it cannot be done to such rows.
        """

    def bind_after(self, before: Chain, rows: Rows, probe: Probe | None) -> Step | None:
        """Return this step bound to what `before`, which is bound to `rows`, makes of them; see `bind`."""
        return self.bind(before.after(rows)[VALUES])

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
            if (last is not None and last.is_last) or (
                not step.is_cast and any(before.only_casts_follow for before in bound.steps)
            ):
                raise PlanError(
                    f"nothing can be done after {last} but a cast, and after int8 nothing: {self}"
                )
            if (one := step.bind_after(bound, rows, probe)) is not None:
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

    @property
    def of_whole_row(self) -> bool:
        """Whether rows come to one shape, whatever places they have."""
        return any(step.of_whole_row for step in self.steps)

    def lossless(self, rows: Rows) -> bool:
        """Return whether nothing at all is lost of `rows`."""
        return all(error.lossless for error in self.errors(rows))

    def said(self, rows: Rows) -> str:
        """Return in words what is lost of `rows`, step by step."""
        lines = [f"{step}: {step.error(form).text}" for step, form in self.each(rows)]
        return "; ".join(lines) or NOTHING_LOST.text

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
        from .reduce_steps import Own

        return Chain((Own(value),))
    raise PlanError(f"{value!r} is no reduction; give text such as 'pool:7', a layertap.reduce step or chain")


# What steps share


def picked(values: Sequence[Any], axes: Sequence[int]) -> tuple[Any, ...]:
    """Return the values of some axes."""
    return tuple(values[axis] for axis in axes)


def check_real(rows: Rows, step: Step) -> None:
    """Refuse complex numbers.

    Raises:
        PlanError: the rows are of such.
    """
    if rows.dtype.kind == "c":
        raise PlanError(f"{step} is of real numbers, and the tap holds {rows.dtype}")


def channel_of(rows: Rows, step: Step) -> int:
    """Return the axis of the channels.

    Raises:
        PlanError: there is none.
    """
    if rows.channel is None:
        dims = ", ".join(f"{d}={n}" for d, n in zip(rows.dims, rows.shape, strict=True)) or "one number"
        raise PlanError(f"{step} needs channels, and a row has none: it is ({dims})")
    return rows.channel


def computed(dtype: DType) -> DType:
    """Return the type of what is computed from values of `dtype`: no half type, whose range is too small."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def finfo(dtype: DType) -> Any:
    """Return the limits of a floating-point type."""
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
