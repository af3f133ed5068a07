"""What a capture costs is measured arm by arm, and what is advised follows from what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.backend import backend_named
from layertap.capture.calibration import Encoded
from layertap.capture.costs import Costs, TapCosts, advise
from layertap.capture.discard import DiscardPlace
from layertap.capture.ladder import CONTROL, COPY, DATA, ENCODE, NO_OP, OFF, WRITE
from layertap.capture.plan import Settings
from layertap.capture.recorder import Facts, Recorder
from layertap.capture.spans import Spans

VALUES = np.random.default_rng(0).standard_normal((48, 3, 32, 32), np.float32).clip(0)


def model(batch: Any) -> dict[str, Any]:
    return {"maps": np.asarray(batch, np.float32) + 1, "means": batch.mean((2, 3))}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Spans, list[str], list[str]]:
    folder = tmp_path_factory.mktemp("at")
    spans, said = Spans(), []
    found = lt.profile(
        model,
        VALUES,
        batch_size=8,
        at=folder,
        seconds=0,
        rows=48,
        trace=spans,
        say=said.append,
        name="a model",
    )
    return found, spans, said, [path.name for path in folder.iterdir()]


# What is measured


def test_all_arms_run_in_each_round_and_nothing_stays(measured):
    found, _, said, left = measured
    assert [rung.name for rung in found.rungs] == [OFF, CONTROL, NO_OP, COPY, ENCODE, WRITE, DATA]
    assert {len(rung.step_s.rounds) for rung in found.rungs} == {found.n_rounds}
    assert found.n_rounds >= 3
    assert left == []
    assert [text.split(":")[0].split(",")[0] for text in said] == [
        *("dry run", "calibration", "ladder", "a real capture"),
    ]


def test_each_arm_is_compared_with_one_stage_less(measured):
    found = measured[0]
    steps = {rung.name: rung.step_s.rounds for rung in found.rungs}
    order = [OFF, NO_OP, COPY, ENCODE, WRITE, DATA]
    for name, below in ((CONTROL, OFF), *zip(order[1:], order[:-1], strict=True)):
        expected = [a - b for a, b in zip(steps[name], steps[below], strict=True)]
        assert found.rung(name).more_s.rounds == pytest.approx(expected)


def test_taps_are_those_of_a_capture_with_their_bytes(measured, tmp_path):
    found = measured[0]
    run = lt.record_dataset(model, VALUES, tmp_path / "s", ["**"], batch_size=8)
    assert [(tap.name, tap.shape, tap.dtype) for tap in found.taps] == [
        (tap.name, tap.shape[1:], str(tap.dtype)) for tap in run.taps.values()
    ]
    assert sum(tap.stored_bytes for tap in found.taps) == sum(
        tap.row_bytes for tap in run.manifest.layout.moved
    )
    assert sum(tap.share for tap in found.taps) == pytest.approx(1)
    for tap in found.taps:
        assert set(tap.stages_s) == {COPY, ENCODE, WRITE}
        assert all(value > 0 for value in tap.stages_s.values())


def test_the_real_capture_is_held_against_what_was_foretold(measured):
    real = measured[0].real
    assert real.n_rows == 48
    assert real.ratio == pytest.approx(real.predicted_s / real.measured_s)
    assert {"forward", "write", "checksum", "wait"} <= set(real.stages_s)


def test_all_of_it_is_json(measured):
    found = measured[0]
    told = json.loads(json.dumps(found.to_json()))
    assert [tap["name"] for tap in told["taps"]] == ["maps", "means"]
    assert [arm["arm"] for arm in told["ladder"]["arms"]] == [rung.name for rung in found.rungs]
    assert told["roofs"]["rows_a_s"]["the model alone"] == pytest.approx(1 / found.forward_s)
    assert told["points"]["this plan"] == pytest.approx([found.costs.disk_bytes, 1 / found.capture_s])
    assert told["bottleneck"] in ("data", "forward", "transfer", "write", "processors")


def test_the_text_fits_a_terminal_and_names_every_stage(measured):
    lines = str(measured[0]).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in ("maps", "means", "ladder", "control", "machine", "pace", "advice", "store", "real"):
        assert words in text


def test_noise_stands_for_data_that_are_not_given(tmp_path):
    found = lt.profile(model, size=(3, 8, 8), batch_size=4, at=tmp_path, seconds=0, run=False)
    assert (found.data, found.real, found.read_s, found.n_readings) == ("noise", None, None, None)
    assert found.taps[0].shape == (3, 8, 8)
    assert "real" not in str(found).split("\n")[-1]


def test_without_a_place_there_is_nothing_to_measure(tmp_path):
    with pytest.raises(lt.PlanError, match="there is no folder"):
        lt.profile(model, VALUES, at=tmp_path / "no")


def test_a_misspelt_layer_leaves_nothing(tmp_path):
    with pytest.raises(lt.SelectionError, match="maps"):
        lt.profile(model, VALUES, "mapz", at=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_keeps_nothing_takes_all_of_a_capture():
    place = DiscardPlace()
    recorder = Recorder(
        model, place, ["maps"], settings=Settings(), facts=Facts(), backend=backend_named("arrays")
    )
    with recorder:
        for start in range(0, 48, 8):
            recorder(VALUES[start : start + 8])
    assert recorder.stages.n_rows == 48
    assert recorder.stages.n_bytes > VALUES.nbytes
    assert not place.exists()


def test_layers_of_torch_that_are_overwritten_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(4, 4, 3), torch.nn.Sigmoid()
    ).eval()
    found = lt.profile(network, VALUES, ["0", "1", "2", "3"], batch_size=8, at=tmp_path, seconds=0, run=False)
    assert {tap.name: tap.overwritten for tap in found.taps} == {
        "0": True,
        "1": False,
        "2": False,
        "3": False,
    }
    assert not any(tap.compiled for tap in found.taps)
    assert "1 of 4 outputs are overwritten" in " ".join(str(found).split())
    assert not network[0]._forward_hooks


def test_layers_in_compiled_code_are_told():
    torch = pytest.importorskip("torch")
    from layertap.capture.data import Batch

    network = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.compile(torch.nn.Linear(4, 4), backend="eager")
    )
    batch = Batch(range(3), (np.ones((3, 4), np.float32),))
    found = backend_named("torch").survey(network, batch)
    assert {one.layer.name: one.compiled for one in found} == {".": False, "0": False, "1": True}


# What follows from it


def costs(**changes: Any) -> Costs:
    """Return what a model costs that takes 1 ms a row, on two processors and a disk of 1 GB/s."""
    encoded = {
        (dtype, codec): Encoded(4e6 * share * ratio, 1e-4 * share * slow)
        for dtype, share in (("float32", 1.0), ("float16", 0.5))
        for codec, ratio, slow in (("none", 1, 1), ("lz4", 0.8, 8), ("zstd", 0.5, 50))
    }
    tap = TapCosts("maps", "Conv2d", "float32", (56, 56), 4_000_000, 4_000_000, 1e-4, encoded, "none", 2e-3)
    return replace(Costs((tap,), 1e-3, 2e-3, 0.0, 0.0, 0.0, 0, 2, 2, 1e9, None), **changes)


def test_what_writes_more_than_the_disk_takes_is_bound_by_writing():
    plan = costs()
    assert plan.bound == "write"
    assert plan.seconds == pytest.approx(4e6 / 1e9 + 1e-4 / 2)
    assert plan.floor_s == pytest.approx(1e-3)


def test_a_cast_is_advised_where_it_helps_and_not_where_it_does_not():
    assert {one.change: one.factor for one in advise(costs())}["cast to float16"] == pytest.approx(
        2, rel=0.02
    )
    fast = [one.change for one in advise(costs(disk_rate=1e12))]
    assert "cast to float16" not in fast


def test_a_pool_makes_it_as_fast_as_the_model():
    best = next(one for one in advise(costs(disk_rate=5e8)) if one.change == "pool maps to 7")
    assert best.bound == "the model sets the pace"
    assert best.options == "--reduce 'maps=pool:7'"
    assert best.bytes_a_row == pytest.approx(4e6 * 49 / 56**2)


def test_a_codec_is_advised_only_where_processors_are_quicker_than_the_disk():
    slow = {one.change for one in advise(costs(disk_rate=1e8))}
    assert "encode with zstd" in slow
    assert "encode with zstd" not in {one.change for one in advise(costs(disk_rate=1e10))}
    packed = replace(costs(disk_rate=1e10).taps[0], codec="zstd")
    assert "do not encode" in {one.change for one in advise(costs(disk_rate=1e10, taps=(packed,)))}


def test_loading_that_sets_the_pace_asks_for_workers():
    plan = costs(disk_rate=1e12, load_s=5e-3, load_cpu_s=1e-4)
    assert plan.bound == "data"
    assert advise(plan)[0].options == "--workers 2"


def test_nothing_is_advised_where_the_model_sets_the_pace():
    plan = costs(disk_rate=1e12, forward_s=1.0, forward_cpu_s=1.0)
    assert plan.bound == "forward"
    assert advise(plan) == []


def test_what_was_measured_scales_what_lies_above_the_model():
    plain = {one.change: one for one in advise(costs())}["cast to float16"]
    slower = {one.change: one for one in advise(costs(), measured_s=1e-3 + 2 * (costs().seconds - 1e-3))}
    assert slower["cast to float16"].seconds - 1e-3 == pytest.approx(2 * (plain.seconds - 1e-3))


def test_of_several_taps_the_one_that_costs_most_is_left_out():
    small = replace(
        costs().taps[0],
        name="small",
        stored_bytes=100,
        encoded={
            key: Encoded(one.bytes_a_row / 100, one.seconds_a_row / 100)
            for key, one in costs().taps[0].encoded.items()
        },
    )
    changes = [one.change for one in advise(costs(taps=(small, costs().taps[0])))]
    assert "leave out maps" in changes
    assert "leave out small" not in changes


# The timeline


def test_spans_of_one_thread_do_not_overlap_and_add_up_to_its_stages(measured):
    found, spans, _, _ = measured
    stages = [span for span in spans.spans if not span.name.startswith("copy ")]
    for thread in {span.thread for span in stages}:
        own = sorted((span for span in stages if span.thread == thread), key=lambda span: span.start_s)
        assert all(a.end_s <= b.start_s for a, b in pairwise(own))
    for stage in ("forward", "write", "checksum", "commit"):
        told = sum(span.seconds for span in stages if span.name == stage)
        assert told == pytest.approx(found.real.stages_s[stage], abs=2e-4)


def test_copies_lie_inside_the_forwards_of_their_thread(measured):
    spans = measured[1].spans
    forwards = [span for span in spans if span.name == "forward"]
    copies = [span for span in spans if span.name.startswith("copy ")]
    assert {span.name for span in copies} == {"copy maps", "copy means"}
    for one in copies:
        assert any(
            f.start_s <= one.start_s and one.end_s <= f.end_s and f.thread == one.thread for f in forwards
        )


def test_a_timeline_is_what_trace_viewers_open(measured, tmp_path):
    measured[1].save(tmp_path / "trace.json")
    told = json.loads((tmp_path / "trace.json").read_text())
    events = [event for event in told["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in events) == 0
    assert all(event["dur"] > 0 for event in events)
    names = {event["args"]["name"] for event in told["traceEvents"] if event["name"] == "thread_name"}
    assert "model" in names
    assert any(name.startswith("layertap-writer") for name in names)
    assert {"block", "array"} <= set(next(e for e in events if e["name"] == "write")["args"])


def test_without_a_timeline_no_span_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(Spans, "add", lambda *args, **about: pytest.fail("a span was made"))
    lt.record_dataset(model, VALUES, tmp_path / "s", ["**"], batch_size=8)


# The pictures and the command


def test_the_roofline_has_every_roof_and_every_plan(measured):
    pytest.importorskip("matplotlib")
    from layertap.render.roofline import figure

    told = measured[0].to_json()
    axes = figure(told).axes[0]
    words = {text.get_text() for text in axes.texts}
    assert {*told["roofs"]["rows_a_s"], *told["points"]} <= words
    plan = next(line for line in axes.lines if len(line.get_xdata()) == 1)
    assert plan.get_xydata().tolist() == [pytest.approx(told["points"]["this plan"])]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_what_is_no_picture_is_refused(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from layertap.render.roofline import save

    with pytest.raises(lt.DrawError, match=r"\.png"):
        save(measured[0].to_json(), tmp_path / "roofline.jpg")


def test_the_page_shows_names_as_text_and_asks_for_nothing(measured):
    pytest.importorskip("matplotlib")
    from layertap.render.profile_page import page

    told = measured[0].to_json()
    told["model"], told["taps"][0]["name"] = "<script>alert(1)</script>", "<img src=x>"
    html = page(told)
    assert "<script" not in html
    assert "<img src=x>" not in html
    assert "&lt;img src=x&gt;" in html
    assert "http" not in html.replace("http-equiv", "")


def test_the_command_writes_every_file(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "model.py").write_text(
        "def build():\n    return lambda batch: {'maps': batch + 1, 'means': batch.mean((2, 3))}\n"
    )
    files = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "html", "png")}
    trace = str(tmp_path / "trace.json")
    options = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    result = CliRunner().invoke(
        main,
        [
            *(
                "profile",
                f"{tmp_path}/model.py:build",
                "--size",
                "3,8,8",
                "--at",
                str(tmp_path),
                "--rows",
                "64",
            ),
            *("--seconds", "0", "--layers", "maps,means", *options, "--trace", trace),
        ],
    )
    assert result.exit_code == 0, result.output
    assert Path(files["png"]).read_bytes()[:4] == b"\x89PNG"
    assert json.loads(Path(files["json"]).read_text())["real"]["n_rows"] == 64
    assert Path(trace).stat().st_size > 0
    assert "What each stage costs a step" in Path(files["html"]).read_text()


def test_a_timeline_needs_the_real_capture(tmp_path):
    (tmp_path / "model.py").write_text("def build():\n    return lambda batch: {'maps': batch}\n")
    result = CliRunner().invoke(
        main, ["profile", f"{tmp_path}/model.py:build", "--no-run", "--trace", str(tmp_path / "t.json")]
    )
    assert result.exit_code == 1
    assert "leave --no-run out" in result.output
