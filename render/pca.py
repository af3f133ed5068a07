"""The first three principal components of a layer's channels at each place, as red, green and blue.

What is fitted is stated, and so are seed, share of the variance and limits: two such pictures can be compared
only where these are the same. The sign of a component is arbitrary; here each is turned so that its largest
loading is positive, so that the same fit always has the same colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from ..capture.moments import Moments
from .kinds import Kind
from .pca_layout import Coloured, LayerColours, pca_sheet
from .selection import can_draw, select_layers, select_rows
from .sheet import Sheet
from .spec import Spec
from .survey import found
from .view import View, axes_order, check_can_draw, has_class_token, read_maps, row_views, unfinished, wrap

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

Values = NDArray[Any]

N = 3
FITS = ("sample", "rows")
MOST_CHANNELS = 4096  # the fit takes a matrix of channels by channels
_MOST_ROWS, _LEAST_ROWS = 1024, 16  # that a sample comes from
_READ_BYTES = 64 * 2**20  # that a sample reads of a layer, as far as it comes from more than the fewest rows
_PIECE_BYTES = 16 * 2**20  # that are held at once


@dataclass(frozen=True, kw_only=True)
class PcaSpec(Spec):
    """Pictures of some rows, and beside each the principal components of every layer as colours."""

    kind: ClassVar[str] = "pca"

    rows: tuple[int, ...]
    """Rows of the data set, in the order in which they are drawn."""
    layers: tuple[str, ...] | None = None
    """Names of taps, in the order in which they are drawn; None is every one that has maps."""
    fit: str = "sample"
    """What components are fitted to: a `sample` of places of captured rows, or all those of these `rows`."""
    places: int = 8192
    """Places that a sample has at most, as many of each of its rows."""
    seed: int = 0
    """What the sample is drawn by."""
    clip: float = 99.0
    """Percentile of a component's sizes over the drawn rows at which its colour ends; 100 clips nothing."""
    picture: bool = True
    """Whether the row's picture, its class and the predicted class stand at the left."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, str) else self.layers
            object.__setattr__(self, "layers", tuple(str(layer) for layer in layers))
        if not self.rows:
            raise DrawError("there is no row to draw")
        if self.fit not in FITS:
            raise DrawError(f"components are fitted to a sample or to the drawn rows, not to {self.fit!r}")
        for name, least in (("places", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DrawError(f"{name} must be a whole number of {least} or more, not {value!r}")
        if not (isinstance(self.clip, int | float) and 50 <= self.clip <= 100):
            raise DrawError(f"clip is a percentile from 50 to 100, not {self.clip!r}")
        object.__setattr__(self, "clip", float(self.clip))


def _choose(run: Run, named: Mapping[str, Any]) -> PcaSpec:
    rows, layers = named.get("rows"), named.get("layers")
    selected = select_rows(run, rows)
    names = _with_maps(run) if layers is None else select_layers(run, layers)
    return PcaSpec.of(dict(named, rows=selected[:1] if rows is None else selected, layers=names))


def _with_maps(run: Run) -> tuple[str, ...]:
    """Return the taps that are drawn where none is named.

    Raises:
        DrawError: there are none.
    """
    names = tuple(name for name, tap in run.taps.items() if can_draw(tap) and len(tap.bound) > 1)
    names = tuple(name for name in names if _n_channels(run.taps[name]) <= MOST_CHANNELS)
    if not names:
        raise DrawError(
            f"{run.path} has no layer of maps or tokens with at most {MOST_CHANNELS} channels; vectors are "
            "drawn, a square a row, where they are named"
        )
    return names


def _n_channels(tap: Tap) -> int:
    order = axes_order(tap.dims[1:])
    return tap.bound[order[0]] if order else 1


def _sheet(run: Run, spec: PcaSpec) -> Sheet:
    select_rows(run, spec.rows)
    names = _with_maps(run) if spec.layers is None else select_layers(run, spec.layers)
    for name in names:
        _check(run[name])
    layers = [_layer(run, run[name], spec) for name in names]
    view = View(row_views(run, spec.rows, spec.picture), (), unfinished(run))
    return pca_sheet(view, layers, spec)


def _check(tap: Tap) -> None:
    check_can_draw(tap)
    n = _n_channels(tap)
    if n > MOST_CHANNELS:
        raise DrawError(
            f"{tap.name} has {n} channels, and components are fitted to {MOST_CHANNELS} at most: capture it "
            "with fewer (reduce='pca:16' or 'project:64'), or draw another layer"
        )


def _layer(run: Run, tap: Tap, spec: PcaSpec) -> LayerColours:
    """Fit the components of a layer, and return the colours of the drawn rows."""
    moments, fitted_to = _fitted(run, tap, spec)
    n, order, note = _n_channels(tap), axes_order(tap.dims[1:]), ""
    if not moments.n:
        moments = Moments(0, np.zeros(n), np.zeros((n, n)))
    components = moments.components(N)
    basis = components.basis if components.total else components.basis[:0]
    scored = []
    for row in spec.rows:
        maps, own, note = _maps(tap, (row,))
        scored.append((_scores(maps, basis, moments.mean), own[0]))
    coloured, limits, n_clipped, n_values = _coloured(scored, spec.clip)
    return LayerColours(
        name=tap.name,
        type=tap.type,
        shape=tuple(tap.bound),
        unit=tap.dims[1 + order[0]] if order else "value",
        note=note,
        fitted_to=fitted_to,
        shares=tuple((components.variances / components.total).tolist()) if components.total else (),
        limits=limits,
        n_clipped=n_clipped,
        n_values=n_values,
        n_channels=n,
        n_still=int((np.diag(moments.scatter) == 0).sum()) if moments.n else 0,
        rows=tuple(coloured),
    )


def _fitted(run: Run, tap: Tap, spec: PcaSpec) -> tuple[Moments, str]:
    """Return what components are fitted to; a sample is taken once for all pictures of a layer."""
    if spec.fit == "rows":
        return _fitted_to_rows(run, tap, spec)
    known, key = found(run), ("pca", tap.name, spec.places, spec.seed)
    if key not in known:
        known[key] = _fitted_to_sample(run, tap, spec)
    fitted: tuple[Moments, str] = known[key]
    return fitted


def _fitted_to_rows(run: Run, tap: Tap, spec: PcaSpec) -> tuple[Moments, str]:
    """Fit to all places of the drawn rows."""
    moments, rows = Moments(), dict.fromkeys(spec.rows)
    for row in rows:
        maps, own, _ = _maps(tap, (row,))
        moments.add(_vectors(maps, own)[0])
    those = f"the {len(rows):,} rows" if len(rows) > 1 else "the row"
    return moments, f"fitted to all {moments.n:,} places of {those} drawn"


def _maps(tap: Tap, rows: Sequence[int]) -> tuple[Values, NDArray[np.bool_], str]:
    """Return floats (rows, channels, height, width) of a tap, which places are its own, and a note."""
    one = tap.of_one_shape(rows)
    order = axes_order(one.dims[1:])
    n = one.shape[1 + order[0]] if order else 1
    values = read_maps(one, np.array(rows), order, range(n))
    class_token = len(order) == 2 and has_class_token(one.shape[1 + order[1]])
    maps, cells, note = wrap(values[:, :, 1:] if class_token else values, len(order))
    if class_token:
        note = f"class token left out, {maps.shape[2]} \N{MULTIPLICATION SIGN} {maps.shape[3]} patches"
    own = np.broadcast_to(True if cells is None else cells, (len(rows), *maps.shape[2:]))
    if "mask" in tap.parts:
        padded = _own(tap, rows, order)
        of_maps = wrap(padded[:, :, 1:] if class_token else padded, len(order))[0]
        own = own & of_maps.all(1)
    return maps, own, note


def _own(tap: Tap, rows: Sequence[int], order: tuple[int, ...]) -> Values:
    """Return which values of a padded tap are the row's own, its axes as those of `read_maps`."""
    mask = tap.mask
    sizes = zip(tap.dims[1:], tap.bound, strict=True)
    shape = (len(rows), *(size if dim in mask.dims else 1 for dim, size in sizes))
    own = np.broadcast_to(np.asarray(mask[np.array(rows)]).reshape(shape), (len(rows), *tap.bound))
    return own.transpose(0, *(1 + axis for axis in order)) if order else own.reshape(-1, 1)


def _vectors(maps: Values, own: NDArray[np.bool_]) -> list[Values]:
    """Return the channels at each own place of each row, each (places, channels)."""
    return [one[:, here].T for one, here in zip(maps, own, strict=True)]


def _fitted_to_sample(run: Run, tap: Tap, spec: PcaSpec) -> tuple[Moments, str]:
    """Fit to places of captured rows, as many of each, drawn at random."""
    rng = np.random.default_rng(spec.seed)
    rows = np.flatnonzero(run.committed())
    row_bytes = math.prod(tap.bound) * 8
    most = min(_MOST_ROWS, max(_LEAST_ROWS, _READ_BYTES // row_bytes), spec.places)
    if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
    each = max(1, spec.places // len(rows))
    moments, n_places = Moments(), 0
    kept: list[Values] = []
    for some in _pieces(tap, rows, row_bytes):
        maps, own, _ = _maps(tap, some)
        vectors = _vectors(maps, own)
        n_places = max(n_places, *map(len, vectors))
        kept += [one[_some(rng, len(one), each)] for one in vectors]
        if sum(one.nbytes for one in kept) > _PIECE_BYTES:
            moments.add(np.concatenate(kept))
            kept.clear()
    if kept:
        moments.add(np.concatenate(kept))
    of = f"{len(rows):,} of {run.n_rows:,} rows" if len(rows) < run.n_rows else f"all {len(rows):,} rows"
    drawn = n_places > each or len(rows) < run.n_committed
    how = f", drawn at random (seed {spec.seed})" if drawn else ""
    return moments, f"fitted to {moments.n:,} places of {of}{how}"


def _some(rng: np.random.Generator, n: int, most: int) -> Any:
    """Return `most` of `n` indices at random, or all."""
    return rng.choice(n, most, replace=False) if n > most else slice(None)


def _pieces(tap: Tap, rows: Values, row_bytes: int) -> Iterator[list[int]]:
    """Yield rows that are read together; those of a tap whose rows differ in shape one by one."""
    n = 1 if tap.is_ragged else max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, len(rows), n):
        yield rows[start : start + n].tolist()


def _scores(maps: Values, basis: Values, mean: Values) -> Values:
    """Return the components at each place of a row, (height, width, 3); those that there are not are 0."""
    places = np.moveaxis(maps[0], 0, -1).astype(np.float64)
    found = np.zeros((*places.shape[:2], N))
    finite = np.isfinite(places).all(-1)
    found[finite, : len(basis)] = (places[finite] - mean) @ basis.T
    found[~finite] = np.nan
    return found


def _coloured(
    scored: Sequence[tuple[Values, NDArray[np.bool_]]], clip: float
) -> tuple[list[Coloured], tuple[float, ...], int, int]:
    """Return each row's colours, where each component's end, how many values that clips, and of how many."""
    finite = [np.isfinite(scores[..., 0]) & own for scores, own in scored]
    values = np.concatenate([scores[there] for (scores, _), there in zip(scored, finite, strict=True)])
    limits = np.zeros(N)
    if len(values):
        limits = np.percentile(np.abs(values), clip, axis=0, method="higher")
    n_clipped = int((np.abs(values) > limits).sum())
    rows = []
    for (scores, own), there in zip(scored, finite, strict=True):
        unit = np.where(limits > 0, scores / np.where(limits > 0, limits, 1), 0)
        levels = np.rint(127.5 + 127.5 * np.nan_to_num(unit).clip(-1, 1)).astype(np.uint8)
        levels[~own] = 255
        rows.append(Coloured(levels, own & ~there))
    return rows, tuple(limits.tolist()), n_clipped, int((limits > 0).sum()) * len(values)


PCA = Kind(PcaSpec, _choose, _sheet)
