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
from layertap.render import draw, fonts, paint_pillow
from layertap.render.lettering import text_width
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


def test_every_character_is_set_or_escaped(no_fonts: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fonts.drawable("a\ud800\U00020000") == r"a\ud800\U00020000"


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
