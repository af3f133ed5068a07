"""Every painter holds the contract; and what each has of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from layertap.capture.errors import DrawError, MissingPackageError
from layertap.render import Picture, draw
from layertap.render.colormaps import BLACK, WHITE, palette
from layertap.render.painters import Painter, default_painter, painter
from layertap.render.png import palette_png, rgb_png
from layertap.render.sheet import Box, Fill, Ink, Line, Sheet
from layertap.render.testing import PainterContract
from layertap.render.testing_sheets import shapes
from PIL import Image
from test_render_run import a_run


def pictures() -> dict[str, Picture]:
    run = a_run()
    spoiled = run["conv1"].values
    spoiled[0, 2], spoiled[0, 3], spoiled[0, 4, 2, 2], spoiled[0, 5, 1] = 0, 0.5, np.nan, np.inf
    return {
        "grid": draw(run, "grid", title="$x$ & <y> {z} \\alpha"),
        "rows": draw(run, "grid", rows=[0, 2], layers="conv1", channels="all", scope="row"),
        "given": draw(run, "grid", layers=["layer1.0", "fc"], scope=(-1, 0.5)),
        "clipped": draw(run, "grid", rows=[1, 3], layers=["layer1.0", "fc"], scope="channel", clip=(5, 90)),
        "montage": draw(run, "montage", layers="conv1"),
        "signed": draw(run, "montage", layers="layer1.0", rows="0:4", channels=3),
        "shapes": Picture(
            replace(draw(run, "montage", layers="conv1").sheet, shapes=shapes()), draw(run).spec
        ),
        "grey shapes": Picture(Sheet(50, 40, shapes=shapes(Ink.GREY, Fill.RULE)), draw(run).spec),
    }


class TestPillow(PainterContract):
    def painter(self) -> Painter:
        return painter("pillow")

    def sheets(self) -> dict[str, Sheet]:
        return {**super().sheets(), **{name: picture.sheet for name, picture in pictures().items()}}


class TestMatplotlib(TestPillow):
    def painter(self) -> Painter:
        pytest.importorskip("matplotlib")
        return painter("matplotlib")


class TestHtml(TestPillow):
    def painter(self) -> Painter:
        pytest.importorskip("fontTools")
        return painter("html")


def test_a_line_covers_the_pixels_on_its_way_and_no_others() -> None:
    sheet = Sheet(12, 9, shapes=(Line(((2, 1), (2, 6), (9, 6)), Ink.BLACK), Line(((10, 4),)), Line(())))
    dark = (painter("pillow").array(sheet) < 255).all(axis=2)
    assert {(x, y) for y, x in np.argwhere(dark).tolist()} == {(2, y) for y in range(1, 7)} | {
        (x, 6) for x in range(2, 10)
    }
    assert list(Line(((3, 3), (6, 3)), Ink.GREY, 3).boxes()) == [Box(2, 2, 6, 3, Ink.GREY)]
    assert list(Line(((3, 3), (6, 3)), Ink.GREY, 2).boxes()) == [Box(3, 3, 5, 2, Ink.GREY)]
    with pytest.raises(ValueError, match="draw steps"):
        Line(((0, 0), (1, 1)))


def test_greys_of_ink_are_those_of_the_palette() -> None:
    greys = {tuple(colour) for colour in palette("viridis")[BLACK : WHITE + 1].tolist()}
    assert {ink.value for ink in [*Ink, *Fill] if ink.is_grey} <= greys


def test_painters_differ_in_the_edges_of_letters_alone() -> None:
    pytest.importorskip("matplotlib")
    for picture in pictures().values():
        with_words = [painter(name).array(picture.sheet) for name in ("pillow", "matplotlib")]
        assert (with_words[0] != with_words[1]).any(axis=2).mean() < 0.1  # of letters, edges differ


def test_a_sheet_of_one_palette_is_a_palette_png() -> None:
    for kind, mode in (
        ("montage", "P"),
        ("signed", "P"),
        ("grid", "RGB"),
        ("given", "RGB"),
        ("grey shapes", "P"),
    ):
        image = Image.open(io.BytesIO(painter("pillow").encode(pictures()[kind].sheet, "png")))
        assert image.mode == mode
        assert image.format == "PNG"


def test_palette_pngs_decode_to_what_went_in() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5), (40, 17)):
        entries = rng.integers(0, 256, shape, np.uint8).repeat(3, axis=0)
        data = palette_png(entries, palette("magma"))
        image = Image.open(io.BytesIO(data))
        assert image.mode == "P"
        assert (np.asarray(image) == entries).all()
        assert image.getpalette() == palette("magma").ravel().tolist()
        image.verify() if image.fp else None


def test_rgb_pngs_decode_to_what_went_in() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5), (40, 17)):
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8).repeat(3, axis=0).repeat(2, axis=1)
        image = Image.open(io.BytesIO(rgb_png(pixels)))
        assert image.mode == "RGB"
        assert (np.asarray(image) == pixels).all()


@pytest.mark.parametrize(("format", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_matplotlib_writes_vector_files_the_same_each_time(format: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    sheet = pictures()["grid"].sheet
    data = painter("matplotlib").encode(sheet, format)
    assert data.startswith(start)
    assert data == painter("matplotlib").encode(sheet, format)


def test_text_stays_text_in_vector_files() -> None:
    pytest.importorskip("matplotlib")
    run = a_run()
    svg = draw(run, "grid", title="a title").encode("svg").decode()
    assert ">a title</text>" in svg
    assert "layertap font" not in svg
    pdf = draw(run, "grid").encode("pdf")
    assert b"/Type3" not in pdf
    assert b"/CIDFontType2" in pdf


def test_svg_images_are_pixel_exact() -> None:
    pytest.importorskip("matplotlib")
    import base64
    import re

    sheet = pictures()["montage"].sheet
    svg = painter("matplotlib").encode(sheet, "svg").decode()
    found = [base64.b64decode(data) for data in re.findall(r'image/png;\n?base64,([^"]+)"', svg)]
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in found]
    for (_, _, pixels), image in zip(sheet.pictures(), images, strict=True):
        assert np.array_equal(image, pixels) or np.array_equal(image[::-1], pixels)


def test_the_users_matplotlib_settings_change_nothing() -> None:
    mpl = pytest.importorskip("matplotlib")
    sheet = pictures()["grid"].sheet
    before = painter("matplotlib").array(sheet), painter("matplotlib").encode(sheet, "svg")
    strange = {
        "image.interpolation": "bicubic",
        "savefig.bbox": "tight",
        "savefig.dpi": 300,
        "figure.dpi": 50,
        "font.size": 30,
        "text.parse_math": True,
        "axes.facecolor": "red",
        "figure.facecolor": "black",
        "savefig.facecolor": "blue",
        "text.color": "red",
        "image.origin": "lower",
        "figure.autolayout": True,
    }
    with mpl.rc_context(strange):
        assert (painter("matplotlib").array(sheet) == before[0]).all()
        assert painter("matplotlib").encode(sheet, "svg") == before[1]


def test_pyplot_is_left_alone() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys, layertap.render.paint_matplotlib as p; from layertap.render.sheet import Sheet; "
        "p.MatplotlibPainter().array(Sheet(4, 4)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_importing_render_loads_nothing_heavy() -> None:
    code = (
        "import sys, layertap.render, layertap.render.cli; layertap.render.GridSpec(rows=[1]); "
        "heavy = {'matplotlib', 'PIL', 'torch', 'jax', 'zarr'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


_WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None  # importing it fails from here on
sys.path.insert(0, {tests!r})
from layertap.render import draw
from layertap.capture.errors import MissingPackageError
from test_render_run import a_run
picture = draw(a_run(), "grid", title="plain")
assert picture.array().shape[2] == 3
picture.save({out!r} + "/grid.png")
for call in (lambda: picture.save({out!r} + "/grid.svg"), draw(a_run(), painter="matplotlib").png):
    try:
        call()
    except MissingPackageError as error:
        assert "pip install 'layertap[matplotlib]'" in str(error)
    else:
        raise AssertionError("drawn without matplotlib")
"""


def test_without_matplotlib_pillow_draws_and_the_rest_names_the_package(tmp_path: Any) -> None:
    from pathlib import Path

    code = _WITHOUT_MATPLOTLIB.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_painters_are_chosen_by_the_file() -> None:
    for kind in ("grid", "montage"):
        assert default_painter(kind) == default_painter(kind, "png") == "pillow"
        assert default_painter(kind, "pdf") == default_painter(kind, "svg") == "matplotlib"
    with pytest.raises(DrawError, match="pillow"):
        painter("pilow")
    assert issubclass(MissingPackageError, ImportError)
