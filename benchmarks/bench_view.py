"""How long the web page waits for its tiles, through the server, to the last byte.

    python -m pytest benchmarks/bench_view.py --benchmark-only --benchmark-columns=min,median,rounds

`first` finds nothing in memory and reads the store; `warm` finds the maps there and makes another picture of
them (a row or scale that was not drawn yet); `again` finds the picture itself. A tile is one map, a screen is
what the page asks for at once when it opens: rows by layers by channels in a few sprites.
"""

from __future__ import annotations

import http.client
import itertools
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.render.serve import Server

sys.path.insert(0, str(Path(__file__).parent))
from harness import n_rounds

#: The last layers of a ResNet's stages.
SHAPES = {"stage1": (64, 56, 56), "stage2": (128, 28, 28), "stage3": (256, 14, 14), "stage4": (2048, 7, 7)}
N_ROWS = 64
FRESH = itertools.count()


@dataclass(frozen=True)
class Case:
    """What is asked for at once."""

    id: str
    requests: tuple[str, ...]


TILES = [Case(name, (f"layer={name}&rows=17&channels=5",)) for name in SHAPES]
SPRITES = [
    Case("8-rows-x-8-of-56px", ("layer=stage1&rows=16-23&channels=0-7",)),
    Case("64-channels-of-56px", ("layer=stage1&rows=17&channels=0-63",)),
    Case("128-channels-of-7px", ("layer=stage4&rows=17&channels=0-127",)),
]
SCREEN = Case("a-screen", tuple(f"layer={name}&rows=16-23&channels=0-7" for name in SHAPES))
CASES = [*TILES, *SPRITES, SCREEN]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    rng = np.random.default_rng(0)

    def layers(inputs: Any) -> dict[str, Any]:
        made = {
            name: rng.standard_normal((len(inputs), *shape), np.float32) for name, shape in SHAPES.items()
        }
        return {name: np.maximum(values, 0) for name, values in made.items()}

    path: Path = tmp_path_factory.mktemp("view") / "run.zarr"
    data = np.zeros((N_ROWS, 4), np.float32), np.arange(N_ROWS) % 10
    run = lt.record_dataset(layers, data, path, "*", backend="arrays", batch_size=16, stats="cheap")
    made = Server(run)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def connection(server: Server) -> Iterator[http.client.HTTPConnection]:
    made = http.client.HTTPConnection("127.0.0.1", server.server_port)
    yield made
    made.close()


def asked(connection: http.client.HTTPConnection, case: Case, scope: str) -> int:
    """Ask for all of a case, one after the other on one connection; return the bytes that came."""
    n_bytes = 0
    for request in case.requests:
        connection.request("GET", f"/tiles?{request}&scope={scope}")
        answer = connection.getresponse()
        n_bytes += len(answer.read())
        assert answer.status == 200
    return n_bytes


@pytest.mark.parametrize("how", ["first", "warm", "again"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tiles(
    benchmark: Any, server: Server, connection: http.client.HTTPConnection, case: Case, how: str
) -> None:
    benchmark.group = f"tiles {case.id}"
    asked(connection, case, "layer")

    def scope() -> str:
        # Limits that were not asked for yet make a new picture of what is in memory.
        return "layer" if how == "again" else f"0:{1 + next(FRESH) / 1000}"

    def forget() -> tuple[tuple[Any, ...], dict[str, Any]]:
        if how == "first":
            server.routes.atlas.forget()
        return (connection, case, scope()), {}

    assert benchmark.pedantic(asked, setup=forget, rounds=n_rounds(20), warmup_rounds=2)
