"""A picture as a page of one file: as the PNG shows it, with real text, and with nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from layertap.capture.errors import DrawError, MissingPackageError
from layertap.render import Picture, Sheet, draw, fonts, read_spec, webfonts
from layertap.render.carried import _without_folders
from layertap.render.painters import painter as painter_of
from layertap.render.sheet import Outline, Text
from layertap.render.spec import Spec
from PIL import Image, features
from test_render_overlay import captured
from test_render_run import a_run

pytest.importorskip("fontTools")

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>",
    "</title></style></text></svg>--> &lt; ]]> \x00\x1b[2J\u202e {x}",
)


class Parsed(HTMLParser):
    """What a page holds: its tags with their attributes, and the text in each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, before = self.texts[-1]
            self.texts[-1] = (tag, before + data)

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def a_picture(**options: Any) -> Picture:
    run = a_run()
    spoiled = run["conv1"].values
    spoiled[0, 2], spoiled[0, 3], spoiled[0, 4, 2, 2], spoiled[0, 5, 1] = 0, 0.5, np.nan, np.inf
    return draw(run, "grid", **({"title": "a title"} | options))


def parsed(picture: Picture) -> Parsed:
    return Parsed(picture.encode("html").decode())


def images(page: Parsed) -> Iterator[tuple[dict[str, str | None], Image.Image]]:
    for attrs in page.attributes("image"):
        kind, data = str(attrs["href"]).split(",")
        assert kind == "data:image/png;base64"
        yield attrs, Image.open(io.BytesIO(base64.b64decode(data)))


def composed(picture: Picture) -> tuple[Any, list[str]]:
    """Return what the images of a page show together, and the mode of each."""
    sheet = picture.sheet
    canvas = np.full((sheet.height, sheet.width, 3), 255, np.uint8)
    modes = []
    for attrs, image in images(parsed(picture)):
        x, y, width, height = (int(attrs[name] or 0) for name in ("x", "y", "width", "height"))
        factor = width // image.width
        assert (width, height) == (image.width * factor, image.height * factor)
        large = np.asarray(image.convert("RGBA")).repeat(factor, 0).repeat(factor, 1)
        at = canvas[y : y + height, x : x + width]
        at[large[..., 3] > 0] = large[..., :3][large[..., 3] > 0]
        modes.append(image.mode)
    return canvas, modes


def test_images_stand_where_the_sheet_says_with_every_pixel() -> None:
    picture = a_picture()
    sheet = picture.sheet
    canvas, modes = composed(picture)
    assert (canvas == painter_of("pillow").array(replace(sheet, texts=()))).all()
    assert modes == ["P"] * (len(sheet.panels) + len(sheet.bars)) + ["RGB"] * len(sheet.photos)


def test_what_is_blended_and_outlined_is_on_the_page_too(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    picture = draw(captured(tmp_path, maps), "overlay", rows=[0, 1])
    sheet = replace(picture.sheet, outlines=(Outline(30, 80, 40, 25, (255, 0, 0)),))
    canvas, modes = composed(Picture(sheet, picture.spec))
    assert (canvas == painter_of("pillow").array(replace(sheet, texts=()))).all()
    assert (canvas[80, 30:70] == (255, 0, 0)).all()
    assert modes[-1] == "RGBA"


def test_every_text_of_the_sheet_is_text_at_its_place() -> None:
    sheet, page = a_picture().sheet, parsed(a_picture())
    assert page.of("text") == [text.text for text in sheet.texts]
    for text, attrs in zip(sheet.texts, page.attributes("text"), strict=True):
        assert (float(attrs["x"] or 0), float(attrs["y"] or 0)) == pytest.approx((text.x, text.y), abs=0.01)
        assert float(attrs["font-size"] or 0) == text.size
        anchor = {"left": "start", "center": "middle", "right": "end"}[text.align]
        assert attrs.get("text-anchor", "start") == anchor
        assert ("font-weight" in attrs) == text.bold


def test_the_notes_stand_beneath() -> None:
    picture = a_picture()
    assert len(picture.sheet.notes) >= 4
    assert parsed(picture).of("li") == list(picture.sheet.notes)


def test_a_page_has_a_title_and_no_address() -> None:
    page = a_picture().encode("html").decode()
    assert "<title>a title</title>" in page
    assert "<title>grid · conv1 · layer1.0 · fc</title>" in a_picture(title=None).encode("html").decode()
    assert not re.search(r"https?:|//|@import|<link(?! rel=\"icon\" href=\"data:,\")", _without_data(page))
    assert "default-src 'none'" in page


def _without_data(page: str) -> str:
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


def test_hostile_names_are_text() -> None:
    run = a_run()
    run.classes = HOSTILE
    run["conv1"].values[0, 2] = np.nan
    run.taps[HOSTILE[0]] = run.taps.pop("conv1")
    run.taps[HOSTILE[0]].name = HOSTILE[0]
    for title in HOSTILE:
        picture = draw(run, "grid", rows=[0, 1], title=title)
        page = parsed(picture)
        allowed = {"html", "head", "meta", "link", "title", "style", "body", "svg", "image", "text"}
        assert {tag for tag, _ in page.tags} <= allowed | {"ul", "li", "script"}
        assert [attrs["type"] for attrs in page.attributes("script")] == ["application/json"]
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
        assert json.loads(page.of("script")[0]) == picture.spec.to_json()
        texts = [fonts.drawable(text.text, bold=text.bold, joiners=True) for text in picture.sheet.texts]
        assert page.of("text") == [text for text in texts if text]
        assert page.of("title") == [fonts.drawable(title)]
        assert "onerror" not in re.sub(r"&lt;img.*?&gt;", "", picture._repr_html_())
        assert "<script" not in picture._repr_html_()


def test_a_page_is_the_same_each_time() -> None:
    assert a_picture().encode("html") == a_picture().encode("html")


# Fonts


def faces(css: str) -> list[tuple[str, set[int]]]:
    """Return the family and the code points of every font that is in the rules."""
    from fontTools.ttLib import TTFont

    found = []
    for family, data in re.findall(r"font-family: '([^']*)'.*?base64,([^)]*)\)", css):
        with TTFont(io.BytesIO(base64.b64decode(data))) as font:
            found.append((family, set(font.getBestCmap())))
    return found


def test_a_page_holds_the_glyphs_of_its_labels() -> None:
    label = "Ünï ελ conv1"
    if not {ord(char) for char in label} <= fonts.coverage(fonts.base_font() or ""):
        pytest.skip("the plain font has no Greek")
    css = webfonts.web_fonts([(label, False), ("bold", True)]).css
    (_, plain), (_, bold) = faces(css)
    assert {ord(char) for char in label} <= plain
    assert {ord(char) for char in "bold"} <= bold
    assert len(plain) < 130  # of some thousand


def test_what_shapes_letters_stays_in_the_font() -> None:
    from fontTools.ttLib import TTFont

    if ord("س") not in fonts.coverage(fonts.base_font() or ""):
        pytest.skip("the plain font has no Arabic letters")
    css = webfonts.web_fonts([("سسس", False)]).css
    (data,) = re.findall(r"base64,([^)]*)\)", css)
    with TTFont(io.BytesIO(base64.b64decode(data))) as font:
        features = {record.FeatureTag for record in font["GSUB"].table.FeatureList.FeatureRecord}
        assert {"init", "medi", "fina"} <= features


def test_a_font_that_may_not_be_embedded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fontTools.ttLib import TTFont

    base = fonts.base_font()
    assert base is not None
    for fs_type, embedded in ((0x2, False), (0x100, False), (0x8, True), (0x0, True)):
        path = tmp_path / f"{fs_type}.ttf"
        with TTFont(base) as font:
            font["OS/2"].fsType = fs_type
            font.save(path)
        monkeypatch.setattr(fonts, "base_font", lambda path=path: str(path))
        monkeypatch.setattr(fonts, "bold_font", lambda path=path: str(path))
        fonts.runs.cache_clear()
        made = webfonts.web_fonts([("conv1", False)])
        assert bool(made.css) is embedded
        assert made.families == "'DejaVu Sans', sans-serif"
    fonts.runs.cache_clear()


def test_without_fonttools_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fontTools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fontTools", None)
    webfonts._subset.cache_clear()
    webfonts.family_name.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install 'layertap\[html\]'"):
        a_picture().encode("html")
    picture = draw(a_run(), painter="pillow")
    assert picture._repr_html_().startswith("<div")  # a notebook's needs none


# The specification in every file


@pytest.mark.parametrize(
    ("format", "painter"),
    [("png", "pillow"), ("png", "matplotlib"), ("svg", None), ("pdf", None), ("html", None)],
)
def test_a_file_carries_what_draws_it_again(tmp_path: Path, format: str, painter: str | None) -> None:
    if painter == "matplotlib" or format in ("svg", "pdf"):
        pytest.importorskip("matplotlib")
    run = a_run()
    run.path = "/home/somebody/secret/run.zarr"
    for title in (None, '(\\) </script> & "飞机" \\u0041 -->', "x" * 3000):
        picture = draw(
            run, "grid", rows=[1, 3], layers=["conv1"], scope=(-1, 0.5), title=title, painter=painter
        )
        path = picture.save(tmp_path / f"a.{format}")
        spec = read_spec(path)
        assert spec == picture.spec
        assert draw(run, spec, painter=painter).encode(format) == path.read_bytes()
        assert b"secret" not in path.read_bytes()


def test_a_store_that_is_named_is_named_without_its_folders() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Spec):
        kind: ClassVar[str] = "other"
        other: str = ""

    for path, name in (
        ("/home/me/b.zarr", "b.zarr"),
        ("/home/me/b.zarr/", "b.zarr"),
        ("C:\\Users\\me\\b.zarr", "b.zarr"),
        ("~/b.zarr", "b.zarr"),
        ("file:///home/me/b.zarr", "b.zarr"),
        ("s3://bucket/runs/b.zarr", "s3://bucket/runs/b.zarr"),
        ("runs/b.zarr", "runs/b.zarr"),
    ):
        picture = Picture(Sheet(9, 9), Other(other=path, title="/a title"))
        assert picture.sheet.spec == {"kind": "other", "other": name, "title": "/a title"}
        assert b"me/b.zarr" not in picture.png()
    assert _without_folders({"frame": {"other": "/home/me/b.zarr"}}) == {"frame": {"other": "b.zarr"}}


def test_a_file_that_carries_nothing_is_told(tmp_path: Path) -> None:
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%PDF-1.4", b"<html></html>", b"\xff" * 99, b"RIFF"):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(DrawError, match="carries no specification"):
            read_spec(tmp_path / "a")
    with pytest.raises(DrawError, match="cannot be read"):
        read_spec(tmp_path / "absent.png")
    (tmp_path / "a").write_text(
        '<script type="application/json" id="layertap-spec">{"kind": "gird"}</script>'
    )
    with pytest.raises(DrawError, match="grid"):
        read_spec(tmp_path / "a")


def test_a_png_with_text_is_still_read_by_others() -> None:
    for kind in ("grid", "montage"):
        image = Image.open(io.BytesIO(draw(a_run(), kind, painter="pillow").png()))
        assert json.loads(image.info["layertap"])["kind"] == kind
        image.load()


# Notebooks


def test_a_notebook_gets_what_it_asks_for() -> None:
    picture = a_picture(painter="pillow")
    assert set(picture._repr_mimebundle_()) == {"text/plain", "image/png", "text/html"}
    assert picture._repr_mimebundle_(include={"image/png"}) == {"image/png": picture.png()}
    assert set(picture._repr_mimebundle_(exclude={"image/png"})) == {"text/plain", "text/html"}
    page = Parsed(picture._repr_html_())
    (image,) = page.attributes("img")
    assert base64.b64decode(str(image["src"]).partition(",")[2]) == picture.png()
    assert (image["width"], image["height"]) == (str(picture.sheet.width), str(picture.sheet.height))
    assert page.of("li") == list(picture.sheet.notes)
    assert not page.attributes("style")  # which would be the whole notebook's


def test_ipython_shows_it() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(a_picture(painter="pillow"))
    assert set(data) == {"text/plain", "image/png", "text/html"}


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed (Debian: chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def shot(browser: Any, picture: Picture, tmp_path: Path, scale: int = 1) -> tuple[Any, Any, list[str]]:
    """Return a page, its screenshot of the sheet's size, and what it asked for."""
    path = picture.save(tmp_path / "a.html")
    size = {"width": picture.sheet.width, "height": picture.sheet.height}
    page = browser.new_page(viewport=size, device_scale_factor=scale)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: asked.append(message.text))
    page.goto(path.as_uri())
    page.evaluate("document.fonts.ready")
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, **size}))).convert("RGB"))
    return page, pixels, [url for url in asked if not url.startswith("data:")]


@pytest.mark.parametrize("scale", [1, 2])
def test_a_browser_shows_the_pixels_of_the_png(browser: Any, tmp_path: Path, scale: int) -> None:
    picture = a_picture(rows=[0, 1])
    page, pixels, asked = shot(browser, picture, tmp_path, scale)
    assert asked == [page.url]
    expected = picture.array().repeat(scale, 0).repeat(scale, 1)
    assert pixels.shape == expected.shape
    for x, y, part in picture.sheet.pictures():
        height, width = part.shape[:2]
        at = (slice(y * scale, (y + height) * scale), slice(x * scale, (x + width) * scale))
        inner = part.repeat(scale, 0).repeat(scale, 1)
        bare = (expected[at] == inner).all(axis=2)  # but for numbers above tiles
        assert (pixels[at] == inner)[bare].mean() > 0.995
        assert bare.mean() > 0.8
    # Where there is ink in one, there is in the other, near by; text is set by two programs.
    for text in picture.sheet.texts:
        y0, y1 = int(text.y - text.size) * scale, int(text.y + 4) * scale
        ours, theirs = ((a[y0:y1] < 200).any(axis=(0, 2)) for a in (expected, pixels))
        assert abs(int(ours.sum()) - int(theirs.sum())) <= 0.12 * ours.sum() + 8 * scale


def test_text_in_a_browser_is_found_and_selected(browser: Any, tmp_path: Path) -> None:
    page, _, _ = shot(browser, a_picture(), tmp_path)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('text'))")
    assert page.evaluate("getSelection().toString()") == "a title"
    assert page.title() == "a title"
    spec = page.evaluate("JSON.parse(document.getElementById('layertap-spec').textContent)")
    assert spec == a_picture().spec.to_json()


def test_hostile_names_do_nothing_in_a_browser(browser: Any, tmp_path: Path) -> None:
    run = a_run()
    run.classes = HOSTILE
    page, _, asked = shot(browser, draw(run, "grid", rows=[0, 1], title=HOSTILE[0]), tmp_path)
    assert asked == [page.url]
    assert page.evaluate("document.querySelectorAll('img, script:not([type])').length") == 0


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow does not shape text")
def test_a_browser_turns_lines_as_the_png_does(browser: Any, tmp_path: Path) -> None:
    if not {0x5E7, 0x5D8} <= fonts.coverage(fonts.base_font() or ""):
        pytest.skip("the plain font has no Hebrew letters")
    spec = draw(a_run()).spec
    for align, x, label in (("left", 10, "קט cat"), ("center", 150, "cat קט"), ("right", 290, "קט  (c) 3")):
        picture = Picture(Sheet(300, 40, texts=(Text(x, 30, label, 20, align),)), spec, None)  # type: ignore[arg-type]
        page, pixels, _ = shot(browser, picture, tmp_path)
        page.close()
        mine, theirs = ((a < 128).any(axis=(0, 2)) for a in (picture.array(), pixels))
        assert (mine == theirs).mean() > 0.9
        assert abs(int(np.argmax(mine)) - int(np.argmax(theirs))) <= 2


def test_a_browser_sets_labels_in_the_fonts_of_the_page(browser: Any, tmp_path: Path) -> None:
    run = a_run()
    run.classes = ("飞机 ελ", "dog")
    page, _, _ = shot(browser, draw(run, "grid", title="conv"), tmp_path)
    loaded = page.evaluate("[...document.fonts].filter(f => f.status == 'loaded').length")
    assert (
        loaded == len({path for text in ("conv", "飞机 ελ") for path, _ in fonts.runs(text, bold=True)}) + 1
    )
