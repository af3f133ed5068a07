"""Principal components as colours are those of an independent computation, and what is said is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import PcaSpec, Sheet, draw, draw_many, pca
from layertap.render.cli import render
from layertap.render.kinds import spec_from_json
from layertap.render.sheet import Photo
from numpy.typing import NDArray

Values = NDArray[Any]
N = 30


def taps() -> dict[str, Values]:
    rng = np.random.default_rng(3)
    mix = rng.standard_normal((6, 6)) * [3, 2, 1, 0.3, 0.2, 0.1]
    maps = np.einsum("nkyx,ck->ncyx", rng.standard_normal((N, 6, 9, 7)), mix)
    tokens = rng.standard_normal((N, 17, 5)) * np.array([5, 3, 2, 1, 1])
    odd = rng.standard_normal((N, 7, 4))
    vector = rng.standard_normal((N, 8))
    found = {"conv": maps, "tokens": tokens, "odd": odd, "vector": vector, "one": maps[:, :1]}
    return {name: values.astype(np.float32) for name, values in found.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    return captured(tmp_path_factory.mktemp("pca") / "run.zarr", taps())


def captured(path: Path, values: dict[str, Values], **options: Any) -> lt.Run:
    rng = np.random.default_rng(0)
    n_rows = len(next(iter(values.values())))
    pictures = rng.integers(0, 256, (n_rows, 3, 16, 16), np.uint8)
    source = lt.ArraySource(pictures, np.arange(n_rows) % 2)
    rows = iter(range(0, n_rows, 8))

    def model(batch: Values) -> dict[str, Values]:
        first = next(rows)
        return {name: one[first : first + len(batch)] for name, one in values.items()}

    return lt.record_dataset(
        model, source, path, ["**"], batch_size=8, memory="64MiB", classes=("cat", "dog"), **options
    )


def reference(vectors: Values, n: int = 3) -> tuple[Values, Values, Values]:
    """Return mean, components by a singular value decomposition, and shares of the variance."""
    vectors = vectors.astype(np.float64)
    mean = vectors.mean(0)
    _, sizes, basis = np.linalg.svd(vectors - mean, full_matrices=False)
    basis = basis[:n] * np.sign(basis[:n, np.abs(basis[:n]).argmax(1)].diagonal())[:, None]
    return mean, basis, (sizes**2 / (sizes**2).sum())[:n]


def colours(maps: Values, mean: Values, basis: Values, clip: float) -> Values:
    """Return RGB (rows, height, width, 3) of maps (rows, channels, height, width), clipped over all rows."""
    scores = np.einsum("nchw,kc->nhwk", maps - mean[:, None, None], basis)
    sizes = np.sort(np.abs(scores).reshape(-1, len(basis)), axis=0)
    limits = sizes[int(np.ceil(clip / 100 * (len(sizes) - 1)))]
    levels = np.full((*scores.shape[:3], 3), 127.5)
    levels[..., : len(basis)] = 127.5 * (1 + np.clip(scores / limits, -1, 1))
    return levels


def drawn(sheet: Sheet, shape: tuple[int, int]) -> list[Values]:
    """Return the maps of a size on a sheet, in the order of rows and then layers."""
    found = [photo for photo in sheet.photos if photo.pixels.shape[:2] == shape]
    return [photo.pixels for photo in sorted(found, key=lambda photo: (photo.y, photo.x))]


def words(sheet: Sheet) -> str:
    return " ".join(text.text for text in sheet.texts)


def test_colours_are_the_components_of_the_drawn_rows(run: lt.Run) -> None:
    rows = [4, 9, 2]
    sheet = draw(run, "pca", rows=rows, layers="conv", fit="rows", clip=90).sheet
    maps = taps()["conv"][rows].astype(np.float64)
    mean, basis, shares = reference(np.moveaxis(maps, 1, -1).reshape(-1, 6))
    expected = colours(maps, mean, basis, 90)
    for pixels, levels in zip(drawn(sheet, (9, 7)), expected, strict=True):
        assert np.abs(pixels - levels).max() <= 0.51
    said = words(sheet)
    assert f"red: component 1, {100 * shares[0]:.3g} %" in said
    assert "fitted to all 189 places of the 3 rows drawn" in said
    scores = np.abs(np.einsum("nchw,kc->knhw", maps - mean[:, None, None], basis)).reshape(3, -1)
    limits = np.percentile(scores, 90, axis=1, method="higher")
    n_clipped = (scores > limits[:, None]).sum()
    assert f"{n_clipped} of 567 values clipped, beyond percentile 90" in said
    assert "One scale for all 3 rows." in said


def test_nothing_is_clipped_at_100_and_the_ends_of_strips_are_the_limits(run: lt.Run) -> None:
    sheet = draw(run, "pca", rows=[4], layers="conv", fit="rows", clip=100).sheet
    pixels = drawn(sheet, (9, 7))[0]
    assert ((pixels == 0) | (pixels == 255)).any((0, 1)).all()
    assert "nothing is clipped" in words(sheet)
    strips = [
        photo.pixels for photo in sheet.photos if photo.pixels.shape[0] == 9 and photo.pixels.shape[1] > 99
    ]
    assert len(strips) == 3
    for i, strip in enumerate(strips):
        assert strip[0, 0].tolist() == [0 if k == i else 128 for k in range(3)]
        assert strip[-1, -1].tolist() == [255 if k == i else 128 for k in range(3)]


def test_a_fit_of_all_places_is_that_of_the_whole_store(run: lt.Run) -> None:
    every = draw(run, "pca", rows=[0, 1], layers="conv").sheet
    same = draw(run, "pca", rows=[0, 1], layers="conv", seed=5).sheet
    assert "fitted to 1,890 places of all 30 rows" in words(every)
    assert "random" not in words(every)
    maps = taps()["conv"].astype(np.float64)
    mean, basis, _ = reference(np.moveaxis(maps, 1, -1).reshape(-1, 6))
    for pixels, levels in zip(drawn(every, (9, 7)), colours(maps[:2], mean, basis, 99), strict=True):
        assert np.abs(pixels - levels).max() <= 0.51
    assert all((a == b).all() for a, b in zip(drawn(every, (9, 7)), drawn(same, (9, 7)), strict=True))


def test_a_sample_is_bounded_seeded_and_said(run: lt.Run) -> None:
    first, again, other = (
        draw(run, "pca", rows=3, layers="conv", places=60, seed=seed).sheet for seed in (1, 1, 2)
    )
    assert "fitted to 60 places of all 30 rows, drawn at random (seed 1)" in words(first)
    assert (drawn(first, (9, 7))[0] == drawn(again, (9, 7))[0]).all()
    assert (drawn(first, (9, 7))[0] != drawn(other, (9, 7))[0]).any()
    few = draw(run, "pca", rows=3, layers="conv", places=10, seed=1).sheet
    assert "fitted to 10 places of 10 of 30 rows" in words(few)


def test_tokens_are_drawn_by_their_patch_grid_without_the_class_token(run: lt.Run) -> None:
    sheet = draw(run, "pca", rows=[5], layers="tokens", fit="rows").sheet
    patches = taps()["tokens"][5, 1:].astype(np.float64)
    mean, basis, _ = reference(patches)
    expected = colours(patches.T.reshape(1, 5, 4, 4), mean, basis, 99)[0]
    assert np.abs(drawn(sheet, (4, 4))[0] - expected).max() <= 0.51
    assert "class token left out, 4 \N{MULTIPLICATION SIGN} 4 patches" in words(sheet)


def test_a_sequence_that_is_no_square_is_wrapped_and_the_rest_is_white(run: lt.Run) -> None:
    sheet = draw(run, "pca", rows=[5], layers="odd").sheet
    pixels = drawn(sheet, (3, 3))[0]
    assert (pixels.reshape(9, 3)[7:] == 255).all()
    assert (pixels.reshape(9, 3)[:7] != 255).any(1).all()


def test_vectors_are_drawn_where_they_are_named_and_left_out_where_not(run: lt.Run) -> None:
    assert draw(run, "pca").spec.layers == ("conv", "tokens", "odd", "one")
    assert len(drawn(draw(run, "pca", rows=[1, 2], layers="vector").sheet, (1, 1))) == 2


def test_one_channel_is_one_component(run: lt.Run) -> None:
    sheet = draw(run, "pca", rows=[1], layers="one", fit="rows").sheet
    assert "red: component 1, 100 %" in words(sheet)
    assert "green: no component 2" in words(sheet)
    assert (drawn(sheet, (9, 7))[0][..., 1:] == 128).all()


def test_what_is_not_finite_has_a_look_of_its_own_and_is_left_out_of_the_fit(tmp_path: Path) -> None:
    values = taps()["conv"]
    values[4, 2, 0, :3], values[4, 5, 8, 6], values[2, 1] = np.nan, np.inf, 3.5
    values[:, 0] = 0
    run = captured(tmp_path / "run.zarr", {"conv": values})
    sheet = draw(run, "pca", rows=[4, 3], layers="conv", fit="rows").sheet
    large, small = max(sheet.photos, key=lambda p: p.pixels.shape), drawn(sheet, (9, 7))[0]
    broken = ~np.isfinite(values[4]).all(0)
    factor = large.pixels.shape[0] // 9
    tiles = large.pixels.reshape(9, factor, 7, factor, 3).swapaxes(1, 2)
    checked = tiles[broken].reshape(-1, factor, factor, 3)
    assert (np.abs(np.diff(checked.astype(int), axis=1)) == 255).all()
    assert (tiles[~broken] == tiles[~broken][:, :1, :1]).all()
    assert small.shape == (9, 7, 3)
    assert sheet.notes == ("conv, row 4: not finite at 4 of 63 places",)
    assert "not finite: 4 places" in words(sheet)
    assert "1 of 6 channels constant" in words(sheet)
    maps = values[[4, 3]].astype(np.float64)
    vectors = np.moveaxis(maps, 1, -1).reshape(-1, 6)
    mean, basis, _ = reference(vectors[np.isfinite(vectors).all(1)])
    scores = np.einsum("chw,kc->hwk", maps[1] - mean[:, None, None], basis)
    assert (np.sign(small.astype(float) - 127.5) == np.sign(scores))[np.abs(scores) > 0.1].all()


@pytest.mark.parametrize("value", [0.0, 2.5, np.nan])
def test_a_layer_without_variance_says_so(tmp_path: Path, value: float) -> None:
    run = captured(tmp_path / "run.zarr", {"conv": np.full((9, 4, 3, 3), value, np.float32)})
    sheet = draw(run, "pca").sheet
    assert "nothing varies in what was fitted" in words(sheet)
    if value == value:
        assert (drawn(sheet, (3, 3))[0] == 128).all()


def test_words_stand_clear_of_each_other_and_of_maps(run: lt.Run) -> None:
    from layertap.render.lettering import text_width

    sheet = draw(run, "pca", rows=[0, 1]).sheet
    boxes = []
    for text in sheet.texts:
        width = text_width(text.text, text.size, text.bold)
        left = text.x - {"left": 0, "center": width / 2, "right": width}[text.align]
        boxes.append((left, text.y - text.size * 0.8, left + width, text.y + 1))
    boxes += [(p.x, p.y, p.x + p.size[0], p.y + p.size[1]) for p in sheet.photos]
    for i, a in enumerate(boxes):
        assert a[2] <= sheet.width
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_rows_that_differ_in_shape_are_drawn_each_in_its_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Embedding(9, 4)

        def forward(self, ids: Any) -> Any:
            return self.layer(ids)

    torch.manual_seed(0)
    model = Encoder()
    for name, options in (("ragged", {"ragged": "layer:9"}), ("pad", {"pad": "layer:9,1e6"})):
        with lt.record(model, tmp_path / name, layers=["layer"], **options):
            for n in (4, 9, 6):
                model(torch.arange(2 * n).reshape(2, n) % 9)
    sheets = [draw(lt.open(tmp_path / name), "pca", rows=[0, 2, 4]).sheet for name in ("ragged", "pad")]
    each = [drawn(sheets[0], shape)[0] for shape in ((2, 2), (3, 3), (2, 3))]
    for pixels, own in zip(drawn(sheets[1], (3, 3)), each, strict=True):
        own = own.reshape(-1, 3)
        assert (pixels.reshape(9, 3)[: len(own)] == own).all()
        assert (pixels.reshape(9, 3)[len(own) :] == 255).all()
    assert all("fitted to 38 places of all 6 rows" in words(sheet) for sheet in sheets)


def test_an_unfinished_capture_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_BLOCK_BYTES", "_SHARD_BYTES"):
        monkeypatch.setattr(f"layertap.capture.plan.{name}", 4000)
    part = captured(tmp_path / "run.zarr", {"conv": taps()["conv"]}, part="1/2")
    n = part.n_committed
    assert 0 < n < N
    said = words(draw(part, "pca").sheet)
    assert f"fitted to {63 * n:,} places of {n} of 30 rows" in said
    assert f"the capture is not finished: {n} of 30 rows" in said
    with pytest.raises(DrawError, match=f"row {n} is not captured yet"):
        draw(part, "pca", rows=n)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fit": "all"}, "sample or to the drawn rows"),
        ({"clip": 20}, "percentile from 50 to 100"),
        ({"places": 1}, "places must be"),
        ({"seed": -1}, "seed must be"),
        ({"layers": "con"}, "conv"),
        ({"rows": 99}, "0 to 29"),
        ({"chanels": 3}, "no option"),
        ({"channels": "all"}, "no option"),
    ],
)
def test_bad_requests_are_refused(run: lt.Run, options: dict[str, Any], text: str) -> None:
    with pytest.raises((DrawError, SelectionError), match=text):
        draw(run, "pca", **options)


def test_too_many_channels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    run = captured(tmp_path / "run.zarr", {"wide": np.zeros((2, 4097), np.float32)})
    with pytest.raises(DrawError, match=r"4097 channels.*pca:16"):
        draw(run, "pca", layers="wide")
    with pytest.raises(DrawError, match="no layer of maps"):
        draw(run, "pca")


def test_the_same_picture_comes_from_its_specification(run: lt.Run, tmp_path: Path) -> None:
    spec = PcaSpec(rows=(3, 1), layers=("conv",), places=40, seed=2, clip=95, picture=False, title="غ")
    again = spec_from_json(json.dumps(spec.to_json()))
    assert again == spec
    assert hash(again) == hash(spec)
    picture = draw(run, spec)
    assert draw(run, again).png() == picture.png()
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        assert picture.save(tmp_path / name).read_bytes().startswith(start)


def test_many_rows_are_drawn_one_by_one_and_fitted_once(
    run: lt.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[str] = []
    fit = pca._fitted_to_sample
    monkeypatch.setattr(pca, "_fitted_to_sample", lambda *given: fits.append(given[1].name) or fit(*given))
    paths = draw_many(run, "pca", [0, 3], tmp_path / "{row}_{class}.png", layers="conv", places=99)
    assert fits == ["conv"]
    assert [path.name for path in paths] == ["0_cat.png", "3_dog.png"]
    assert paths[1].read_bytes() == draw(run, "pca", rows=3, layers="conv", places=99).png()


def test_the_command_draws_what_the_call_draws(run: lt.Run, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    arguments = ("--rows", "0,3", "--layers", "conv", "--fit", "rows", "--clip", "95", "--out", str(out))
    result = CliRunner().invoke(render, ["pca", str(run.path), *arguments])
    assert (result.exit_code, result.output) == (0, f"{out}\n")
    assert out.read_bytes() == draw(run, "pca", rows=[0, 3], layers="conv", fit="rows", clip=95).png()
    result = CliRunner().invoke(render, ["pca", str(run.path), "--layers", "cov"])
    assert result.exit_code == 1
    assert "conv" in result.output


def test_photos_are_magnified_by_whole_numbers(run: lt.Run) -> None:
    sheet = draw(run, "pca", layers="conv").sheet
    maps = [photo for photo in sheet.photos if photo.pixels.shape[:2] == (9, 7)]
    assert [photo.factor for photo in maps] == [round(176 / 9)]
    assert all(isinstance(photo, Photo) for photo in sheet.photos)
