"""How long a figure takes, to the bytes of a PNG, beside the usual way.

    pytest benchmarks/bench_render.py --benchmark-columns=min,median,rounds

`of_a_store` is the whole way, from the files of a store; the other arms start from a view in memory. The
usual way is an axes for each channel, each with its title and its own scale, in one matplotlib figure.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.render import GridSpec, MontageSpec
from layertap.render.layout import grid, montage
from layertap.render.painters import painter
from layertap.render.view import LayerView, RowView, View

pytest.importorskip("matplotlib")


@dataclass(frozen=True)
class Case:
    """A figure: so many layers of so many channels, of so many pixels each."""

    layers: int
    channels: int
    side: int

    @property
    def id(self) -> str:
        return f"{self.layers}x{self.channels}-of-{self.side}px"


FIGURES = [Case(3, 9, 32), Case(3, 64, 16)]
MONTAGES = [Case(1, 512, 7), Case(1, 512, 14), Case(1, 512, 28)]


def view_of(case: Case) -> View:
    """Return positive maps, about half of each zero, and a picture."""
    rng = np.random.default_rng(0)
    shape = (1, case.channels, case.side, case.side)
    layers = tuple(
        LayerView(
            f"layer{i}",
            "Conv2d",
            shape[1:],
            tuple(range(case.channels)),
            case.channels,
            "channel",
            None,
            np.maximum(rng.standard_normal(shape, np.float32), 0),
            None,
        )
        for i in range(case.layers)
    )
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    return View((RowView(17, "17.png", "frog", "cat", False, picture),), layers)


@pytest.fixture(
    scope="module", params=[(FIGURES[0], "grid"), (MONTAGES[1], "montage")], ids=lambda p: p[0].id
)
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, str, Path]:
    """Return a figure, its kind, and the path of a store of 64 rows that it is drawn from."""
    case, kind = request.param
    rng = np.random.default_rng(0)
    shape = (case.channels, case.side, case.side)

    def layers(pictures: Any) -> dict[str, Any]:
        draws = rng.standard_normal((case.layers, len(pictures), *shape), np.float32)
        return {f"layer{i}": np.maximum(values, 0) for i, values in enumerate(draws)}

    path = tmp_path_factory.mktemp("store") / "run.zarr"
    data = rng.integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64) % 10
    lt.record_dataset(layers, data, path, "*", backend="arrays")
    return case, kind, path


def test_of_a_store(benchmark: Any, stored: tuple[Case, str, Path]) -> None:
    case, kind, path = stored
    run = lt.open(path)
    benchmark.group = f"{'figure' if kind == 'grid' else kind} {case.id}"
    assert benchmark(lambda: lt.draw(run, kind, rows=17, channels="all").png())


@pytest.mark.parametrize("painter_name", ["matplotlib", "pillow"])
@pytest.mark.parametrize("case", FIGURES, ids=lambda case: case.id)
def test_figure(benchmark: Any, case: Case, painter_name: str) -> None:
    view, spec = view_of(case), GridSpec(rows=(17,), channels="all")
    benchmark.group = f"figure {case.id}"
    assert benchmark(lambda: painter(painter_name).encode(grid(view, spec), "png"))


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: case.id)
def test_figure_the_usual_way(benchmark: Any, case: Case) -> None:
    view = view_of(case)
    benchmark.group = f"figure {case.id}"
    assert benchmark.pedantic(_axes_a_channel, (view,), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("case", MONTAGES, ids=lambda case: case.id)
def test_montage(benchmark: Any, case: Case) -> None:
    view, spec = view_of(case), MontageSpec(rows=(17,))
    benchmark.group = f"montage {case.id}"
    assert benchmark(lambda: painter("pillow").encode(montage(view, spec), "png"))


@pytest.mark.parametrize("case", MONTAGES[:1], ids=lambda case: case.id)
def test_montage_the_usual_way(benchmark: Any, case: Case) -> None:
    view = view_of(case)
    benchmark.group = f"montage {case.id}"
    assert benchmark.pedantic(_axes_a_channel, (view,), rounds=1)


def _axes_a_channel(view: View) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(view.layers[0].channels)
    columns = int(np.ceil(np.sqrt(n)))
    figure = Figure(figsize=(3 * len(view.layers), 3.5), dpi=100)
    FigureCanvasAgg(figure)
    for outer, layer in zip(np.atleast_1d(figure.subplots(1, len(view.layers))), view.layers, strict=True):
        outer.set_title(layer.name)
        outer.axis("off")
        for i, channel in enumerate(layer.values[0]):
            line, column = divmod(i, columns)
            place = (column / columns, 1 - (line + 1) / columns, 0.9 / columns, 0.8 / columns)
            axes = outer.inset_axes(place)
            axes.imshow(channel)
            axes.set_title(str(i), fontsize=6)
            axes.axis("off")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out)
    return out.getvalue()
