"""Statistics of a store, merged over its committed blocks in their order, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, SelectionError, closest
from .measure import chan
from .statistics import ROWS, Statistics, TapFields, edges
from .trust import check_room, empty

if TYPE_CHECKING:
    from .reader import Array, Run

Values = NDArray[Any]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TapStatistics:
    """What was computed of one tap while it streamed by, over all committed rows.

    `c` is the number of channels, `k` that of the rows kept for each. All but the counts are of finite values
    alone. What was not asked for is None, and all but `nan` and `inf` is where no statistics were.
    """

    name: str
    """The tap."""
    nan: int
    """NaN values in it."""
    inf: int
    """Infinite values in it."""
    axis: str | None = None
    """The axis that the channels lie on; None: there is one channel."""
    count: Counts | None = None
    """Finite values, (c,)."""
    n_nan: Counts | None = None
    """NaN values, (c,)."""
    n_inf: Counts | None = None
    """Infinite values, (c,)."""
    n_zero: Counts | None = None
    """Values that are zero, (c,)."""
    minimum: Floats | None = None
    """Least value, (c,); NaN where none is finite, like the next three."""
    maximum: Floats | None = None
    """Greatest value, (c,)."""
    mean: Floats | None = None
    """Mean, (c,)."""
    variance: Floats | None = None
    """Mean of the squared deviations from the mean, (c,)."""
    histogram: Counts | None = None
    """How many values lie in each bin between `edges`, (c, bins)."""
    top_rows: Counts | None = None
    """Rows with the greatest maxima, the greatest first, the earlier of equals; (c, k). -1: there is none."""
    top_values: Floats | None = None
    """These maxima, (c, k)."""
    top_positions: Counts | None = None
    """Where in its row each lies, the first of equals: its index on each other axis, (c, k, axes).

    Of rows that differ in shape too: in the row's own shape, and of padded ones in the padded row."""
    class_rows: Counts | None = None
    """Rows of each class, (classes,)."""
    class_maps: Floats | None = None
    """Mean over the rows of each class, each cell a mean of neighbours; (classes, c, ...). NaN: no rows.

    `RunStatistics.class_means` serves where a map has one cell, and where rows differ in shape: there is no
    such map then.
    """
    gram: Floats | None = None
    """Sum over rows and positions of products of two channels, values that are not finite as 0; (c, c)."""

    @property
    def zero_fraction(self) -> Floats | None:
        """Share of the finite values that are zero, (c,); NaN where there is none."""
        if self.count is None or self.n_zero is None:
            return None
        return np.where(self.count > 0, self.n_zero / np.maximum(self.count, 1), np.nan)

    @property
    def dead(self) -> NDArray[np.bool_] | None:
        """Whether every value of a channel is zero, (c,)."""
        if self.count is None or self.n_zero is None or self.n_nan is None or self.n_inf is None:
            return None
        return np.asarray((self.n_zero == self.count) & (self.n_nan + self.n_inf == 0))

    @property
    def edges(self) -> Floats:
        """Edges of the histogram's bins, (bins + 1,): the same for every tap and store."""
        return edges()

    def quantile(self, q: float | Sequence[float]) -> Floats:
        """Return quantiles of each channel by its histogram, even within a bin; shape (c,) or (len(q), c).

        A bin is an eighth of an octave, so they are right to 1/8 of themselves, and exact at 0 and 1.

        Raises:
            SelectionError: no histogram was kept.
        """
        if self.histogram is None or self.minimum is None or self.maximum is None:
            raise _not_kept(self.name, "histogram")
        wanted = np.atleast_1d(np.asarray(q, np.float64))
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise SelectionError(f"quantiles lie between 0 and 1; {q} were asked for")
        found = np.full((len(wanted), len(self.minimum)), np.nan)
        for channel, counts in enumerate(self.histogram):
            if counts.sum():
                limits = np.clip(self.edges, self.minimum[channel], self.maximum[channel])
                total = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
                first, last = np.flatnonzero(counts)[[0, -1]]
                inside = slice(first, last + 2)
                found[:, channel] = np.interp(wanted, total[inside], limits[inside])
        return found[0] if np.ndim(q) == 0 else found


class RunStatistics(Mapping[str, TapStatistics]):
    """The statistics of a run by tap: `run.stats["layer1"].mean`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._found: dict[str, TapStatistics] = {}

    def __getitem__(self, name: str) -> TapStatistics:
        if name not in self._found:
            self._found[name] = self._merged(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._run.taps)

    def __len__(self) -> int:
        return len(self._run.taps)

    @property
    def names(self) -> tuple[str, ...]:
        """Which statistics the store keeps."""
        kept = self._run.manifest.layout.statistics
        return () if kept is None else kept.names

    def not_finite(self, name: str) -> tuple[int, int]:
        """Return how many values of a tap are NaN and infinite."""
        layout, i = self._run.manifest.layout, self._index(name)
        if not layout.values:
            return self[name].nan, self[name].inf
        records = [records[i] for records in self._run.records()]
        return sum(record.n_nan for record in records), sum(record.n_inf for record in records)

    def covers(self, name: str) -> bool:
        """Return whether all values of a tap are counted: of padded rows, only what is their own is."""
        return self._run.manifest.layout.taps[self._index(name)].role != "padded"

    def pooled(
        self, name: str, what: str = "mean", rows: slice | Sequence[int] | Values | None = None
    ) -> Values:
        """Return the mean or maximum of each row and channel, over finite values; shape (rows, channels).

        Args:
            name: the tap.
            what: `mean` or `maximum`.
            rows: which; by default all that are committed.

        Raises:
            SelectionError: they were not kept.
        """
        if what not in ("mean", "maximum"):
            raise SelectionError(f"rows are pooled by 'mean' and 'maximum'; {what!r} was asked for")
        tap, array = self._fields(name), self._rows(name)
        start = tap.pooled + (tap.channels if what == "maximum" else 0)
        if rows is None:
            rows = slice(None) if self._run.complete else np.flatnonzero(self._run.committed())
        values: Values = array[rows, start : start + tap.channels]
        return values

    def class_means(self, name: str, labels: Values | None = None) -> Floats:
        """Return the mean over the rows of each class of their pooled means; shape (classes, channels).

        Args:
            name: the tap.
            labels: the class of each row of the data set, from 0 on, negative where it has none; by default
                the column `label`.
        """
        n, means, _ = self._by_class(name, self.labels(labels))
        return np.where(n > 0, means, np.nan)

    def f_ratio(self, name: str, labels: Values | None = None) -> Floats:
        """Return how well each channel's pooled means tell the classes apart; shape (channels,).

        The F-ratio of the analysis of variance (Fisher 1925): the mean square between the classes over that
        within them. Rows without a class, or without a finite value, are left out. NaN where it is undefined.

        Args:
            name: the tap.
            labels: as for `class_means`.
        """
        return f_ratio(*self._by_class(name, self.labels(labels)))

    def cka(self, layers: Sequence[str] | None = None) -> Floats:
        """Return the linear CKA of each two taps' pooled means; shape (layers, layers), 1 on the diagonal.

        Of centred features X (rows, p) and Y (rows, q) it is |Y'X|^2 / (|X'X| |Y'Y|) by Frobenius norms
        (Kornblith et al. 2019, "Similarity of neural network representations revisited", equation 3 with
        linear kernels), in float64. Rows with a mean that is not finite in any of the taps are left out. NaN
        for a tap whose features are constant.

        Args:
            layers: tap names; by default all.
        """
        names = list(self) if layers is None else list(layers)
        widths = [self._fields(name).channels for name in names]
        bounds = np.concatenate([[0], np.cumsum(widths)]).astype(int)
        n = int(bounds[-1])
        check_room(16 * n * n, f"the cross-products of {n} channels")
        total, n_rows = np.zeros(n), 0
        for features in self._features(names):
            total += features.sum(0)
            n_rows += len(features)
        products = empty((n, n), np.dtype(np.float64), f"the cross-products of {n} channels", np.zeros)
        for features in self._features(names):
            features -= total / max(n_rows, 1)
            products += features.T @ features
        spans = [slice(a, b) for a, b in pairwise(bounds.tolist())]
        norms = np.array([[np.square(products[a, b]).sum() for b in spans] for a in spans])
        own = np.sqrt(np.diag(norms))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(norms / np.outer(own, own))

    def _index(self, name: str) -> int:
        names = list(self._run.taps)
        if name not in names:
            raise SelectionError(f"{self._run.path} holds no tap {name!r}. {closest(name, names)}")
        return names.index(name)

    def _kept(self, name: str, what: str) -> Statistics:
        kept = self._run.manifest.layout.statistics
        if kept is None or what not in kept.names:
            raise _not_kept(name, what)
        return kept

    def _fields(self, name: str) -> TapFields:
        i = self._index(name)
        return self._kept(name, "pooled").taps[i]

    def _rows(self, name: str) -> Array:
        from .reader import Array

        self._kept(name, "pooled")
        arrays = self._run.manifest.layout.arrays
        return Array(self._run, next(i for i, array in enumerate(arrays) if array.path == ROWS))

    def labels(self, labels: Values | None = None) -> Values:
        """Return the class of each row of the data set, negative where it has none or is not captured.

        Args:
            labels: whole numbers to take instead of the column `label`, one for each row.

        Raises:
            SelectionError: there are none.
        """
        if labels is None:
            if "label" not in self._run.rows:
                raise SelectionError(f"{self._run.path} has no column 'label'; give labels=, one a row")
            column = self._run.rows["label"]
            if column.ndim != 1 or column.dtype.kind not in "biu":
                raise SelectionError(f"the column 'label' of {self._run.path} holds no class numbers")
            labels = np.full(self._run.n_rows, -1, np.int64)
            for block in self._run.blocks:
                rows = self._run.rows_of(block)
                labels[rows] = np.asarray(column[rows]).astype(np.int64)
            return labels
        labels = np.asarray(labels)
        if labels.shape != (self._run.n_rows,) or labels.dtype.kind not in "biu":
            raise SelectionError(
                f"labels are whole numbers, one for each of {self._run.n_rows} rows; got {labels.dtype} of "
                f"shape {labels.shape}"
            )
        return labels.astype(np.int64)

    def _by_class(self, name: str, labels: Values) -> tuple[Floats, Floats, Floats]:
        """Return rows, means and squared deviations of each class and channel, (classes, channels)."""
        n_channels = self._fields(name).channels
        rows = (self._run.rows_of(block) for block in self._run.blocks)
        parts = ((self.pooled(name, "mean", some).astype(np.float64), labels[some]) for some in rows)
        return by_class(parts, int(labels.max(initial=-1)) + 1, n_channels)

    def _features(self, names: Sequence[str]) -> Iterator[Floats]:
        """Yield the pooled means of all of `names` side by side, block by block."""
        for block in self._run.blocks:
            rows = self._run.rows_of(block)
            features = np.hstack([self.pooled(name, "mean", rows) for name in names]).astype(np.float64)
            yield features[np.isfinite(features).all(1)]

    def _merged(self, name: str) -> TapStatistics:
        i = self._index(name)
        kept = self._run.manifest.layout.statistics
        if kept is None:
            return TapStatistics(name, *self.not_finite(name))
        tap, total = kept.taps[i], None
        for block in self._run.blocks:
            entries = self._entries(kept, tap, block)
            _check(entries, tap, f"block {block} of the statistics of {name}")
            total = entries if total is None else _together(total, entries)
        if total is None:
            total = _nothing(tap)
        return _statistics(name, tap, kept, total)

    def _entries(self, kept: Statistics, tap: TapFields, block: int) -> dict[str, Floats]:
        """Read a block's fields of one tap."""
        width = kept.blocks.shape[0]
        start, stop = tap.fields[0].start, tap.fields[-1].stop
        pieces = range(start // width, (stop - 1) // width + 1)
        check_room(16 * len(pieces) * width, f"the statistics of {self._run.path}")
        shard = self._run.shard(kept.blocks, block)
        data = np.concatenate(list(shard.chunks(pieces))).view("<f8")
        first = pieces.start * width
        return {
            field.name: data[field.start - first : field.stop - first].reshape(field.shape)
            for field in tap.fields
        }


def by_class(
    parts: Iterable[tuple[Values, Values]], n_classes: int, n_channels: int
) -> tuple[Floats, Floats, Floats]:
    """Return rows, means and squared deviations of each class and channel, (classes, channels).

    Args:
        parts: features of rows, (rows, channels), and the class of each, negative where it has none.
        n_classes: how many classes there are.
        n_channels: how many features.
    """
    shape = (n_classes, n_channels)
    check_room(64 * n_classes * n_channels, f"the means of {n_classes} classes")
    n, mean, squares = (np.zeros(shape) for _ in range(3))
    for values, theirs in parts:
        for label in np.unique(theirs[theirs >= 0]).tolist():
            some = values[theirs == label]
            finite = np.isfinite(some)
            n_some = finite.sum(0)
            mean_some = np.where(finite, some, 0).sum(0) / np.maximum(n_some, 1)
            deviations = np.where(finite, some - mean_some, 0)
            mean[label], squares[label] = chan(
                n[label], mean[label], squares[label], n_some, mean_some, np.square(deviations).sum(0)
            )
            n[label] += n_some
    return n, mean, squares


def f_ratio(n: Floats, means: Floats, squares: Floats) -> Floats:
    """Return the F-ratio of each channel from what `by_class` gives; NaN where it is undefined."""
    n_rows, n_classes = n.sum(0), (n > 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (n * means).sum(0) / n_rows
        between = (n * (means - mean) ** 2).sum(0) / (n_classes - 1)
        within = squares.sum(0) / (n_rows - n_classes)
        return np.where((n_classes > 1) & (n_rows > n_classes), between / within, np.nan)


def _not_kept(name: str, what: str) -> SelectionError:
    return SelectionError(
        f"the store keeps no {what!r} statistics of {name}; capture with stats={what!r} (--stats {what})"
    )


def _check(entries: Mapping[str, Floats], tap: TapFields, where: str) -> None:
    """Hold what a store says to what can be true.

    Raises:
        FormatError: a count is no whole number, or a row or position is none.
    """
    n_positions = int(np.prod(tap.positions, dtype=np.int64))
    for name, least, most in (
        *((name, 0, 2.0**53) for name in ("count", "nan", "inf", "zero", "histogram", "class_rows")),
        ("top_row", -1, 2.0**40),
        ("top_position", -1, n_positions - 1),
    ):
        values = entries.get(name)
        if values is None:
            continue
        if not ((values >= least) & (values <= most) & (values == np.floor(values))).all():
            raise FormatError(f"{where} has a {name} that cannot be")


def _nothing(tap: TapFields) -> dict[str, Floats]:
    """Return the fields of no rows."""
    fill = {"minimum": np.nan, "maximum": np.nan, "mean": np.nan, "top_value": np.nan, "top_row": -1.0}
    fill["top_position"] = -1.0
    return {field.name: np.full(field.shape, fill.get(field.name, 0.0)) for field in tap.fields}


def _together(a: dict[str, Floats], b: dict[str, Floats]) -> dict[str, Floats]:
    """Return the fields of two sets of rows from those of each, the earlier rows first."""
    merged = {name: a[name] + b[name] for name in a if not name.startswith("top_")}
    merged["minimum"] = np.fmin(a["minimum"], b["minimum"])
    merged["maximum"] = np.fmax(a["maximum"], b["maximum"])
    known = [np.where(side["count"] > 0, side["mean"], 0) for side in (a, b)]
    mean, merged["squares"] = chan(a["count"], known[0], a["squares"], b["count"], known[1], b["squares"])
    merged["mean"] = np.where(merged["count"] > 0, mean, np.nan)
    if "top_value" in a:
        both = {name: np.concatenate([a[name], b[name]]) for name in a if name.startswith("top_")}
        rank = np.where(both["top_row"] >= 0, both["top_value"], -np.inf)
        order = np.argsort(-rank, axis=0, kind="stable")[: len(a["top_value"])]
        merged |= {name: np.take_along_axis(values, order, 0) for name, values in both.items()}
    return merged


def _statistics(name: str, tap: TapFields, kept: Statistics, total: dict[str, Floats]) -> TapStatistics:
    counts = {key: total[key].astype(np.int64) for key in ("count", "nan", "inf", "zero")}
    n = np.maximum(total["count"], 1)
    optional: dict[str, Any] = {}
    if "histogram" in total:
        optional["histogram"] = total["histogram"].astype(np.int64)
    if "top_value" in total:
        positions = total["top_position"].astype(np.int64).T
        axes = np.unravel_index(np.maximum(positions, 0), tap.positions) if tap.positions else ()
        found = np.stack(axes, -1) if axes else np.zeros((*positions.shape, 0), np.int64)
        optional["top_positions"] = np.where(positions[..., None] < 0, -1, found)
        optional["top_rows"] = total["top_row"].astype(np.int64).T
        optional["top_values"] = total["top_value"].T
    if "class_sum" in total:
        rows = total["class_rows"]
        shape = (-1, *[1] * (total["class_sum"].ndim - 1))
        maps = total["class_sum"] / np.maximum(rows, 1).reshape(shape)
        optional["class_maps"] = np.where(rows.reshape(shape) > 0, maps, np.nan)
        optional["class_rows"] = rows.astype(np.int64)
    if "gram" in total:
        gram = np.zeros((tap.channels, tap.channels))
        gram[np.triu_indices(tap.channels)] = total["gram"]
        optional["gram"] = gram + np.triu(gram, 1).T
    return TapStatistics(
        name,
        int(counts["nan"].sum()),
        int(counts["inf"].sum()),
        tap.axis,
        counts["count"],
        counts["nan"],
        counts["inf"],
        counts["zero"],
        total["minimum"],
        total["maximum"],
        total["mean"],
        np.where(total["count"] > 0, total["squares"] / n, np.nan),
        **optional,
    )
