"""What a user names, as numbers: rows, layers, channels.

Nothing that was asked for is dropped in silence: a name or number that is not there is an error that names
what is closest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, SelectionError, closest
from ..capture.taps import OUTPUT, Layer, TapName, select
from .importance import check_measure

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

Rows = int | slice | str | Iterable[int] | None

_WRITTEN = {"first": "first:9", "top": "top:9:variance", "page": "page:2:64"}


@dataclass(frozen=True)
class ChannelChoice:
    """Which channels of a layer, before it is known how many it has."""

    how: str
    """`auto`, `all`, `first`, `top`, `page` or `list`."""
    n: int = 0
    """How many, for `first`, `top` and `page`."""
    by: str = "index"
    """What `top` and `page` rank by."""
    numbers: str | tuple[int, ...] = ()
    """The channels themselves, for `list`; text such as `0,3,5:8` is read once their number is known."""
    page: int = 1
    """Which page, from 1 on, for `page`."""

    @classmethod
    def parse(cls, channels: str | Sequence[int], by: str | None = None) -> ChannelChoice:
        """Read `auto`, `all`, `first:9`, `top:9`, `top:9:variance`, `page:2:64`, `0,3,5:8`, or numbers.

        Args:
            channels: the text, or numbers.
            by: what `top` and `page` rank by, where their own text does not say; None is `mean` and `index`.

        Raises:
            DrawError: it is none of these, or ranks by another measure than `by`.

        """
        if not isinstance(channels, str):
            if not channels:
                raise DrawError("there is no channel to draw")
            return cls("list", numbers=tuple(channels))
        text = channels.strip()
        if text in ("auto", "all"):
            return cls(text)
        how, *rest = text.split(":")
        if how in _WRITTEN:
            return cls._counted(how, rest, by, channels)
        if not text or not set(text) <= set("0123456789,:- "):
            raise DrawError(
                f"channels {channels!r} is none of: all, first:9, top:9, top:9:variance, page:2:64, 0,3,5:8"
            )
        return cls("list", numbers=text)

    @classmethod
    def _counted(cls, how: str, rest: list[str], by: str | None, said: str) -> ChannelChoice:
        """Read what follows `first`, `top` or `page`."""
        n_numbers = 2 if how == "page" else 1
        numbers, measures = rest[:n_numbers], rest[n_numbers:]
        counted = [int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 10 and int(n) > 0]
        if len(counted) < n_numbers or len(measures) > (how != "first"):
            raise DrawError(f"channels {said!r}: write {_WRITTEN[how]}")
        if how == "first":
            return cls(how, counted[0])
        if measures and by is not None and measures[0] != by:
            raise DrawError(
                f"channels {said!r} ranks by {measures[0]}, but by says {by}; give one of the two"
            )
        ranked_by = measures[0] if measures else by or ("mean" if how == "top" else "index")
        check_measure(ranked_by)
        return cls(how, counted[-1], ranked_by, page=counted[0] if how == "page" else 1)

    def window(self, n_channels: int, what: str) -> slice:
        """Return which of all channels in order are on the page, or are the first or top ones.

        Raises:
            SelectionError: there is no such page.

        """
        start = (self.page - 1) * self.n
        if start >= n_channels:
            n_pages = -(-n_channels // self.n)
            pages = f"{n_pages} pages" if n_pages > 1 else "one page"
            raise SelectionError(
                f"page {self.page} of {what} is not there; its {n_channels} make {pages} of {self.n}"
            )
        return slice(start, start + self.n)

    def indices(self, n_channels: int, what: str) -> tuple[int, ...]:
        """Return the channels of a `list`, checked against how many there are.

        Raises:
            SelectionError: one is not there.

        """
        return parse_indices(self.numbers, n_channels, what)


def parse_indices(given: Any, n: int, what: str) -> tuple[int, ...]:
    """Return the numbers that `given` means among `n`: an int, a slice, ints, or `0,3,5:8,90:`.

    Args:
        given: what the user wrote; numbers count from 0, negative ones from the end.
        n: how many there are.
        what: their name in an error, `row` for example.

    Raises:
        SelectionError: a number is not there.
        DrawError: it cannot be read, or means none.

    """
    if isinstance(given, slice):
        numbers = list(range(*given.indices(n)))
    elif isinstance(given, str):
        numbers = [i for part in given.split(",") for i in _part(part.strip(), n, what)]
    else:
        try:
            numbers = [int(i) for i in np.atleast_1d(np.asarray(given, np.int64))]
        except (TypeError, ValueError, OverflowError):
            raise DrawError(f"a {what} is a whole number, not {given!r}") from None
    for i in numbers:
        if not -n <= i < n:
            has = f"0 to {n - 1}" if n else "none"
            raise SelectionError(f"{what} {i} is not there; there are {has}")
    if not numbers:
        raise DrawError(f"{given!r} means no {what} at all; there are {n}")
    return tuple(i % n for i in numbers)


def _part(part: str, n: int, what: str) -> list[int]:
    first, colon, last = part.partition(":")
    try:
        if not colon:
            return [int(first)]
        # An end beyond the last is what a slice allows; a start beyond it is a mistake.
        start, stop = int(first or 0), int(last or n)
    except ValueError:
        raise DrawError(f"{part!r} is not a {what}: write 7, or 10:20, or 0,5,10:20") from None
    if start >= n:
        raise SelectionError(f"{what} {start} is not there; there are {f'0 to {n - 1}' if n else 'none'}")
    return list(range(*slice(start, stop).indices(n)))


def can_draw(tap: Tap) -> bool:
    """Return whether the tap's values can be drawn as maps."""
    real = all(tap.bound) and tap.dtype.kind != "c"
    return len(tap.bound) <= 3 and real and "rank" not in tap.dims


def select_layers(run: Run, layers: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the taps that are meant, in the order given, or every one that can be drawn.

    What is no name of a tap is a pattern as a capture takes them (`layer*.1`, `**.conv2`, `re:layer[12].*`,
    `type:Conv2d`), of the taps' names, and gives them in the store's order. A text other than `re:...` may
    hold several, with commas between them.

    Raises:
        SelectionError: a name or pattern matches nothing; the closest are named.
        DrawError: the store has no tap that can be drawn.

    """
    if layers is None:
        names = [name for name, tap in run.taps.items() if can_draw(tap)]
        if not names:
            raise DrawError(f"{run.path} has no tap that can be drawn")
        return tuple(names)
    if isinstance(layers, str):
        one = layers in run.taps or layers.startswith("re:")
        layers = [layers] if one else [part.strip() for part in layers.split(",")]
    chosen = [tap for name in layers for tap in ([name] if name in run.taps else _matching(run, name))]
    if not chosen:
        raise DrawError("there is no layer to draw")
    return tuple(dict.fromkeys(chosen))


def _matching(run: Run, pattern: str) -> list[str]:
    """Return the taps that `pattern` means, in the store's order.

    Raises:
        SelectionError: there is none.

    """
    # A kind stands behind a pattern, so the names that patterns are of have none.
    taps = [(TapName.parse(tap.name), tap.type) for tap in run.taps.values()]
    layers = [Layer(str(replace(name, kind=OUTPUT)), (type,), name) for name, type in taps]
    try:
        choices = select(layers, pattern)
    except SelectionError as error:
        raise SelectionError(f"{run.path}: {error}") from None
    # `conv1#2` is found as a call of `conv1`, but is not there, or it would have been found by name.
    names = [str(choice.layer.module) for choice in choices if choice.takes(choice.layer.module)]
    if not names:
        raise SelectionError(f"{run.path} holds no tap {pattern!r}. {closest(pattern, run.taps)}")
    return names


def select_rows(
    run: Run,
    rows: Rows = None,
    *,
    class_name: str | None = None,
    outcome: str | None = None,
    each_class: bool = False,
) -> tuple[int, ...]:
    """Return the rows that are meant.

    Args:
        run: the store.
        rows: an int, a slice, ints, or text such as `0,5,10:20`; None is every captured row.
        class_name: keep rows of this class; its name, or its number as text.
        outcome: keep `right` or `wrong` predictions.
        each_class: keep the first row of each class, in the order of the classes.

    Raises:
        SelectionError: a row, class or column is not there.
        DrawError: a row that was asked for is not captured yet, or none is left.

    """
    if not run.n_committed:
        raise DrawError(f"{run.path} has no captured rows yet; run its capture first")
    done = run.committed()
    if rows is None:
        chosen = np.flatnonzero(done)
    else:
        chosen = np.array(parse_indices(rows, run.n_rows, "row"), np.intp)
        missing = chosen[~done[chosen]]
        if missing.size:
            raise DrawError(
                f"row {missing[0]} is not captured yet ({int(done.sum())} of {run.n_rows} rows are); "
                "run the same capture again to go on"
            )
    if class_name is not None:
        chosen = chosen[row_classes(run, "label", chosen) == class_label(run, class_name)]
    if outcome is not None:
        chosen = by_outcome(run, chosen, outcome)
    if each_class:
        names, first = np.unique(row_classes(run, "label", chosen), return_index=True)
        chosen = chosen[first[names != "" if names.dtype.kind == "U" else names >= 0]]
    if not chosen.size:
        raise DrawError("no captured row is left after what was asked for")
    return tuple(chosen.tolist())


def class_column(run: Run, name: str, rows: NDArray[np.intp]) -> NDArray[Any] | None:
    """Return column `name`, `label` or `prediction`, of `rows`: int64, or text; None where there is none.

    A capture writes one whole number a row there. Another's store may hold something else under the name,
    which is no class, and then counts as absent.
    """
    column = run.rows.get(name)
    if column is None or len(column.shape) != 1 or column.dtype.kind not in "biuU":
        return None
    if not rows.size:
        return np.empty(0, np.str_ if column.dtype.kind == "U" else np.int64)
    values = np.asarray(column[rows])
    return values if values.dtype.kind == "U" else values.astype(np.int64)


#: How columns come into a store.
_REMEDIES = {
    "label": "A capture keeps labels where its data set gives them, or rec.annotate(label=...). ",
    "prediction": "A capture keeps predictions where the model gives one number for each class of the data "
    "(classes=), or rec.annotate(prediction=...). ",
}


def row_classes(run: Run, name: str, rows: NDArray[np.intp]) -> NDArray[Any]:
    """Return column `name`, `label` or `prediction`, of `rows`: int64, or text.

    Raises:
        SelectionError: there is none, or it is not of one class a row.

    """
    values = class_column(run, name, rows)
    if values is None:
        if name in run.rows:
            raise SelectionError(f"{run.path} has a column {name!r}, but not of one class a row")
        raise SelectionError(
            f"{run.path} has no column {name!r}. {_REMEDIES.get(name, '')}{closest(name, run.rows)}"
        )
    return values


def are_right(run: Run, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return of which rows the prediction is the label.

    Raises:
        SelectionError: either is not known, or they are not alike.

    """
    labels, predictions = (row_classes(run, name, rows) for name in ("label", "prediction"))
    if labels.dtype.kind != predictions.dtype.kind:
        raise SelectionError(
            f"{run.path} has text for one of label and prediction, and numbers for the other"
        )
    return np.asarray(labels == predictions)


def by_outcome(run: Run, rows: NDArray[np.intp], outcome: str) -> NDArray[np.intp]:
    """Return those of `rows` whose predictions are `right` or `wrong`.

    Raises:
        DrawError: the outcome is neither.
        SelectionError: it is not known which are.

    """
    if outcome not in ("right", "wrong"):
        raise DrawError(f"an outcome is right or wrong, not {outcome!r}")
    return np.asarray(rows[are_right(run, rows) == (outcome == "right")], np.intp)


def class_label(run: Run, name: str) -> int | str:
    """Return what the label of class `name` is: its number, which the name may be too, or a text.

    Raises:
        SelectionError: there is no such class, or no label; the closest are named.

    """
    column = class_column(run, "label", np.empty(0, np.intp))
    return _named(run, name) if column is not None and column.dtype.kind == "U" else _label(run, name)


def _named(run: Run, name: str) -> str:
    """Return `name` where a captured row has this label, of labels that are text."""
    known = np.unique(row_classes(run, "label", np.flatnonzero(run.committed()))).tolist()
    if name not in known:
        raise SelectionError(f"{run.path} has no class {name!r}. {closest(name, known)}")
    return name


def _label(run: Run, name: str) -> int:
    classes = run.classes or ()
    if name in classes:
        return classes.index(name)
    if name.isascii() and name.isdigit() and (not classes or int(name) < len(classes)):
        return int(name)
    raise SelectionError(f"{run.path} has no class {name!r}. {closest(name, classes)}")
