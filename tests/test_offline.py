"""The web page as a file or a folder: whole, offline, and the same as from a server."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from chromium import Tab, browser, part
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import offline
from layertap.render.colormaps import palette
from layertap.render.offline import export_html
from stores import HOSTILE, a_store
from test_ragged import Sequences, double
from test_view_server import pixels, serving


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return a_store(tmp_path_factory.mktemp("store") / "secret-folder" / "run.zarr", stats="all")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


def about(page: Path) -> dict[str, Any]:
    """Return what the page knows before it shows anything."""
    found = re.search(r'id="layertap-run">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    made: dict[str, Any] = json.loads(found[1])
    return made


def piece(page: Path, key: str) -> bytes:
    """Return what a piece of a one-file page holds."""
    n = about(page)["pieces"][key]
    found = re.search(rf'id="piece-{n}">([^<]*)</script>', page.read_text("utf-8"))
    assert found
    return zlib.decompress(base64.b64decode(found[1]))


# What is written


def test_a_file_holds_the_exact_values_of_the_chosen_rows_and_channels(run: Any, tmp_path: Path) -> None:
    page = export_html(run, tmp_path / "a.html", [3, 17], layers=["conv1", "tokens"], channels="0,2")
    assert page == tmp_path / "a.html"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    values = np.frombuffer(piece(page, "maps:0:17"), "<f4").reshape(2, 6, 5)
    assert np.array_equal(values, run["conv1"][17, [0, 2]])
    tokens = np.frombuffer(piece(page, "maps:1:3"), "<i8").reshape(2, 7)
    assert np.array_equal(tokens, run["tokens"][3][:, [0, 2]].T)
    assert [one["only"] for one in about(page)["layers"]] == [[0, 2], [0, 2]]
    assert [one["row"] for one in about(page)["facts"]] == [3, 17]
    assert piece(page, "picture:3").startswith(b"\x89PNG")


def test_nothing_of_a_store_breaks_out_of_its_place_in_the_page(run: Any, tmp_path: Path) -> None:
    page = export_html(run, tmp_path / "a.html", [1])
    text = page.read_text("utf-8")
    assert HOSTILE not in text
    assert "<img src=x" not in text
    assert text.count("</body>") == text.count("</html>") == 1
    assert about(page)["facts"][0]["true"] == HOSTILE


def test_the_page_says_nothing_of_where_the_store_lay(run: Any, tmp_path: Path) -> None:
    page = export_html(run, tmp_path / "a.html", [1])
    assert "secret-folder" not in page.read_text("utf-8")
    assert about(page)["path"] == "run.zarr"


def test_a_folder_has_its_pieces_beside_it(run: Any, tmp_path: Path) -> None:
    page = export_html(run, tmp_path / "out", "0:3", layers="conv1")
    assert page == tmp_path / "out" / "index.html"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "pieces"}
    pieces = about(page)["pieces"]
    assert len(list((tmp_path / "out" / "pieces").iterdir())) == len(pieces) == 2 + 3 + 3
    script = (tmp_path / "out" / "pieces" / f"{pieces['maps:0:2']}.js").read_text()
    assert script.startswith(f"layertapPiece({pieces['maps:0:2']}, ")


def test_what_is_there_is_replaced_when_asked_and_only_if_it_is_an_export(run: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": "fc"}
    for name in ("a.html", "out"):
        export_html(run, tmp_path / name, [1], **options)
        with pytest.raises(DrawError, match="overwrite"):
            export_html(run, tmp_path / name, [2], **options)
        page = export_html(run, tmp_path / name, [2], overwrite=True, **options)
        assert [one["row"] for one in about(page)["facts"]] == [2]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for target in (mine, tmp_path / "mine.html"):
        if target.suffix:
            target.mkdir()
        with pytest.raises(DrawError, match="not what an export wrote"):
            export_html(run, target, [1], overwrite=True, **options)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


def test_a_page_that_a_browser_could_not_open_is_refused_with_the_size(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "MOST_FILE_BYTES", 12 * 6 * 5 * 4 * 2)
    export_html(run, tmp_path / "a.html", [1, 2], layers="conv1")
    with pytest.raises(DrawError, match="Name a folder"):
        export_html(run, tmp_path / "b.html", [1, 2, 3], layers="conv1")
    export_html(run, tmp_path / "b", [1, 2, 3], layers="conv1")


def test_what_is_not_there_is_refused_and_nothing_is_left(run: Any, tmp_path: Path) -> None:
    for rows, layers, channels in ((99, None, "all"), (1, "conv2", "all"), (1, "conv1", "99")):
        with pytest.raises(SelectionError):
            export_html(run, tmp_path / "a.html", rows, layers=layers, channels=channels)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_the_rows_that_the_pictures_take(run: Any, tmp_path: Path) -> None:
    def called(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["export", "html", str(run.path), *arguments])

    out = tmp_path / "a.html"
    done = called("--wrong", "--rows", "0:9", "--layers", "fc", "--out", str(out))
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    assert [one["row"] for one in about(out)["facts"]] == [2, 5, 8]
    called("--out", str(out), "--overwrite", "--layers", "fc")
    assert [one["row"] for one in about(out)["facts"]] == list(range(9))
    called("--each-class", "--out", str(out), "--overwrite", "--layers", "conv1", "--channels", "top:2:mean")
    assert [one["row"] for one in about(out)["facts"]] == [0, 1, 2]
    assert len(about(out)["layers"][0]["only"]) == 2
    assert called("--wrong", "--right").exit_code == 2
    assert "closest" in called("--layers", "conv2", "--out", str(tmp_path / "b.html")).output


# What a browser makes of it


@pytest.fixture(params=["file", "folder"])
def page(request: pytest.FixtureRequest, run: Any, tmp_path: Path) -> Path:
    """Export seven rows as one file and as a folder."""
    target = tmp_path / ("page.html" if request.param == "file" else "page")
    return export_html(run, target, [0, 1, 2, 3, 4, 5, 17])


LOOKS = [
    *(f"scope={scope}&colors={colors}" for scope in ("layer", "row", "map") for colors in ("auto", "gray")),
    "scope=channel&colors=RdBu_r",
    "scope=store",
    "scope=given&low=-0.5&high=0.75",
    *(f"scope={scope}&clip=95" for scope in ("layer", "row", "channel", "map")),
    "scope=map&colors=gray&clip=99",
]


def test_a_page_from_a_disk_is_that_of_the_server(chromium: Any, run: Any, page: Path) -> None:
    """Every scale and colour map, painted by the page itself and by the server."""
    tab = Tab(chromium)
    looks = LOOKS if page.name == "page.html" else LOOKS[:1]
    from_disk = []
    for look in looks:
        tab.open(f"{page.as_uri()}#n=all&size=32&{look}")
        from_disk.append((tab.canvas(), tab.tiles()))
    assert tab.complaints == []
    assert all(url.startswith(("file:", "about:", "data:", "blob:")) for url in tab.requests)
    for server in serving(run):
        for look, (drawn, tiles) in zip(looks, from_disk, strict=True):
            tab.open(f"{server.url}#n=all&size=32&{look}")
            online = {(one["layer"], one["row"], one["channel"]): one for one in tab.tiles()}
            both = [one for one in tiles if (one["layer"], one["row"], one["channel"]) in online]
            assert len(both) > 50
            wanted = tab.canvas()
            for one in both:
                same = online[one["layer"], one["row"], one["channel"]]
                assert np.array_equal(part(drawn, one), part(wanted, same)), (look, one)
    tab.page.close()


def test_a_page_from_a_disk_filters_tells_values_and_opens_channels(
    chromium: Any, run: Any, page: Path
) -> None:
    tab = Tab(chromium).open(page.as_uri())
    assert tab.text("#count") == "7 rows"
    assert "7 of 40 rows" in tab.text("#about")
    said = tab.hover(tab.tile("layer2.<b>x</b>", 17, 2), 0.9, 0.1)
    assert np.float16(said.rpartition(" = ")[2]) == run["layer2.<b>x</b>"][17, 2, 0, 3]
    tab.choose(outcome="wrong").counts("3 rows")
    assert {one["row"] for one in tab.tiles()} == {2, 5, 17}
    tab.press("Escape", "ArrowDown", "ArrowDown", "r")
    assert tab.text("#side .turn b") == "Row 5"
    assert tab.page.evaluate("() => document.querySelector('#side img').naturalWidth") == 8
    tab.open(f"{page.as_uri()}#view=channel&layer=conv1&channel=5")
    assert tab.page.locator("svg.histogram").count() == 1
    assert "Over all 40 captured rows" in tab.text("#channel h2")
    assert tab.page.locator(".classes > a").count() == 3
    assert "not in this page" in tab.text("#channel .top")
    assert tab.complaints == []
    tab.page.close()


def test_zeros_alone_are_in_the_middle_of_a_diverging_map(chromium: Any, tmp_path: Path) -> None:
    data = np.zeros((3, 2), np.float32)
    run = lt.record_dataset(lambda batch: {"a": batch}, data, tmp_path / "r", "*", backend="arrays")
    page = export_html(run, tmp_path / "a.html")
    tab = Tab(chromium).open(f"{page.as_uri()}#scope=channel&colors=RdBu_r")
    drawn = part(tab.canvas(), tab.tile("a", 1, 0))
    for server in serving(run):
        sprite = pixels(server.routes.answer("/tiles", "layer=a&rows=1&channels=0&colormap=RdBu_r")[1])
        assert (drawn[1:-1, 1:-1] == palette("RdBu_r")[sprite[0, 0]]).all()
    tab.page.close()


def test_a_folder_without_one_of_its_pieces_says_which(chromium: Any, run: Any, tmp_path: Path) -> None:
    page = export_html(run, tmp_path / "out", [0, 1], layers="conv1")
    lost = about(page)["pieces"]["maps:0:1"]
    (tmp_path / "out" / "pieces" / f"{lost}.js").unlink()
    tab = Tab(chromium).open(page.as_uri())
    assert tab.text("#alert span") == f"pieces/{lost}.js is not beside this page"
    assert not any(one["there"] for one in tab.tiles() if one["row"] == 1)
    tab.page.close()


def test_rows_that_differ_in_shape_are_in_the_page_each_in_its_own(chromium: Any, tmp_path: Path) -> None:
    texts = Sequences()
    run = lt.record_dataset(double, texts, tmp_path / "r", "twice", ragged="twice:9", backend="arrays")
    tab = Tab(chromium).open(export_html(run, tmp_path / "a.html", "0:6").as_uri())
    said = tab.hover(tab.tile("twice", 5, 1), 0.9, 0.9)
    assert said.startswith("twice, row 5, feature 1, token 8 = ")
    assert np.float32(said.rpartition(" = ")[2]) == 2 * texts.rows[5][8, 1]
    assert tab.hover(tab.tile("twice", 2, 1)).endswith("no value here")
    two = tab.tile("twice", 1, 0)  # two tokens stand beside each other, in the middle of the row
    assert two["width"] == 2 * two["height"] == 64
    full = {row: tab.tile("twice", row, 0) for row in (0, 5)}
    pitch = (full[5]["y"] - full[0]["y"]) / 5
    assert abs(two["y"] + two["height"] / 2 - full[0]["y"] - full[0]["height"] / 2 - pitch) <= 1
    tab.page.close()
