"""Reduced taps in a store: one folder for a tap's arrays, which are committed, checked and read alike."""

from __future__ import annotations

import json
import zipfile
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.moments import Moments
from layertap.capture.recorder import Recorder
from layertap.capture.reduce import Pca, as_chain
from layertap.capture.reduce_arrays import apply
from layertap.capture.store import Manifest
from layertap.capture.testing import StopError, contents
from layertap.capture.verify import repair, verify

VALUES = np.random.default_rng(0).standard_normal((40, 6, 16, 16), np.float32)
VALUES[3, 2, 1, 1], VALUES[4, 0, 0, 0] = np.nan, np.inf
#: Every kind of part and constant, and a tap that is not reduced.
REDUCE = {
    "codes": "int8",
    "top": "topk:3|float16",
    "few": "pca:2,rows=10",
    "small": "channels:stride=2|pool:4|float8_e4m3fn",
}
TAPS = ("plain", *REDUCE)


def model(batch: Any) -> dict[str, Any]:
    return {name: batch + i for i, name in enumerate(TAPS)}


def capture(path: Any, **options: Any) -> lt.Run:
    options = {"reduce": REDUCE, "batch_size": 4, "memory": "1200KiB", "writers": 1, **options}
    return lt.record_dataset(model, VALUES, path, ["**"], **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    made = capture(tmp_path_factory.mktemp("reduced") / "run.zarr")
    assert made.manifest.n_blocks > 2
    return made


def test_a_tap_reads_as_what_it_stands_for_and_its_parts_as_they_are_stored(run):
    whole = model(VALUES)
    assert np.array_equal(run["plain"][...], whole["plain"], equal_nan=True)
    codes = run["codes"]
    assert (codes.shape, codes.dtype, codes.dims) == (VALUES.shape, np.float32, ("row", "channel", "y", "x"))
    assert (codes.raw.dtype, codes.parts["scale"].shape) == (np.int8, (40, 6))
    got, true = codes[...], whole["codes"]
    finite = np.isfinite(true)
    limit = np.where(finite, np.abs(true), 0).max((2, 3), keepdims=True) / 251
    assert (np.abs(got[finite] - true[finite]) <= np.broadcast_to(limit, true.shape)[finite]).all()
    assert np.array_equal(got[~finite], true[~finite], equal_nan=True)
    assert [(run.stats[name].nan, run.stats[name].inf) for name in ("codes", "plain")] == [(1, 1)] * 2
    top, at = run["top"], run["top"].positions
    assert top.dims == at.dims == ("row", "rank", "y", "x")
    assert (top.shape, top.dtype, at.dtype) == ((40, 3, 16, 16), np.float16, np.int32)
    taken = np.take_along_axis(whole["top"], at[...].astype(int), 1)
    assert np.array_equal(taken.astype(np.float16), top[...], equal_nan=True)
    small = run["small"]
    assert (small.shape, small.dtype) == ((40, 3, 4, 4), ml_dtypes.float8_e4m3fn)
    assert (small.source_shape, small.source_dtype) == ((6, 16, 16), "float32")


@pytest.mark.parametrize(
    "key",
    [
        3,
        (slice(None), 2),
        ([3, 30, 4], [0, 2], slice(1, 9, 3)),
        (slice(5, 30, 7), slice(None), 1, 1),
        (-1, -1),
    ],
    ids=str,
)
def test_codes_are_read_by_any_key_as_whole(run, key):
    whole = run["codes"][...]
    keys = key if isinstance(key, tuple) else (key,)
    for axis in reversed(range(len(keys))):
        whole = whole[
            (slice(None),) * axis + (np.asarray(keys[axis]) if isinstance(keys[axis], list) else keys[axis],)
        ]
    assert np.array_equal(run["codes"][key], whole, equal_nan=True)


def test_what_was_done_and_what_it_cost_is_recorded(run):
    assert str(run["small"].reduction) == "channels:stride=2 | pool:4x4 | float8_e4m3fn"
    assert run["plain"].reduction == lt.reduce.Chain()
    assert run["plain"].error == "lossless"
    assert "1/252 of the largest magnitude" in run["codes"].error
    assert "exact in what it keeps" in run["small"].error
    assert "of the variance is left out" in run["few"].error
    with pytest.raises(lt.SelectionError, match=r"no positions.*int8"):
        _ = run["codes"].positions


def test_a_projection_is_undone_by_its_stored_basis(run):
    basis, mean = run["few"].constants["basis"], run["few"].constants["mean"]
    assert (basis.shape, mean.shape) == ((2, 6), (6,))
    assert np.allclose(basis @ basis.T, np.eye(2), atol=1e-6)
    true, rows = model(VALUES)["few"][5:10], run["few"][5:10]
    back = np.einsum("nkyx,kc->ncyx", rows, basis) + mean[:, None, None]
    assert 0.5 < np.mean((back - true) ** 2) / np.var(true) < 0.7  # 4 of 6 like components are gone
    again = np.einsum("ncyx,kc->nkyx", back - mean[:, None, None], basis)
    assert np.allclose(again, rows, atol=1e-5)


def test_other_readers_open_every_array(run):
    xarray, tensorstore = pytest.importorskip("xarray"), pytest.importorskip("tensorstore")
    group = run.zarr()
    for tap in run.info["taps"]:
        folder = tap["path"].rpartition("/")[0]
        opened = xarray.open_zarr(run.path, group=folder)
        arrays = {"values": run[tap["name"]].raw, **run[tap["name"]].parts}
        for name, array in arrays.items():
            expected = array[...]
            if "float8" in str(expected.dtype):
                assert group[folder][name].attrs["layertap"] == {"dtype": str(expected.dtype)}
                expected = expected.view(np.uint8)
            assert group[f"{folder}/{name}"][...].tobytes() == expected.tobytes()
            assert opened[name].dims == array.dims
            assert opened[name].values.tobytes() == expected.tobytes()
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{run.path}/{folder}/{name}"}}
            assert tensorstore.open(spec).result().read().result().tobytes() == expected.tobytes()
        for name, values in run[tap["name"]].constants.items():
            assert np.array_equal(opened[name].values, values)
            assert np.array_equal(group[f"{folder}/{name}"][...], values)


def test_a_zip_holds_the_parts_and_constants(run, tmp_path):
    lt.pack(run.path, tmp_path / "run.zip")
    packed = lt.open(tmp_path / "run.zip")
    assert set(zipfile.ZipFile(tmp_path / "run.zip").namelist()) == set(contents(run.path))
    for name in TAPS:
        for part, array in run[name].parts.items():
            assert packed[name].parts[part][...].tobytes() == array[...].tobytes()
    assert np.array_equal(packed["few"].constants["basis"], run["few"].constants["basis"])


def test_a_capture_that_died_ends_byte_identical_and_fits_nothing_anew(run, tmp_path, monkeypatch):
    begin = Recorder.begin

    def dies(self: Recorder, n_rows: int) -> Any:
        if self.row >= 24:
            raise StopError
        return begin(self, n_rows)

    monkeypatch.setattr(Recorder, "begin", dies)
    with pytest.raises(StopError):
        capture(tmp_path / "s")
    monkeypatch.setattr(Recorder, "begin", begin)
    assert 0 < lt.open(tmp_path / "s").n_committed < 40
    monkeypatch.setattr(Moments, "components", lambda *_: pytest.fail("the store has the basis"))
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(run.path)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*") if file.is_file()}
    capture(tmp_path / "s")
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_parts_of_an_array_job_make_the_same_store(run, tmp_path):
    for part in ("2/3", "1/3", "3/3"):
        capture(tmp_path / "s", part=part)
    assert contents(tmp_path / "s") == contents(run.path)


def test_every_file_that_is_flipped_is_found_and_mended(run, tmp_path):
    capture(tmp_path / "s")
    whole = contents(tmp_path / "s")
    broken = [
        *("taps/codes/scale/c.1.0", "taps/top/positions/c.0.0.0.0", "taps/few/basis/c.0.0"),
        *("taps/few/mean/zarr.json", "taps/small/values/c.2.0.0.0"),
    ]
    for name in broken:
        data = bytearray(whole[name])
        data[len(data) // 3] ^= 4
        (tmp_path / "s" / name).write_bytes(data)
    damages = list(verify(tmp_path / "s"))
    assert sorted(damage.file for damage in damages) == sorted(broken)
    assert {damage.name for damage in damages if damage.block is not None} == {
        "codes/scale",
        "top/positions",
        "small",
    }
    with pytest.raises(lt.ChecksumError, match="basis"):
        _ = lt.open(tmp_path / "s")["few"].constants
    repair(tmp_path / "s", damages)
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == whole
    (tmp_path / "s" / "taps/few/basis/c.0.0").unlink()
    capture(tmp_path / "s")  # of a finished store, too
    assert contents(tmp_path / "s") == whole


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"codes": "pool:4|int8"}, "tap codes: reduction int8 there, pool:4x4 | int8 now"),
        ({"codes": None}, "tap codes: reduction int8 there, none now"),
        ({"few": "pca:3,rows=10"}, "tap few: reduction pca:2,rows=10 there, pca:3,rows=10 now"),
        ({"few": "pca:2,rows=11"}, "tap few: reduction pca:2,rows=10 there, pca:2,rows=11 now"),
        ({"few": Pca(None, np.eye(6)[:2], np.zeros(6), 10)}, "tap few: another basis of its reduction"),
        ({"top": "topk:3"}, "tap top: dtype float16 there, float32 now"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_reduction_is_refused_by_name(run, changed, words):
    before = contents(run.path)
    if isinstance(changed.get("few"), Pca):
        changed = {"few": Pca(None, np.eye(6)[:2], np.zeros(6), 10, run["few"].reduction.steps[0].explained)}
    with pytest.raises(lt.StoreExistsError) as caught:
        capture(run.path, reduce=REDUCE | changed)
    assert words in str(caught.value)
    assert contents(run.path) == before


def test_an_own_function_that_changed_is_refused(tmp_path):
    def first(batch: Any) -> Any:
        return batch[:, :2]

    def make(scale: int) -> Any:
        return (lambda batch: batch[:, :2] * 1) if scale else (lambda batch: batch[:, :2] * 2)

    lt.record_dataset(model, VALUES, tmp_path / "s", ["plain"], reduce=first)
    assert "not known" in lt.open(tmp_path / "s")["plain"].error
    lt.record_dataset(model, VALUES, tmp_path / "s", ["plain"], reduce=first)
    with pytest.raises(lt.StoreExistsError, match="tap plain: reduction own:"):
        lt.record_dataset(model, VALUES, tmp_path / "s", ["plain"], reduce=make(1))


def test_a_cast_is_the_same_as_an_option_and_as_a_reduction(tmp_path):
    for name, options in (("a", {"dtype": "float16"}), ("b", {"reduce": "float16"})):
        lt.record_dataset(model, VALUES, tmp_path / name, ["plain"], **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    both = lt.record_dataset(model, VALUES, tmp_path / "c", ["plain"], reduce="pool:4", dtype="bfloat16")
    assert str(both["plain"].reduction) == "pool:4x4 | bfloat16"


def test_a_loop_of_ones_own_reduces_and_goes_on(tmp_path):
    def loop(stop: int) -> None:
        with lt.record(
            model, tmp_path / "s", ["codes", "top"], reduce="topk:2", memory="700KiB", writers=1
        ) as rec:
            for i in range(0, stop, 4):
                rec(VALUES[i : i + 4])
                if i == 24 and stop < 40:
                    raise StopError

    with pytest.raises(StopError):
        loop(39)
    assert 0 < lt.open(tmp_path / "s").n_rows < 40
    loop(40)
    expected = apply(
        as_chain("topk:2"), VALUES, lt.reduce.Rows((6, 16, 16), ("channel", "y", "x"), VALUES.dtype)
    )
    assert lt.open(tmp_path / "s")["codes"].positions[...].tobytes() == expected[1].tobytes()
    with (
        pytest.raises(lt.PlanError, match="fit_pca"),
        lt.record(model, tmp_path / "t", ["top"], reduce="pca:2") as rec,
    ):
        rec(VALUES[:4])


def test_fitting_beforehand_gives_what_a_capture_fits_itself(run, tmp_path):
    fitted = lt.fit_pca(model, VALUES, ["few"], 2, rows=10, batch_size=4)
    assert list(fitted) == ["few"]
    once = lt.record_dataset(model, VALUES, tmp_path / "s", ["few"], reduce=fitted, batch_size=4)
    for name, values in once["few"].constants.items():
        assert np.array_equal(values, run["few"].constants[name])
    moments = fitted["few"].steps[0]
    channels = np.moveaxis(model(VALUES)["few"][:10], 1, -1).reshape(-1, 6).astype(np.float64)
    channels = channels[np.isfinite(channels).all(1)]
    variances = np.linalg.eigvalsh(np.cov(channels.T, bias=True))[::-1]
    assert np.allclose(moments.mean, channels.mean(0), atol=1e-5)
    assert abs(moments.explained - variances[:2].sum() / variances.sum()) < 1e-6
    assert (np.take_along_axis(moments.basis, np.abs(moments.basis).argmax(1)[:, None], 1) > 0).all()
    with pytest.raises(lt.PlanError, match=r"plain.*own:<lambda>|gave object"):
        lt.record_dataset(model, VALUES, tmp_path / "o", ["plain"], reduce=lambda b: b[:, 0].astype(object))
    pooled = lt.fit_pca(model, VALUES, ["few"], 9, rows=8, before="pool:2")["few"]
    assert str(pooled) == "pool:2 | pca:6,rows=8"


def test_pictures_of_reduced_taps_are_drawn_and_top_values_are_refused(run):
    lt.draw(run, "grid", rows=[0, 5])  # all that can be drawn
    lt.draw(run, "montage", rows=5, layers="few")
    lt.draw(run, "montage", rows=5, layers="codes")
    with pytest.raises(lt.DrawError, match=r"top cannot be drawn: it holds the largest values.*positions"):
        lt.draw(run, "grid", rows=[5], layers="top")


def test_norms_and_components_of_maps_are_drawn_as_maps(tmp_path):
    from layertap.render.spec import MontageSpec
    from layertap.render.view import take

    for text, n in (("norm:l2", 1), ("project:3", 3), ("pool:4", 6)):
        made = lt.record_dataset(model, VALUES, tmp_path / "s", ["plain"], reduce=text, overwrite=True)
        view = take(made, MontageSpec(rows=(5,), layers="plain", channels="all"))
        side = 4 if text == "pool:4" else 16
        assert view.layers[0].values.shape == (1, n, side, side)
    tokens = VALUES.reshape(40, 6, 256).transpose(0, 2, 1)
    made = lt.record_dataset(
        lambda b: {"t": b}, tokens, tmp_path / "s", ["t"], reduce="project:3", overwrite=True
    )
    view = take(made, MontageSpec(rows=(5,), layers="t", channels="all"))
    assert view.layers[0].values.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda taps: taps[1].update(parts=[]),
        lambda taps: taps[1]["parts"][0].update(shape=[7]),
        lambda taps: taps[1]["parts"][0].update(dims=["row", "y"]),
        lambda taps: taps[1]["parts"][0].update(path="taps/plain/scale"),
        lambda taps: taps[1]["parts"][0].update(path="taps/codes/values"),
        lambda taps: taps[1]["parts"][0].update(name="../scale"),
        lambda taps: taps[1].update(parts={"scale": 1}),
        lambda taps: taps[1].update(reduction={"text": "int8", "error": "", "steps": []}),
        lambda taps: taps[1].update(reduction={"text": "melt", "error": "no", "steps": [{"kind": "melt"}]}),
        lambda taps: taps[1].update(reduction=[]),
        lambda taps: taps[3]["constants"][0].update(path="rows/id"),
        lambda taps: taps[3]["constants"][0].update(shape=[2**50]),
        lambda taps: taps[3]["constants"][0].update(crc32c=-1),
        lambda taps: taps[3]["constants"][0].update(name="values", path="taps/few/values"),
        lambda taps: taps[3]["constants"][0].update(dtype="object"),
        lambda taps: taps[3].update(source_shape=["a"]),
    ],
)
def test_a_manifest_that_says_something_else_of_a_reduction_is_refused(run, tmp_path, change):
    from layertap.capture.store import manifest_crc

    data = json.loads(json.dumps(run.info))
    change(data["taps"])
    data["crc32c"] = manifest_crc(data)
    capture(tmp_path / "s")
    file = tmp_path / "s" / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["layertap"] = data
    file.write_text(json.dumps(root))
    with pytest.raises((lt.FormatError, lt.StoreError)):
        opened = lt.open(tmp_path / "s")
        _ = [tap[0] for tap in opened.taps.values()]


def test_the_manifest_gives_the_layout_back(run):
    again = Manifest.from_json(json.loads(json.dumps(run.info)))
    assert again.layout == run.manifest.layout
    assert [array.name for array in again.layout.parts] == ["codes/scale", "top/positions"]


def test_the_command_line_reduces_by_pattern(tmp_path):
    np.save(tmp_path / "x.npy", VALUES[:8])
    (tmp_path / "m.py").write_text(
        "def build():\n    return lambda b: {'a': b, 'b': b * 2}\n\ndef half(b):\n    return b[:, :3]\n"
    )
    base = ["capture", f"{tmp_path}/m.py:build", f"{tmp_path}/x.npy", str(tmp_path / "s"), "--layers", "a,b"]
    options = ["--reduce", "pool:2|int8", "--reduce", f"b={tmp_path}/m.py:half", "--dtype", "float16"]
    result = CliRunner().invoke(main, [*base, *options])
    assert result.exit_code == 0, result.output
    run = lt.open(tmp_path / "s")
    assert str(run["a"].reduction) == "pool:2x2 | int8"
    assert str(run["b"].reduction) == "own:m.py:half | float16"
    assert run["b"].shape == (8, 3, 16, 16)
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "s")]).output
    assert "a is reduced, pool:2x2 | int8:" in shown
    assert "what it loses is not known" in shown
    result = CliRunner().invoke(main, [*base, "--reduce", "poll:2", "--overwrite"])
    assert result.exit_code == 1
    assert "The closest are: pool" in result.output


def test_top_values_may_be_cast_to_codes(tmp_path):
    run = lt.record_dataset(model, VALUES[8:16], tmp_path / "s", ["plain"], reduce="topk:3,space|int8")
    tap = run["plain"]
    assert list(tap.parts) == ["values", "positions", "scale"]
    places = VALUES[8:16].reshape(8, 6, 256)
    true = np.take_along_axis(places, tap.positions[...].astype(int), 2)
    assert np.abs(tap[...] - true).max() <= true.max() / 251
    assert (true[..., 0] == places.max(2)).all()


def test_statistics_are_of_the_reduced_values_and_of_what_codes_stand_for(tmp_path):
    reduce = {"few": "project:2", "top": "topk:2", "small": "pool:4|float16"}
    run = lt.record_dataset(
        model, VALUES[8:], tmp_path / "s", ["few", "top", "small"], reduce=reduce, stats="cheap", batch_size=4
    )
    for name in reduce:
        values = run[name][...].astype(np.float64)
        assert np.allclose(run.stats[name].mean, values.mean((0, 2, 3)), atol=1e-3), name
    assert list(verify(tmp_path / "s")) == []
    alone = lt.record_dataset(
        model, VALUES[8:], tmp_path / "t", ["top"], reduce="topk:2", values=False, batch_size=4
    )
    assert np.array_equal(alone.stats["top"].mean, run.stats["top"].mean)
    assert not list((tmp_path / "t" / "taps").rglob("c.*"))
    coded = lt.record_dataset(
        model, VALUES, tmp_path / "u", ["plain"], reduce="topk:3,space|int8", stats="cheap", batch_size=4
    )
    values = coded["plain"][...].astype(np.float64)
    finite = np.where(np.isfinite(values), values, np.nan)
    assert np.allclose(coded.stats["plain"].mean, np.nanmean(finite, (0, 2)), rtol=1e-5)
    assert (coded.stats["plain"].nan, coded.stats["plain"].inf) == (1, 1)
