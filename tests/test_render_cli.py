"""The commands draw what the calls draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from layertap.capture import reader
from layertap.capture.errors import StoreNotFoundError
from layertap.render import cli, draw, picture
from layertap.render.cli import render
from test_render_run import a_run


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a command in an empty folder; the store of any name but `absent` is the stand-in's."""

    def opened(path: str) -> Any:
        if path == "absent":
            raise StoreNotFoundError(f"there is nothing at {path}")
        return a_run()

    monkeypatch.setattr(reader, "open_run", opened)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(render, list(arguments))

    return run


def test_a_grid_is_what_draw_gives(call: Any) -> None:
    result = call(
        *("grid", "run.zarr", "--rows", "2", "--layers", "conv1,fc", "--channels", "top:4"),
        *("--by", "l2", "--scope", "-1:2", "--painter", "pillow", "--out", "x.png"),
    )
    assert (result.exit_code, result.output) == (0, "x.png\n")
    same = draw(
        a_run(), rows=2, layers=["conv1", "fc"], channels="top:4", by="l2", scope=(-1, 2), painter="pillow"
    )
    assert Path("x.png").read_bytes() == same.png()


def test_scales_and_rankings_are_told_as_in_python(call: Any) -> None:
    for clip, same in (("99.5", 99.5), ("0.5:99.5", (0.5, 99.5))):
        result = call(
            *(
                "grid",
                "run.zarr",
                "--layers",
                "conv1",
                "--scope",
                "data",
                "--clip",
                clip,
                "--sign",
                "diverging",
            ),
            *(
                "--channels",
                "page:2:4",
                "--by",
                "variance",
                "--over",
                "data",
                "--out",
                "x.png",
                "--overwrite",
            ),
        )
        assert (result.exit_code, result.output) == (0, "x.png\n")
        options = {"scope": "data", "clip": same, "sign": "diverging", "over": "data"}
        expected = draw(a_run(), layers="conv1", channels="page:2:4", by="variance", **options)
        assert Path("x.png").read_bytes() == expected.png()


def test_without_options_the_first_row_is_drawn(call: Any) -> None:
    assert call("grid", "run.zarr").output == "00000.png\n"
    assert call("montage", "run.zarr").output == "montage.png\n"


def test_several_rows_take_a_template_or_one_file(call: Any) -> None:
    layers = ("--layers", "conv1", "--painter", "pillow")
    assert "--one-file" in call("grid", "run.zarr", "--rows", "0:3", "--out", "x.png").output
    result = call("grid", "run.zarr", *layers, "--rows", "0:3", "--out", "{row}_{class}.png")
    assert result.output.split() == ["0_cat.png", "1_dog.png", "2_cat.png"]
    result = call("grid", "run.zarr", *layers, "--rows", "0:3", "--one-file", "--out", "x.png")
    assert result.output.split() == ["x.png"]
    rows = [0, 1, 2]
    assert Path("x.png").read_bytes() == draw(a_run(), rows=rows, layers="conv1", painter="pillow").png()


def test_rows_are_filtered(call: Any) -> None:
    options = ("grid", "run.zarr", "--layers", "conv1", "--painter", "pillow", "--out", "{row}.png")
    assert call(*options, "--class", "dog", "--wrong").output.split() == ["5.png"]
    assert call(*options, "--right", "--rows", "0:3").output.split() == ["0.png", "1.png"]
    assert call(*options, "--each-class", "--rows", "1:", "--overwrite").output.split() == ["2.png", "1.png"]


def test_a_montage_is_over_rows(call: Any) -> None:
    result = call("montage", "run.zarr", "--rows", "0:6", "--layers", "conv1", "--channels", "5")
    assert result.output == "montage.png\n"
    same = draw(a_run(), "montage", rows="0:6", layers="conv1", channels=5)
    assert Path("montage.png").read_bytes() == same.png()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent",), "nothing at"),
        (("run.zarr", "--layers", "conv2"), "conv1"),
        (("run.zarr", "--rows", "9"), "0 to 5"),
        (("run.zarr", "--class", "cut"), "cat"),
        (("run.zarr", "--channels", "best"), "first:9"),
        (("run.zarr", "--scope", "a:b"), "two numbers"),
        (("run.zarr", "--scope", "all"), "layer"),
        (("run.zarr", "--clip", "a"), "percentile"),
        (("run.zarr", "--clip", "99", "--scope", "0:1"), "give one of the two"),
        (("run.zarr", "--layers", "conv1", "--channels", "page:9:4"), "its 16 make 4 pages of 4"),
        (("run.zarr", "--out", "x.gif"), "png, svg, pdf"),
        (("run.zarr", "--out", "{what}.png"), "{row}"),
        (("run.zarr", "--painter", "oil"), "no painter"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_and_leaves_nothing(
    call: Any, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    for kind in ("grid", "montage"):
        result = call(kind, *arguments)
        assert result.exit_code == 1
        assert words in result.output
        assert result.output.startswith("Error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [(), ("grid",), ("montage",)])
def test_every_command_has_an_example(call: Any, command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Example: layertap render" in result.output


def test_one_file_has_a_plain_name(call: Any) -> None:
    options = ("grid", "run.zarr", "--rows", "0,1", "--layers", "conv1", "--painter", "pillow", "--one-file")
    assert call(*options).output == "grid.png\n"
    assert Path("grid.png").read_bytes() == draw(a_run(), rows=[0, 1], layers="conv1", painter="pillow").png()
    result = call(*options, "--out", "{row}.png")
    assert result.exit_code == 2
    assert "--one-file makes one file, but {row}.png names one a row" in result.output
    assert [path.name for path in Path().iterdir()] == ["grid.png"]


def test_options_that_exclude_each_other_are_refused(call: Any) -> None:
    for kind in ("grid", "montage"):
        for options in (("--wrong", "--right"), ("--right", "--wrong")):
            result = call(kind, "run.zarr", *options)
            assert result.exit_code == 2
            assert "--wrong and --right" in result.output


def test_what_is_kept_is_not_told_as_drawn(call: Any) -> None:
    options = ("grid", "run.zarr", "--layers", "conv1", "--painter", "pillow", "--out", "{row}.png")
    assert call(*options, "--rows", "1").output == "1.png\n"
    Path("1.png").write_bytes(b"mine")
    output = call(*options, "--rows", "0:2").output
    assert output == "0.png\nkept 1.png (there already; --overwrite draws it anew)\n"
    assert call(*options, "--rows", "0:2", "--overwrite").output == "0.png\n1.png\n"
    assert Path("1.png").read_bytes() != b"mine"


def test_files_are_drawn_by_as_many_processes_as_are_asked_for(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def many(run: Any, kind: str, rows: Any, out: str, *, jobs: int, **options: Any) -> None:
        asked.append(jobs)

    monkeypatch.setattr(picture, "draw_many", many)
    monkeypatch.setattr(cli, "n_cores", lambda: 7)
    for options in ((), ("--jobs", "3")):
        assert call("grid", "run.zarr", *options).exit_code == 0
    monkeypatch.setattr(cli, "_MANY", 6)
    for options in (("--rows", "0:6"), ("--rows", "0:5"), ("--rows", "0:6", "--jobs", "1")):
        assert call("grid", "run.zarr", *options).exit_code == 0
    assert asked == [1, 3, 7, 1, 1]


def test_an_option_is_told_before_the_name_of_the_file(call: Any) -> None:
    for kind in ("grid", "montage"):
        result = call(kind, "run.zarr", "--rows", "0:3", "--scope", "figur", "--out", "x.png")
        assert "no scope 'figur'" in result.output
        result = call(kind, "run.zarr", "--rows", "0:3", "--layers", "conv2", "--out", "{what}.png")
        assert "conv2" in result.output


def test_two_measures_are_refused(call: Any) -> None:
    for by in ("l1", "mean"):
        result = call("grid", "run.zarr", "--channels", "top:9:variance", "--by", by)
        assert result.exit_code == 1
        assert f"ranks by variance, but by says {by}" in result.output
