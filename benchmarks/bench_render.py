"""How long pictures take, from the files of a store, beside what a user would do instead.

    python -m pytest benchmarks/bench_render.py --benchmark-only -s

Arms are interleaved in random order and compared round by round; the control is the first arm once more.

- A figure of layers by channels, as an array and as a PNG, beside one matplotlib axes for each channel inside
  one axes for each layer, with titles and `tight_layout`.
- A montage of all channels of a layer, beside `skimage.util.montage` and torchvision's `make_grid`, which get
  the same values from the same store and bring them to 0..1, as an array and as a PNG by Pillow.
- 1,000 figures into 1,000 files, by one process and by two, and once more when all are there.

All begin with a store that is open. The other ways put tiles side by side and no more: no scale, no numbers,
no words.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved, ratios, summary

sys.path.insert(0, str(Path(__file__).parent))
from harness import n_rounds

pytest.importorskip("matplotlib")

ROUNDS = n_rounds(7)
EXPORTED = 1000


@dataclass(frozen=True)
class Case:
    """So many layers of so many channels, of so many pixels each."""

    layers: int
    channels: int
    side: int

    @property
    def id(self) -> str:
        return f"{self.layers}x{self.channels}-of-{self.side}px"


FIGURES = [Case(3, 9, 32), Case(3, 64, 16)]
MONTAGES = [Case(1, 512, 7), Case(1, 512, 14), Case(1, 512, 28)]


def store_of(case: Case, folder: Path, n_rows: int = 64) -> Any:
    """Return a run of positive maps, about half of each zero, with pictures and labels."""
    rng = np.random.default_rng(0)
    shape = (case.channels, case.side, case.side)

    def layers(pictures: Any) -> dict[str, Any]:
        return {
            f"layer{i}": np.maximum(rng.standard_normal((len(pictures), *shape), np.float32), 0)
            for i in range(case.layers)
        }

    data = rng.integers(0, 256, (n_rows, 32, 32, 3), np.uint8), np.arange(n_rows) % 10
    lt.record_dataset(layers, data, folder / "run.zarr", "*", backend="arrays")
    return lt.open(folder / "run.zarr")


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: case.id)
def test_figure(benchmark: Any, tmp_path: Path, case: Case) -> None:
    run = store_of(case, tmp_path)

    def draw(painter: str | None = None) -> Any:
        return lt.draw(run, "grid", rows=17, channels="all", painter=painter)

    arms = {
        "png": lambda: draw().png(),
        "again": lambda: draw().png(),
        "array": lambda: draw().array(),
        "matplotlib_painter": lambda: draw("matplotlib").png(),
        "inset_axes_png": lambda: inset_axes(run, "png"),
        "inset_axes_array": lambda: inset_axes(run, "raw"),
    }
    rounds = timed(benchmark, arms, ROUNDS if case.channels < 64 else max(1, ROUNDS // 5))
    report(benchmark, rounds, png=("inset_axes_png",), array=("inset_axes_array",))


@pytest.mark.parametrize("case", MONTAGES, ids=lambda case: case.id)
def test_montage(benchmark: Any, tmp_path: Path, case: Case) -> None:
    skimage = pytest.importorskip("skimage.util")
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision.utils")
    run = store_of(case, tmp_path)

    def by_skimage() -> Any:
        maps = run["layer0"][17]
        return skimage.montage(maps / maps.max(), fill=1, padding_width=2)

    def by_torchvision() -> Any:
        maps = torch.from_numpy(run["layer0"][17])[:, None]
        return torchvision.make_grid(maps, nrow=23, normalize=True, pad_value=1).numpy()[0]

    arms = {
        "png": lambda: lt.draw(run, "montage", rows=17).png(),
        "again": lambda: lt.draw(run, "montage", rows=17).png(),
        "array": lambda: lt.draw(run, "montage", rows=17).array(),
        "as_small_array": lambda: lt.draw(run, "montage", rows=17, magnification=1).array(),
        "skimage_array": by_skimage,
        "skimage_png": lambda: grey_png(by_skimage()),
        "make_grid_array": by_torchvision,
        "make_grid_png": lambda: grey_png(by_torchvision()),
    }
    rounds = timed(benchmark, arms, 2 * ROUNDS)
    report(
        benchmark,
        rounds,
        png=("skimage_png", "make_grid_png"),
        array=("skimage_array", "make_grid_array"),
        as_small_array=("skimage_array", "make_grid_array"),
    )


def test_export(benchmark: Any, tmp_path: Path) -> None:
    """1,000 grids of 3 x 9; a call that finds half of them goes on, and one that finds all draws none."""
    run = store_of(FIGURES[0], tmp_path, EXPORTED)
    drawn: dict[str, int] = {}

    def export(arm: str, jobs: int) -> None:
        told: list[bool] = []
        lt.draw_many(
            run,
            "grid",
            None,
            tmp_path / arm / "{row:05d}.png",
            channels="top:9",
            jobs=jobs,
            report=lambda path, is_new: told.append(is_new),
        )
        assert len(told) == EXPORTED
        drawn[arm] = sum(told)

    def before(arm: str) -> None:
        if arm == "half_there":
            for row in range(0, EXPORTED, 2):
                (tmp_path / arm / f"{row:05d}.png").unlink()
        elif arm != "all_there":
            shutil.rmtree(tmp_path / arm, ignore_errors=True)

    jobs = {"one_process": 1, "two_processes": 2, "half_there": 1, "all_there": 1}
    export("half_there", 1)
    shutil.copytree(tmp_path / "half_there", tmp_path / "all_there")
    arms = {arm: partial(export, arm, n) for arm, n in jobs.items()}
    rounds = timed(benchmark, arms, max(1, ROUNDS // 5), before, warm=False)
    benchmark.extra_info["drawn"] = drawn
    benchmark.extra_info["grids_a_second"] = {
        arm: summary([n / wall for wall in rounds.wall(arm)], 1) for arm, n in drawn.items() if n
    }
    report(benchmark, rounds, one_process=("two_processes",))


def timed(
    benchmark: Any,
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[str], object] = lambda arm: None,
    *,
    warm: bool = True,
) -> Rounds:
    """Run all arms once for nothing, where `warm`, then so many rounds of them."""
    for call in arms.values() if warm else ():
        call()
    measured: list[Rounds] = []
    benchmark.pedantic(lambda: measured.append(interleaved(arms, rounds, before=before)), rounds=1)
    return measured[0]


def report(benchmark: Any, rounds: Rounds, **over: tuple[str, ...]) -> None:
    """Keep the milliseconds of each arm, and how many times as long the others take as ours."""
    walls = {name: [1000 * wall for wall in rounds.wall(name)] for name in rounds.arms}
    benchmark.extra_info |= {
        "ms": {name: round(statistics.median(wall), 2) for name, wall in walls.items()},
        **{
            f"{other}_over_{ours}": summary(ratios(walls[other], walls[ours]), 2)
            for ours, others in over.items()
            for other in others
        },
    }
    if "again" in walls:
        benchmark.extra_info["control"] = summary(ratios(walls["again"], walls["png"]))
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")


def inset_axes(run: Any, format: str) -> bytes:
    """Return a figure of an axes for each channel, each with its title and its own scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = {name: run[name][17] for name in run}
    columns = int(np.ceil(np.sqrt(len(next(iter(layers.values()))))))
    figure = Figure(figsize=(3 * len(layers) + 2, 3.5), dpi=100)
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, 1 + len(layers))
    first.imshow(run.rows["picture"][17])
    first.axis("off")
    for outer, (name, maps) in zip(others, layers.items(), strict=True):
        outer.set_title(name)
        outer.axis("off")
        for i, channel in enumerate(maps):
            line, column = divmod(i, columns)
            place = (column / columns, 1 - (line + 1) / columns, 0.9 / columns, 0.8 / columns)
            axes = outer.inset_axes(place)
            axes.imshow(channel)
            axes.set_title(str(i), fontsize=6)
            axes.axis("off")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format=format)
    return out.getvalue()


def grey_png(mosaic: Any) -> bytes:
    """Return a PNG of values from 0 to 1, as it is usually made."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray((mosaic * 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
