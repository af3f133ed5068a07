"""Labels in any script: in a font that covers them, or as ASCII with one warning; never as boxes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layertap.render import bidi, draw, fonts, paint_pillow
from layertap.render.lettering import shorten, text_width
from layertap.render.painters import painter
from layertap.render.sheet import Sheet, Text
from PIL import features
from test_render_run import a_run

CHINESE = "飞机"


@pytest.fixture(autouse=True)
def _look_anew() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    fonts.forget()
    paint_pillow._lettering.cache_clear()
    paint_pillow._font.cache_clear()


@pytest.fixture
def cjk() -> str:
    path = next((p for p in fonts.installed() if {ord(c) for c in CHINESE} <= fonts.coverage(p)), None)
    if path is None:
        pytest.skip("no font with Chinese characters is installed (Debian: fonts-wqy-zenhei)")
    return path


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plain font only."""
    fonts.base_font()
    monkeypatch.setattr(fonts, "installed", _none)


@lru_cache
def _none() -> tuple[str, ...]:
    return ()


@pytest.fixture(params=["pillow", "matplotlib"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "matplotlib":
        pytest.importorskip("matplotlib")
    return str(request.param)


def ink(name: str, text: str) -> Any:
    """Return which pixels `text` takes on a sheet, shape (40, 300)."""
    return (painter(name).array(Sheet(300, 40, texts=(Text(5, 30, text, 20),))) < 160).any(axis=2)


def test_plain_text_is_in_the_plain_font() -> None:
    assert fonts.runs("conv1 · 16") == ((fonts.base_font(), "conv1 · 16"),)


def test_a_mixed_label_is_split_by_what_fonts_cover(cjk: str) -> None:
    (plain, latin), (other, chinese), (again, rest) = fonts.runs(f"row {CHINESE} 7")
    assert (latin, chinese, rest) == ("row ", CHINESE, " 7")
    assert plain == again == fonts.base_font()
    assert other is not None
    assert {ord(c) for c in CHINESE} <= fonts.coverage(other)


def test_each_chinese_character_has_its_own_look(cjk: str, name: str) -> None:
    # Boxes, and characters that are left out, all look alike.
    looks = {ink(name, char).tobytes() for char in "飞机汽车鸟猫鹿"}
    assert len(looks) == 7
    assert all(np.frombuffer(look, np.bool_).sum() > 20 for look in looks)


def test_painters_set_a_mixed_label_as_wide_as_each_other(cjk: str) -> None:
    pytest.importorskip("matplotlib")
    right = [np.nonzero(ink(name, f"cat {CHINESE} 7"))[1].max() for name in ("pillow", "matplotlib")]
    assert abs(int(right[0]) - int(right[1])) <= 4


def test_a_figure_with_chinese_classes_warns_of_nothing(
    cjk: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_run()
    run.classes = ("飞机", "卡车 (truck)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw(run, rows=[0, 1], title="特征图 feature maps", painter=name)
        assert picture.png()
        if name == "matplotlib":
            assert picture.encode("svg")
            assert picture.encode("pdf")
    assert not [r for r in caplog.records if "font" in r.getMessage().lower()]


def test_without_a_font_labels_are_ascii_and_one_warning_says_what_to_install(
    no_fonts: None, name: str
) -> None:
    with pytest.warns(UserWarning, match="fonts-noto-cjk") as caught:
        first = ink(name, CHINESE)
        ink(name, "汽车 truck")
    assert len(caught) == 1
    assert (first == ink(name, r"\u98de\u673a")).all()
    assert fonts.drawable("汽车 truck") == r"\u6c7d\u8f66 truck"


def test_an_escape_has_the_room_that_it_takes(no_fonts: None, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width = np.nonzero(ink(name, CHINESE))[1].max() - 5
        assert width > 100
        assert width <= text_width(CHINESE, 20) + 1
        short = shorten(CHINESE * 20, 200, 20)
        assert np.nonzero(ink(name, short))[1].max() - 5 <= 200
        assert "…" in short


def test_a_name_is_not_cut_between_a_letter_and_its_marks() -> None:
    marked = "x\u0302"
    for width in range(40, 140, 3):
        short = shorten(marked * 30, width, 20)
        assert set(short.split("…")) <= {marked * n for n in range(30)}
        assert text_width(short, 20) <= width


def test_every_character_is_set_or_escaped(no_fonts: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fonts.drawable("a\ud800\U00020000") == r"a\ud800\U00020000"


def a_font(folder: Path, name: str, chars: str) -> str:
    """Return the path of a font that has a block for each of `chars`, each as wide as it comes late."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    glyphs, widths = {}, {}
    for i, glyph in enumerate([".notdef", *(f"u{ord(char):04X}" for char in chars)]):
        pen, width = TTGlyphPen(None), 400 + 60 * i
        for k, corner in enumerate([(50, 0), (50, 700), (width - 50, 700), (width - 50, 0)]):
            (pen.lineTo if k else pen.moveTo)(corner)
        pen.closePath()
        glyphs[glyph], widths[glyph] = pen.glyph(), (width, 50)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(char): f"u{ord(char):04X}" for char in chars})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(widths)
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = folder / f"{name}.ttf"
    builder.save(path)
    return str(path)


def only(monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
    """Leave the plain font and these."""
    base, bold = fonts.base_font(), fonts.bold_font()
    if base is None or not {ord(char) for char in "éЖ\u0301"} <= fonts.coverage(base):
        pytest.skip("the plain font has no accents")
    for finder, found in (("installed", paths), ("base_font", base), ("bold_font", bold)):
        monkeypatch.setattr(fonts, finder, lru_cache(lambda found=found: found))
    fonts.runs.cache_clear()
    fonts._installed_with.cache_clear()


def test_what_stands_together_is_in_one_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The plain font has the first letter; joined and marked they are within one font only.
    part, whole = a_font(tmp_path, "part", "\u0915"), a_font(tmp_path, "whole", "é\u0915\u093f")
    only(monkeypatch, part, whole)
    assert fonts.runs("row é\u0915\u093f 7") == (
        (fonts.base_font(), "row "),
        (whole, "é\u0915\u093f"),
        (fonts.base_font(), " 7"),
    )
    assert fonts.runs("é\u0915") == ((whole, "é\u0915"),)
    only(monkeypatch, part)
    assert fonts.runs("é\u0915") == ((fonts.base_font(), "é"), (part, "\u0915"))


def test_a_mark_is_in_the_font_of_its_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, marked = a_font(tmp_path, "bare", "\u0915"), a_font(tmp_path, "marked", "\u0915\u0301")
    only(monkeypatch, bare, marked)
    assert fonts.runs("\u0915\u0301") == ((marked, "\u0915\u0301"),)
    only(monkeypatch, bare)
    with pytest.warns(UserWarning, match="u0301"):
        assert fonts.runs("\u0915\u0301") == ((bare, "\u0915"), (fonts.base_font(), "\\u0301"))
    with pytest.warns(UserWarning, match="u0e01"):
        fonts._warned.clear()
        assert fonts.drawable("\u0e01\u0301") == "\\u0e01\\u0301"


def test_what_the_bold_font_lacks_is_in_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ascii_only = a_font(tmp_path, "ascii", "".join(map(chr, range(0x20, 0x7F))))
    only(monkeypatch)
    plain = ink(name, "Ж").tobytes()
    monkeypatch.setattr(fonts, "bold_font", lru_cache(lambda: ascii_only))
    _forget()
    only(monkeypatch)
    assert fonts.runs("a Ж", bold=True) == ((ascii_only, "a "), (fonts.base_font(), "Ж"))
    bold = painter(name).array(Sheet(300, 40, texts=(Text(5, 30, "Ж", 20, bold=True),)))
    assert (bold < 160).any(axis=2).tobytes() == plain


@pytest.mark.parametrize("code", [0xAD, 0x34F, 0x61C, 0x115F, 0x180B, 0x200E, 0x2066, 0x3164, 0xFE0F, 0xFEFF])
def test_what_has_no_look_of_its_own_is_left_out(code: int) -> None:
    assert fonts.drawable(f"a{chr(code)}b") == "ab"
    assert fonts.drawable(f"a{chr(0xE0100)}{chr(0xE0067)}b") == "ab"


def test_signs_that_stand_around_digits_are_not_lost(no_fonts: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fonts.drawable("\u0601\u06dd") in ("\u0601\u06dd", r"\u0601\u06dd")
        assert fonts.drawable("\U000110bd") == r"\U000110bd"


def test_syllables_that_a_file_system_took_apart_are_put_together() -> None:
    assert fonts.on_one_line("\u1112\u1161\u11ab") == "\ud55c"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12))
def test_whatever_a_label_holds_each_character_is_covered_or_ascii(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for bold in (False, True):
            for path, piece in fonts.runs(text, bold=bold, joiners=True):
                points = fonts.coverage(path) if path else frozenset()
                assert all(char.isascii() or char in "\u200c\u200d" or ord(char) in points for char in piece)
        assert paint_pillow._lettering(text, 13, False).cover.ndim == 2


def test_parts_of_a_line_stand_as_unicode_says() -> None:
    assert bidi.parts("cat") == [("cat", False)]
    assert bidi.parts("אב (ab) ג") == [(") ג", True), ("ab", False), ("אב (", True)]
    assert [part for part, _ in bidi.parts("אב cat ג")] == [" ג", "cat", "אב "]
    assert bidi.parts("cat אב 12") == [("cat ", False), ("12", False), ("אב ", True)]
    assert bidi.parts("אב 1,2%") == [("1,2%", False), ("אב ", True)]
    assert bidi.levels("a(ב)ג") == [0, 0, 1, 0, 1]  # the brackets go with the a
    assert bidi.levels("א(b)c") == [1, 1, 2, 1, 2]
    assert bidi.turned("(אב) x") == "x (בא)"
    assert bidi.turned("ש\u05b0ל") == "לש\u05b0"


def test_a_line_of_several_fonts_stands_in_the_order_of_its_letters(
    cjk: str, arabic: None, name: str
) -> None:
    if not (features.check("raqm") if name == "pillow" else _shaping_matplotlib()):
        pytest.skip("nothing here turns letters around")
    # Read from the right: the Arabic word, the Chinese one, and at the left end the last in order.
    mixed, first = ink(name, "قطة 猫"), ink(name, "猫")
    assert (mixed[:, :24] == first[:, :24]).mean() > 0.98
    mixed, first = ink(name, "猫 قطة"), ink(name, "猫")
    assert (mixed[:, :24] == first[:, :24]).mean() > 0.98
    last = np.nonzero(ink(name, "قطة 猫 cat"))[1].max()
    assert abs(int(last) - int(np.nonzero(ink(name, "猫 cat قطة"))[1].max())) <= 3


def _shaping_matplotlib() -> bool:
    import matplotlib as mpl

    return mpl.__version_info__ >= (3, 11)


def test_without_shaping_a_line_is_turned_around(arabic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paint_pillow, "_shapes", lambda: False)
    _forget()
    assert (ink("pillow", "\u0627 cat") == ink("pillow", "cat \u0627")).all()


def test_an_svg_brings_the_glyphs_of_its_labels(cjk: str) -> None:
    pytest.importorskip("matplotlib")
    from test_render_html import faces

    svg = (
        painter("matplotlib")
        .encode(Sheet(90, 30, texts=(Text(5, 20, f"cat {CHINESE}", 12),)), "svg")
        .decode()
    )
    (_, plain), (family, chinese) = faces(svg)
    assert {ord(char) for char in "cat"} <= plain
    assert chinese == {ord(char) for char in CHINESE}
    assert f"'{family}'" in svg.partition("</style>")[2]


def test_what_only_steers_is_left_out() -> None:
    assert fonts.drawable("a\nb\tc\u200bd\u202ee") == "a b cde"
    assert fonts.drawable("e\u0301") == "\xe9"
    assert fonts.drawable("") == ""


def test_joiners_stay_for_a_painter_that_shapes() -> None:
    assert fonts.drawable("a\u200cb\u200dc\u202e\u200b", joiners=True) == "a\u200cb\u200dc"


def test_joiners_make_no_runs_of_their_own(cjk: str) -> None:
    assert len(fonts.runs("a\u200c飞\u200d", joiners=True)) <= 2


@pytest.fixture
def arabic() -> None:
    base = fonts.base_font()
    if base is None or ord("س") not in fonts.coverage(base):
        pytest.skip("the plain font has no Arabic letters")


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow does not shape text")
def test_letters_are_joined_where_pillow_can(arabic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def width(text: str) -> float:
        return paint_pillow._lettering(text, 20, False).advance

    assert width("سسس") < 3 * width("س") - 5
    assert width("س\u200cسس") > width("سسس") + 2
    first = np.nonzero(ink("pillow", "اسس"))[1]  # alef, a line without a joint, is at the right
    assert ink("pillow", "اسس")[:, first.max() - 3 :].any(axis=1).sum() > 12
    monkeypatch.setattr(paint_pillow, "_shapes", lambda: False)
    _forget()
    assert width("سسس") == width("س\u200cسس") == pytest.approx(3 * width("س"), abs=1)


@pytest.mark.parametrize("text", ["شبكة عصبية", "خرائط الميزات", "می\u200cخواهم", "سسسس", "قطة conv1 ب ف"])  # noqa: RUF001
@pytest.mark.parametrize("shapes", [True, False])
def test_arabic_is_no_wider_than_was_planned(
    arabic: None, monkeypatch: pytest.MonkeyPatch, text: str, shapes: bool
) -> None:
    if shapes and not features.check("raqm"):
        pytest.skip("this Pillow does not shape text")
    monkeypatch.setattr(paint_pillow, "_shapes", lambda: shapes)
    for bold in (False, True):
        assert paint_pillow._lettering(text, 20, bold).cover.shape[1] <= text_width(text, 20, bold) + 1


def test_a_title_with_joiners_warns_of_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ink(name, "a\u200cb\u200d").any()
    assert not [r for r in caplog.records if "font" in r.getMessage().lower()]


def test_the_last_resort_font_is_never_chosen() -> None:
    assert not [path for path in fonts.installed() if "lastresort" in Path(path).name.lower()]


def test_coverage_agrees_with_freetype(cjk: str) -> None:
    ft2font = pytest.importorskip("matplotlib.ft2font")
    for path in (fonts.base_font(), cjk):
        assert path is not None
        assert fonts.coverage(path) == frozenset(ft2font.FT2Font(path).get_charmap())


def test_a_file_that_is_no_font_covers_nothing(tmp_path: Path) -> None:
    for content in (b"", b"not a font", b"\0\1\0\0" + b"\xff" * 200, b"ttcf" + b"\0" * 12):
        (tmp_path / "broken.ttf").write_bytes(content)
        fonts.coverage.cache_clear()
        assert fonts.coverage(str(tmp_path / "broken.ttf")) == frozenset()
    assert fonts.coverage(str(tmp_path / "absent.ttf")) == frozenset()


def test_text_is_seldom_wider_than_was_planned(name: str) -> None:
    for text in (
        "conv1",
        "layer4.1.bn2",
        "BasicBlock",
        "all 512 channels, by variance",
        "WWWW",
        "0123456789",
    ):
        assert np.nonzero(ink(name, text))[1].max() - 5 <= text_width(text, 20) + 1


_WITHOUT_MATPLOTLIB = """
import sys, warnings
sys.modules["matplotlib"] = None
from layertap.render import fonts
from layertap.render.painters import painter
from layertap.render.sheet import Sheet, Text
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    paths = {path for path, _ in fonts.runs("frog \u9752\u86d9")}
    painter("pillow").array(Sheet(90, 30, texts=(Text(5, 20, "frog \u9752\u86d9", 12),)))
assert len(paths) == 2 or len(caught) == 1, (paths, caught)
"""


def test_fonts_are_found_without_matplotlib() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_MATPLOTLIB], check=True, timeout=120)


def test_pillows_own_font_serves_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for finder in ("base_font", "bold_font", "installed"):
        monkeypatch.setattr(fonts, finder, _none if finder == "installed" else _nothing)
    assert ink("pillow", "conv1").any()


@lru_cache
def _nothing() -> None:
    return None
