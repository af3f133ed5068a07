"""The server behind the web page: what its routes answer, and what it refuses."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.errors import StoreError
from layertap.render import serve
from layertap.render.bounded import Bounded
from layertap.render.colormaps import Mark, palette
from layertap.render.page_data import SCRIPTS
from layertap.render.row_filter import RowFilter, classes_of
from layertap.render.serve import Server
from PIL import Image
from stores import CLASSES, HOSTILE, N_ROWS, a_store
from test_ragged import Sequences, double
from test_render_run import FakeArray, a_run


def asked(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def serving(run: Any) -> Iterator[Server]:
    server = Server(run)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a store without statistics."""
    yield from serving(a_store(tmp_path_factory.mktemp("plain") / "run.zarr"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a store with all statistics."""
    yield from serving(a_store(tmp_path_factory.mktemp("measured") / "run.zarr", stats="all"))


def got(server: Server, route: str, **query: Any) -> bytes:
    status, _, body = asked(server, f"{route}?{urlencode(query)}")
    assert status == 200, body
    return body


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(data))
    assert image.mode == "P"
    return np.asarray(image)


# What is answered


def test_the_run_says_what_the_page_must_know(plain: Server) -> None:
    run = json.loads(got(plain, "/api/run"))
    assert (run["rows"], run["captured"], run["complete"]) == (N_ROWS, N_ROWS, True)
    assert [one["name"] for one in run["classes"]] == CLASSES
    assert run["outcome"] == {"right": 27, "wrong": 13}
    layers = {one["name"]: one for one in run["layers"]}
    assert list(layers) == ["conv1", "layer2.<b>x</b>", "fc", "tokens"]
    assert (layers["conv1"]["map"]["height"], layers["conv1"]["map"]["width"]) == (6, 5)
    assert [layers[name]["wire"] for name in layers] == ["float32", "float32", "float64", "int64"]
    assert (layers["tokens"]["map"]["n_cells"], layers["tokens"]["map"]["axes"]) == (7, ["token"])
    assert bytes.fromhex(run["palettes"]["viridis"]) == palette("viridis").tobytes()


def test_rows_are_filtered_by_class_prediction_outcome_and_id(plain: Server) -> None:
    def rows(**query: str) -> list[int]:
        return np.frombuffer(got(plain, "/api/rows", **query), "<u4").tolist()

    numbers = np.arange(N_ROWS)
    assert rows() == numbers.tolist()
    assert rows(label=HOSTILE) == numbers[numbers % 3 == 1].tolist()
    assert rows(label="1") == rows(label=HOSTILE)
    assert rows(prediction="frog") == numbers[numbers % 3 != 1].tolist()
    assert rows(outcome="wrong") == rows(label=CLASSES[2]) == numbers[numbers % 3 == 2].tolist()
    assert rows(outcome="right", label=CLASSES[2]) == []
    assert rows(text="SET/01") == list(range(10, 20))
    assert rows(text="3-é") == [3, 13, 23, 33]


def test_a_class_that_is_not_there_is_refused_with_the_closest(plain: Server) -> None:
    status, _, body = asked(plain, "/api/rows?label=frogg")
    assert status == 404
    assert "frog" in json.loads(body)["error"]


@pytest.mark.parametrize("name", ["conv1", "layer2.<b>x</b>", "fc", "tokens"])
def test_values_are_those_of_the_store_to_the_bit(plain: Server, name: str) -> None:
    run = plain.routes.atlas.run
    for channel in range(3):
        status, headers, body = asked(plain, f"/values?layer={quote(name)}&row=9&channel={channel}")
        assert status == 200
        stored = run[name][9][..., channel] if name == "tokens" else run[name][9][channel]
        found = np.frombuffer(body, headers["X-Type"])
        assert found.tolist() == pytest.approx(stored.ravel().tolist(), rel=0, abs=0, nan_ok=True)


def test_tiles_are_the_entries_of_the_scale_that_is_asked_for(plain: Server) -> None:
    run = plain.routes.atlas.run
    values = run["conv1"][[3, 30]][:, [0, 7]]
    sprite = pixels(got(plain, "/tiles", layer="conv1", rows="3,30", channels="0,7"))
    assert sprite.shape == (2 * 6, 2 * 5)
    high = run["conv1"][...].max()
    expected = np.rint(values / high * 230).astype(int).transpose(0, 2, 1, 3).reshape(12, 10)
    assert np.abs(sprite - expected).max() <= 1
    by_map = pixels(got(plain, "/tiles", layer="conv1", rows="3,30", channels="0,7", scope="map"))
    for row in range(2):
        for channel in range(2):
            tile = by_map[6 * row : 6 * row + 6, 5 * channel : 5 * channel + 5]
            assert tile.max() == 230
            assert np.unravel_index(tile.argmax(), tile.shape) == np.unravel_index(
                values[row, channel].argmax(), (6, 5)
            )
    row_high = run["conv1"][3].max()
    by_row = pixels(got(plain, "/tiles", layer="conv1", rows="3", channels="0-11", scope="row"))
    assert np.abs(by_row[:, :5] - np.rint(values[0, 0] / row_high * 230)).max() <= 1


def test_what_is_no_ordinary_value_has_its_mark(plain: Server) -> None:
    run = plain.routes.atlas.run
    flat = pixels(got(plain, "/tiles", layer="conv1", rows="5", channels="3,4"))
    assert (np.unique(flat[:, :5]), np.unique(flat[:, 5:])) == ([Mark.ZERO], [Mark.CONSTANT])
    signed = pixels(got(plain, "/tiles", layer="layer2.<b>x</b>", rows="0", channels="0,1"))
    assert signed[1, 2] == Mark.NAN
    assert (signed[0, 4], signed[3, 7]) == (Mark.POSITIVE_INFINITY, Mark.NEGATIVE_INFINITY)
    given = pixels(got(plain, "/tiles", layer="conv1", rows="5", channels="0", scope="0.25:0.75"))
    values = run["conv1"][5, 0]
    assert ((given == Mark.OVER) == (values > 0.75)).all()
    assert ((given == Mark.UNDER) == (values < 0.25)).all()


@pytest.mark.parametrize("scope", ["layer", "channel", "row", "map"])
@pytest.mark.parametrize("name", ["conv1", "layer2.<b>x</b>"])
def test_a_percentile_cuts_what_shares_a_scale_and_marks_what_it_cuts_off(
    plain: Server, name: str, scope: str
) -> None:
    values = plain.routes.atlas.run[name][[3, 30]][:, [0, 2]].astype(np.float64)
    every = plain.routes.atlas.run[name][...].astype(np.float64)
    shares = {
        "layer": lambda row, channel: every,
        "channel": lambda row, channel: every[:, [0, 2][channel]],
        "row": lambda row, channel: every[[3, 30][row]],
        "map": lambda row, channel: values[row, channel],
    }[scope]
    query = {"layer": name, "rows": "3,30", "channels": "0,2", "scope": scope, "clip": "95"}
    height, width = values.shape[2:]
    sprite = pixels(got(plain, "/tiles", **query)).reshape(2, height, 2, width).transpose(0, 2, 1, 3)
    for row, channel in np.ndindex(2, 2):
        its = shares(row, channel)
        its = its[np.isfinite(its)]
        sizes = np.sort(np.abs(its))
        cut = sizes[int(np.ceil(round(0.95 * sizes.size, 6))) - 1]
        over, under = sprite[row, channel] == Mark.OVER, sprite[row, channel] == Mark.UNDER
        assert (over == (values[row, channel] > cut)).all()
        assert (under == (values[row, channel] < -cut)).all()
    assert (sprite == Mark.OVER).any() or its.size < 20


def test_where_histograms_are_kept_they_tell_percentiles_to_a_bin_and_no_row_is_read(
    measured: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layertap.render import ranges

    def never(*_: Any) -> Any:
        raise AssertionError("rows are read")

    monkeypatch.setattr(ranges, "some_rows", never)
    values = measured.routes.atlas.run["conv1"][...]
    whole = json.loads(got(measured, "/api/cuts", layer="conv1", clip="99"))
    each = json.loads(got(measured, "/api/cuts", layer="conv1", clip="99", scope="channel"))
    assert whole["rows"] == each["rows"] == N_ROWS
    assert whole["about"] is each["about"] is True
    for (low, high), some in [
        (whole["limits"], values),
        *((each["limits"][i], values[:, i]) for i in (0, 5)),
    ]:
        exact = np.percentile(some, 99, method="inverted_cdf")
        assert low is None
        assert exact <= high <= 1.13 * exact
    assert each["limits"][3] == [None, None]  # a dead channel is not cut


def test_without_histograms_percentiles_come_from_rows(tmp_path: Path) -> None:
    run = a_store(tmp_path / "r", stats="cheap")
    for server in serving(run):
        cut = json.loads(got(server, "/api/cuts", layer="conv1", clip="99"))
        exact = np.percentile(run["conv1"][...], 99, method="inverted_cdf")
        assert cut == {"rows": N_ROWS, "about": False, "limits": [None, float(exact)]}


def test_a_value_beyond_the_rows_that_were_looked_at_is_marked_and_not_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layertap.render import ranges

    monkeypatch.setattr(ranges, "MOST_ROWS", 2)
    values = np.ones((6, 2, 3, 3), np.float32) * np.arange(1, 10).reshape(3, 3)
    values[3, 1, 0, 0], values[3, 0, 2, 2] = 50, -1
    run = lt.record_dataset(
        lambda batch: {"a": batch}, values, tmp_path / "r", "*", backend="arrays", batch_size=2
    )
    for server in serving(run):
        layer = json.loads(got(server, "/api/layer", layer="a"))
        assert (layer["low"], layer["high"], layer["rows"], layer["whole"]) == (1, 9, 2, False)
        tile = pixels(got(server, "/tiles", layer="a", rows="3", channels="0,1"))
        assert (tile[0, 3], tile[2, 2]) == (Mark.OVER, Mark.UNDER)


def test_statistics_say_what_is_known_of_all_rows(measured: Server, plain: Server) -> None:
    run = measured.routes.atlas.run
    exact, looked = (json.loads(got(server, "/api/layer", layer="conv1")) for server in (measured, plain))
    values = run["conv1"][...].astype(np.float64)
    assert exact["whole"]
    assert exact["high"] == looked["high"] == values.max()
    assert set(exact["measures"]) == {"mean", "maximum", "variance", "l1", "l2", "sparsity", "f_ratio"}
    assert set(looked["measures"]) == set(exact["measures"]) - {"f_ratio"}
    for layer in (exact, looked):
        assert layer["odd"] == {"dead": [3], "constant": [4]}
    signed = json.loads(got(plain, "/api/layer", layer="layer2.<b>x</b>"))
    assert signed["odd"] == {"NaN": [0], "infinite": [1]}
    for by in looked["measures"]:
        assert looked["measures"][by] == pytest.approx(exact["measures"][by], rel=1e-6), by
    assert exact["measures"]["l2"] == pytest.approx(np.sqrt((values**2).sum((0, 2, 3))).tolist())


def test_a_channels_facts_come_from_statistics_or_from_rows_and_say_so(
    measured: Server, plain: Server
) -> None:
    kept, looked = (json.loads(got(s, "/api/channel", layer="conv1", channel=5)) for s in (measured, plain))
    values = measured.routes.atlas.run["conv1"][:, 5].astype(np.float64)
    maxima = values.max((1, 2))
    for facts in (kept, looked):
        assert (facts["rows"], facts["whole"], facts["lacking"]) == (N_ROWS, True, [])
        assert facts["numbers"]["maximum"] == values.max()
        assert facts["numbers"]["mean"] == pytest.approx(values.mean())
        assert facts["top"][0]["row"] == maxima.argmax()
        assert [one["value"] for one in facts["top"]] == sorted(maxima, reverse=True)[: len(facts["top"])]
        assert sum(facts["histogram"]["counts"]) == values.size
        means = {one["name"]: one["mean"] for one in facts["classes"]}
        expected = [values[np.arange(N_ROWS) % 3 == label].mean() for label in range(3)]
        assert [means[name] for name in CLASSES] == pytest.approx(expected)
    at = kept["top"][0]["at"]
    assert values[(maxima.argmax(), *at)] == maxima.max()
    assert np.array(kept["classes"][0]["map"]).shape == (6, 5)


def test_the_rows_that_excite_a_channel_most_come_from_means_and_maxima_where_these_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layertap.render import ranges

    monkeypatch.setattr(ranges, "MOST_ROWS", 4)
    run = a_store(tmp_path / "r", stats="pooled", memory="1.6MiB")
    assert len(run.blocks) > 1
    for server in serving(run):
        for channel in (3, 6):
            facts = json.loads(got(server, "/api/channel", layer="conv1", channel=channel))
            maxima = run["conv1"][:, channel].max((1, 2))
            order = np.argsort(-maxima, kind="stable")[:16]
            assert [(one["row"], one["value"]) for one in facts["top"]] == [
                (row, maxima[row]) for row in order
            ]
            assert "top" not in facts["sampled"]


def test_of_many_rows_without_statistics_some_are_looked_at_and_the_flag_is_named(
    plain: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layertap.render import ranges

    monkeypatch.setattr(ranges, "MOST_ROWS", 10)
    facts = json.loads(got(plain, "/api/channel", layer="conv1", channel=6))
    assert facts["sample_rows"] == 10
    assert facts["sampled"] == ["numbers", "histogram", "top", "classes"]
    assert [one["stats"] for one in facts["lacking"]] == ["cheap", "histogram", "top:16", "classes"]
    assert facts["numbers"]["count"] == 10 * 30


def test_row_facts_have_the_users_own_columns_for_one_row(plain: Server) -> None:
    several = json.loads(got(plain, "/api/facts", rows="1,2"))
    assert [one["right"] for one in several] == [True, False]
    assert several[0] == {
        "row": 1,
        "id": "set/001-É.png",
        "true": HOSTILE,
        "predicted": HOSTILE,
        "right": True,
    }
    assert json.loads(got(plain, "/api/facts", rows="1"))[0]["columns"] == {"note": f"{HOSTILE} 1"}


def test_a_picture_is_the_stores(plain: Server) -> None:
    image = Image.open(io.BytesIO(got(plain, "/picture", row=7)))
    assert (np.asarray(image) == plain.routes.atlas.run.rows["picture"][7]).all()


# What is refused


def test_another_host_name_is_refused(plain: Server) -> None:
    port = plain.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        status, _, body = asked(plain, "/api/run", Host=host)
        assert status == 421, host
        assert b"answers under no other name" in body
    assert asked(plain, "/api/run", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"])
def test_nothing_but_reading_is_allowed(plain: Server, method: str) -> None:
    status, headers, _ = asked(plain, "/api/run", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_says_what_get_does_without_a_body(plain: Server) -> None:
    status, headers, body = asked(plain, "/page.js", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(got(plain, "/page.js"))


@pytest.mark.parametrize(
    "path",
    [
        "/zarr.json",
        "/page/page.js",
        "/../pyproject.toml",
        "/page.css/",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page.css%00",
        "/api",
        "/serve.py",
    ],
)
def test_no_path_leads_to_a_file(plain: Server, path: str) -> None:
    assert asked(plain, path)[0] == 404


def test_every_answer_is_told_to_run_nothing_foreign(plain: Server) -> None:
    for path in ("/", "/page.js", "/api/run", "/tiles", "/nothing"):
        _, headers, _ = asked(plain, path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert "Python" not in headers["Server"]


def test_the_page_names_no_other_address() -> None:
    for name in ("index.html", "page.css", *SCRIPTS, "icon.svg"):
        text = (serve.page_file(name)).decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/tiles?rows=1&channels=0", 400, "names no layer"),
        ("/tiles?layer=conv2&rows=1&channels=0", 404, "conv1"),
        ("/tiles?layer=conv1&rows=40&channels=0", 404, "0 to 39"),
        ("/tiles?layer=conv1&rows=1&channels=12", 404, "channel 12"),
        ("/tiles?layer=conv1&rows=1&channels=0&scope=figure", 400, "layer, channel"),
        ("/tiles?layer=conv1&rows=1&channels=0&scope=1:0", 400, "limits"),
        ("/tiles?layer=conv1&rows=1&channels=0&scope=0:inf", 400, "limits"),
        ("/tiles?layer=conv1&rows=1&channels=0&colormap=jet", 400, "viridis"),
        ("/tiles?layer=conv1&rows=1&channels=0&clip=98", 400, "clip is one of 99.9, 99, 95"),
        ("/tiles?layer=conv1&rows=1&channels=0&scope=store&clip=99", 400, "not of 'store'"),
        ("/tiles?layer=conv1&rows=1&channels=0&scope=0:1&clip=99", 400, "not of '0:1'"),
        ("/api/cuts?layer=conv1&scope=map&clip=99", 400, "of a layer or of its channels"),
        ("/api/cuts?layer=conv2&clip=99", 404, "conv1"),
        ("/tiles?layer=conv1&rows=0-99999999999&channels=0", 400, "1024 at once"),
        ("/tiles?layer=conv1&rows=-1&channels=0", 400, "whole numbers"),
        ("/tiles?layer=conv1&rows=&channels=0", 400, "names no rows"),
        ("/values?layer=conv1&row=1,2&channel=0", 400, "1 at once"),
        ("/values?layer=conv1&row=٣&channel=0", 400, "whole numbers"),
        ("/picture?row=40", 404, "0 to 39"),
        ("/api/channel?layer=conv1&channel=99", 404, "0 to 11"),
        ("/api/facts?rows=0-999", 400, "512"),
        ("/api/rows?outcome=maybe", 400, "right or wrong"),
        ("/api/rows?text=%ff", 400, "cannot be read"),
    ],
)
def test_a_bad_request_is_told_in_a_sentence(plain: Server, path: str, status: int, words: str) -> None:
    found, _, body = asked(plain, quote(path, safe="/?=&%:,"))
    assert found == status
    assert words in json.loads(body)["error"]


def test_so_many_pixels_are_refused_before_they_are_read(
    plain: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layertap.render import atlas

    monkeypatch.setattr(atlas, "MOST_PIXELS", 6 * 5 * 4)
    assert asked(plain, "/tiles?layer=conv1&rows=1,2&channels=0,1&scope=map")[0] == 200
    status, _, body = asked(plain, "/tiles?layer=conv1&rows=1,2&channels=0-2&scope=map")
    assert status == 400
    assert b"180 pixels" in body


def test_a_port_that_is_taken_is_an_error(plain: Server) -> None:
    with pytest.raises(StoreError, match=r"cannot be used.*a free one"):
        Server(plain.routes.atlas.run, plain.server_port)


# What is kept


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    cache: Bounded[bytes] = Bounded(10, len)
    made: list[str] = []

    def make(key: str, n: int) -> bytes:
        made.append(key)
        return bytes(n)

    for key, n in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("large", 11)):
        assert len(cache.get(key, lambda key=key, n=n: make(key, n))) == n  # type: ignore[misc]
    assert made == ["a", "b", "c", "large"]
    assert (len(cache), cache.n_bytes) == (2, 8)
    assert cache.find("b") is None
    assert cache.find("large") is None


def test_of_threads_that_ask_at_once_one_makes() -> None:
    cache: Bounded[bytes] = Bounded(100, len)
    made: list[int] = []
    together = threading.Barrier(5)

    def make() -> bytes:
        made.append(1)
        threading.Event().wait(0.05)
        return b"x"

    def ask() -> None:
        together.wait()
        cache.get("key", make)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_map_that_was_read_is_not_read_again(measured: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from layertap.render import atlas

    reads: list[list[int]] = []

    def counted(run: Any, name: str, rows: Any, channels: Any = None) -> Any:
        reads.append(list(rows))
        return maps_of(run, name, rows, channels)

    maps_of = atlas.maps_of
    monkeypatch.setattr(atlas, "maps_of", counted)
    first = got(measured, "/tiles", layer="conv1", rows="20-23", channels="0-3")
    assert reads == [[20, 21, 22, 23]]
    assert got(measured, "/tiles", layer="conv1", rows="20-23", channels="0-3") == first
    got(measured, "/tiles", layer="conv1", rows="22-25", channels="5-9", colormap="magma")
    assert reads == [[20, 21, 22, 23], [24, 25]]


# Stores of every kind


def test_an_unfinished_store_shows_what_is_committed_and_more_when_it_is(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((24, 4, 32, 32), np.float32)
    options: dict[str, Any] = {"batch_size": 4, "backend": "arrays", "memory": "704KiB", "writers": 1}
    model = lambda batch: {"a": batch}  # noqa: E731
    lt.record_dataset(model, data, tmp_path / "r", "*", part="2/3", **options)
    for server in serving(lt.open(tmp_path / "r")):
        rows = np.frombuffer(got(server, "/api/rows"), "<u4")
        run = json.loads(got(server, "/api/run"))
        assert (run["complete"], run["captured"], run["rows"]) == (False, len(rows), 24)
        assert 0 < len(rows) < 24
        missing = next(row for row in range(24) if row not in rows)
        status, _, body = asked(server, f"/tiles?layer=a&rows={missing}&channels=0")
        assert status == 502
        assert b"not captured yet" in body
        lt.record_dataset(model, data, tmp_path / "r", "*", **options)
        again = json.loads(got(server, "/api/run"))
        assert (again["complete"], again["captured"]) == (True, 24)
        assert again["version"] != run["version"]
        assert len(got(server, "/api/rows")) == 4 * 24
        assert pixels(got(server, "/tiles", layer="a", rows=missing, channels="0")).shape == (32, 32)


def an_empty_store(path: Path) -> Any:
    """Return a run of which no block is committed."""
    data = np.ones((8, 1), np.float32)
    lt.record_dataset(lambda batch: {"a": batch}, data, path, "*", backend="arrays")
    for record in (path / "commits").glob("c.*"):
        record.unlink()
    return lt.open(path)


def test_a_store_without_a_row_is_served_too(tmp_path: Path) -> None:
    for server in serving(an_empty_store(tmp_path / "r")):
        run = json.loads(got(server, "/api/run"))
        assert (run["rows"], run["captured"], run["complete"]) == (8, 0, False)
        assert got(server, "/api/rows") == b""
        layer = json.loads(got(server, "/api/layer", layer="a"))
        assert (layer["low"], layer["high"], layer["measures"]) == (None, None, {})
        assert json.loads(got(server, "/api/limits")) == {"low": None, "high": None}
        assert json.loads(got(server, "/api/channel", layer="a", channel=0))["top"] is None


def test_a_store_of_statistics_alone_has_channels_and_no_maps(tmp_path: Path) -> None:
    run = a_store(tmp_path / "r", stats="all", values=False)
    for server in serving(run):
        assert json.loads(got(server, "/api/run"))["values"] is False
        assert json.loads(got(server, "/api/channel", layer="conv1", channel=0))["numbers"]["maximum"] > 0
        assert asked(server, "/tiles?layer=conv1&rows=1&channels=0")[0] == 502


def test_rows_that_differ_in_shape_are_served_each_in_its_own(tmp_path: Path) -> None:
    texts = Sequences()
    run = lt.record_dataset(double, texts, tmp_path / "r", "twice", ragged="twice:9", backend="arrays")
    for server in serving(run):
        for row in range(6):
            _, headers, body = asked(server, f"/values?layer=twice&row={row}&channel=1")
            assert np.frombuffer(body, headers["X-Type"]).tolist() == (2 * texts.rows[row][:, 1]).tolist()
        layer = json.loads(got(server, "/api/layer", layer="twice"))
        assert (layer["rows"], layer["whole"]) == (len(texts.rows), True)
        shapes = {
            len(texts.rows[row]): pixels(got(server, "/tiles", layer="twice", rows=row, channels="0-2")).shape
            for row in range(6)
        }
        assert shapes == {8: (3, 9), 2: (1, 6), 0: (1, 3), 1: (1, 3), 3: (2, 6), 9: (3, 9)}


def test_of_rows_that_differ_in_their_number_of_channels_no_channel_is_drawn(tmp_path: Path) -> None:
    def model(batch: Any) -> dict[str, Any]:
        n = 1 + int(batch[0, 0]) % 5
        return {"scores": np.ones((len(batch), n)), "boxes": np.ones((len(batch), n, 4))}

    data = np.repeat(np.arange(10, dtype=np.float32), 4)[:, None]
    run = lt.record_dataset(
        model, data, tmp_path / "r", "*", ragged="*:9", backend="arrays", batch_size=4, memory="20MiB"
    )
    for server in serving(run):
        refused = {one["name"]: one["refusal"] for one in json.loads(got(server, "/api/run"))["layers"]}
        assert refused == {
            "scores": "rows have 1 to 5 features, so there is none that all have",
            "boxes": "",
        }
        assert asked(server, "/tiles?layer=scores&rows=0&channels=0")[0] == 400
        assert json.loads(got(server, "/api/layer", layer="boxes"))["whole"]


def test_what_cannot_be_drawn_is_listed_with_the_reason(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((4, 3, 5, 5), np.float32)

    def model(batch: Any) -> dict[str, Any]:
        return {"maps": batch, "waves": batch.astype(np.complex64), "video": batch[:, :, None]}

    run = lt.record_dataset(model, data, tmp_path / "r", "*", backend="arrays", reduce={"maps": "topk:2"})
    for server in serving(run):
        refused = {one["name"]: one["refusal"] for one in json.loads(got(server, "/api/run"))["layers"]}
        assert "largest values" in refused["maps"]
        assert "complex64" in refused["waves"]
        assert "axes" in refused["video"]
        assert asked(server, "/tiles?layer=video&rows=0&channels=0")[0] == 400


def test_a_filter_needs_the_column_that_tells(tmp_path: Path) -> None:
    data = np.zeros((4, 2), np.float32)
    run = lt.record_dataset(lambda batch: {"a": batch}, data, tmp_path / "r", "*", backend="arrays")
    for chosen in (RowFilter(label="1"), RowFilter(outcome="right"), RowFilter(text="x")):
        with pytest.raises(lt.SelectionError, match=r"no column|no ids"):
            chosen.rows(run)


def test_classes_that_are_texts_are_filtered_by_name_and_not_held_against_numbers() -> None:
    run: Any = a_run(4)
    run.rows["label"] = FakeArray("label", ("row",), np.array(["frog", "toad", "frog", "toad"]))
    assert RowFilter(label="toad").rows(run).tolist() == [1, 3]
    with pytest.raises(lt.SelectionError, match="text for one of label and prediction"):
        RowFilter(outcome="right").rows(run)
    assert classes_of(run)[1] == {}


# A store behind a web server


def test_a_remote_store_is_served_and_one_without_ranges_gives_an_error(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from object_server import FileServer

    local = a_store(tmp_path / "r")
    for ranges in (True, False):
        files = FileServer(tmp_path / "r", ranges=ranges)
        for server in serving(lt.open(files.address)):
            status, _, body = asked(server, "/tiles?layer=conv1&rows=3&channels=0-3&scope=map")
            if ranges:
                assert status == 200
                for same in serving(local):
                    assert got(same, "/tiles", layer="conv1", rows=3, channels="0-3", scope="map") == body
            else:
                assert status == 502
                assert "HTTP Range, status 206" in json.loads(body)["error"]
                assert asked(server, "/values?layer=conv1&row=3&channel=0")[0] == 502
        files.stop()


# The command


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_store(tmp_path / "run.zarr")
    answers: list[int] = []

    def serve_one(self: Server) -> None:
        thread = threading.Thread(target=self.handle_request)
        thread.start()
        answers.append(asked(self, "/api/run")[0])
        thread.join()
        raise KeyboardInterrupt

    opened: list[str] = []
    monkeypatch.setattr(Server, "serve_forever", serve_one)
    monkeypatch.setattr(serve.webbrowser, "open", opened.append)
    done = CliRunner().invoke(main, ["view", str(tmp_path / "run.zarr"), "--no-browser"])
    assert (done.exit_code, answers, opened) == (0, [200], [])
    assert "http://127.0.0.1:" in done.output
    done = CliRunner().invoke(main, ["view", str(tmp_path / "run.zarr")])
    assert done.exit_code == 0
    assert opened[0] in done.output


def test_the_command_tells_what_is_wrong_in_a_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["view", str(tmp_path / "absent")])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
