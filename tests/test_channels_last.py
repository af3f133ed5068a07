"""Maps whose channels come last are captured, reduced, measured and drawn as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")

FIRST, LAST = "conv", "permuted"


def model() -> Any:
    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 13, 3, stride=2, padding=1)
            self.permuted = torch.nn.Identity()

        def forward(self, x: Any) -> Any:
            return self.permuted(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2))

    torch.manual_seed(0)
    return Model().eval()


def captured(path: Path, **options: Any) -> lt.Run:
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    return lt.record_dataset(
        model(), (pictures, np.arange(12) % 3), path, [FIRST, LAST], batch_size=4, mean=[0.5] * 3, **options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    folder = tmp_path_factory.mktemp("channels_last")
    return captured(folder / "s", fields=True, stats="all", classes=["a", "b", "c"])


def test_axes_are_named_by_what_they_are(run: lt.Run) -> None:
    assert run[FIRST].dims == ("row", "channel", "y", "x")
    assert run[LAST].dims == ("row", "y", "x", "feature")
    assert np.array_equal(run[LAST][:].transpose(0, 3, 1, 2), run[FIRST][:])


def test_statistics_are_of_channels(run: lt.Run) -> None:
    first, last = run.stats[FIRST], run.stats[LAST]
    for name in ("mean", "variance", "minimum", "maximum", "zeros", "histogram"):
        if getattr(first, name, None) is not None:
            assert getattr(last, name) == pytest.approx(getattr(first, name)), name
    assert len(last.count) == 13


def test_receptive_fields_are_of_places(run: lt.Run) -> None:
    first, last = run[FIRST].field, run[LAST].field
    assert first is not None
    assert last is not None
    assert (last.y.tolist(), last.x.tolist()) == (first.y.tolist(), first.x.tolist())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("grid", {"channels": "top:4"}),
        ("montage", {}),
        ("overlay", {"cell": (2, 5)}),
        ("overlay", {"heat": "channel", "channels": [3]}),
        ("pca", {}),
        ("top", {"k": 2}),
        ("classes", {"channels": [0, 3]}),
    ],
)
def test_pictures_are_the_same(run: lt.Run, kind: str, options: dict[str, Any]) -> None:
    rows = {} if kind in ("top", "classes") else {"rows": 7}
    first, last = (lt.draw(run, kind, layers=[name], **rows, **options).sheet for name in (FIRST, LAST))
    assert first.panels or first.photos
    for one, other in zip(last.panels, first.panels, strict=True):
        assert np.array_equal(one.tiles, other.tiles)
    for one, other in zip(last.photos, first.photos, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_reductions_are_over_places(tmp_path: Path) -> None:
    for reduce in ("pool:2", "pool:global", "channels:1,3", "crop:4", "norm:l2", "pca:2|pool:4"):
        run = captured(tmp_path / reduce.replace(":", "-").replace("|", "-"), reduce=reduce)
        first, last = run[FIRST][:], run[LAST][:]
        if first.ndim == 4:
            last = last.transpose(0, 3, 1, 2)
        assert last == pytest.approx(first, abs=1e-5), reduce
