"""The web page in a real browser: keys, filters, true values, links, hostile names, 100,000 rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import layertap as lt
import numpy as np
import pytest
from chromium import Tab, alike, browser, part
from layertap.render.colormaps import palette
from layertap.render.serve import Server
from stores import HOSTILE, N_ROWS, a_store
from test_view_server import an_empty_store, pixels, serving


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(a_store(tmp_path_factory.mktemp("view") / "run.zarr", stats="all"))


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    """Give a page in which nothing may go wrong."""
    opened = Tab(chromium)
    yield opened
    opened.page.close()
    assert opened.complaints == []


def test_the_page_opens_and_shows_what_the_store_holds(tab: Tab, served: Server) -> None:
    tab.open(served.url)
    assert "run.zarr" in tab.page.title()
    assert tab.text("#count") == f"{N_ROWS} rows"
    assert "67.5 % right" in tab.text("#about")
    assert [one.text_content() for one in tab.page.locator("#tops button").all()][:2] == [
        "conv1",
        "layer2.<b>x</b>",
    ]
    assert tab.text("#tops small").startswith(
        "8 of 12 channels · dead: 3 · constant: 4 · 6 \N{MULTIPLICATION SIGN} 5"
    )
    sprite = pixels(served.routes.answer("/tiles", "layer=conv1&rows=2&channels=5")[1])
    drawn = part(tab.canvas(), tab.tile("conv1", 2, 5))
    factor = len(drawn) // 6
    assert factor == 10
    assert np.array_equal(drawn, palette("viridis")[sprite].repeat(factor, 0).repeat(factor, 1))


def test_a_screen_takes_few_requests(tab: Tab, served: Server) -> None:
    tab.open(served.url)
    n_tiles = len(tab.tiles())
    asked = [url for url in tab.requests if "/tiles?" in url]
    assert n_tiles > 100
    assert len(asked) <= 4 * 2  # layers, and pages of eight rows
    assert all(url.startswith(served.url) for url in tab.requests if not url.startswith("about:"))


def test_keys_go_from_row_to_row_and_channel_to_channel_and_open_both(tab: Tab, served: Server) -> None:
    tab.open(served.url).press("ArrowDown", "j", "ArrowDown", "k")
    assert tab.query() == "#row=1"
    tab.press("ArrowRight", "ArrowRight", "]", "[", "ArrowRight")
    assert tab.query() == "#row=1&layer=conv1&channel=1"
    values = served.routes.atlas.run["conv1"][1, 1]
    y, x = np.unravel_index(values.argmax(), values.shape)
    said = tab.text("#place")
    assert said.startswith("conv1, row 1, channel 1: from 0 to ")
    assert said.endswith(f"{values.max()!s}, y {y}, x {x}")
    tab.press("Enter")
    assert tab.query().startswith("#view=channel&row=1")
    assert tab.text("#channel .turn b") == "conv1, channel 1"
    tab.press("ArrowRight")
    assert tab.text("#channel .turn b") == "conv1, channel 2"
    tab.press("r")
    assert tab.text("#side .turn b") == "Row 1"
    tab.press("ArrowRight", "n")
    assert tab.text("#side .turn b") == "Row 3"
    assert {one["row"] for one in tab.tiles()} == {3}
    assert len([one for one in tab.tiles() if one["layer"] == "conv1"]) == 12
    tab.press("Escape")
    assert "view" not in tab.query()
    assert len({one["row"] for one in tab.tiles()}) > 5
    tab.press("End")
    assert max(one["row"] for one in tab.tiles()) == N_ROWS - 1
    tab.press("Home")
    assert min(one["row"] for one in tab.tiles()) == 0


def test_rows_are_filtered_and_back_undoes_it(tab: Tab, served: Server) -> None:
    tab.open(served.url)
    tab.choose(outcome="wrong").counts("13 rows")
    assert {one["row"] % 3 for one in tab.tiles()} == {2}
    tab.choose(label=HOSTILE)
    assert tab.text("#empty") == "No row fits the filter."
    tab.page.go_back()
    tab.counts("13 rows").press("/")
    tab.page.keyboard.type("set/02")
    tab.counts("4 rows")
    assert {one["row"] for one in tab.tiles()} == {20, 23, 26, 29}
    assert "text=set%2F02" in tab.query()


@pytest.mark.parametrize(
    ("layer", "channel", "index", "cell", "size"),
    [
        ("conv1", 7, (7, 4, 1), (4, 1), (6, 5)),
        ("layer2.<b>x</b>", 0, (0, 1, 2), (1, 2), (4, 4)),
        ("layer2.<b>x</b>", 1, (1, 3, 3), (3, 3), (4, 4)),
        ("layer2.<b>x</b>", 3, (3, 2, 0), (2, 0), (4, 4)),
        ("fc", 2, (2,), (0, 0), (1, 1)),
        ("tokens", 1, (5, 1), (1, 2), (3, 3)),
    ],
)
def test_the_value_under_the_pointer_is_the_stores(
    tab: Tab, served: Server, layer: str, channel: int, index: Any, cell: Any, size: Any
) -> None:
    tab.open(f"{served.url}#{urlencode({'layers': layer})}")
    said = tab.hover(tab.tile(layer, 0, channel), (cell[1] + 0.5) / size[1], (cell[0] + 0.5) / size[0])
    place, _, text = said.rpartition(" = ")
    value = served.routes.atlas.run[layer][0][index]
    if layer == "tokens":
        assert int(text) == int(value)
        assert place.endswith("token 5")
    else:
        expected = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(str(value))
        assert text == expected if expected else type(value)(text) == value
    if len(size) == 2 and layer == "conv1":
        assert place == f"conv1, row 0, channel {channel}, y {cell[0]}, x {cell[1]}"


def test_a_class_token_is_left_out_and_the_others_keep_their_numbers(tab: Tab, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 10, 3), np.float32)
    run = lt.record_dataset(lambda batch: {"a": batch}, tokens, tmp_path / "r", "*", backend="arrays")
    for server in serving(run):
        tab.open(server.url)
        place, _, value = tab.hover(tab.tile("a", 1, 2), 0.5, 0.9).rpartition(" = ")
        assert place == "a, row 1, feature 2, token 8"
        assert np.float32(value) == tokens[1, 8, 2]
        assert "class token left out" in tab.text("#tops small")


def test_what_lies_beyond_a_scale_is_counted_under_the_pointer(tab: Tab, served: Server) -> None:
    every = served.routes.atlas.run["conv1"][:, :3]
    row, channel = (int(i) for i in np.unravel_index(every.max((2, 3)).argmax(), (N_ROWS, 3)))
    values, place = every[row, channel], ("conv1", row, channel)
    tab.open(f"{served.url}#scope=given&low=0.25&high=1.5&row={row}")
    tab.hover(tab.tile(*place))
    over, under = (values > 1.5).sum(), (values < 0.25).sum()
    assert over > 0
    assert under > 0
    counted = f"{over} of 30 above the scale, {under} of 30 below the scale"
    assert tab.text("#tip span").endswith(counted)
    tab.choose(scope="layer", clip="95")
    cut = served.routes.atlas.cuts("conv1", 95.0, False, False).limits[1]
    assert (values > cut).any()
    tab.hover(tab.tile(*place), 0.6)
    assert tab.text("#tip span").endswith(f", {(values > cut).sum()} of 30 above the scale")
    assert "cut at about 95 %" in tab.text("#tops .bar")


def test_a_link_restores_the_view(chromium: Any, tab: Tab, served: Server) -> None:
    tab.open(served.url)
    tab.choose(prediction="frog", n="4", by="variance", scope="row", clip="99", colors="magma")
    tab.press("+", "PageDown", "PageDown", "ArrowRight").scroll("(board) => board.scrollBy(37, 50)")
    tab.page.wait_for_function("() => location.hash.includes('top=') && location.hash.includes('x=')")
    other = Tab(chromium).open(tab.page.url)
    assert other.query() == tab.query()
    assert other.tiles() == tab.tiles()
    assert other.text("#count") == tab.text("#count") != ""
    assert other.page.locator("[name=by]").input_value() == "variance"
    assert alike(other.picture(), tab.picture())
    other.page.close()


def test_other_views_are_links_too(chromium: Any, tab: Tab, served: Server) -> None:
    other = Tab(chromium)
    seen: list[Any] = []
    for view in ("view=row&row=7", "view=channel&layer=conv1&channel=2", "scope=given&low=-1&high=2"):
        picture = tab.open(f"{served.url}#{view}").picture()
        assert alike(other.open(tab.page.url).picture(), picture)
        assert not any(alike(one, picture) for one in seen)
        seen.append(picture)
    other.page.close()


def test_hostile_names_do_nothing(tab: Tab, served: Server) -> None:
    for view in (
        "",
        "view=row&row=1",
        "view=channel&layer=layer2.<b>x</b>&channel=1",
        "view=channel&layer=<img src=x>",
    ):
        tab.open(f"{served.url}#{quote(view, safe='=&')}").press("?")
        assert "hit" not in tab.page.title()
        assert tab.page.locator("img[src=x]").count() == 0
        assert tab.page.locator("main b b, nav b, .layer b").count() == 0
        tab.press("Escape")
    tab.open(f"{served.url}#view=row&row=1")
    assert HOSTILE in tab.text("#side dl")
    assert not [url for url in tab.requests if url.endswith("/x")]


def test_a_channel_shows_its_top_rows_histogram_and_classes(tab: Tab, served: Server) -> None:
    run = served.routes.atlas.run
    tab.open(f"{served.url}#view=channel&layer=conv1&channel=5")
    best = int(run["conv1"][:, 5].max((1, 2)).argmax())
    assert f"row {best} " in tab.text("#channel figure figcaption")
    assert tab.page.locator(".classes > a").count() == 3
    tab.page.locator("#channel figure a").first.click()
    assert f"row={best}" in tab.query()
    assert "view=row" in tab.query()


@pytest.mark.parametrize(("layer", "channel"), [("conv1", 5), ("layer2.<b>x</b>", 2)])
def test_a_histogram_has_every_value_that_is_not_zero(
    tab: Tab, served: Server, layer: str, channel: int
) -> None:
    tab.open(f"{served.url}#{urlencode({'view': 'channel', 'layer': layer, 'channel': channel})}")
    bars = tab.page.locator("svg.histogram title").all_text_contents()
    values = served.routes.atlas.run[layer][:, channel]
    assert len(bars) > 10
    assert sum(int(one.rpartition(": ")[2].replace(",", "")) for one in bars) == (values != 0).sum()


def test_clicks_open_the_channel_the_row_and_the_layer(tab: Tab, served: Server) -> None:
    tab.open(served.url)
    tile, box = tab.tile("conv1", 1, 2), tab.page.locator("#canvas").bounding_box()
    assert box is not None
    tab.page.mouse.click(box["x"] + tile["x"] + 9, box["y"] + tile["y"] + 9)
    tab.settled()
    assert tab.query() == "#view=channel&row=1&layer=conv1&channel=2"
    tab.page.go_back()
    tab.settled()
    tab.page.locator("#lefts a").nth(3).click()
    tab.settled()
    assert tab.query() == "#view=row&row=3"
    tab.page.go_back()
    tab.settled()
    tab.page.locator("#tops button").nth(1).click()
    tab.settled()
    assert {one["layer"] for one in tab.tiles()} == {"layer2.<b>x</b>"}
    assert len({one["channel"] for one in tab.tiles()}) == 5


def test_an_address_that_names_nothing_is_told(tab: Tab, served: Server) -> None:
    tab.open(f"{served.url}#view=channel&layer=conv9&channel=1")
    assert tab.text("#channel p") == "There is no layer conv9 here."
    tab.open(f"{served.url}#label=dog")
    assert "no class 'dog'" in tab.text("#alert span")
    tab.complaints.clear()  # the browser itself notes that a request was refused


def test_nothing_stands_out_at_any_width(tab: Tab, served: Server) -> None:
    for view in ("", "view=row&row=1", "view=channel&layer=conv1&channel=1"):
        tab.open(f"{served.url}#{view}")
        for width in (320, 700, 1600):
            tab.page.set_viewport_size({"width": width, "height": 700})
            tab.scroll("() => {}")
            over = tab.page.evaluate(
                "() => [document.documentElement, document.querySelector('#channel')]"
                ".map((one) => one.scrollWidth - one.clientWidth)"
            )
            assert max(over) <= 0, (view, width)


# A hundred thousand rows

ROWS, CHANNELS = 100_000, 2_048


class Many(lt.Source):
    """Rows of one number: a batch is made when it is asked for."""

    name = "many"
    n_rows = ROWS

    def batch(self, rows: range) -> lt.Batch:
        numbers = np.arange(rows.start, rows.stop)
        return lt.Batch(rows, (numbers.astype(np.float32),), columns={"label": numbers % 7})


def many_layers(numbers: Any) -> dict[str, Any]:
    wide = np.zeros((len(numbers), CHANNELS), np.uint8)
    wide[np.arange(len(numbers)), numbers.astype(int) % CHANNELS] = 255
    return {
        "small": np.tile(numbers[:, None, None, None] / ROWS, (1, 2, 2, 2)).astype(np.float16),
        "wide": wide,
    }


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("many") / "run.zarr"
    run = lt.record_dataset(
        many_layers, Many(), path, "*", backend="arrays", batch_size=2000, codec="zstd", memory="1GiB"
    )
    yield from serving(run)


def test_a_hundred_thousand_rows_and_2048_channels_scroll_in_a_page_of_few_elements(
    tab: Tab, many: Server
) -> None:
    tab.open(f"{many.url}#n=all&size=96")
    count = "() => document.querySelectorAll('*').length"
    first = tab.page.evaluate(count)
    assert tab.page.evaluate("() => document.querySelector('#space').offsetHeight") <= 8_000_000
    assert ROWS * 106 > 8_000_000  # so the bar is scaled
    seen = []
    for share in (0.5, 0.9, 0.25, 1.0):
        tab.scroll("(board, share) => { board.scrollTop = share * board.scrollHeight; }", share)
        rows = sorted({one["row"] for one in tab.tiles()})
        assert rows == list(range(rows[0], rows[-1] + 1))
        assert abs(rows[0] - share * ROWS) < 0.001 * ROWS + 10
        seen.append(tab.page.evaluate(count))
    assert max(one["row"] for one in tab.tiles()) == ROWS - 1
    assert max(seen) <= first + 40
    tab.scroll("(board) => { board.scrollLeft = 1e9; }")
    assert max(one["channel"] for one in tab.tiles() if one["layer"] == "wide") == CHANNELS - 1
    assert tab.page.evaluate(count) <= first + 40


def test_a_wheel_turns_by_pixels_of_the_view_however_the_bar_is_scaled(tab: Tab, many: Server) -> None:
    tab.open(f"{many.url}#size=96&top=70000")
    before = tab.tile("small", 70_000, 0)["y"]
    tab.page.mouse.move(600, 400)
    for _ in range(3):
        tab.page.mouse.wheel(0, 7)
    tab.page.wait_for_function(
        "(y) => Math.abs(canvas.tiles.find((tile) => tile.row === 70000).y - y) < 1.01", arg=before - 21
    )


def test_the_last_row_is_reached_by_a_key_and_its_values_are_its_own(tab: Tab, many: Server) -> None:
    tab.open(f"{many.url}#size=96").press("End").settled()
    last = tab.tile("small", ROWS - 1, 0)
    assert tab.hover(last).endswith(f"= {np.float16(1 - 1 / ROWS):g}")
    tab.press("g")
    tab.page.keyboard.type("51234\n")
    tab.settled()
    assert 51_234 in {one["row"] for one in tab.tiles()}
    assert "row=51234" in tab.query()


# A store behind a server that ignores Range


def test_a_remote_store_without_ranges_gives_an_error_and_no_picture(chromium: Any, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from object_server import FileServer

    a_store(tmp_path / "run.zarr")
    files = FileServer(tmp_path / "run.zarr", ranges=False)
    for server in serving(lt.open(files.address)):
        tab = Tab(chromium).open(server.url)
        assert "Range" in tab.text("#alert span")
        assert not any(one["there"] for one in tab.tiles())
        tab.page.close()
    files.stop()


def test_a_store_of_many_layers_is_asked_only_about_those_on_the_screen(
    chromium: Any, tmp_path: Path
) -> None:
    def model(batch: Any) -> dict[str, Any]:
        return {f"layer{i}": batch + i for i in range(50)}

    run = lt.record_dataset(model, np.ones((4, 9, 3, 3), np.float32), tmp_path / "r", "*", backend="arrays")
    for server in serving(run):
        tab = Tab(chromium).open(server.url)
        about = [url for url in tab.requests if "/api/layer" in url]
        assert 1 <= len(about) <= 4
        assert len([url for url in tab.requests if "/tiles" in url]) <= 4
        tab.page.close()


def test_an_unfinished_store_shows_what_is_committed_and_says_so(tab: Tab, tmp_path: Path) -> None:
    def model(batch: Any) -> dict[str, Any]:
        return {"a": batch}

    data = np.random.default_rng(0).random((24, 1, 300, 300), np.float32)
    options: dict[str, Any] = {"batch_size": 4, "backend": "arrays", "memory": "20MiB", "part": "2/3"}
    lt.record_dataset(model, data, tmp_path / "r", "*", **options)
    run = lt.open(tmp_path / "r")
    assert 0 < run.n_committed < 24
    for server in serving(run):
        tab.open(server.url)
        assert tab.text("#count") == f"{run.n_committed} rows · not finished, of 24 rows (reload for more)"
        assert f"{run.n_committed} captured so far" in tab.text("#about")
        assert {one["row"] for one in tab.tiles()} <= set(np.flatnonzero(run.committed()).tolist())
        assert "300 \N{MULTIPLICATION SIGN} 300, drawn 64 across" in tab.text("#tops small")


def test_a_store_without_a_row_says_what_to_do(tab: Tab, tmp_path: Path) -> None:
    for server in serving(an_empty_store(tmp_path / "r")):
        tab.open(server.url)
        assert tab.text("#empty") == "No row is captured yet: run the capture, then reload."
        tab.press("ArrowDown", "ArrowRight", "Enter", "r", "Escape", "End")
        assert tab.page.locator("#alert").is_hidden()


def test_statistics_alone_still_open_channels(tab: Tab, tmp_path: Path) -> None:
    for server in serving(a_store(tmp_path / "r", stats="all", values=False)):
        tab.open(server.url)
        assert "statistics alone" in tab.text("#alert span")
        tab.press("ArrowDown", "ArrowRight", "Enter")
        assert tab.page.locator("svg.histogram").count() == 1
        assert not [url for url in tab.requests if "/tiles" in url or "/values" in url]
