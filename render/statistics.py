"""Statistics of layers, drawn: histograms, sparsity, what is dead, ranges, CKA, correlation of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..capture.errors import DrawError, closest
from .kinds import Kind
from .matrices import Matrix, cka_sheet, correlation_sheet
from .relations import channel_correlation, layer_cka
from .selection import select_layers, select_rows
from .sheet import Sheet
from .spec import Spec
from .statistics_layout import facts_of, table
from .tally import n_channels_of, sample_size, tallied

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

PER_PAGE = 64  # layers of a table
WHAT = ("overview", "histograms", "sparsity", "dead", "ranges", "cka", "correlation")
LOG = ("none", "counts", "values", "both")
ORDERS = ("index", "clusters")


@dataclass(frozen=True, kw_only=True)
class StatisticsSpec(Spec):
    """What is drawn of the statistics of layers."""

    kind: ClassVar[str] = "statistics"

    what: str = "overview"
    """Histograms, sparsity, dead channels and ranges, each by itself or together as an `overview`; `cka`
    between layers; `correlation` of a layer's channels."""
    layers: tuple[str, ...] | None = None
    """Names of taps, in the order in which they are drawn; None is every tap of numbers."""
    rows: tuple[int, ...] | None = None
    """Rows that they are of; None is all that are captured."""
    log: str = "none"
    """What is logarithmic: the `counts` of histograms, `values`, `both` or `none`."""
    order: str = "index"
    """How the channels of a correlation are ordered: by `index`, or in `clusters` of those that are alike."""
    page: int = 1
    """Which part of many layers is drawn, from 1 on."""
    sample: int | None = None
    """Rows that are read at most where no statistics were kept; None is by the size of the largest layer."""
    seed: int = 0
    """What these are drawn by."""

    def __post_init__(self) -> None:
        for name, convert in (("layers", str), ("rows", int)):
            value = getattr(self, name)
            if value is not None:
                value = (value,) if isinstance(value, str) else value
                object.__setattr__(self, name, tuple(convert(one) for one in value))
        if self.rows == ():
            raise DrawError("there is no row to draw statistics of")
        for name, known in (("what", WHAT), ("log", LOG), ("order", ORDERS)):
            value = getattr(self, name)
            if value not in known:
                raise DrawError(f"there is no {name} {value!r} of statistics. {closest(str(value), known)}")
        for name, least in (("page", 1), ("sample", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "sample":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DrawError(f"{name} must be a whole number of {least} or more, not {value!r}")


def _choose(run: Run, named: Mapping[str, Any]) -> StatisticsSpec:
    values = {name: value for name, value in named.items() if value is not None}
    rows, layers = named.get("rows"), named.get("layers")
    values["layers"] = _numbers(run) if layers is None else select_layers(run, layers)
    if named.get("what") == "correlation" and layers is None:
        values["layers"] = _with_channels(run)
    if rows is not None:
        values["rows"] = select_rows(run, rows)
    return StatisticsSpec.of(values)


def _numbers(run: Run) -> tuple[str, ...]:
    """Return the taps of real numbers.

    Raises:
        DrawError: there are none.
    """
    names = tuple(name for name, tap in run.taps.items() if _is_real(tap))
    if not names:
        raise DrawError(f"{run.path} has no tap of real numbers")
    return names


def _with_channels(run: Run) -> tuple[str, ...]:
    """Return the first tap of several channels."""
    names = tuple(name for name in _numbers(run) if n_channels_of(run[name]) > 1)
    if not names:
        raise DrawError(f"{run.path} has no tap with more than one channel")
    return names[:1]


def _is_real(tap: Tap) -> bool:
    return tap.dtype.kind != "c" and all(tap.bound)


def _sheet(run: Run, spec: StatisticsSpec) -> Sheet:
    select_rows(run, spec.rows)
    names = _numbers(run) if spec.layers is None else select_layers(run, spec.layers)
    for name in names:
        if not _is_real(run[name]):
            raise DrawError(
                f"{name} has no statistics: a row of it is {run[name].bound} of {run[name].dtype}, and they "
                "are of real numbers; name other layers"
            )
    sample = spec.sample or sample_size(run, names)  # by all layers, so that each page is of the same rows
    if spec.what == "cka":
        values, source, caution = layer_cka(run, names, spec.rows, sample, spec.seed)
        return cka_sheet(names, values, source, caution, spec)
    if spec.what == "correlation":
        return correlation_sheet([_correlation(run, name, spec, sample) for name in names], spec)
    needs = "channels" if spec.what in ("sparsity", "dead") else "histogram"
    shown, pages = _page(names, spec.page)
    found = tallied(run, shown, spec.rows, sample, spec.seed, needs)
    facts = [facts_of(its, run[its.name].type, tuple(run[its.name].bound)) for its in found.layers]
    return table(facts, found.source, pages, spec)


def _page(names: Sequence[str], page: int) -> tuple[Sequence[str], str]:
    """Return the layers of a page, and which page it is of how many, in words; none where there is one."""
    n = -(-len(names) // PER_PAGE)
    if page > n:
        raise DrawError(f"there is no page {page} of {len(names)} layers; {n} hold them")
    first = (page - 1) * PER_PAGE
    shown = names[first : first + PER_PAGE]
    if n == 1:
        return shown, ""
    return shown, f"layers {first + 1} to {first + len(shown)} of {len(names)}, page {page} of {n}"


def _correlation(run: Run, name: str, spec: StatisticsSpec, sample: int) -> Matrix:
    tap = run[name]
    found = channel_correlation(run, name, spec.rows, sample, spec.seed, spec.order == "clusters")
    return Matrix(name, tap.type, tuple(tap.bound), *found)


STATISTICS = Kind(StatisticsSpec, _choose, _sheet)
