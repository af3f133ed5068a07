"""Mean maps of classes, and of right against wrong predictions, with their signed differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .compare import FEW_ROWS, MINUS, CompareSpec, amount, chosen_rows, heads_of, named_options
from .kinds import Kind
from .means import keep_top, kept_class_maps, mean_maps
from .selection import ChannelChoice, are_right, class_label, row_classes, select_layers
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
from .view import LayerView, class_name

if TYPE_CHECKING:
    from ..capture.reader import Run

Values = NDArray[Any]

MOST_CLASSES = 10  # that are drawn where none are named


@dataclass(frozen=True, kw_only=True)
class ClassesSpec(CompareSpec):
    """The mean maps of some classes below each other, and the differences from one of them."""

    kind: ClassVar[str] = "classes"

    classes: tuple[str, ...] | None = None
    """Names of classes, or their numbers as text; None is the first ten of which there are rows."""
    minus: str | None = None
    """The class that is taken from each of the others; None is the second of two, and none of more."""
    exact: bool = False
    """Whether values are read also where the statistics of the store have mean maps, which may be coarser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "classes", _names(self.classes))

    @property
    def subtracted(self) -> str | None:
        """The class that is taken from each of the others."""
        two = self.classes is not None and len(self.classes) == 2
        return self.classes[1] if self.minus is None and two and self.classes else self.minus


@dataclass(frozen=True, kw_only=True)
class OutcomesSpec(CompareSpec):
    """The mean maps of right and of wrong predictions, and their difference."""

    kind: ClassVar[str] = "outcomes"

    classes: tuple[str, ...] | None = None
    """Classes within which right and wrong are compared too, below all rows; by the true class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "classes", _names(self.classes))


def _names(classes: Any) -> tuple[str, ...] | None:
    if classes is None:
        return None
    names = (classes,) if isinstance(classes, str) else classes
    found = tuple(dict.fromkeys(str(name) for name in names))
    if not found:
        raise DrawError("there is no class to draw")
    return found


def _named_classes(run: Run, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as `named_options` does, with the classes checked; text may hold several."""
    values = named_options(run, named)
    classes = named.get("classes")
    if isinstance(classes, str):
        one = classes in (run.classes or ())
        values["classes"] = [classes] if one else [part.strip() for part in classes.split(",")]
    for name in _names(values.get("classes")) or ():
        class_label(run, name)
    return values


def _classes(run: Run, named: Mapping[str, Any]) -> ClassesSpec:
    spec = ClassesSpec.of(_named_classes(run, named))
    if spec.minus is not None:
        class_label(run, spec.minus)
    return spec


def _outcomes(run: Run, named: Mapping[str, Any]) -> OutcomesSpec:
    return OutcomesSpec.of(_named_classes(run, named))


def _sheet_of_classes(run: Run, spec: ClassesSpec) -> Sheet:
    rows = chosen_rows(run, spec.rows)
    labels = row_classes(run, "label", rows)
    present = np.unique(labels[labels != "" if labels.dtype.kind == "U" else labels >= 0]).tolist()
    chosen = _chosen(run, spec, present)
    sides = [_Side(_name(run, label), rows[labels == label]) for label in chosen]
    empty = next((side.name for side in sides if not len(side.rows)), None)
    if empty is not None:
        raise DrawError(f"no captured row that was asked for is of class {empty}; leave it out")
    base = None if spec.subtracted is None else chosen.index(class_label(run, spec.subtracted))
    pairs = [] if base is None else [(i, base) for i in range(len(sides)) if i != base]
    heads = [f"Means over {amount(sum(len(side.rows) for side in sides), 'row')}, by class."]
    if spec.classes is None and len(chosen) < len(present):
        heads[0] += f" {len(chosen)} of {len(present)} classes; name those to see."
    if base is not None:
        heads.append(
            difference_head(sides[pairs[0][0]].name if len(pairs) == 1 else "class", sides[base].name)
        )
    lines = [side.line(i) for i, side in enumerate(sides)]
    lines += [Line(_minus(sides, pair), difference=k) for k, pair in enumerate(pairs)]
    kept = None if spec.exact or spec.rows is not None else chosen
    return _sheet(run, spec, sides, pairs, (Group(tuple(lines)),), tuple(heads), kept)


def _chosen(run: Run, spec: ClassesSpec, present: Sequence[int | str]) -> list[int | str]:
    """Return the labels of the classes that are drawn.

    Raises:
        DrawError: there is none, or none but the one that is subtracted.

    """
    if not present:
        raise DrawError("no captured row that was asked for has a class")
    chosen = list(present[:MOST_CLASSES])
    if spec.classes is not None:
        chosen = list(dict.fromkeys(class_label(run, name) for name in spec.classes))
    if spec.subtracted is not None:
        base = class_label(run, spec.subtracted)
        chosen += [] if base in chosen else [base]
        if len(chosen) == 1:
            raise DrawError(f"there is no class but {spec.subtracted} to take it from; name another")
    return chosen


def _name(run: Run, label: int | str) -> str:
    return class_name(run.classes, label) or str(label)


def _sheet_of_outcomes(run: Run, spec: OutcomesSpec) -> Sheet:
    rows = chosen_rows(run, spec.rows)
    right = are_right(run, rows)
    labels, predictions = (row_classes(run, name, rows) for name in ("label", "prediction"))
    unknown = "" if labels.dtype.kind == "U" else -1
    known = (labels > unknown) & (predictions > unknown)
    within = {"": known}
    for name in spec.classes or ():
        label = class_label(run, name)
        within[_name(run, label)] = known & (labels == label)
    sides: list[_Side] = []
    pairs: list[tuple[int, int]] = []
    groups = []
    for name, mask in within.items():
        if not mask.any():
            raise DrawError(
                f"no captured row that was asked for is of class {name} and has a prediction"
                if name
                else "no captured row that was asked for has both a label and a prediction"
            )
        lines: list[Line] = []
        for outcome, rows_of_it in (("right", rows[mask & right]), ("wrong", rows[mask & ~right])):
            if len(rows_of_it):
                side = _Side(outcome, rows_of_it, f"{outcome} {name}" if name else outcome)
                lines.append(side.line(len(sides)))
                sides.append(side)
            else:
                lines.append(Line(outcome, "0 rows", absent=f"no prediction is {outcome}"))
        if all(line.side is not None for line in lines):
            lines.append(Line(f"right {MINUS} wrong", difference=len(pairs)))
            pairs.append((len(sides) - 2, len(sides) - 1))
        title = f"true class {name}" if name else "all classes" if len(within) > 1 else ""
        groups.append(Group(tuple(lines), title))
    n = int(known.sum())
    accuracy = f"{100 * (right & known).sum() / n:.1f} %"
    heads = [f"Means over {amount(n, 'row')}, by whether the prediction is right ({accuracy} are)."]
    if not known.all():
        heads[0] += f" {amount(int((~known).sum()), 'row')} without label or prediction left out."
    heads += [difference_head("right", "wrong")] if pairs else []
    return _sheet(run, spec, sides, pairs, tuple(groups), tuple(heads), None)


@dataclass(frozen=True, eq=False)
class _Side:
    """Rows whose mean is one side."""

    name: str
    rows: Values
    full_name: str = ""
    """What a note calls it, where its name is that of others too."""

    def line(self, i: int) -> Line:
        """Return how side `i` is labelled."""
        return Line(self.name, amount(len(self.rows), "row"), few=len(self.rows) < FEW_ROWS, side=i)


def _minus(sides: Sequence[_Side], pair: tuple[int, int]) -> str:
    a, b = (sides[i].full_name or sides[i].name for i in pair)
    return f"{a} {MINUS} {b}"


def _sheet(
    run: Run,
    spec: CompareSpec,
    sides: Sequence[_Side],
    pairs: Sequence[tuple[int, int]],
    groups: tuple[Group, ...],
    heads: tuple[str, ...],
    kept: Sequence[int | str] | None,
) -> Sheet:
    """Read the means of each side in each layer and lay them out.

    Args:
        run: the store.
        spec: what is drawn.
        sides: what is averaged.
        pairs: of which two sides each difference is.
        groups: how they stand.
        heads: what stands at the top.
        kept: the labels of the sides, where they are classes whose means the statistics may have.

    """
    choice = ChannelChoice.parse(spec.channels, spec.by)
    layers = []
    for name in select_layers(run, spec.layers):
        view: LayerView | None = None
        notes: tuple[str, ...] = ()
        if kept is not None and all(isinstance(label, int) for label in kept):
            view = kept_class_maps(run, name, [int(label) for label in kept], choice)
            notes = ("from the statistics of the store",)
        if view is None:
            means = mean_maps(run, name, [side.rows for side in sides], choice)
            view, notes = means.layer, left_out(means.n_left_out)
        (view,) = keep_top([view], choice)
        layers.append(
            ComparedLayer(name, (Part(view, tuple(range(len(sides)))),), differences(view, pairs), notes)
        )
    return lay_out(
        Comparison(
            heads_of(run, heads),
            groups,
            tuple(SideView.of(i, side.full_name or side.name) for i, side in enumerate(sides)),
            tuple(SideView.of(i, _minus(sides, pair)) for i, pair in enumerate(pairs)),
            tuple(layers),
        ),
        spec,
    )


CLASSES = Kind(ClassesSpec, _classes, _sheet_of_classes)
OUTCOMES = Kind(OutcomesSpec, _outcomes, _sheet_of_outcomes)
