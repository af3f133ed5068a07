"""An S3 server of our own process tree, and a web server in front of it that can be slow, fail and count."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


class S3Server:
    """moto in a process of its own: one in the client's process can wait for the client for ever."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._put_bucket()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.stop()
                    raise
                time.sleep(0.1)

    def _put_bucket(self) -> None:
        url = f"http://127.0.0.1:{self.port}/{BUCKET}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Front:
    """Passes requests on to a server, after `before(method, path)` has had its say.

    `before` returns None to let a request through, or a status to answer with; it may sleep.
    """

    def __init__(self, port: int) -> None:
        self.before: Callable[[str, str], int | None] = lambda method, path: None
        self.counts: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self._body()
                with front._lock:
                    front.counts[self.command] += 1
                    front.at_once += 1
                    front.most_at_once = max(front.most_at_once, front.at_once)
                try:
                    status = front.before(self.command, self.path)
                    if status is not None:
                        self._answer(status, b"", {})
                        return
                    headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
                    server = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    server.request(self.command, self.path, body, headers)
                    answer = server.getresponse()
                    data = answer.read()
                    self._answer(answer.status, data, dict(answer.getheaders()))
                    server.close()
                finally:
                    with front._lock:
                        front.at_once -= 1

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
                length = headers.get("Content-Length", str(len(data)))
                self.send_response_only(status)
                for key, value in headers.items():
                    if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(key, value)
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815 - http.server's names

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class FileServer:
    """A plain web server of a folder, with ranges or without."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.counts: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.counts[self.command] += 1
                file = folder / self.path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                data, status = file.read_bytes(), 200
                headers = {"Last-Modified": self.date_time_string(int(file.stat().st_mtime))}
                asked = self.headers.get("Range", "")
                if ranges and asked.startswith("bytes="):
                    first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
                    headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                    status = 206 if first < len(data) else 416
                    data = data[first : last + 1]
                self.send_response_only(status)
                for key, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET  # noqa: N815 - http.server's names

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
