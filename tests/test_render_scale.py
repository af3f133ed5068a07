"""Numbers become colours by one honest rule, and what is no ordinary number never looks like one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layertap.capture.errors import DrawError
from layertap.render import draw
from layertap.render.colormaps import (
    BLACK,
    DIVERGING,
    N_COLOURS,
    WHITE,
    Mark,
    palette,
)
from layertap.render.importance import MEASURES, importance, rank
from layertap.render.scale import Scale, TileFacts, entries, fit
from layertap.render.sheet import Fill, Ink
from numpy.typing import NDArray
from test_render_run import Values, maps_run

MIDDLE = N_COLOURS // 2
SEQUENTIAL = ("viridis", "magma", "gray")


def drawn(values: Values, limits: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Return the entries of (rows, channels, height, width) values on one scale."""
    facts = TileFacts.of(values, values.shape[2] * values.shape[3])
    low, high = np.fmin.reduce(facts.low, axis=None), np.fmax.reduce(facts.high, axis=None)
    scale = fit(np.asarray(low), np.asarray(high), None, bool(low < 0))
    if limits:
        name = "RdBu_r" if limits[0] < 0 else "viridis"
        scale = Scale(name, np.asarray(limits[0]), np.asarray(limits[1]), given=True)
    return entries(values, scale, facts)


def test_positive_values_run_from_zero_to_the_largest() -> None:
    got = drawn(np.array([[[[0.0, 1.0, 2.0, 4.0]]]], np.float32))
    assert got.ravel().tolist() == [0, 58, 115, 230]


def test_positive_values_do_not_start_at_their_smallest() -> None:
    assert drawn(np.array([[[[3.0, 4.0]]]])).min() == round(0.75 * (N_COLOURS - 1))


def test_signed_values_are_symmetric_around_the_middle() -> None:
    values = np.array([[[[-1.0, 0.0, 1.0, 4.0]]]], np.float32)
    got = drawn(values).ravel().astype(int)
    assert got[1] == MIDDLE
    assert got[0] + got[2] == 2 * MIDDLE
    assert got[3] == N_COLOURS - 1
    assert (drawn(-values).ravel() == 2 * MIDDLE - got).all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_a_scale_holds_at_any_size(size: float) -> None:
    values = np.array([[[[-1.0, 0.0, 1.0]]]]) * size
    assert drawn(values.astype(np.float32)).ravel().tolist() == [0, MIDDLE, N_COLOURS - 1]


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1.7e308])
def test_a_scale_holds_at_any_size_in_double_precision(size: float) -> None:
    values = np.array([[[[-1.0, 0.0, 1.0]]]]) * size
    assert drawn(values).ravel().tolist() == [0, MIDDLE, N_COLOURS - 1]


def test_what_is_not_finite_is_marked_and_leaves_the_rest_as_it_was() -> None:
    values = np.array([[[[0.0, 1.0], [2.0, 3.0]]]], np.float32)
    spoiled = np.concatenate([values, values], axis=3)
    spoiled[0, 0, 0, 2:], spoiled[0, 0, 1, 2] = (np.nan, np.inf), -np.inf
    got = drawn(spoiled)[0, 0]
    assert (got[:, :2] == drawn(values)[0, 0]).all()
    assert got[0, 2:].tolist() == [Mark.NAN, Mark.POSITIVE_INFINITY]
    assert got[1, 2] == Mark.NEGATIVE_INFINITY


def test_a_map_without_a_finite_value_is_drawn() -> None:
    assert (drawn(np.full((1, 1, 2, 2), np.nan)) == Mark.NAN).all()
    assert (drawn(np.full((1, 1, 2, 2), np.inf)) == Mark.POSITIVE_INFINITY).all()


def test_zero_and_constant_maps_have_their_own_look() -> None:
    values = np.random.default_rng(0).random((1, 3, 4, 4))
    values[0, 0], values[0, 1] = 0, 0.5
    got = drawn(values)
    assert (got[0, 0] == Mark.ZERO).all()
    assert (got[0, 1] == Mark.CONSTANT).all()
    assert (got[0, 2] < N_COLOURS).all()


def test_a_map_of_one_pixel_has_its_colour() -> None:
    assert drawn(np.array([[[[0.0]], [[2.0]]]])).ravel().tolist() == [0, N_COLOURS - 1]


def test_values_outside_given_limits_are_marked_and_not_clipped() -> None:
    got = drawn(np.array([[[[-2.0, -1.0, 0.0, 3.0, 3.5]]]], np.float32), (-1, 3)).ravel().tolist()
    assert got[0] == Mark.UNDER
    assert got[4] == Mark.OVER
    assert got[2] == MIDDLE
    assert got[3] == N_COLOURS - 1
    assert got[1] == round((N_COLOURS - 1) / 3)  # symmetric around 0 although the limits are not


def test_a_bar_runs_between_the_limits_only() -> None:
    scale = Scale("RdBu_r", np.asarray(-1.0), np.asarray(3.0), given=True)
    bar = scale.bar(5)
    assert bar[0] == round((N_COLOURS - 1) / 3)
    assert bar[-1] == N_COLOURS - 1
    values = np.linspace(-1, 3, 5).reshape(1, 1, 1, 5)
    assert (bar == scale.indices(values).ravel()).all()


def test_float16_bool_and_integers_have_a_scale() -> None:
    for values in (np.array([0, 1], np.float16), np.array([0.0, 2**40])):
        assert drawn(values.reshape(1, 1, 1, 2)).ravel().tolist() == [0, N_COLOURS - 1]


# Importance


def _values() -> Values:
    values = np.random.default_rng(3).standard_normal((2, 7, 5, 4)).astype(np.float32)
    values[values < -1] = 0
    return values


PLAIN = {
    "mean": lambda v: v.mean(),
    "maximum": lambda v: v.max(),
    "variance": lambda v: v.var(),
    "l1": lambda v: np.abs(v).sum(),
    "l2": lambda v: np.sqrt((v**2).sum()),
    "sparsity": lambda v: (v != 0).mean(),
}


@pytest.mark.parametrize("by", MEASURES)
def test_importance_is_what_numpy_says_channel_by_channel(by: str) -> None:
    values = _values()
    plain = [PLAIN[by](values[:, c].astype(np.float64)) for c in range(7)]
    np.testing.assert_allclose(importance(values, by), plain, rtol=1e-12)
    assert rank(values, by).tolist() == sorted(range(7), key=lambda c: -plain[c])


@pytest.mark.parametrize("by", MEASURES)
def test_nan_and_infinity_do_not_upset_the_ranking(by: str) -> None:
    values = _values()
    clean = [c for c in rank(values, by).tolist() if c not in (2, 4)]
    values[0, 2, 0, 0], values[1, 2, 0, 0] = np.nan, np.inf
    values[:, 4] = np.nan
    spoiled = rank(values, by).tolist()
    assert [c for c in spoiled if c not in (2, 4)] == clean
    assert spoiled[-1] == 4


def test_equals_stay_in_order() -> None:
    assert rank(np.ones((1, 5, 2, 2)), "mean").tolist() == [0, 1, 2, 3, 4]
    assert rank(_values(), "index").tolist() == list(range(7))


# Colour maps


def lightness(rgb: Values) -> Values:
    """Return CIE L* of sRGB colours."""
    linear = rgb / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.asarray(np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sequential_maps_rise_in_lightness(name: str) -> None:
    steps = np.diff(lightness(palette(name)[:N_COLOURS].astype(float)))
    assert steps.min() > -0.35  # rounding to 8 bits
    assert lightness(palette(name)[[0, N_COLOURS - 1]].astype(float)).tolist()[1] > 85


@pytest.mark.parametrize("name", DIVERGING)
def test_diverging_maps_darken_to_both_sides_of_a_light_middle(name: str) -> None:
    light = lightness(palette(name)[:N_COLOURS].astype(float))
    assert light[MIDDLE] > 95
    assert np.diff(light[: MIDDLE + 1]).min() > -0.35
    assert np.diff(light[MIDDLE:]).max() < 0.35


@pytest.mark.parametrize("name", [*SEQUENTIAL, *DIVERGING])
def test_colour_maps_are_those_of_the_field(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    theirs = matplotlib.colormaps[name](np.linspace(0, 1, N_COLOURS))[:, :3] * 255
    assert np.abs(palette(name)[:N_COLOURS] - theirs).max() <= 3.5


# Linear RGB as it is seen with a kind of colour blindness: G. Machado, M. Oliveira and L. Fernandes,
# "A physiologically-based model for simulation of color vision deficiency" (2009), severity 1.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_D65 = np.array([0.9505, 1.0, 1.089])


def seen(rgb: Values, sight: str) -> Values:
    """Return CIE L*a*b* of sRGB colours as they are seen."""
    linear = rgb / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ SIGHT[sight].T, 0, 1) @ _XYZ.T / _D65
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def apart(a: Values, b: Values) -> Values:
    """Return the colour differences CIEDE2000 between each of `a` and each of `b`, in L*a*b*.

    G. Sharma, W. Wu and E. Dalal, "The CIEDE2000 color-difference formula: implementation notes,
    supplementary test data, and mathematical observations" (2005), equations 2 to 22.
    """
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(a[:, None], -1, 0), np.moveaxis(b[None], -1, 0)
    seventh = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - np.sqrt(seventh / (seventh + 25.0**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = (np.degrees(np.arctan2(y, x)) % 360 for x, y in ((a1, b1), (a2, b2)))
    grey = c1 * c2 == 0
    turn = np.where(grey, 0, (h2 - h1 + 180) % 360 - 180)
    far = np.abs(h1 - h2) > 180
    hue = np.where(grey, h1 + h2, (h1 + h2 + np.where(far, np.where(h1 + h2 < 360, 360, -360), 0)) / 2)
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    cosines = ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63))
    t = 1 + sum(k * np.cos(np.radians(n * hue + offset)) for k, n, offset in cosines)
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    angle = np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2)))
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(angle)
    return np.asarray(np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh))


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.5, 0), (56, -27, -3), 31.9030),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_colour_differences_are_those_that_its_authors_give(a: Any, b: Any, difference: float) -> None:
    for one, other in ((a, b), (b, a)):
        got = apart(np.array([one], float), np.array([other], float)).item()
        assert got == pytest.approx(difference, abs=5e-5)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("name", [*SEQUENTIAL, *DIVERGING])
def test_no_mark_looks_like_a_value_the_page_or_another_mark(name: str, sight: str) -> None:
    colours = seen(palette(name).astype(float), sight)
    marks = colours[list(Mark)]
    assert apart(marks, colours[:N_COLOURS]).min() > 10
    assert apart(marks, colours[[WHITE]]).min() > 10
    assert (apart(marks, marks) + 999 * np.eye(len(Mark))).min() > 10


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("name", [*SEQUENTIAL, *DIVERGING])
def test_values_a_tenth_of_the_scale_apart_look_different_to_everybody(name: str, sight: str) -> None:
    shades = seen(palette(name)[: N_COLOURS : N_COLOURS // 10].astype(float), sight)
    assert len(shades) == 11
    differences = apart(shades, shades)
    assert (differences + 999 * np.eye(11)).min() > 3.5
    assert differences[0, -1] > 20


@pytest.mark.parametrize("sight", SIGHT)
def test_boxes_over_each_other_and_their_numbers_differ_to_everybody(sight: str) -> None:
    fills = [Fill.PAGE, Fill.LIGHT, Fill.MIDDLE, Fill.DARK]
    colours = seen(np.array([fill.value for fill in fills], float), sight)
    assert (apart(colours, colours) + 999 * np.eye(4)).min() > 8


@pytest.mark.parametrize("sight", SIGHT)
def test_inks_are_readable_on_the_page_and_differ_to_everybody(sight: str) -> None:
    inks = np.array([ink.value for ink in Ink if ink is not Ink.WHITE], float)
    colours, page = seen(inks, sight), seen(np.array([[255.0, 255, 255]]), sight)
    assert (apart(colours, colours) + 999 * np.eye(len(inks))).min() > 15
    assert apart(colours, page).min() > 40
    # What the Web Content Accessibility Guidelines ask of small text: a contrast of 4.5.
    luminance = ((lightness(inks) + 16) / 116) ** 3
    assert (1.05 / (luminance + 0.05)).min() > 4.5


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("name", DIVERGING)
def test_plus_and_minus_look_different_to_everybody(name: str, sight: str) -> None:
    colours = seen(palette(name)[:N_COLOURS].astype(float), sight)
    for distance in (MIDDLE, MIDDLE // 2):
        assert apart(colours[[MIDDLE - distance]], colours[[MIDDLE + distance]]).item() > 20


def test_greys_run_from_black_to_white() -> None:
    greys = palette("viridis")[BLACK : WHITE + 1]
    assert greys[0].tolist() == [0, 0, 0]
    assert greys[-1].tolist() == [255, 255, 255]


def test_an_unknown_colour_map_is_refused_with_those_there_are() -> None:
    with pytest.raises(DrawError, match="'virdis'; there are viridis, magma, gray and RdBu_r"):
        palette("virdis")


@pytest.mark.parametrize("name", [*SEQUENTIAL, *DIVERGING])
def test_a_zero_map_is_quiet(name: str) -> None:
    light = lightness(palette(name).astype(float))
    zero = light[MIDDLE if name in DIVERGING else 0]
    assert abs(light[Mark.ZERO] - zero) < 26


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1e-7, 1.0, 6e4])
def test_no_value_makes_numpy_warn(dtype: Any, bad: float, size: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.random((2, 4, 5, 5)) * size).astype(dtype)
    values[0, 0], values[0, 1, 0, 0], values[1, 2, 1], values[1, 2, 2, 2] = bad, bad, np.inf, -np.inf
    values[1, 3, :2], values[1, 3, 0, 0] = np.nan, -1
    run = maps_run(values)
    with np.errstate(all="raise"):
        for scope in ("layer", "figure", "row", "channel", (-1, 1)):
            for kind in ("grid", "montage"):
                draw(run, kind, rows=[0, 1], channels="all", scope=scope)
        for by in MEASURES:
            draw(run, "grid", rows=[0, 1], channels="top:2", by=by)
