"""A web server for one reader of one store: on this machine alone, read-only, from a fixed list of routes.

What it trusts. It listens on 127.0.0.1, and answers only where the `Host` header says so: a page from
elsewhere whose name was made to lead here (DNS rebinding) gets nothing. No header allows another origin to
read an answer. A path is looked up in a table and never in a file system. The page's content security
policy lets no script, style or request be but its own, and everything that a store says reaches the page as
JSON, numbers or PNG.
"""

from __future__ import annotations

import json
import socketserver
import sys
import threading
import traceback
import webbrowser
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from ..capture.errors import DrawError, LayertapError, SelectionError, StoreError
from ..capture.printable import printable
from .atlas import Atlas, Look
from .bounded import Bounded
from .channel_facts import ChannelFacts, finite
from .page_data import SCRIPTS, as_json, cut_facts, layer_facts, page_file, picture_png, run_facts
from .row_filter import RowFilter, facts_of

if TYPE_CHECKING:
    from ..capture.reader import Run

Answer = tuple[str, bytes, dict[str, str]]

HOST = "127.0.0.1"
#: Nothing but what this server sends; pictures are made by the page too.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_JSON, _BINARY = "application/json; charset=utf-8", "application/octet-stream"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{f"/{name}": (name, "text/javascript; charset=utf-8") for name in SCRIPTS},
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
#: Of an answer whose address names the store's version: it never means anything else.
_KEPT = {"Cache-Control": "private, max-age=3600, immutable"}
_MOST_FACTS, _MOST_ROWS, _MOST_CHANNELS = 512, 1024, 65_536
_IDLE_S = 60


class Query:
    """What stands behind the question mark of an address.

    Raises:
        DrawError: it cannot be read.
    """

    def __init__(self, text: str) -> None:
        try:
            self._given = parse_qs(text, keep_blank_values=True, max_num_fields=32, errors="strict")
        except ValueError as error:
            raise DrawError(f"the address cannot be read: {error}") from None

    def maybe(self, name: str) -> str | None:
        """Return a text, or None where there is none."""
        found = self._given.get(name)
        return found[0] if found and found[0] else None

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        found = self.maybe(name)
        if found is None:
            raise DrawError(f"the address names no {name}")
        return found

    def number(self, name: str) -> int:
        """Return a whole number, 0 or more."""
        return self.numbers(name, 1)[0]

    def numbers(self, name: str, most: int) -> tuple[int, ...]:
        """Return at most so many whole numbers, with commas between them, and `5-9` for 5 to 9."""
        found: list[int] = []
        for part in self.text(name).split(","):
            first, last = (_whole(end, name) for end in (part.partition("-")[0], part.rpartition("-")[2]))
            if last - first >= most - len(found):
                raise DrawError(f"{name}: there may be {most} at once")
            found += range(first, last + 1)
        if not found:
            raise DrawError(f"the address names no {name}")
        return tuple(found)


def _look(query: Query) -> Look:
    return Look.parse(*(query.maybe(key) for key in ("scope", "colormap", "clip")))


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise DrawError(f"{name}: whole numbers with commas between them are wanted, not {text[:40]!r}")
    return int(text)


class Routes:
    """What answers each path, from a store.

    Args:
        run: the store.
    """

    def __init__(self, run: Run) -> None:
        self.atlas = Atlas(run)
        self._rows: Bounded[bytes] = Bounded(32 * 2**20, len)
        self._channels: Bounded[bytes] = Bounded(32 * 2**20, len)
        self._layers: dict[str, ChannelFacts] = {}
        self._refreshing = threading.Lock()
        self._answers: dict[str, Callable[[Query], Answer]] = {
            "/api/run": self._run,
            "/api/rows": self._chosen,
            "/api/facts": self._facts,
            "/api/layer": self._layer,
            "/api/cuts": self._cuts,
            "/api/limits": self._limits,
            "/api/channel": self._channel,
            "/tiles": self._tiles,
            "/values": self._values,
            "/picture": self._picture,
        }

    def __contains__(self, path: str) -> bool:
        return path in _FILES or path in self._answers

    def answer(self, path: str, query: str) -> Answer:
        """Return type, bytes and headers of what stands at one of the paths.

        Raises:
            LayertapError: what is asked for is not there, or cannot be read.
        """
        if path in _FILES:
            name, kind = _FILES[path]
            return kind, page_file(name), {"Cache-Control": "no-cache"}
        return self._answers[path](Query(query))

    def _run(self, query: Query) -> Answer:
        run = self.atlas.run
        with self._refreshing:
            before = run.blocks
            if not run.complete:
                run.refresh()
            if run.blocks != before:
                self.atlas.forget()
                self._rows.clear()
                self._channels.clear()
                self._layers.clear()
        return _JSON, as_json(run_facts(self.atlas)), {}

    def _chosen(self, query: Query) -> Answer:
        chosen = RowFilter(*(query.maybe(key) for key in ("label", "prediction", "outcome", "text")))
        return _BINARY, self._rows.get(chosen, lambda: chosen.rows(self.atlas.run).tobytes()), {}

    def _facts(self, query: Query) -> Answer:
        rows = query.numbers("rows", _MOST_FACTS)
        return _JSON, as_json(facts_of(self.atlas.run, rows, columns=len(rows) == 1)), _KEPT

    def _layer(self, query: Query) -> Answer:
        return _JSON, as_json(layer_facts(self.atlas, query.text("layer"))), _KEPT

    def _cuts(self, query: Query) -> Answer:
        look, name = _look(query), query.text("layer")
        if look.clip is None or look.scope not in ("layer", "channel"):
            raise DrawError("a percentile is asked for, of a layer or of its channels")
        symmetric = look.symmetric(self.atlas.ranges(name).signed)
        facts = cut_facts(self.atlas, name, look.clip, symmetric, look.scope == "channel")
        return _JSON, as_json(facts), _KEPT

    def _limits(self, query: Query) -> Answer:
        low, high = map(finite, self.atlas.store_limits())
        return _JSON, as_json({"low": low, "high": high}), _KEPT

    def _channel(self, query: Query) -> Answer:
        name, channel = query.text("layer"), query.number("channel")
        self.atlas.check(name, channel)
        if name not in self._layers:
            self._layers[name] = ChannelFacts(self.atlas.run, name)
        its = self._layers[name]
        made = self._channels.get((name, channel), lambda: as_json(its.of(channel)))
        return _JSON, made, _KEPT

    def _tiles(self, query: Query) -> Answer:
        look = _look(query)
        rows, channels = query.numbers("rows", _MOST_ROWS), query.numbers("channels", _MOST_CHANNELS)
        name = query.text("layer")
        data, headers = self.atlas.tiles(name, rows, channels, look), dict(_KEPT)
        if look.scope == "row":
            scale = self.atlas.row_scale(name, rows, look)
            pairs = zip(scale.low[:, 0], scale.high[:, 0], strict=True)
            headers["X-Limits"] = json.dumps([[finite(limit) for limit in pair] for pair in pairs])
        return "image/png", data, headers

    def _values(self, query: Query) -> Answer:
        name, row, channel = query.text("layer"), query.number("row"), query.number("channel")
        values, shape = self.atlas.exact(name, row, [channel])
        headers = {"X-Type": str(values.dtype), "X-Shape": json.dumps(asdict(shape))}
        return _BINARY, values.tobytes(), headers | _KEPT

    def _picture(self, query: Query) -> Answer:
        return "image/png", picture_png(self.atlas.run, query.number("row")), _KEPT


class Server(ThreadingHTTPServer):
    """Serves the page of one store on 127.0.0.1.

    Args:
        run: the store.
        port: the port; 0 takes one that is free.

    Raises:
        StoreError: the port cannot be used.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, run: Run, port: int = 0) -> None:
        self.routes = Routes(run)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise StoreError(
                f"port {port} of {HOST} cannot be used ({error}); without a port, a free one is taken"
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "layertap", ""
    server: Server
    timeout = _IDLE_S
    # Headers and body leave in one piece, and at once: in two, the second waits until the first is confirmed.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            self._fail(421, f"this is {self.server.url}, and answers under no other name")
            return
        address = urlsplit(self.path)
        if address.path not in self.server.routes:
            self._fail(404, "there is no such page")
            return
        try:
            kind, body, headers = self.server.routes.answer(address.path, address.query)
        except LayertapError as error:
            self._fail(_status(error), str(error))
        except Exception as error:
            traceback.print_exc()
            self._fail(500, f"{type(error).__name__}: {error}")
        else:
            self._send(200, kind, body, headers)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any other method
            return self._refuse
        raise AttributeError(name)

    def _refuse(self) -> None:
        self.close_connection = True  # what it sends is not read
        self._fail(405, "this server is for reading", {"Allow": "GET, HEAD"})

    def _fail(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, _JSON, as_json({"error": words}), headers or {})

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        for key, value in (about | _HEADERS | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def _status(error: LayertapError) -> int:
    """Return the status that says whose fault it is: of who asks, or of the store behind this server."""
    return 404 if isinstance(error, SelectionError) else 400 if isinstance(error, DrawError) else 502


def view(run: Run, port: int = 0, *, browser: bool = True, say: Callable[[str], None] = print) -> None:
    """Show a store in a web browser, until the process is interrupted.

    Args:
        run: the store.
        port: the port of 127.0.0.1 to serve at; 0 takes one that is free.
        browser: whether to open a browser.
        say: takes the line with the address.

    Raises:
        StoreError: the port cannot be used.
    """
    with Server(run, port) as server:
        say(f"{printable(run.path)} at {server.url} (Ctrl-C ends it)")
        if browser:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
