"""Heat maps lie where the model saw them, and their colours say what their bars say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.capture.errors import DrawError, FormatError, SelectionError
from layertap.capture.trust import check_facts
from layertap.render import OverlaySpec
from layertap.render.cli import render
from layertap.render.colormaps import N_COLOURS, WHITE, Mark, palette
from layertap.render.heat import Tokens, grad_cam, reduced, rollout
from layertap.render.heat_maps import seen_by
from layertap.render.kinds import spec_from_json
from layertap.render.painters import painter
from layertap.render.resize import Area, averaged, cell_of, resized
from layertap.render.selection import select_layers
from layertap.render.sheet import Outline, Sheet
from numpy.typing import NDArray

Values = NDArray[Any]


def area_of(shape: tuple[int, int]) -> Area:
    return Area(0, 0, *shape)


def layers(batch: Values) -> dict[str, Values]:
    """Positive maps, signed maps, tokens after a class token, and a vector."""
    n = len(batch)
    cells = batch.reshape(n, 3, 4, 8, 4, 8).mean(axis=(3, 5))
    tokens = cells.reshape(n, 3, 16).transpose(0, 2, 1)
    return {
        "relu": np.concatenate([cells, cells**2], axis=1),
        "signed": cells - cells.mean(axis=(2, 3), keepdims=True),
        "tokens": np.ascontiguousarray(np.concatenate([tokens[:, :1] + 9, tokens], axis=1)),
        "fc": tokens[:, 0],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pictures = np.random.default_rng(3).integers(0, 256, (6, 32, 32, 3), np.uint8)
    labels = np.arange(6) % 2
    source = lt.ArraySource(pictures, labels, classes=("猫", "dog"))
    return lt.record_dataset(layers, source, tmp_path_factory.mktemp("overlay") / "run.zarr", ["**"])


def captured(tmp_path: Path, maps: Values, pictures: Any = None, **options: Any) -> Any:
    """Return a run of one layer with these maps over pictures of 8 x 8, or others."""
    if pictures is None:
        pictures = np.full((len(maps), 8, 8, 3), 100, np.uint8)
    numbered = iter(range(99))

    def model(batch: Values) -> dict[str, Values]:
        start = next(numbered) * len(batch)
        return {"maps": maps[start : start + len(batch)]}

    options = {"batch_size": len(maps), "overwrite": True} | options
    return lt.record_dataset(model, pictures, tmp_path / "maps.zarr", ["maps"], **options)


def tile(picture: Any, i: int = 0) -> Values:
    """Return the palette entries of the first tile of a panel of maps."""
    return np.asarray(picture.sheet.panels[i].tiles[0])


def texts(picture: Any) -> str:
    return " ".join(text.text for text in picture.sheet.texts).replace("\N{MULTIPLICATION SIGN}", "x")


# Resizing


@pytest.mark.parametrize("how", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    ("cells", "pixels"), [((7, 7), (224, 224)), ((3, 5), (32, 31)), ((1, 1), (5, 4)), ((8, 8), (8, 8))]
)
def test_maps_are_resized_as_torch_does_without_aligned_corners(
    how: str, cells: tuple[int, int], pixels: tuple[int, int]
) -> None:
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(0).standard_normal((2, 3, *cells)).astype(np.float32)
    mode: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
    if how == "nearest":
        mode = {"mode": "nearest-exact"}
    expected = torch.nn.functional.interpolate(torch.from_numpy(maps), pixels, **mode).numpy()
    values, inside = resized(maps, area_of(pixels), pixels, how)
    assert inside.all()
    assert np.allclose(values, expected, atol=2e-6)


@pytest.mark.parametrize("how", ["bilinear", "nearest"])
def test_maps_lie_in_their_area_and_nowhere_else(how: str) -> None:
    maps = np.arange(1, 7, dtype=np.float64).reshape(2, 3)
    area = Area(-2, 1.5, 9, 12)
    values, inside = resized(maps, area, (10, 14), how)
    for y in range(10):
        for x in range(14):
            v, u = (y + 0.5 + 2) / 11 * 2, (x + 0.5 - 1.5) / 10.5 * 3
            if not (0 <= v < 2 and 0 <= u < 3):
                assert not inside[y, x]
                assert values[y, x] == 0
            elif how == "nearest":
                assert values[y, x] == maps[int(v), int(u)]
            else:
                b, a = min(max(v - 0.5, 0), 1), min(max(u - 0.5, 0), 2)
                j, i = min(int(b), 0), min(int(a), 1)
                top, bottom = (maps[k, i] + (a - i) * (maps[k, i + 1] - maps[k, i]) for k in (j, j + 1))
                assert values[y, x] == pytest.approx(top + (b - j) * (bottom - top))


@pytest.mark.parametrize("how", ["bilinear", "nearest"])
def test_what_is_not_finite_covers_its_own_cell_alone(how: str) -> None:
    maps = np.full((4, 4), 2.0, np.float32)
    maps[1, 2], maps[3, 0], maps[3, 1] = np.nan, np.inf, -np.inf
    values, _ = resized(maps, area_of((16, 16)), (16, 16), how)
    cells = values.reshape(4, 4, 4, 4).swapaxes(1, 2)
    for y in range(4):
        for x in range(4):
            assert np.array_equal(np.unique(cells[y, x]), [maps[y, x]], equal_nan=True)


def test_no_nan_is_lost_where_maps_are_averaged_down() -> None:
    maps = np.ones((1, 7, 9))
    maps[0, 5, 1] = np.nan
    cells = np.ones((7, 9), np.bool_)
    cells[0, 8] = False
    means, whole = averaged(maps, cells, 3)
    assert means.shape == (1, 2, 3)
    assert np.isnan(means[0]).tolist() == [[False, False, False], [True, False, False]]
    assert whole.tolist() == [[True, True, False], [True, True, True]]


# Numbers


def test_channels_are_reduced_by_mean_maximum_and_l2() -> None:
    values = np.random.default_rng(1).standard_normal((2, 5, 3, 4)).astype(np.float32)
    values[0, 2, 1, 1] = np.nan
    for heat, expected in (
        ("mean", sum(values[:, i].astype(np.float64) for i in range(5)) / 5),
        ("maximum", np.stack([values[:, i] for i in range(5)]).max(axis=0)),
        ("l2", sum(values[:, i].astype(np.float64) ** 2 for i in range(5)) ** 0.5),
    ):
        got = reduced(values, heat)
        assert got.shape == (2, 1, 3, 4)
        assert np.allclose(got[:, 0], expected, equal_nan=True)
        assert np.isnan(got).sum() == 1


def test_grad_cam_keeps_nan_and_drops_what_is_negative() -> None:
    outputs = np.array([[[[1.0, -1.0], [np.nan, 2.0]]]])
    assert np.array_equal(grad_cam(outputs, np.ones_like(outputs)), [[[[1, 0], [np.nan, 2]]]], equal_nan=True)


def test_rollout_is_the_product_of_mixed_layers() -> None:
    rng = np.random.default_rng(2)
    weights = rng.random((3, 2, 4, 5, 5)).astype(np.float32)  # layers, rows, heads, query, key
    weights /= weights.sum(axis=-1, keepdims=True)
    got = rollout(iter(weights))
    for row in range(2):
        expected = np.eye(5)
        for layer in range(3):
            mixed = sum(weights[layer, row, head].astype(np.float64) for head in range(4)) / 4
            mixed = 0.5 * mixed + 0.5 * np.eye(5)
            expected = (mixed / mixed.sum(axis=1)[:, None]) @ expected
        assert np.allclose(got[row], expected)


@pytest.mark.parametrize(
    ("n", "size", "before", "expected"),
    [
        (197, (224, 224), None, Tokens(1, 14, 14)),
        (196, (224, 224), None, Tokens(0, 14, 14)),
        (198, (224, 224), 2, Tokens(2, 14, 14)),
        (201, (224.0, 224.0), 5, Tokens(5, 14, 14)),
        (141, (224, 160), None, Tokens(1, 14, 10)),
        (140, (160, 224), None, Tokens(0, 10, 14)),
    ],
)
def test_patches_are_found_by_the_picture_that_they_fill(
    n: int, size: tuple[float, float], before: int | None, expected: Tokens
) -> None:
    assert Tokens.of(n, size, before, "block") == expected


@pytest.mark.parametrize(
    ("n", "before", "words"), [(198, None, "prefix=2"), (197, 3, "prefix=1"), (3, 0, "fill")]
)
def test_tokens_that_are_no_patches_are_refused_with_what_would_do(
    n: int, before: int | None, words: str
) -> None:
    with pytest.raises(DrawError, match=words):
        Tokens.of(n, (224, 224), before, "block")


# Colours


def test_a_map_is_resized_first_and_scaled_then(tmp_path: Path) -> None:
    maps = np.zeros((1, 1, 4, 4), np.float32)
    maps[0, 0, 1, 1] = 16
    picture = lt.draw(captured(tmp_path, maps), "overlay")
    expected, _ = resized(maps[0, 0], area_of((8, 8)), (8, 8))
    assert expected.max() == 9  # between the centres of cells; none of the peak's own
    assert picture.sheet.bars[0].high == 9
    assert (tile(picture) == np.rint(expected / 9 * (N_COLOURS - 1))).all()
    assert "resized first (bilinear, to 8 x 8 pixels), scaled then: one scale" in texts(picture)
    nearest = lt.draw(captured(tmp_path, maps), "overlay", resize="nearest")
    assert nearest.sheet.bars[0].high == 16
    assert "resized first (nearest" in texts(nearest)


@pytest.mark.parametrize("name", ["pillow", "matplotlib"])
def test_pixels_are_the_picture_in_grey_below_the_colours_of_the_bar(run: Any, name: str) -> None:
    if name == "matplotlib":
        pytest.importorskip("matplotlib")
    picture = lt.draw(run, "overlay", rows=[2, 4], layers="relu", alpha=0.25, painter=name)
    panel = picture.sheet.panels[1]
    at = (slice(panel.y, panel.y + 160), slice(panel.x, panel.x + 160))
    grey = np.rint(run.rows["picture"][4] @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    colours = palette("viridis")[panel.tiles[0]]
    expected = np.rint(0.75 * grey + 0.25 * colours).repeat(5, axis=0).repeat(5, axis=1)
    assert abs(picture.array()[at] - expected).max() <= 1
    bar = picture.sheet.bars[0]
    drawn = picture.array()[bar.y, bar.x : bar.x + len(bar.line)]
    assert (drawn == palette("viridis")[bar.line]).all()
    assert "Colours at 25 % over the picture in grey; bars have them unblended." in texts(picture)


def test_painters_agree_pixel_by_pixel(run: Any) -> None:
    pytest.importorskip("matplotlib")
    sheet = lt.draw(run, "overlay", rows=[0, 5], layers="relu,signed", channels="0:2", cell=(2, 2)).sheet
    bare = Sheet(sheet.width, sheet.height, sheet.panels, sheet.photos, sheet.bars, outlines=sheet.outlines)
    assert (painter("pillow").array(bare) == painter("matplotlib").array(bare)).all()


def test_files_of_each_format_and_of_each_row_are_written(run: Any, tmp_path: Path) -> None:
    paths = lt.draw_many(run, "overlay", [1, 3], tmp_path / "{row}_{class}.png", layers="relu", heat="l2")
    assert [path.name for path in paths] == ["1_dog.png", "3_dog.png"]
    picture = lt.draw(run, "overlay", rows=3, layers="relu", heat="l2")
    assert paths[1].read_bytes() == picture.png() == picture._repr_png_()
    pytest.importorskip("matplotlib")
    assert picture.save(tmp_path / "x.svg").read_bytes().count(b"<image") == 3  # picture, map and bar
    assert picture.save(tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_may_stay_in_colour_below(run: Any) -> None:
    picture = lt.draw(run, "overlay", rows=1, layers="relu", beneath="colour", alpha=1e-6)
    (photo,), (panel,) = picture.sheet.photos, picture.sheet.panels
    assert (photo.pixels == run.rows["picture"][1]).all()
    assert (panel.rgb()[1:-1, 1:-1] == photo.rgb()).all()


def test_signed_maps_diverge_and_are_clear_at_zero(run: Any) -> None:
    panel = lt.draw(run, "overlay", layers="signed").sheet.panels[0]
    assert panel.colormap == "RdBu_r"
    assert panel.opacity is not None
    middle = N_COLOURS // 2
    assert panel.opacity[middle] == 0
    assert np.allclose(panel.opacity[[0, N_COLOURS - 1]], 0.6)
    assert np.allclose(panel.opacity[middle:N_COLOURS], panel.opacity[middle::-1])
    flat = lt.draw(run, "overlay", layers="signed", fade=False)
    assert np.allclose(flat.sheet.panels[0].opacity[:N_COLOURS], 0.6)
    both = texts(lt.draw(run, "overlay", layers=["relu", "signed"]))
    assert "60 % (of signed maps 0 to 60 %, the more the larger the value)" in both


def test_nan_dead_and_constant_maps_hide_the_picture_and_are_named(tmp_path: Path) -> None:
    maps = np.random.default_rng(5).random((4, 1, 4, 4), np.float32)
    maps[1], maps[2], maps[3, 0, 1, 3] = 0, 0.5, np.nan
    run = captured(tmp_path, maps)
    picture = lt.draw(run, "overlay", rows="0:4")
    assert np.unique(tile(picture, 1)).tolist() == [Mark.ZERO]
    assert np.unique(tile(picture, 2)).tolist() == [Mark.CONSTANT]
    assert (tile(picture, 3) == Mark.NAN).sum() == 4
    assert (picture.sheet.panels[1].rgb()[1:-1, 1:-1] == palette("viridis")[Mark.ZERO]).all()
    for words in ("all zero: row 1", "constant: row 2", "NaN in row 3"):
        assert words in texts(picture)
    assert "maps, row 3: NaN in the map" in picture.sheet.notes
    alone = lt.draw(run, "overlay", rows=3, scope=(0, 0.5))
    assert "NaN in the map" in texts(alone)
    assert "over 0.5 in the map" in texts(alone)
    assert "all zero" in texts(lt.draw(run, "overlay", rows=1))


def test_the_scope_of_the_scale_is_the_one_that_was_asked_for(run: Any) -> None:
    def highs(scope: Any) -> list[float]:
        return [
            bar.high
            for bar in lt.draw(run, "overlay", rows="0:3", layers="relu,tokens", scope=scope).sheet.bars
        ]

    assert len(highs("layer")) == 2
    assert len(set(highs("figure"))) == 1
    assert len(set(highs("row"))) == 6
    assert highs((0, 7)) == [7, 7]
    each = lt.draw(run, "overlay", layers="relu,tokens", channels="0:2", scope="channel")
    assert "scaled then: a scale for each channel and feature." in texts(each)
    assert len([note for note in each.sheet.notes if "from 0 to" in note]) == 4
    assert "one scale for each layer" in texts(lt.draw(run, "overlay", layers="relu", scope="channel"))


# Places


def test_a_capture_keeps_what_the_model_saw(tmp_path: Path) -> None:
    source = lt.ArraySource(np.zeros((2, 40, 50, 3), np.uint8), preprocess=lt.Preprocess(resize=32, crop=16))
    run = captured(tmp_path, np.ones((2, 1, 4, 4), np.float32), source)
    assert run.rows["picture"].shape[1:3] == (16, 16)
    assert seen_by(run, (16, 16), None).area == Area(0, 0, 16, 16)


def test_maps_over_whole_pictures_lie_in_the_middle_that_the_store_says(tmp_path: Path) -> None:
    run = captured(tmp_path, np.ones((1, 1, 4, 4), np.float32))
    run.manifest.facts["preprocess"] = {"resize": 40, "crop": 32}
    seen = seen_by(run, (80, 100), None)
    assert seen.area == Area(8, 18, 72, 82)
    assert "middle 64" in seen.note


def test_a_region_that_is_given_is_where_maps_lie(run: Any) -> None:
    picture = lt.draw(run, "overlay", layers="relu", region=(8, 0, 24, 16))
    covered = tile(picture) != WHITE
    assert covered[8:24, :16].all()
    assert covered.sum() == 16 * 16
    clear = ~covered.repeat(5, axis=0).repeat(5, axis=1)
    panel = picture.sheet.panels[0]
    beneath = panel.beneath[0].repeat(5, axis=0).repeat(5, axis=1)
    assert (panel.rgb()[1:-1, 1:-1][clear] == beneath[clear]).all()
    assert "The region was given." in texts(picture)
    with pytest.raises(DrawError, match=r"beside the picture, which has 32 . 32 pixels"):
        lt.draw(run, "overlay", region=(32, 0, 40, 8))


def test_inputs_of_other_proportions_than_the_picture_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    with lt.record(model, tmp_path / "loop.zarr", layers=["0", ".:input"]) as rec:
        model(torch.rand(2, 3, 16, 16))
        rec.annotate(picture=np.zeros((2, 30, 40, 3), np.uint8))
    run = lt.open(tmp_path / "loop.zarr")
    with pytest.raises(DrawError, match=r"got 16 . 16 pixels .* have 30 . 40.* region="):
        lt.draw(run, "overlay", layers="0")
    assert lt.draw(run, "overlay", layers="0", region=(0, 5, 30, 35)).sheet.panels


def test_a_layer_that_was_cropped_covers_its_part(tmp_path: Path) -> None:
    maps = np.random.default_rng(6).random((2, 1, 8, 8), np.float32)
    run = captured(tmp_path, maps, reduce="crop:2x4@6,0")
    picture = lt.draw(run, "overlay", resize="nearest")
    covered = np.zeros((8, 8), np.bool_)
    covered[6:, :4] = True
    assert ((tile(picture) != WHITE) == covered).all()
    assert "stored as crop:2x4@6,0" in texts(picture)


def test_a_layer_that_was_pooled_and_then_cropped_covers_its_part(tmp_path: Path) -> None:
    maps = np.random.default_rng(6).random((2, 1, 8, 8), np.float32)
    run = captured(tmp_path, maps, reduce="pool:4|crop:1x2@3,0")
    covered = np.zeros((8, 8), np.bool_)
    covered[6:, :4] = True
    assert ((tile(lt.draw(run, "overlay")) != WHITE) == covered).all()


def test_what_a_store_says_wrongly_of_a_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = captured(tmp_path, np.ones((1, 1, 8, 8), np.float32), reduce="crop:2x4@6,0")
    monkeypatch.setattr(run["maps"], "source_shape", (8,))
    with pytest.raises(DrawError, match="crop:2x4@6,0 of 8, which does not fit"):
        lt.draw(run, "overlay")


@pytest.mark.parametrize("pixels", ["224", 0, -1, 2.5, True, 2**40])
def test_a_store_that_says_no_pixels_of_its_preprocessing_is_refused(pixels: Any) -> None:
    for key in ("resize", "crop"):
        with pytest.raises(FormatError, match=key):
            check_facts({"taps": {}, "preprocess": {key: pixels}})
        check_facts({"taps": {}, "preprocess": {key: 224}})


def test_a_region_of_less_than_a_pixel_is_not_magnified_without_end(run: Any) -> None:
    with pytest.raises(DrawError, match="the picture would have"):
        lt.draw(run, "overlay", layers="relu", region=(0, 0, 1e-4, 1e-4))


def test_tokens_that_were_pooled_have_no_place(tmp_path: Path) -> None:
    run = captured(tmp_path, np.random.default_rng(6).random((2, 36, 3), np.float32), reduce="pool:16")
    assert run["maps"].shape == (2, 16, 3)
    with pytest.raises(DrawError, match="holds pool:16 of maps, so where its tokens lie"):
        lt.draw(run, "overlay")


def test_cells_that_are_far_from_square_are_said(run: Any, tmp_path: Path) -> None:
    wide = captured(tmp_path, np.random.default_rng(0).random((1, 1, 2, 8), np.float32))
    assert "its cells are 4 x 1 pixels, not square" in texts(lt.draw(wide, "overlay"))
    assert "not square" not in texts(lt.draw(run, "overlay", layers="relu"))


def test_large_pictures_are_averaged_down_with_their_maps(tmp_path: Path) -> None:
    pictures = np.random.default_rng(7).integers(0, 256, (1, 480, 640, 3), np.uint8)
    run = captured(tmp_path, np.random.default_rng(8).random((1, 1, 12, 16), np.float32), pictures)
    picture = lt.draw(run, "overlay")
    (panel,), (photo,) = picture.sheet.panels, picture.sheet.photos
    assert panel.tiles.shape == (1, 120, 160)
    assert photo.pixels.shape == (120, 160, 3)
    assert photo.pixels[3, 5, 0] == round(pictures[0, 12:16, 20:24, 0].mean())
    assert "to 480 x 640 pixels), averaged down with the picture (4 x 4)" in texts(picture)
    assert lt.draw(run, "overlay", magnification=1).sheet.panels[0].tiles.shape == (1, 480, 640)


def test_a_map_with_more_cells_than_the_picture_has_pixels_loses_none(tmp_path: Path) -> None:
    maps = np.random.default_rng(9).random((1, 1, 24, 24), np.float32)
    panel = lt.draw(captured(tmp_path, maps), "overlay").sheet.panels[0]
    assert panel.tiles.shape == (1, 24, 24)
    assert (panel.tiles[0] == np.rint(maps[0, 0] / maps.max() * (N_COLOURS - 1))).all()


# Boxes


def test_the_box_of_a_cell_is_drawn_on_the_map_and_on_the_picture(run: Any) -> None:
    picture = lt.draw(run, "overlay", layers="relu", cell=(1, 3))
    (photo,), (panel,) = picture.sheet.photos, picture.sheet.panels
    pixels = picture.array()
    for part in (photo, panel):
        y, x = part.y + 8 * 5, part.x + 24 * 5
        assert (pixels[y, x : x + 40] == 0).all()
        assert (pixels[y : y + 40, x + 39] == 0).all()
        assert (pixels[y + 1, x + 1 : x + 39] == 255).all()
    assert "cell (1, 3)" in texts(picture)


def test_a_cell_that_is_not_there_is_refused(run: Any) -> None:
    with pytest.raises(SelectionError, match=r"cell \(4, 0\) of relu .* 4 . 4"):
        lt.draw(run, "overlay", layers="relu", cell=(4, 0))


@pytest.mark.parametrize("name", ["pillow", "matplotlib"])
def test_an_outline_is_four_lines_on_top_of_all(name: str) -> None:
    if name == "matplotlib":
        pytest.importorskip("matplotlib")
    outline = Outline(3, 5, 6, 4, (200, 0, 90))
    got = painter(name).array(Sheet(12, 14, outlines=(outline,)))
    expected = np.full((14, 12, 3), 255, np.uint8)
    expected[5:9, 3:9] = (200, 0, 90)
    expected[6:8, 4:8] = 255
    assert (got == expected).all()
    assert Sheet(12, 14, outlines=(outline,)).colormap is None


def test_a_cell_is_its_share_of_the_area() -> None:
    assert cell_of((1, 2), (4, 8), Area(10, 20, 50, 100)) == Area(20, 40, 30, 50)


# The specification, and what is refused


@pytest.mark.parametrize(
    "spec",
    [
        OverlaySpec(rows=(3,), layers=("relu",)),
        OverlaySpec(
            rows=(1, 2), layers=("relu", "tokens"), heat="l2", channels=(0, 2), cell=(1, 1), alpha=0.4
        ),
        OverlaySpec(rows=(0,), layers=("signed",), region=(0, 0, 16, 16), fade=False, resize="nearest"),
        OverlaySpec(rows=(0,), layers=("a",), heat="head", query=(1, 2), prefix=1, original=False),
    ],
)
def test_a_specification_comes_back_from_json_equal(spec: OverlaySpec, run: Any) -> None:
    again = spec_from_json(json.dumps(spec.to_json()))
    assert again == spec
    assert hash(again) == hash(spec)
    if spec.heat != "head":
        assert (lt.draw(run, again).array() == lt.draw(run, spec).array()).all()


def test_without_options_it_is_the_mean_of_every_layer_that_has_places(run: Any) -> None:
    picture = lt.draw(run, "overlay")
    assert picture.spec.to_json() == {"kind": "overlay", "rows": [0], "layers": ["relu", "signed", "tokens"]}
    assert "mean of all 6 channels" in texts(picture)
    assert "class token left out" in texts(picture)


def test_channels_are_drawn_each_or_reduced_together(run: Any) -> None:
    each = lt.draw(run, "overlay", rows=2, layers="relu", channels=[4, 1])
    assert each.spec.heat == "channel"
    assert each.sheet.panels[0].tiles.shape[0] == 2
    one = lt.draw(run, "overlay", rows=2, layers="relu", channels=4)
    assert "channel 4 of 6" in texts(one)
    assert one.sheet.bars[0].high == pytest.approx(
        resized(run["relu"][2, 4], area_of((32, 32)), (32, 32))[0].max()
    )
    some = lt.draw(run, "overlay", rows=2, layers="relu", channels="0:2", heat="maximum")
    expected, _ = resized(run["relu"][2, :2].max(axis=0), area_of((32, 32)), (32, 32))
    assert some.sheet.bars[0].high == pytest.approx(expected.max())
    best = lt.draw(run, "overlay", rows=2, layers="relu", heat="channel")
    assert f"channel {run['relu'][2].mean(axis=(1, 2)).argmax()} of 6, by mean" in texts(best)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heat": "grad"}, "gradcam"),
        ({"heat": "gradcam"}, "layer4:grad"),
        ({"heat": "rollout"}, ":attention"),
        ({"heat": "head", "layers": "relu"}, ":attention"),
        ({"layers": "fc"}, r"fc cannot be laid over a picture: a row of it is \(feature=3\)"),
        ({"query": "class"}, "of attention"),
        ({"query": "all", "heat": "head"}, "class, mean or a patch|:attention"),
        ({"cell": (1,)}, "two whole numbers"),
        ({"cell": (-1, 0)}, "from 0"),
        ({"region": (4, 0, 4, 8)}, "above its bottom"),
        ({"region": (1, 2, 3)}, "four numbers"),
        ({"alpha": 0}, "alpha"),
        ({"prefix": -1}, "prefix"),
        ({"resize": "cubic"}, "bilinear or nearest"),
        ({"beneath": "red"}, "grey or colour"),
        ({"channels": 6, "layers": "relu"}, "0 to 5"),
        ({"layers": "tokens", "prefix": 4}, "prefix=1"),
    ],
)
def test_a_bad_option_is_named_with_what_would_do(run: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((DrawError, SelectionError), match=words):
        lt.draw(run, "overlay", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heat": "gradcam", "channels": "0:4"}, "all channels"),
        ({"heat": "rollout", "channels": (1,)}, "all heads"),
        ({"heat": "rollout", "cell": (0, 0)}, "query="),
        ({"heat": "head", "query": "every"}, "class, mean or a patch"),
    ],
)
def test_options_that_have_no_meaning_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DrawError, match=words):
        OverlaySpec(rows=(0,), layers=("a",), **options)


def test_a_store_without_pictures_is_refused(tmp_path: Path) -> None:
    run = lt.record_dataset(
        lambda batch: {"maps": batch}, np.ones((2, 5, 4, 4), np.float32), tmp_path / "bare.zarr", ["**"]
    )
    with pytest.raises(DrawError, match=r"annotate\(input=images\)"):
        lt.draw(run, "overlay")


def test_the_command_draws_what_the_call_draws(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    arguments = [
        *("overlay", str(run.path), "--rows", "1,2", "--layers", "relu", "--heat", "l2", "--cell", "0,3"),
        *("--region", "0,0,30.5,32", "--alpha", "0.5", "--resize", "nearest", "--painter", "pillow"),
    ]
    done = CliRunner().invoke(render, [*arguments, "--out", str(out)])
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    same = lt.draw(
        *(run, "overlay"),
        rows=[1, 2],
        layers="relu",
        heat="l2",
        cell=(0, 3),
        region=(0, 0, 30.5, 32),
        alpha=0.5,
        resize="nearest",
        painter="pillow",
    )
    assert out.read_bytes() == same.png()
    each = CliRunner().invoke(render, [*arguments, "--out", str(tmp_path / "{row}.png")])
    assert each.output.split() == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    wrong = CliRunner().invoke(render, ["overlay", str(run.path), "--cell", "1;2"])
    assert "2 numbers with commas between them" in wrong.output


# Gradients and attention


class Net:
    """Builds small networks, so that torch is imported by the tests that need it alone."""

    @staticmethod
    def convolutions() -> Any:
        import torch
        from torch import nn

        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.Flatten(), nn.Linear(8 * 64, 3)
        ).eval()

    @staticmethod
    def transformer() -> Any:
        import torch
        from torchvision.models import VisionTransformer

        torch.manual_seed(0)
        model = VisionTransformer(32, 8, 3, 4, 16, 32, num_classes=3)
        torch.nn.init.normal_(model.heads.head.weight)
        for layer in model.encoder.layers:  # sharp, so that layers and heads differ
            layer.self_attention.in_proj_weight.data *= 6
        return model.eval()


@pytest.fixture(scope="module")
def images() -> Values:
    return np.random.default_rng(11).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def cam_run(images: Values, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torch")
    names = [f"{i}{kind}" for i in (0, 2) for kind in ("", ":grad")]
    source = lt.ArraySource(images, np.arange(5) % 3, classes=("frog", "toad", "newt"))
    store = tmp_path_factory.mktemp("cam") / "cam.zarr"
    return lt.record_dataset(Net.convolutions(), source, store, names, score="prediction")


@pytest.fixture(scope="module")
def vit_run(images: Values, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torchvision")
    names = ["type:MultiheadAttention:attention", "encoder.layers.*", "encoder.layers.*:grad"]
    source = lt.ArraySource(images, np.arange(5) % 3)
    store = tmp_path_factory.mktemp("vit") / "vit.zarr"
    return lt.record_dataset(Net.transformer(), source, store, names, score=1)


def attention_layers(run: Any) -> list[str]:
    return [name for name in run if name.endswith(":attention")]


def drawn_heat(run: Any, **options: Any) -> list[Values]:
    """Return the maps of a picture before they are resized: one of (rows, maps, height, width) a layer."""
    from layertap.render.heat_maps import heats

    spec = lt.draw(run, "overlay", **options).spec
    assert isinstance(spec, OverlaySpec)
    return [heat.maps for heat in heats(run, spec, seen_by(run, (32, 32), None))]


def test_grad_cam_is_that_of_autograd(cam_run: Any, images: Values) -> None:
    import torch

    model = Net.convolutions()
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    for name, got in zip("02", drawn_heat(cam_run, heat="gradcam", rows="0:5"), strict=True):
        for row in range(5):
            kept = model[: int(name) + 1](inputs[row : row + 1]).detach().requires_grad_()
            logits = model[int(name) + 1 :](kept)
            logits[0, logits.argmax()].backward()
            weights = kept.grad[0].mean(dim=(1, 2))
            expected = torch.relu(torch.einsum("k,kyx->yx", weights, kept[0])).detach().numpy()
            assert np.allclose(got[row, 0], expected, rtol=1e-4, atol=1e-7)
            assert expected.any()


def test_grad_cam_of_tokens_is_of_the_patches(vit_run: Any) -> None:
    first = "encoder.layers.encoder_layer_0"
    assert vit_run[first].shape[1:] == (17, 16)
    (got,) = drawn_heat(vit_run, heat="gradcam", layers=first, rows=[1, 4])
    for i, row in enumerate((1, 4)):
        outputs, gradients = (vit_run[name][row, 1:].astype(np.float64) for name in (first, f"{first}:grad"))
        expected = np.maximum(outputs @ gradients.mean(axis=0), 0).reshape(4, 4)
        assert np.allclose(got[i, 0], expected, rtol=1e-5)
        assert expected.any()


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("prediction", "Grad-CAM of the predicted class's logit"),
        ("label", "Grad-CAM of the true class's logit"),
        ("1", "Grad-CAM of the logit of toad"),
        ("margin", "Grad-CAM of margin"),
        (None, "Grad-CAM of what backward() was called on"),
    ],
)
def test_the_class_that_grad_cam_is_of_is_said(
    cam_run: Any, monkeypatch: pytest.MonkeyPatch, score: str | None, words: str
) -> None:
    assert cam_run.manifest.facts["score"] == "prediction"
    monkeypatch.setitem(cam_run.manifest.facts, "score", score)
    picture = lt.draw(cam_run, "overlay", heat="gradcam", layers="2", rows=1, original=False)
    assert words in " ".join(texts(picture).split())
    assert "predicted" in texts(picture)


def test_layers_of_grad_cam_may_be_named_by_output_or_gradient(cam_run: Any) -> None:
    for layers in ("2", "2:grad", ["2:grad", "2"]):
        assert lt.draw(cam_run, "overlay", heat="gradcam", layers=layers).spec.to_json()["layers"] == ["2"]
    assert lt.draw(cam_run, "overlay", heat="gradcam").spec.to_json()["layers"] == ["0", "2"]


def test_grad_cam_of_what_was_not_captured_whole_is_refused(images: Values, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model, names = Net.convolutions(), ["0", "2", "2:grad"]
    run = lt.record_dataset(
        *(model, images, tmp_path / "some.zarr", names),
        score=0,
        reduce={"2": "channels:0,1"},
    )
    with pytest.raises(SelectionError, match=r"takes 0:grad, .* name one of 2"):
        lt.draw(run, "overlay", heat="gradcam", layers="0")
    with pytest.raises(DrawError, match="holds channels:0,1 of 2; capture it whole"):
        lt.draw(run, "overlay", heat="gradcam")


def test_rollout_is_that_of_the_captured_attention(vit_run: Any) -> None:
    (got,) = drawn_heat(vit_run, heat="rollout", rows=[0, 3])
    for i, row in enumerate((0, 3)):
        expected = np.eye(17)
        for name in attention_layers(vit_run):
            mixed = 0.5 * vit_run[name][row].astype(np.float64).mean(axis=0) + 0.5 * np.eye(17)
            expected = mixed / mixed.sum(axis=1, keepdims=True) @ expected
        assert np.allclose(got[i, 0], expected[0, 1:].reshape(4, 4))
    (patch,) = drawn_heat(vit_run, heat="rollout", rows=3, query=(1, 2))
    assert np.allclose(patch[0, 0], expected[1 + 4 + 2, 1:].reshape(4, 4))
    (mean,) = drawn_heat(vit_run, heat="rollout", rows=3, query="mean")
    assert np.allclose(mean[0, 0], expected[:, 1:].mean(axis=0).reshape(4, 4))


def test_rollout_keeps_the_order_of_the_layers(vit_run: Any) -> None:
    names = attention_layers(vit_run)
    assert len(names) == 3
    picture = lt.draw(vit_run, "overlay", layers=names[::-1])
    assert picture.spec.to_json()["heat"] == "rollout"
    assert picture.spec.to_json()["layers"] == names
    assert f"attention rollout over {', '.join(names)}" in picture.sheet.notes
    assert "class token to each patch" in texts(picture)


def test_rollout_of_layers_of_other_tokens_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class TwoSizes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = (torch.nn.MultiheadAttention(3, 1, batch_first=True) for _ in range(2))

        def forward(self, x: Any) -> Any:
            x = self.fine(*[x.flatten(2).transpose(1, 2)] * 3)[0]
            return self.coarse(*[x[:, ::4]] * 3)[0]

    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    run = lt.record_dataset(TwoSizes(), pictures, tmp_path / "two.zarr", ["*:attention"])
    assert [run[name].shape[2] for name in run] == [16, 4]
    with pytest.raises(DrawError, match="fine:attention has 16 and coarse:attention 4"):
        lt.draw(run, "overlay", heat="rollout")
    assert lt.draw(run, "overlay", heat="rollout", layers="coarse:attention").sheet.panels


def test_patterns_mean_taps_of_the_kind_behind_them(vit_run: Any) -> None:
    pattern = "encoder.layers.*.self_attention:attention"
    assert select_layers(vit_run, pattern) == tuple(attention_layers(vit_run))
    gradients = select_layers(vit_run, "encoder.layers.*:grad")
    assert gradients == tuple(f"encoder.layers.encoder_layer_{i}:grad" for i in range(3))
    assert select_layers(vit_run, "encoder.layers.*") == tuple(
        name.removesuffix(":grad") for name in gradients
    )


def test_heads_are_those_of_the_capture(vit_run: Any) -> None:
    name = attention_layers(vit_run)[1]
    weights = vit_run[name][2]
    (all_heads,) = drawn_heat(vit_run, layers=name, rows=2)
    assert np.array_equal(all_heads[0], weights[:, 0, 1:].reshape(4, 4, 4))
    (some,) = drawn_heat(vit_run, layers=name, rows=2, channels=[3, 1], query=(3, 0))
    assert np.array_equal(some[0], weights[[3, 1], 13, 1:].reshape(2, 4, 4))
    picture = lt.draw(vit_run, "overlay", layers=name, rows=2, channels=[3, 1], query=(3, 0))
    assert picture.spec.to_json()["heat"] == "head"
    assert len(picture.sheet.outlines) == 2 * 3  # two heads and the picture
    assert "patch (3, 0), in the box, to each patch" in texts(picture)
    assert lt.draw(vit_run, "overlay", heat="head").spec.to_json()["layers"] == attention_layers(vit_run)[-1:]


def test_attention_is_refused_where_it_is_not_of_a_pictures_tokens(vit_run: Any) -> None:
    name = attention_layers(vit_run)[0]
    with pytest.raises(SelectionError, match=r"patch \(4, 0\) .* 4 . 4"):
        lt.draw(vit_run, "overlay", heat="rollout", query=(4, 0))
    with pytest.raises(DrawError, match="heat='rollout'"):
        lt.draw(vit_run, "overlay", heat="mean", layers=name)
    with pytest.raises(DrawError, match="no class token"):
        lt.draw(vit_run, "overlay", layers=name, query="class", prefix=0, region=(0, 0, 17, 1))


def test_pages_clipping_and_rows_that_are_ranked_over_are_said(run: Any) -> None:
    page = lt.draw(run, "overlay", layers="relu", channels="page:2:2", heat="channel")
    assert page.sheet.panels[0].tiles.shape[0] == 2
    assert "2 of 6 channels, page 2 of 3" in texts(page)
    ranked = lt.draw(run, "overlay", layers="relu", channels="top:2:variance", over="data")
    assert "by variance over all 6 rows" in " ".join(texts(ranked).split())
    clipped = lt.draw(run, "overlay", layers="relu", clip=90)
    assert "clipped at percentile 90" in texts(clipped)
    assert "over" in texts(clipped)
    with pytest.raises(DrawError, match="scope is layer"):
        lt.draw(run, "overlay", scope="data")
    with pytest.raises(DrawError, match="heads are ranked over the rows"):
        OverlaySpec(rows=(0,), layers=("a",), heat="head", channels="top:2", over="data")


def test_a_capture_that_did_not_end_is_drawn_and_said_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "layertap.render.overlay.unfinished", lambda run: "the capture is not finished: 3 of 6 rows"
    )
    assert "not finished: 3 of 6 rows" in texts(lt.draw(run, "overlay", layers="relu"))
