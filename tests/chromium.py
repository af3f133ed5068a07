"""A headless Chromium for tests of the web page, where there is one."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

#: Whether the page painted what was last done, and has all that is on the screen.
_AT_REST = """() => document.querySelector('main').ariaBusy === 'false'
  && [...document.querySelectorAll('main img')].every((image) => image.hidden || image.naturalWidth)"""


@contextmanager
def browser() -> Iterator[Any]:
    """Give a browser; skip where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="the page's own tests drive it with playwright")
    with api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("no Chromium here; the page's own tests need one (Debian: apt-get install chromium)")
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
        self.page.set_default_timeout(60_000)

    def open(self, url: str) -> Tab:
        """Load an address anew, and wait until the page is at rest."""
        self.page.goto("about:blank")
        self.page.goto(url)
        return self.settled()

    def settled(self) -> Tab:
        """Wait until the page has painted what was last done, with all that is on the screen."""
        self.page.wait_for_function(_AT_REST)
        return self

    def press(self, *keys: str) -> Tab:
        """Press keys one after the other, each once the page has painted what the last did."""
        for key in keys:
            self.page.keyboard.press(key)
            self.settled()
        return self

    def scroll(self, script: str, *arguments: Any) -> Tab:
        """Scroll by a script, and wait for the frame after the one in which the page is told of it."""
        self.page.evaluate(
            f"""async (given) => {{ ({script})(document.querySelector('#board'), given);
              for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame); }}""",
            *arguments,
        )
        return self.settled()

    def choose(self, **options: str) -> Tab:
        """Choose in the header's lists."""
        for name, value in options.items():
            self.page.select_option(f"[name={name}]", value)
        return self.settled()

    def counts(self, rows: str) -> Tab:
        """Wait until the page says that so many rows fit."""
        self.page.wait_for_function(
            "(rows) => document.querySelector('#count').textContent.startsWith(rows)", arg=rows
        )
        return self.settled()

    def picture(self) -> NDArray[np.uint8]:
        """Return a picture of all but header and footer, RGB."""
        data: bytes = self.page.locator("main").screenshot()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def tiles(self) -> list[dict[str, Any]]:
        """Return where each tile on the board is, and of which layer, channel and row."""
        found: list[dict[str, Any]] = self.page.evaluate(
            "() => document.querySelector('#canvas').tiles.map((tile) => ({...tile, layer: tile.layer.name}))"
        )
        return found

    def tile(self, layer: str, row: int, channel: int) -> dict[str, Any]:
        """Return one of them."""
        wanted = (layer, row, channel)
        return next(one for one in self.tiles() if (one["layer"], one["row"], one["channel"]) == wanted)

    def canvas(self) -> NDArray[np.uint8]:
        """Return the pixels of the board, RGB."""
        shot: str = self.page.evaluate("() => document.querySelector('#canvas').toDataURL().split(',')[1]")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))

    def hover(self, tile: dict[str, Any], u: float = 0.5, v: float = 0.5) -> str:
        """Put the pointer on a place of a tile, from 0 to 1; return what the page says of it."""
        box = self.page.locator("#canvas").bounding_box()
        assert box is not None
        x, y = tile["x"] + u * tile["width"], tile["y"] + v * tile["height"]
        self.page.mouse.move(box["x"] + x, box["y"] + y)
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


def alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    """Return whether two pictures are the same, but for the edges of letters, which a browser draws anew."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b).max()) <= 8


def part(canvas: NDArray[np.uint8], tile: dict[str, Any]) -> NDArray[np.uint8]:
    """Return the pixels of a tile on a canvas, at one device pixel a CSS pixel."""
    x, y = round(tile["x"]), round(tile["y"])
    return canvas[y : y + round(tile["height"]), x : x + round(tile["width"])]
