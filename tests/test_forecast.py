"""What a capture would take is said before it is taken, and nothing is stored for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.forecast_text import show, show_seconds
from layertap.capture.local import LocalPlace
from layertap.capture.testing import contents

VALUES = np.random.default_rng(0).standard_normal((64, 3, 32, 32), np.float32).clip(0)
MB = 2**20


class Model:
    """Counts its forwards."""

    def __init__(self, names: tuple[str, ...] = ("maps", "codes", "top")) -> None:
        self.names, self.n_calls = names, 0

    def __call__(self, batch: Any) -> dict[str, Any]:
        self.n_calls += 1
        return {name: np.asarray(batch, np.float32) for name in self.names}


REDUCE = {"codes": "int8", "top": "topk:2|float16"}


def plan(path: Path, **options: Any) -> lt.Forecast:
    options = {"model": Model(), "reduce": REDUCE, "batch_size": 8, **options}
    return lt.plan(options.pop("model"), VALUES, path, ["**"], **options)


def test_bytes_are_those_of_the_capture(tmp_path):
    for codec, off in (("none", 0.002), ("zstd", 0.06)):
        forecast = plan(tmp_path / "s", codec=codec)
        run = lt.record_dataset(
            Model(), VALUES, tmp_path / "s", ["**"], reduce=REDUCE, batch_size=8, codec=codec, overwrite=True
        )
        assert forecast.reduced_bytes == 64 * sum(array.row_bytes for array in run.manifest.layout.moved)
        assert forecast.source_bytes == 64 * 3 * VALUES[0].nbytes
        assert abs(forecast.disk_bytes / run.n_bytes - 1) < off
        for tap in forecast.taps:
            assert (tap.shape, tap.reduction) == (run[tap.name].raw.shape[1:], str(run[tap.name].reduction))
            assert tap.error == run[tap.name].error
        assert (forecast.n_rows, forecast.step_rows, forecast.n_steps) == (64, 8, 8)
        assert forecast.block_rows == run.manifest.layout.block_rows


def test_three_forwards_and_nothing_is_stored(tmp_path):
    model = Model()
    forecast = plan(tmp_path / "new" / "s", model=model)
    assert model.n_calls == 3
    assert list(tmp_path.iterdir()) == []
    assert forecast.fits_disk
    assert forecast.fits_memory
    lt.record_dataset(Model(), VALUES[:8], tmp_path / "s", ["maps"])
    before = contents(tmp_path / "s")
    plan(tmp_path / "s")
    assert contents(tmp_path / "s") == before
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_data_set_of_one_batch_is_enough(tmp_path):
    model = Model()
    forecast = lt.plan(model, VALUES[:5], tmp_path / "s", ["maps"])
    assert (model.n_calls, forecast.n_steps, forecast.step_rows) == (3, 1, 5)


def test_a_model_of_torch_is_left_as_it_was(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Conv2d(3, 4, 3)
    model = torch.nn.Sequential(layer).train()
    forecast = lt.plan(
        model, VALUES, tmp_path / "s", ["0"], batch_size=8, reduce="pca:2|pool:5", dtype="float16"
    )
    assert model.training
    assert not layer._forward_hooks
    assert not model._forward_hooks
    assert forecast.taps[0].shape == (2, 5, 5)
    assert forecast.taps[0].reduction == "pca:2,rows=1024 | pool:5x5 | float16"
    assert forecast.taps[0].reduced_bytes == 100
    assert forecast.taps[0].source_bytes == 4 * 30 * 30 * 4


def test_the_estimate_is_arithmetic_on_what_was_measured(tmp_path):
    base = replace(plan(tmp_path / "s"), n_rows=8000, load_s=0.1, forward_s=0.4, workers=0, n_writers=2)
    base = replace(base, durable_rate=1e12, encode_rate=1e12, load_cpu_s=0, forward_cpu_s=0, n_cores=2)
    assert base.bottleneck == "forward"
    assert base.seconds == pytest.approx(1000 * 0.5)
    loaded = replace(base, workers=2)
    assert loaded.stages_s["data"] == 0
    assert loaded.seconds == pytest.approx(1000 * 0.4)
    slow = replace(base, workers=2, load_s=2.0)
    assert slow.bottleneck == "data"
    assert slow.seconds == pytest.approx(1000 * 1.0)
    written = replace(base, durable_rate=MB / 8, encode_rate=MB / 4)
    assert written.bottleneck == "write"
    assert written.seconds == pytest.approx(base.reduced_bytes / (MB / 2) + base.disk_bytes / (MB / 8))
    assert replace(written, durable_rate=None).seconds == pytest.approx(
        max(500, base.reduced_bytes / (MB / 2))
    )
    alone = replace(written, durable_rate=None, n_writers=8, n_cores=8)
    assert alone.stages_s["write"] == pytest.approx(base.reduced_bytes / (2 * MB))
    assert replace(alone, n_cores=2).stages_s["write"] == pytest.approx(base.reduced_bytes / (MB / 2))


def test_the_estimate_knows_that_processors_are_shared(tmp_path):
    base = replace(plan(tmp_path / "s"), n_rows=8000, load_s=0.1, forward_s=0.4, workers=1, n_cores=2)
    base = replace(base, durable_rate=None, encode_rate=base.reduced_bytes / 300, load_cpu_s=0.1)
    idle = replace(base, forward_cpu_s=0.2)  # a device computes
    assert idle.processors_s == pytest.approx((1000 * 0.3 + 300) / 2)
    assert idle.seconds == pytest.approx(1000 * 0.4)
    assert "the model sets the pace" in " ".join(str(idle).split())
    busy = replace(base, forward_cpu_s=0.8)
    assert busy.seconds == pytest.approx((1000 * 0.9 + 300) / 2)
    assert busy.bottleneck == "forward"
    assert "slowed by what shares its 2 processors, sets the pace" in " ".join(str(busy).split())
    assert replace(busy, n_cores=16).seconds == pytest.approx(1000 * 0.4)


def test_what_does_not_fit_is_said_and_not_raised(tmp_path, monkeypatch):
    small = plan(tmp_path / "s", memory="300KiB")
    assert not small.fits_memory
    assert "does not fit the memory of 300KiB" in small.memory_problem
    assert "DO NOT HOLD IT" in str(small)
    assert "Give memory=" in " ".join(str(small).split())
    assert plan(tmp_path / "s", memory="300KiB", stats="cheap").statistics is not None
    monkeypatch.setattr(LocalPlace, "free_bytes", lambda self: 1000)
    full = plan(tmp_path / "s")
    assert not full.fits_disk
    assert "of 1000B free: DOES NOT FIT" in str(full)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(lt.StoreError, match="nothing can be written"):
        plan(tmp_path / "file" / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_table_fits_eighty_columns_whatever_the_names(tmp_path):
    names = ("a", "encoder.layers.17.self_attention.out_proj[last_hidden_state]#2", "x" * 300)
    text = str(plan(tmp_path / "s", model=Model(names), reduce="pool:4x4|channels:0,2|float8_e4m3fn"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("enc" in line and "state]#2" in line and "..." in line for line in lines)
    wide = replace(plan(tmp_path / "s"), n_rows=10**12, load_s=1e6)
    taps = tuple(replace(tap, shape=(123456,) * 6, source_bytes=10**15) for tap in wide.taps)
    assert max(map(len, show(replace(wide, taps=taps)).splitlines())) <= 80


def test_durations_read_as_people_say_them():
    assert [show_seconds(s) for s in (0.04, 59, 61, 3600, 7500, 360000)] == [
        *("0.0 s", "59.0 s", "1 min", "60 min", "2 h 05 min", "100 h 00 min")
    ]


def test_the_command_prints_the_table_and_makes_no_store(tmp_path):
    np.save(tmp_path / "x.npy", VALUES[:16])
    (tmp_path / "m.py").write_text("def build():\n    return lambda b: {'a': b, 'b': b.sum((2, 3))}\n")
    command = [
        "capture",
        f"{tmp_path}/m.py:build",
        f"{tmp_path}/x.npy",
        str(tmp_path / "s"),
        "--layers",
        "**",
    ]
    result = CliRunner().invoke(
        main, [*command, "--reduce", "pool:8|float16", "--batch-size", "4", "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "s").exists()
    lines = result.output.splitlines()
    assert lines[0].split() == ["tap", "row", "as", "stored", "as", "it", "is", "reduced", "on", "disk"]
    assert "3 x 8 x 8 float16" in lines[1]
    assert "12KiB" in lines[1]
    assert "384B" in lines[1]
    assert "a and 1 more" not in result.output  # a vector has no windows: it is only cast
    assert "nothing was stored" in lines[-1]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("values", [True, False], ids=["values", "statistics alone"])
@pytest.mark.parametrize("stats", ["channels", "cheap", "all"])
def test_files_and_bytes_of_statistics_are_those_of_the_capture(tmp_path, monkeypatch, stats, values):
    for name in ("_BLOCK_BYTES", "_SHARD_BYTES"):
        monkeypatch.setattr(f"layertap.capture.plan.{name}", 30_000)
    data = lt.ArraySource(VALUES, np.arange(64) % 3)
    options: Any = {"reduce": REDUCE, "batch_size": 8, "stats": stats, "classes": ("a", "b", "c")}
    options["values"] = values
    forecast = lt.plan(Model(), data, tmp_path / "s", ["**"], **options)
    run = lt.record_dataset(Model(), data, tmp_path / "s", ["**"], **options)
    assert run.manifest.n_blocks > 3
    its = forecast.statistics
    assert its is not None
    assert its.names == run.stats.names
    files = {name: data for name, data in contents(tmp_path / "s").items() if name.startswith("statistics/")}
    files = {name: data for name, data in files.items() if not name.endswith("zarr.json")}
    assert its.n_files == len(files)
    of_rows = [len(data) for name, data in files.items() if name.startswith("statistics/rows")]
    assert its.rows_bytes == sum(of_rows)
    assert abs(its.blocks_bytes / (sum(map(len, files.values())) - sum(of_rows)) - 1) < 0.1
    assert abs(forecast.disk_bytes / run.n_bytes - 1) < 0.02
    assert its.measured_bytes == 64 * sum(tap.row_bytes for tap in run.manifest.layout.taps)
    assert its.rate > 0
    assert forecast.block_rows == run.manifest.layout.block_rows
    assert all((tap.disk_bytes > 0) is values for tap in forecast.taps)
    text = " ".join(str(forecast).split())
    assert f"{its.n_files} files of" in text
    assert ("no activations" in text) is not values


def test_time_of_statistics_is_that_of_the_writers(tmp_path):
    forecast = plan(tmp_path / "s", stats="cheap")
    assert forecast.statistics is not None
    its = replace(forecast.statistics, measured_bytes=100 * MB, rate=float(MB))
    base = replace(forecast, n_writers=2, n_cores=2, encode_rate=1e15, durable_rate=None)
    assert replace(base, statistics=its).stages_s["write"] == pytest.approx(50)
    assert replace(base, statistics=None).stages_s["write"] == pytest.approx(0, abs=1e-6)
    alone = replace(base, statistics=its, values=False, encode_rate=1.0)
    assert alone.stages_s["write"] == pytest.approx(50)


def test_the_command_forecasts_statistics_too(tmp_path):
    np.save(tmp_path / "x.npy", VALUES[:16])
    (tmp_path / "m.py").write_text("def build():\n    return lambda b: {'a': b, 'b': b.sum((2, 3))}\n")
    command = [
        "capture",
        f"{tmp_path}/m.py:build",
        f"{tmp_path}/x.npy",
        str(tmp_path / "s"),
        "--layers",
        "**",
    ]
    for more in (["--stats", "cheap"], ["--stats-only"]):
        result = CliRunner().invoke(main, [*command, *more, "--batch-size", "4", "--dry-run"])
        assert result.exit_code == 0, result.output
        assert "statistics  channels, pooled, top: 2 files of" in result.output
        assert max(map(len, result.output.splitlines())) <= 80
        assert not (tmp_path / "s").exists()
