"""Pictures that move: frames of one size, on one scale, with the colours that they have as pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from layertap.capture import reader
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import AnimationSpec, GridSpec, animate, draw, film, read_spec
from layertap.render import animation as module
from layertap.render.cli import render
from layertap.render.colormaps import BLACK, N_COLOURS, WHITE, Mark, palette
from layertap.render.kinds import spec_from_json
from layertap.render.sheet import Ink
from PIL import Image, ImageSequence
from test_render_overlay import captured
from test_render_run import FakeTap, a_run

FORMATS = ("gif", "webp", "png")


def frames_of(data: bytes) -> list[Any]:
    """Return the frames of a file in RGB, as Pillow reads them."""
    with Image.open(io.BytesIO(data)) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def tiles(sheet: Any) -> list[Any]:
    """Return the maps on a sheet, without the swatches of captions."""
    return [panel.tiles for panel in sheet.panels if panel.tiles.shape[1:] != (1, 1) or len(panel.tiles) > 1]


def checkpoints() -> list[Any]:
    """Return three stores of the same rows, whose values grow."""
    runs = []
    for i in range(3):
        run = a_run()
        run.path = f"/somewhere/epoch-{i}.zarr"
        run["conv1"].values *= i + 1
        runs.append(run)
    return runs


# What each frame shows


def test_frames_over_rows_are_the_rows_of_one_figure() -> None:
    run, rows = a_run(), [4, 0, 3]
    moving = animate(run, "grid", rows=rows, layers=["conv1", "layer1.0"])
    whole = draw(run, "grid", rows=rows, layers=["conv1", "layer1.0"]).sheet
    assert len(moving) == 3
    assert moving.names == ("row 4", "row 0", "row 3")
    for i in range(3):
        sheet = moving.sheet(i)
        for mine, theirs in zip(tiles(sheet), tiles(whole)[2 * i : 2 * i + 2], strict=True):
            assert (mine == theirs).all()
        assert [(bar.low, bar.high) for bar in sheet.bars] == [(bar.low, bar.high) for bar in whole.bars]
        assert (sheet.photos[0].pixels == whole.photos[i].pixels).all()


def test_the_channels_are_those_of_all_rows() -> None:
    # Ranked row by row, a tile would be another channel in each frame.
    run = a_run()
    moving = animate(run, "grid", rows=[0, 1, 2], layers="conv1", channels="top:4")
    numbers = {
        tuple(t.text for t in moving.sheet(i).texts if t.size == 9 and t.text.isdigit()) for i in range(3)
    }
    assert len({n[:4] for n in numbers}) == 1


@pytest.mark.parametrize(
    ("scope", "clip"),
    [(s, c) for s in ("layer", "figure", "row", "channel", "data") for c in (None, 90)]
    + [((-1.0, 0.5), None)],
)
def test_every_scope_holds_over_all_frames(scope: Any, clip: int | None) -> None:
    run, rows = a_run(), [0, 1, 2]
    options: dict[str, Any] = {"layers": ["conv1", "layer1.0"], "scope": scope, "clip": clip}
    moving = animate(run, "grid", rows=rows, **options)
    whole = draw(run, "grid", rows=rows, **options).sheet
    for i in range(3):
        for mine, theirs in zip(tiles(moving.sheet(i)), tiles(whole)[2 * i : 2 * i + 2], strict=True):
            assert (mine == theirs).all()
        said = [text.text for text in moving.sheet(i).texts]
        words = {
            "row": "a scale for each row",
            "channel": "on one scale in all frames",
            "data": "whole data set",
        }.get(scope, "all frames")
        assert any(words in text for text in said)


def test_depth_is_on_one_scale_unless_each_layer_is_to_have_its_own() -> None:
    run = a_run()
    moving = animate(run, "montage", over="layers", rows=[2], channels="first:4")
    assert moving.names == ("conv1", "layer1.0", "fc")
    assert isinstance(moving.spec.frame, module.MontageSpec)
    assert moving.spec.frame.scope == "figure"
    assert len({(bar.low, bar.high) for i in range(3) for bar in moving.sheet(i).bars}) == 1
    own = animate(run, "montage", over="layers", rows=[2], channels="first:4", scope="layer")
    assert len({(bar.low, bar.high) for i in range(3) for bar in own.sheet(i).bars}) == 3


def test_frames_over_channels_are_channels() -> None:
    run = a_run()
    moving = animate(run, "montage", over="channels", rows="0:6", layers="conv1", channels=[3, 0])
    assert moving.names == ("channel 3", "channel 0")
    whole = draw(run, "montage", rows="0:6", layers="conv1", channels=[3, 0], columns=2).sheet
    for i in range(2):
        (mine,) = tiles(moving.sheet(i))
        assert (mine == whole.panels[0].tiles[i::2]).all()
    with pytest.raises(DrawError, match="name one layer"):
        animate(run, over="channels", layers=["conv1", "layer1.0"], channels="top:3")


def test_frames_over_stores_are_checkpoints_on_one_scale() -> None:
    runs = checkpoints()
    moving = animate(runs, "grid", rows=[0, 2], layers="conv1", channels="top:3")
    assert moving.names == ("epoch-0", "epoch-1", "epoch-2")
    assert moving.spec.over == "stores"
    bars = {(bar.low, bar.high) for i in range(3) for bar in moving.sheet(i).bars}
    assert len(bars) == 1
    assert bars.pop()[1] == pytest.approx(float(runs[2]["conv1"].values[[0, 2]].max()), rel=0.2)
    low, high = (tiles(moving.sheet(i))[0].astype(int).sum() for i in (0, 2))
    assert high > 2 * low


def test_stores_that_do_not_match_are_told() -> None:
    runs = checkpoints()
    runs[1].taps["conv1"] = FakeTap("conv1", np.zeros((6, 16, 4, 4), np.float32))
    with pytest.raises(DrawError, match=r"conv1 has another shape in /somewhere/epoch-1\.zarr"):
        animate(runs, layers="conv1", rows=[0])
    del runs[1].taps["conv1"]
    with pytest.raises(SelectionError, match="no tap 'conv1'"):
        animate(runs, layers="conv1", rows=[0])
    same = checkpoints()
    same[1].path = "/elsewhere/epoch-0.zarr"
    assert animate(same, layers="conv1", rows=[0]).names == ("epoch-0 1", "epoch-0 2", "epoch-2")


def test_frames_have_one_size_and_a_caption_at_one_place() -> None:
    moving = animate(a_run(), "grid", over="layers", rows=[0, 1])
    assert len({array.shape for array in moving.arrays()}) == 1
    sheets = [moving.sheet(i) for i in range(3)]
    assert {(sheet.width, sheet.height) for sheet in sheets} == {moving.size}
    for i, sheet in enumerate(sheets):
        count, name, held = sheet.texts[-3:]
        assert (count.text, name.text, held.text) == (
            f"{i + 1} of 3",
            moving.names[i],
            "one scale for all frames",
        )
        assert (count.y, name.x, held.y) == (
            sheets[0].texts[-3].y,
            sheets[0].texts[-2].x,
            moving.size[1] - 18,
        )
        others = [t.y for t in sheet.texts[:-3]] + [p.y + p.size[1] for p in sheet.panels]
        assert max(others) < count.y - 12


def test_names_are_given_and_counted() -> None:
    assert animate(a_run(), rows=[0, 1], names=["before", "after"]).names == ("before", "after")
    with pytest.raises(DrawError, match="2 frames, but 1 names"):
        animate(a_run(), rows=[0, 1], names=["before"])


def test_by_default_the_first_captured_rows_are_shown() -> None:
    assert animate(a_run(40), layers="fc").spec.frame.rows == tuple(range(16))
    assert animate(a_run(40), over="layers").spec.frame.rows == (0,)


def test_the_notes_of_all_frames_are_listed_once() -> None:
    run = a_run()
    run["conv1"].values[1, 2] = 0
    run["conv1"].values[3, 5] = np.nan
    notes = animate(run, rows=[0, 1, 3], layers="conv1").notes
    assert notes == ("conv1, row 1: all zero: 2", "conv1, row 3: NaN in 5")


def test_pictures_of_another_kind_are_frames_where_their_limits_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = a_run()
    options: dict[str, Any] = {"rows": [0, 2], "layers": ["conv1", "fc"]}
    with monkeypatch.context() as patch:
        patch.delitem(module._LAYOUTS, GridSpec)
        with pytest.raises(DrawError, match=r"each 'grid' finds a scale of its own.*scope=\(low, high\)"):
            animate(run, "grid", **options)
        with pytest.raises(DrawError, match="'grid' goes over rows or layers, not over channels"):
            animate(run, "grid", over="channels", **options)
        for over, names in (("rows", ("row 0", "row 2")), ("layers", ("conv1", "fc"))):
            moving = animate(run, "grid", over=over, scope=(0, 1), **options)
            assert moving.names == names
            assert moving.sheet(0).texts[-1].text == "one scale for all frames; it was given"
            arrays = list(moving.arrays())
            assert arrays[0].shape == arrays[1].shape
            one = options | {over: options[over][1:]}
            single = draw(run, "grid", scope=(0, 1), painter="pillow", **one)
            height, width = single.array().shape[:2]
            assert (arrays[1][:height, :width] == single.array())[:-40].all()


def test_heat_maps_over_pictures_are_frames(tmp_path: Path) -> None:
    run = captured(tmp_path, np.random.default_rng(0).random((3, 2, 8, 8), np.float32))
    moving = animate(run, "overlay", rows=[0, 2], scope=(0, 1))
    assert moving.names == ("row 0", "row 2")
    for mine, theirs in zip(frames_of(moving.encode("png")), moving.arrays(), strict=True):
        assert (mine == theirs).all()
    with pytest.raises(DrawError, match="each 'overlay' finds a scale of its own"):
        animate(run, "overlay", rows=[0, 2])


# Files


@pytest.mark.parametrize("kind", ["grid", "montage"])
@pytest.mark.parametrize("format", ["webp", "png"])
def test_webp_and_apng_keep_every_colour(kind: str, format: str) -> None:
    moving = animate(a_run(), kind, rows="0:4", layers="layer1.0", channels="first:4")
    got = frames_of(moving.encode(format))
    assert len(got) == 4
    for mine, theirs in zip(got, moving.arrays(), strict=True):
        assert (mine == theirs).all()


def test_a_gif_of_one_palette_keeps_every_colour() -> None:
    run = a_run()
    run["layer1.0"].values[2, 1] = np.nan
    moving = animate(run, "montage", rows="0:4", layers="layer1.0")
    for mine, theirs in zip(frames_of(moving.encode("gif")), moving.arrays(), strict=True):
        assert (mine == theirs).all()


def test_a_gif_beside_pictures_is_near() -> None:
    moving = animate(a_run(), "grid", rows="0:3", layers=["conv1", "layer1.0"])
    for i, (mine, theirs) in enumerate(zip(frames_of(moving.encode("gif")), moving.arrays(), strict=True)):
        sheet = moving.sheet(i)
        for x, y, entries, _ in sheet.coloured():
            at = (slice(y, y + entries.shape[0]), slice(x, x + entries.shape[1]))
            assert np.abs(mine[at].astype(int) - theirs[at]).max() <= 16
        assert (mine[0, 0] == 255).all()


def test_a_shared_palette_has_marks_greys_and_both_ends_as_they_are() -> None:
    frames = [np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)]
    for names in (["viridis"], ["viridis", "RdBu_r"], ["viridis", "magma", "gray", "RdBu_r"]):
        colours = film.shared_palette(names, frames, Ink)
        assert colours.shape == (256, 3)
        kept = {tuple(colour) for colour in colours.tolist()}
        for name in names:
            exact = [*range(BLACK, WHITE + 1), *range(Mark.ZERO, Mark.UNDER + 1), 0, N_COLOURS - 1]
            assert {tuple(colour) for colour in palette(name)[exact].tolist()} <= kept
        for ink in Ink:
            assert ink.is_grey or ink.value in kept
    blend = np.full((5, 5, 3), (90, 40, 200), np.uint8)
    assert [90, 40, 200] in film.shared_palette(["viridis"], [blend], Ink).tolist()


def test_each_pixel_takes_the_nearest_colour() -> None:
    rng = np.random.default_rng(1)
    rgb, colours = rng.integers(0, 256, (9, 7, 3), np.uint8), rng.integers(0, 256, (256, 3), np.uint8)
    got = colours[film.nearest(rgb, colours)].astype(int)
    best = ((rgb[:, :, None].astype(int) - colours.astype(int)) ** 2).sum(-1).min(-1)
    assert (((got - rgb) ** 2).sum(-1) == best).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_how_long_and_how_often(format: str) -> None:
    for loops in (0, 3):
        moving = animate(a_run(), "montage", rows="0:3", layers="conv1", seconds=0.25, loops=loops)
        with Image.open(io.BytesIO(moving.encode(format))) as image:
            assert image.n_frames == 3
            assert image.info["loop"] == (loops - 1 if format == "gif" and loops else loops)
            for i in range(3):
                image.seek(i)
                image.load()
                assert image.info["duration"] == 250


def test_frames_that_do_not_change_are_still_there() -> None:
    run = a_run()
    run["conv1"].values[:] = run["conv1"].values[:1]
    moving = animate(run, "montage", rows="0:3", layers="conv1", names=["same"] * 3)
    for format in ("gif", "png"):
        assert len(frames_of(moving.encode(format))) == 3


def test_frames_are_made_one_by_one_as_the_file_takes_them() -> None:
    alive: list[int] = []

    def frames() -> Iterator[Any]:
        for i in range(5):
            alive.append(i)
            yield np.full((4, 6), i, np.uint8)

    for write in (film.gif, film.apng):
        alive.clear()
        pieces = write(film.Film(6, 4, 5, 100, 0, ""), frames(), palette("gray"))
        seen = [len(alive) for _ in pieces]
        assert seen[0] == 0
        assert seen == sorted(seen)
        assert max(np.diff(seen)) == 1


def test_a_frame_holds_what_differs_and_no_more() -> None:
    frames = [np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8)] * 2
    frames[1] = frames[0].copy()
    frames[1][30:32, 40:43] ^= 1
    for write in (film.gif, film.apng):
        pieces = list(write(film.Film(60, 50, 2, 100, 0, ""), frames, palette("gray")))
        whole = max(pieces, key=len)
        assert len(whole) > 3000
        assert len(b"".join(pieces[pieces.index(whole) + 1 :])) < 150
        for mine, theirs in zip(frames_of(b"".join(pieces)), frames, strict=True):
            assert (mine == palette("gray")[theirs]).all()


@pytest.mark.parametrize("format", [*FORMATS, "apng", "html"])
def test_a_file_carries_what_draws_it_again(tmp_path: Path, format: str) -> None:
    if format == "html":
        pytest.importorskip("fontTools")
    runs = checkpoints()
    moving = animate(runs, rows=[1], layers="conv1", seconds=0.5, loops=2, title='</script> "(飞)" \\')
    path = moving.save(tmp_path / f"a.{format}")
    spec = read_spec(path)
    assert spec == moving.spec
    assert animate(runs, spec).encode(format) == path.read_bytes()
    assert b"somewhere" not in path.read_bytes()


def test_a_page_shows_it_and_its_notes() -> None:
    pytest.importorskip("fontTools")
    run = a_run()
    run["conv1"].values[1, 2] = 0
    moving = animate(run, "montage", rows=[0, 1], layers="conv1")
    page = moving.encode("html").decode()
    assert page.count("data:image/png;base64,") == 1
    assert '<li dir="auto">conv1, row 1: all zero: 2</li>' in page
    assert moving._repr_mimebundle_().keys() == {"text/plain", "text/html"}
    assert moving._repr_html_().startswith("<div")
    assert repr(moving) == "<Animation over rows: 2 frames>"


def test_what_does_not_move_shows_all_frames_one_below_the_other(tmp_path: Path) -> None:
    run = a_run()
    picture = draw(run, "animation", over="layers", rows=[0], channels="first:4")
    moving = animate(run, over="layers", rows=[0], channels="first:4")
    assert picture.spec == moving.spec
    got, height = picture.array(), moving.size[1]
    for i, frame in enumerate(moving.arrays()):
        assert (got[i * (height + 14) :][:height] == frame).all()
    assert picture.save(tmp_path / "a.png").is_file()


# What is asked for


def test_a_specification_goes_to_json_and_back() -> None:
    spec = AnimationSpec(
        frame=GridSpec(rows=(3, 1), layers=("conv1",), scope=(-1, 2)),
        over="rows",
        seconds=1.5,
        names=("a", "b"),
    )
    text = json.dumps(spec.to_json())
    assert AnimationSpec.from_json(text) == spec == spec_from_json(text)
    run = a_run()
    assert animate(run, spec).encode("gif") == animate(run, spec_from_json(text)).encode("gif")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"over": "row"}, "rows"),
        ({"over": "stores"}, "two stores or more; there are 1"),
        ({"seconds": 0}, "0.02 to 60"),
        ({"seconds": float("nan")}, "0.02 to 60"),
        ({"loops": -1}, "0 for ever"),
        ({"kind": "gird"}, "grid"),
        ({"kind": "animation"}, "'animation' cannot be animated; grids and montages can"),
        ({"layers": "conv2"}, "conv1"),
        ({"rows": 99}, "0 to 5"),
        ({"chanels": 3}, "channels"),
        ({"kind": GridSpec(rows=(0,)), "rows": [1]}, "says it all"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((DrawError, SelectionError), match=words):
        animate(a_run(), **options)


def test_several_stores_are_frames_over_stores_only() -> None:
    with pytest.raises(DrawError, match="frames over rows take one store; there are 3"):
        animate(checkpoints(), over="rows")
    with pytest.raises(DrawError, match="no store"):
        animate([])


@pytest.mark.parametrize("name", ["a.bmp", "a.svg", "a"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DrawError, match="gif, webp, png"):
        animate(a_run(), rows=[0], layers="fc").save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_would_take_too_much_memory_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = a_run()
    per_row = 16 * 8 * 8
    monkeypatch.setattr(module, "MOST_VALUES", 3 * per_row)
    assert len(animate(run, "montage", rows="0:3", layers="conv1")) == 3
    assert len(animate(run, rows="0:6", layers="conv1", channels="first:8")) == 6
    monkeypatch.setattr(FakeTap, "__getitem__", lambda self, key: pytest.fail("read"))
    with pytest.raises(DrawError, match=r"4,096 values in memory, and 3,072 are the most: name fewer"):
        animate(run, "montage", rows="0:4", layers="conv1")


def test_more_frames_than_anybody_would_watch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FRAMES", 3)
    with pytest.raises(DrawError, match="4 frames; 3 are the most: name fewer rows"):
        animate(a_run(), rows="0:4", layers="fc")


def test_frames_that_a_format_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = animate(a_run(), "montage", rows=[0, 1], layers="conv1")
    monkeypatch.setitem(film._LARGEST, "webp", 200)
    with pytest.raises(DrawError, match=r"webp holds 200 in each direction.*APNG"):
        moving.save(tmp_path / "a.webp")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(DrawError, match="one below the other are too much"):
        moving.still()


# Commands


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a command in an empty folder."""

    def opened(path: str) -> Any:
        run = a_run()
        run.path = path
        return run

    monkeypatch.setattr(reader, "open_run", opened)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(render, list(arguments))

    return run


def test_the_command_draws_what_the_call_draws(call: Any) -> None:
    result = call(
        "animation", "run.zarr", "--rows", "0:3", "--layers", "conv1", "--seconds", "0.5", "--wrong"
    )
    assert (result.exit_code, result.output) == (0, "animation.gif\n")
    same = animate(a_run(), rows=[2], layers="conv1", seconds=0.5).encode("gif")
    assert Path("animation.gif").read_bytes() == same
    call("animation", "run.zarr", "--rows", "0:2", "--layers", "conv1", "--clip", "5:95", "--out", "x.gif")
    clipped = animate(a_run(), rows="0:2", layers="conv1", clip=(5, 95)).encode("gif")
    assert Path("x.gif").read_bytes() == clipped


def test_the_command_goes_over_depth_and_stores(call: Any) -> None:
    assert call("animation", "a.zarr", "--over", "layers", "--out", "depth.webp").output == "depth.webp\n"
    depth = animate(a_run(), over="layers")
    assert Path("depth.webp").read_bytes() == depth.encode("webp")
    options = ("--rows", "1", "--layers", "conv1", "--name", "first", "--name", "second")
    assert call("animation", "a.zarr", "b.zarr", *options, "--out", "x.png").output == "x.png\n"
    spec = read_spec("x.png")
    assert isinstance(spec, AnimationSpec)
    assert (spec.over, spec.names) == ("stores", ("first", "second"))
    assert call("animation", "a.zarr", "--over", "layers", "--out", "x.pdf").output == "x.pdf\n"


def test_a_mistake_is_told_in_a_sentence(call: Any) -> None:
    for arguments, words in (
        (("--out", "x.bmp"), "gif"),
        (("--over", "stores"), "two stores"),
        (("--layers", "conv2"), "conv1"),
        (("--scope", "a:b"), "two numbers"),
        (("--seconds", "0"), "0.02"),
        (("--clip", "50:40"), "clip"),
    ):
        result = call("animation", "run.zarr", *arguments)
        assert result.exit_code == 1
        assert words in result.output
    assert call("animation", "run.zarr", "--wrong", "--right").exit_code == 2
    assert not list(Path().iterdir())


def test_a_file_is_drawn_again_in_another_format(call: Any) -> None:
    pytest.importorskip("matplotlib")
    call("grid", "run.zarr", "--rows", "2", "--layers", "conv1", "--painter", "pillow", "--out", "a.png")
    assert call("again", "run.zarr", "--from", "a.png", "--out", "b.svg").output == "b.svg\n"
    assert call("again", "run.zarr", "--from", "b.svg", "--out", "c.pdf").output == "c.pdf\n"
    assert read_spec("c.pdf") == read_spec("a.png")
    call("animation", "a.zarr", "b.zarr", "--rows", "1", "--layers", "conv1", "--out", "d.gif")
    assert call("again", "a.zarr", "b.zarr", "--from", "d.gif", "--out", "e.gif").output == "e.gif\n"
    assert Path("d.gif").read_bytes() == Path("e.gif").read_bytes()
    assert call("again", "a.zarr", "b.zarr", "--from", "a.png", "--out", "x.png").exit_code == 2
    assert "carries no" in call("again", "a.zarr", "--from", "/dev/null", "--out", "x.png").output


@pytest.mark.parametrize("command", ["animation", "again"])
def test_every_command_has_an_example(call: Any, command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example: layertap render" in result.output
