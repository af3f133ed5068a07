"""Two stores, of two checkpoints or two models, on the same rows, with the signed difference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, SelectionError, closest
from .compare import MINUS, CompareSpec, amount, chosen_rows, heads_of, named_options
from .kinds import Kind
from .layout import row_about
from .means import keep_top, mean_maps
from .selection import ChannelChoice, can_draw, select_layers, select_rows
from .sheet import Sheet
from .sides import (
    ComparedLayer,
    Comparison,
    Group,
    Line,
    Part,
    SideView,
    difference_head,
    differences,
    lay_out,
    left_out,
)
from .view import RowView, row_views

if TYPE_CHECKING:
    from ..capture.reader import Run

Values = NDArray[Any]

# A run that a caller opened, with credentials of its own perhaps, is drawn from as long as the caller has it.
_opened: WeakValueDictionary[str, Run] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class StoresSpec(CompareSpec):
    """The maps of the same rows in two stores, A and B, and A minus B."""

    kind: ClassVar[str] = "stores"

    other: str
    """Path or URL of the store B; A is the one that is drawn from."""
    other_layers: tuple[str, ...] | None = None
    """The tap of B that each of `layers` is compared with; None is that of the same name."""
    mean: bool = False
    """Whether the means over all rows are compared, and not each row."""
    picture: bool = True
    """Whether each row's picture stands at the left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.other_layers is not None:
            layers = tuple(str(name) for name in self.other_layers)
            object.__setattr__(self, "other_layers", layers)
            if self.layers is None or len(self.layers) != len(layers):
                raise DrawError(
                    f"other_layers names {amount(len(layers), 'layer')}, and there are "
                    f"{len(self.layers or ())} to compare them with; name as many in layers"
                )


def _choose(run: Run, named: Mapping[str, Any]) -> StoresSpec:
    if named.get("other") is None:
        raise DrawError("name the store to compare with: other=, a path, a URL or a run (--other)")
    other, path = _run_and_path(named["other"])
    layers, others = _pairs(run, other, named.get("layers"), named.get("other_layers"))
    values = named_options(run, dict(named, layers=layers))
    if values.get("rows") is None and named.get("rows") is None and not named.get("mean"):
        values["rows"] = (_first_in_both(run, other),)
    elif values.get("rows") is None and not named.get("mean"):
        values["rows"] = select_rows(run, named["rows"])
    values["other"] = path
    values["other_layers"] = None if others == layers else others
    return StoresSpec.of(values)


def _run_and_path(other: Any) -> tuple[Run, str]:
    """Return the store that is meant, and a path or URL that finds it from anywhere on this machine."""
    if isinstance(other, str | os.PathLike):
        text = os.fspath(other)
        path = text if "://" in text else os.path.abspath(text)
        return _open(path), path
    path = str(other.path)
    path = path if "://" in path else os.path.abspath(path)
    _opened[path] = other
    return other, path


def _open(path: str) -> Run:
    from ..capture.reader import open_run

    return _opened.get(path) or open_run(path)


def _pairs(run: Run, other: Run, layers: Any, others: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the taps of both stores that are compared; by name, unless pairs are given.

    A pair is written `conv1=stem.conv`, or is two names in a tuple.

    Raises:
        SelectionError: one is not there, or only in one of the stores.

    """
    if layers is None:
        names = tuple(
            name for name in select_layers(run, None) if name in other.taps and can_draw(other.taps[name])
        )
        if not names:
            raise SelectionError(
                f"{run.path} and {other.path} have no layer of the same name; give pairs: "
                f"{next(iter(run.taps))}={next(iter(other.taps))}"
            )
        return names, names
    if others is not None:
        names = select_layers(run, layers)
        return names, tuple(_in_other(run, other, name) for name in others)
    if isinstance(layers, str):
        layers = [layers] if layers in run.taps or layers.startswith("re:") else layers.split(",")
    pairs: dict[str, str] = {}
    for said in layers:
        first, _, second = (said, "", "") if isinstance(said, str) and said in run.taps else _parts(said)
        for name in select_layers(run, first):
            pairs.setdefault(name, _in_other(run, other, second or name))
    return tuple(pairs), tuple(pairs.values())


def _parts(said: Any) -> tuple[str, str, str]:
    if isinstance(said, str):
        first, equals, second = said.partition("=")
        return first.strip(), equals, second.strip()
    first, second = said
    return str(first), "=", str(second)


def _in_other(run: Run, other: Run, name: str) -> str:
    if name not in other.taps:
        raise SelectionError(
            f"{other.path} holds no tap {name!r}. {closest(name, other.taps)} A layer that has another name "
            f"there is given as a pair: {name}=ITS.NAME"
        )
    return name


def _first_in_both(run: Run, other: Run) -> int:
    """Return the first captured row of which the other store has one too."""
    rows = np.asarray(select_rows(run), np.intp)
    found, _ = _matched(run, other, rows)
    if not (found >= 0).any():
        raise DrawError(f"{run.path} and {other.path} have no captured row in common")
    return int(rows[int(np.argmax(found >= 0))])


def _matched(run: Run, other: Run, rows: Values) -> tuple[Values, str]:
    """Return the row of the other store for each of `rows`, -1 where there is none, and by what they match.

    Raises:
        SelectionError: an id is that of several rows.

    """
    done = other.committed()
    if "id" not in run.rows or "id" not in other.rows:
        there = (rows < len(done)) & done[np.minimum(rows, len(done) - 1)]
        return np.where(there, rows, -1), "index"
    captured = np.flatnonzero(done)
    ids = np.asarray(other.rows["id"][captured])
    order = np.argsort(ids, kind="stable")
    wanted = np.asarray(run.rows["id"][rows])
    first = np.searchsorted(ids[order], wanted)
    last = np.searchsorted(ids[order], wanted, "right")
    several = np.flatnonzero(last - first > 1)
    if several.size:
        i = int(several[0])
        a, b = captured[order[first[i] : first[i] + 2]]
        raise SelectionError(
            f"the id {str(wanted[i])!r} is that of rows {a} and {b} of {other.path}, so that no row can be "
            "matched by it"
        )
    found = order[np.minimum(first, len(order) - 1)]
    return np.where(last > first, captured[found], -1), "id"


def _sheet(run: Run, spec: StoresSpec) -> Sheet:
    other = _open(spec.other)
    rows = chosen_rows(run, spec.rows) if spec.mean else np.asarray(select_rows(run, spec.rows), np.intp)
    found, by = _matched(run, other, rows)
    n_missing = int((found < 0).sum())
    if n_missing and (spec.rows is not None or n_missing == len(rows)):
        row = int(rows[int(np.argmax(found < 0))])
        known = f" (id {str(run.rows['id'][row])!r})" if by == "id" else ""
        raise DrawError(f"row {row}{known} of {run.path} is not among the captured rows of {other.path}")
    rows, found = rows[found >= 0], found[found >= 0]
    names = [f"mean of {amount(len(rows), 'row')}"] if spec.mean else [f"row {row}" for row in rows.tolist()]
    groups: tuple[Group, ...] = (Group(_lines(0, 1)),)
    if not spec.mean:
        views = row_views(run, tuple(rows.tolist()), spec.picture)
        theirs = row_views(other, tuple(found.tolist()), False)
        groups = tuple(
            Group(_lines(i, len(names), (view, their)), row_about(replace(view, predicted=None)), view)
            for i, (view, their) in enumerate(zip(views, theirs, strict=True))
        )
    names_of_stores = _told_apart(str(run.path), spec.other)
    heads = [f"{side}: {name}" for side, name in zip("AB", names_of_stores, strict=True)]
    heads.append(f"Rows are matched by {by}.")
    if spec.mean:
        heads[-1] = f"Means over {amount(len(rows), 'row')} that both have, matched by {by}."
    heads.append(difference_head("A", "B"))
    sides = [f"A, {name}" for name in names] + [f"B, {name}" for name in names]
    layers = tuple(_layers(run, other, spec, rows, found))
    return lay_out(
        Comparison(
            heads_of(run, heads),
            groups,
            tuple(SideView.of(i, side) for i, side in enumerate(sides)),
            tuple(SideView.of(i, f"A {MINUS} B, {name}") for i, name in enumerate(names)),
            layers,
            "A and B",
        ),
        spec,
    )


def _told_apart(*paths: str) -> tuple[str, ...]:
    """Return the ends of some paths, as long as it takes to tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for n in range(1, max(map(len, parts))):
        names = tuple("/".join(one[-n:]) for one in parts)
        if len(set(names)) == len(set(paths)):
            return names
    return paths


def _lines(i: int, n: int, views: Sequence[RowView] = ()) -> tuple[Line, ...]:
    """Return the lines of a group of `n`: A and B, each with its prediction, and their difference."""
    a, b = (f"predicted {view.predicted}" if view.predicted else "" for view in views) if views else ("", "")
    return Line("A", a, side=i), Line("B", b, side=n + i), Line(f"A {MINUS} B", difference=i)


def _layers(run: Run, other: Run, spec: StoresSpec, rows: Values, found: Values) -> Iterator[ComparedLayer]:
    """Read each two layers, and subtract them where they have one shape."""
    choice = ChannelChoice.parse(spec.channels, spec.by)
    names = select_layers(run, spec.layers)
    groups, others = ([rows], [np.sort(found)]) if spec.mean else (list(rows[:, None]), list(found[:, None]))
    n = len(groups)
    for name, theirs in zip(names, spec.other_layers or names, strict=True):
        a, b = mean_maps(run, name, groups, choice), mean_maps(other, theirs, others, choice)
        notes = left_out(a.n_left_out + b.n_left_out) if spec.mean else ()
        both = [a.layer, b.layer]
        if theirs != name:
            both = [replace(view, name=f"A: {name}, B: {theirs}") for view in both]
        if a.layer.shape == b.layer.shape and a.layer.unit == b.layer.unit:
            first, second = keep_top(both, choice)
            joined = replace(first, values=np.concatenate([first.values, second.values]))
            difference = differences(joined, [(i, n + i) for i in range(n)])
            yield ComparedLayer(name, (Part(joined, tuple(range(2 * n))),), difference, notes)
            continue
        (first,), (second,) = (keep_top([view], choice) for view in both)
        parts = Part(first, tuple(range(n)), "A"), Part(second, tuple(range(n, 2 * n)), "B")
        sizes = [" \N{MULTIPLICATION SIGN} ".join(map(str, view.shape)) for view in both]
        notes += (f"no difference: a row is {sizes[0]} in A and {sizes[1]} in B",)
        yield ComparedLayer(name, parts, None, notes)


STORES = Kind(StoresSpec, _choose, _sheet)
