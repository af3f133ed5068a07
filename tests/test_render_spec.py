"""A specification is data: checked when it is made, the same after JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import GridSpec, MontageSpec
from layertap.render.selection import ChannelChoice, parse_indices, select_layers, select_rows
from test_render_run import FakeArray, FakeRun, FakeTap, a_run


@pytest.mark.parametrize(
    "spec",
    [
        GridSpec(rows=(3,)),
        GridSpec(rows=(3, 1), layers=("a", "b"), channels="top:9:l2", scope=(-1, 2), picture=False),
        GridSpec(rows=(0,), channels=(5, 2), by="variance", columns=4, colormap="magma", title="飞机"),
        MontageSpec(rows=(1, 2), layers=("a",), channels=(3,), magnification=2, numbers=False),
        GridSpec(
            rows=(1,), channels="page:2:64:f_ratio", over="data", scope="data", clip=99.5, sign="diverging"
        ),
        MontageSpec(rows=(1,), scope="channel", clip=(0.5, 99.5), sign="sequential", colormap="gray"),
    ],
)
def test_a_specification_comes_back_from_json_equal(spec: GridSpec | MontageSpec) -> None:
    text = json.dumps(spec.to_json())
    assert type(spec).from_json(text) == spec
    assert type(spec).from_json(json.loads(text)) == spec
    assert hash(type(spec).from_json(text)) == hash(spec)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": ()}, "no row"),
        ({"rows": (0,), "scope": "layers"}, "one of layer, figure, row, channel, data"),
        ({"rows": (0,), "clip": 101}, "percentile such as 99.5"),
        ({"rows": (0,), "clip": 0}, "percentile such as 99.5"),
        ({"rows": (0,), "clip": "a"}, "percentile such as 99.5"),
        ({"rows": (0,), "clip": (99, 1)}, "two that rise"),
        ({"rows": (0,), "clip": (1, 50, 99)}, "percentile such as 99.5"),
        ({"rows": (0,), "clip": 99, "scope": (0, 1)}, "give one of the two"),
        ({"rows": (0,), "sign": "plus"}, "one of auto, sequential, diverging"),
        ({"rows": (0,), "sign": "diverging", "colormap": "magma"}, "magma is a sequential colour map"),
        ({"rows": (0,), "sign": "sequential", "colormap": "RdBu_r"}, "RdBu_r is a diverging colour map"),
        ({"rows": (0,), "over": "all"}, "one of drawn, data"),
        ({"rows": (0,), "channels": "page:2"}, "page:2:64"),
        ({"rows": (0,), "channels": "page:0:64"}, "page:2:64"),
        ({"rows": (0,), "channels": "page:1:64:meen"}, "mean"),
        ({"rows": (0,), "channels": "first:9:mean"}, "first:9"),
        ({"rows": (0,), "scope": (1, 1)}, "below"),
        ({"rows": (0,), "scope": (0, float("inf"))}, "finite"),
        ({"rows": (0,), "scope": ("a", "b")}, "two numbers"),
        ({"rows": (0,), "by": "meen"}, "mean"),
        ({"rows": (0,), "channels": "top:9:meen"}, "mean"),
        ({"rows": (0,), "channels": "top"}, "top:9"),
        ({"rows": (0,), "channels": "best"}, "none of"),
        ({"rows": (0,), "channels": ()}, "no channel"),
        ({"rows": (0,), "columns": 0}, "columns"),
        ({"rows": (0,), "magnification": 1.5}, "magnification"),
        ({"rows": (0,), "colormap": "jet"}, "colour map"),
        ({"rows": (0,), "colour": "red"}, "colormap"),
        ({"rows": ("x",)}, "cannot be drawn"),
    ],
)
def test_a_bad_option_is_named_with_what_would_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DrawError, match=words):
        GridSpec.of(options)


def test_json_of_another_kind_or_no_json_is_refused() -> None:
    with pytest.raises(DrawError, match="'montage', not of a 'grid'"):
        GridSpec.from_json(MontageSpec(rows=(1,)).to_json())
    with pytest.raises(DrawError, match="not JSON"):
        GridSpec.from_json("{")
    with pytest.raises(DrawError, match="object"):
        GridSpec.from_json("[]")


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (3, (3,)),
        (-1, (9,)),
        ([4, 2], (4, 2)),
        (slice(8, None), (8, 9)),
        ("0,5,7:9", (0, 5, 7, 8)),
        ("8:", (8, 9)),
        ("8:100", (8, 9)),
        (range(2), (0, 1)),
    ],
)
def test_indices_are_read(given: Any, numbers: tuple[int, ...]) -> None:
    assert parse_indices(given, 10, "row") == numbers


@pytest.mark.parametrize("given", [10, -11, "10", "12:14", [1, 10]])
def test_an_index_that_is_not_there_says_what_is(given: Any) -> None:
    with pytest.raises(SelectionError, match="0 to 9"):
        parse_indices(given, 10, "row")


@pytest.mark.parametrize("given", ["", "a", "1:b", [], "5:5", "frog"])
def test_indices_that_mean_nothing_are_refused(given: Any) -> None:
    with pytest.raises(DrawError):
        parse_indices(given, 10, "row")


def test_channels_are_read() -> None:
    assert ChannelChoice.parse("top:4", "l1") == ChannelChoice("top", 4, "l1")
    assert ChannelChoice.parse("top:4:l2", "l2") == ChannelChoice("top", 4, "l2")
    assert ChannelChoice.parse("top:4:l2") == ChannelChoice("top", 4, "l2")
    assert ChannelChoice.parse("top:4") == ChannelChoice("top", 4, "mean")
    with pytest.raises(DrawError, match="ranks by l2, but by says l1"):
        ChannelChoice.parse("top:4:l2", "l1")
    assert ChannelChoice.parse("first:4", "l1") == ChannelChoice("first", 4)
    assert ChannelChoice.parse("page:3:64") == ChannelChoice("page", 64, "index", page=3)
    assert ChannelChoice.parse("page:3:64", "l1") == ChannelChoice("page", 64, "l1", page=3)
    assert ChannelChoice.parse("page:3:64:l2") == ChannelChoice("page", 64, "l2", page=3)
    assert ChannelChoice.parse("0,3,5:8", "l1").indices(16, "channel") == (0, 3, 5, 6, 7)


def test_layers_are_found_by_name_pattern_and_list() -> None:
    run: Any = FakeRun(*(FakeTap(name, a_run().taps["conv1"].values) for name in ("a[0]", "b.1", "b.2")))
    assert select_layers(run, None) == ("a[0]", "b.1", "b.2")
    assert select_layers(run, "b.*") == ("b.1", "b.2")
    assert select_layers(run, ["b.2", "a[0]"]) == ("b.2", "a[0]")
    assert select_layers(run, "b.2,b.1") == ("b.2", "b.1")
    with pytest.raises(SelectionError, match=r"b\.1"):
        select_layers(run, ["b.3"])


def taps_run(*names: str, type: str = "Conv2d") -> Any:
    """Return a run of taps with these names."""
    values = a_run().taps["conv1"].values
    return FakeRun(*(FakeTap(name, values, type=type) for name in names))


def test_patterns_mean_what_they_mean_to_a_capture() -> None:
    run = taps_run("layer1.1", "layer1.0.1", "layer2.1", "relu", "relu#2", "split[parts][low]", "split[b]")
    run.taps["relu"].type = "ReLU"
    assert select_layers(run, "layer*.1") == ("layer1.1", "layer2.1")
    assert select_layers(run, "layer**.1") == ("layer1.1", "layer1.0.1", "layer2.1")
    assert select_layers(run, r"re:layer\d{1,2}\.1") == ("layer1.1", "layer2.1")
    assert select_layers(run, "type:ReLU") == ("relu",)
    assert select_layers(run, "relu#2,split[parts][low]") == ("relu#2", "split[parts][low]")
    assert select_layers(run, ["split[b]", "layer?.1", "relu", "layer1.1"]) == (
        *("split[b]", "layer1.1", "layer2.1", "relu"),
    )


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("relu#3", "relu#2"), ("conv1[0]", "conv1"), ("type:Conv", "Conv2d"), ("conv*.1", "conv1")],
)
def test_a_pattern_that_matches_nothing_names_the_closest(pattern: str, near: str) -> None:
    with pytest.raises(SelectionError, match=rf"run\.zarr.*The closest are:.*{near}"):
        select_layers(taps_run("conv1", "relu", "relu#2"), ["relu", pattern])


def test_rows_are_kept_by_labels_that_are_text() -> None:
    run = a_run(4)
    run.rows["label"] = FakeArray("label", ("row",), np.array(["frog", "", "cat", "frog"]))
    assert select_rows(run, class_name="frog") == (0, 3)
    assert select_rows(run, each_class=True) == (2, 0)
    with pytest.raises(SelectionError, match=r"no class 'frogs'.*frog"):
        select_rows(run, class_name="frogs")
    with pytest.raises(SelectionError, match="text for one"):
        select_rows(run, outcome="wrong")
    run.rows["prediction"] = FakeArray("prediction", ("row",), np.array(["frog", "cat", "cat", "cat"]))
    assert select_rows(run, outcome="right") == (0, 2)


def test_a_column_of_no_class_a_row_is_refused() -> None:
    run = a_run(4)
    run.rows["label"] = FakeArray("label", ("row", "x"), np.zeros((4, 2), np.int64))
    for filters in ({"class_name": "cat"}, {"outcome": "right"}, {"each_class": True}):
        with pytest.raises(SelectionError, match="not of one class a row"):
            select_rows(run, None, **filters)


def test_rows_are_kept_by_class_and_outcome() -> None:
    run = a_run(6)  # labels 0 1 0 1 0 1, rows 2 and 5 wrong
    assert select_rows(run) == (0, 1, 2, 3, 4, 5)
    assert select_rows(run, class_name="dog") == (1, 3, 5)
    assert select_rows(run, class_name="1", outcome="wrong") == (5,)
    assert select_rows(run, "1:", outcome="right") == (1, 3, 4)
    assert select_rows(run, "1:", each_class=True) == (2, 1)
    with pytest.raises(SelectionError, match="cat"):
        select_rows(run, class_name="cut")
    with pytest.raises(DrawError, match="left"):
        select_rows(run, 0, outcome="wrong")


def test_only_captured_rows_are_drawn() -> None:
    run = a_run(4)
    run._committed[2:] = False
    assert select_rows(run) == (0, 1)
    with pytest.raises(DrawError, match=r"row 3 is not captured yet \(2 of 4"):
        select_rows(run, 3)
    run._committed[:] = False
    with pytest.raises(DrawError, match="no captured rows"):
        select_rows(run)


def test_a_column_that_is_missing_is_named() -> None:
    run = a_run()
    del run.rows["prediction"]
    with pytest.raises(SelectionError, match="prediction"):
        select_rows(run, outcome="wrong")
