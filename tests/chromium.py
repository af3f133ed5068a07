"""A headless Chromium for tests of the web page, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """Give a browser; skip where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here; the page's own tests need one (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


class Tab:
    """A page that notes what goes wrong in it, and what it asks for."""

    def __init__(self, started: Any, **options: Any) -> None:
        self.page = started.new_page(**({"viewport": {"width": 1200, "height": 760}} | options))
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type == "error" else None
        )
        self.page.set_default_timeout(20_000)

    def open(self, url: str) -> Tab:
        """Load an address anew, and wait until every tile on the screen is there."""
        self.page.goto("about:blank")
        self.page.goto(url)
        return self.settled()

    def settled(self) -> Tab:
        """Wait until nothing that is on the screen is missing."""
        self.page.wait_for_function(
            "() => document.querySelector('#count').textContent && "
            "(document.querySelector('#board').hidden || !document.querySelector('#empty').hidden || "
            "(document.querySelector('#canvas').tiles?.length && "
            "document.querySelector('#canvas').tiles.every((tile) => tile.there)))"
        )
        return self

    def picture(self) -> bytes:
        """Return a picture of all but header and footer, once it does not change any more."""
        main, last = self.page.locator("main"), b""
        for _ in range(40):
            now: bytes = main.screenshot()
            if now == last:
                return now
            last = now
            self.page.wait_for_timeout(80)
        raise AssertionError("the page does not come to rest")

    def press(self, *keys: str) -> Tab:
        """Press keys one after the other, each once the page has painted what the last did."""
        for key in keys:
            self.page.keyboard.press(key)
            self.page.evaluate(
                "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)))"
            )
        return self

    def tiles(self) -> list[dict[str, Any]]:
        """Return where each tile on the board is, and of which layer, channel and row."""
        found: list[dict[str, Any]] = self.page.evaluate(
            "() => (document.querySelector('#canvas').tiles ?? [])"
            ".map((tile) => ({...tile, layer: tile.layer.name}))"
        )
        return found

    def tile(self, layer: str, row: int, channel: int) -> dict[str, Any]:
        """Return one of them."""
        wanted = (layer, row, channel)
        return next(one for one in self.tiles() if (one["layer"], one["row"], one["channel"]) == wanted)

    def hover(self, tile: dict[str, Any], u: float = 0.5, v: float = 0.5) -> str:
        """Put the pointer on a place of a tile, from 0 to 1; return what the page says of it."""
        box = self.page.locator("#canvas").bounding_box()
        assert box is not None
        self.page.mouse.move(
            box["x"] + tile["x"] + u * tile["width"], box["y"] + tile["y"] + v * tile["height"]
        )
        self.page.wait_for_function(
            "([layer, row, channel]) => { const said = document.querySelector('#place').textContent;"
            " return said.startsWith(`${layer}, row ${row}, `) && said.includes(` ${channel}`)"
            " && !said.endsWith('…'); }",
            arg=[tile["layer"], tile["row"], tile["channel"]],
        )
        return self.text("#place")

    def text(self, selector: str) -> str:
        """Return the text of an element."""
        return str(self.page.locator(selector).first.text_content())

    def query(self) -> str:
        """Return what stands behind the # of the address."""
        return str(self.page.evaluate("() => location.hash"))

    def colours(self, tile: dict[str, Any], height: int, width: int) -> list[list[list[int]]]:
        """Return the colour in the middle of each cell of a tile, RGB."""
        found: list[list[list[int]]] = self.page.evaluate(
            """([tile, height, width]) => {
              const canvas = document.querySelector('#canvas'), pen = canvas.getContext('2d');
              const ratio = canvas.width / canvas.clientWidth;
              const colour = (x, y) => [...pen.getImageData(
                ratio * (tile.x + (x + 0.5) * tile.width / width),
                ratio * (tile.y + (y + 0.5) * tile.height / height), 1, 1).data].slice(0, 3);
              const numbers = (n) => Array.from({length: n}, (_, i) => i);
              return numbers(height).map((y) => numbers(width).map((x) => colour(x, y)));
            }""",
            [tile, height, width],
        )
        return found
