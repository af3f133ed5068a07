"""The stand-in run that the drawing tests draw from has what a real one has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from layertap.capture.errors import SelectionError, closest
from layertap.capture.reader import Array, Run, Tap
from numpy.typing import NDArray

Values = NDArray[Any]
MAPS = ("row", "channel", "y", "x")


class FakeArray:
    """Values in memory, indexed as an array of a store is: every axis by itself."""

    def __init__(self, name: str, dims: tuple[str, ...], values: Values) -> None:
        self.name, self.dims, self.values = name, dims, values
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, key: Any) -> Any:
        values = self.values
        for axis, one in reversed(list(enumerate(key if isinstance(key, tuple) else (key,)))):
            values = values[(slice(None),) * axis + (one,)]
        return values


class FakeTap(FakeArray):
    is_ragged = False

    def __init__(self, name: str, values: Values, dims: tuple[str, ...] = MAPS, type: str = "Conv2d") -> None:
        super().__init__(name, dims, values)
        self.layer, self.type = name, type
        self.bound, self.kind = self.shape[1:], "output"

    def of_one_shape(self, rows: Any) -> FakeTap:
        return self


class FakeRun:
    def __init__(
        self,
        *taps: FakeTap,
        classes: tuple[str, ...] | None = None,
        committed: Values | None = None,
        **columns: Any,
    ) -> None:
        self.path = "run.zarr"
        self.n_rows = taps[0].shape[0]
        self.taps = {tap.name: tap for tap in taps}
        self.rows = {name: FakeArray(name, ("row",), np.asarray(values)) for name, values in columns.items()}
        self.classes = classes
        self.stats = SimpleNamespace(names=())
        self._committed = np.ones(self.n_rows, np.bool_) if committed is None else committed

    def __getitem__(self, name: str) -> FakeTap:
        if name not in self.taps:
            raise SelectionError(f"no tap {name!r}. {closest(name, self.taps)}")
        return self.taps[name]

    def committed(self) -> Values:
        return self._committed

    @property
    def n_committed(self) -> int:
        return int(self._committed.sum())

    @property
    def complete(self) -> bool:
        return bool(self._committed.all())


def a_run(n_rows: int = 6, side: int = 8) -> Any:
    """Positive maps, signed maps and a vector; two classes, every third prediction wrong."""
    rng = np.random.default_rng(7)
    labels = np.arange(n_rows) % 2
    return FakeRun(
        FakeTap("conv1", rng.random((n_rows, 16, side, side), np.float32)),
        FakeTap("layer1.0", rng.standard_normal((n_rows, 32, side, side), np.float32), type="BasicBlock"),
        FakeTap("fc", rng.standard_normal((n_rows, 10), np.float32), ("row", "feature"), "Linear"),
        classes=("cat", "dog"),
        label=labels,
        prediction=np.where(np.arange(n_rows) % 3 == 2, 1 - labels, labels),
        id=[f"{i:03d}.png" for i in range(n_rows)],
        picture=rng.integers(0, 256, (n_rows, 32, 32, 3), np.uint8),
    )


def maps_run(values: Values, name: str = "conv1") -> Any:
    """Return a run of one tap of maps, (rows, channels, height, width)."""
    return FakeRun(FakeTap(name, values))


@pytest.mark.parametrize(("fake", "real"), [(FakeRun, Run), (FakeArray, Array), (FakeTap, Tap)])
def test_the_stand_in_has_no_method_that_a_real_one_lacks(fake: type, real: type) -> None:
    assert {name for name in vars(fake) if not name.startswith("_")} <= set(dir(real))


def test_the_stand_in_selects_each_axis_by_itself() -> None:
    tap = FakeTap("conv1", np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4))
    assert (tap[[1, 0], [0, 2]] == tap.values[np.ix_([1, 0], [0, 2])]).all()
