"""Reductions as values: what they make of rows, their text and JSON, and that their errors are bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from layertap.capture.axes import dims_of
from layertap.capture.dtypes import DTYPES
from layertap.capture.reduce import (
    Cast,
    Chain,
    Channels,
    ChannelsFirst,
    Crop,
    Int8,
    Norm,
    Own,
    Pca,
    Pool,
    Project,
    Rows,
    Tokens,
    TopK,
    as_chain,
)
from layertap.capture.reduce_arrays import apply, dequantized
from layertap.capture.reduce_text import chain_from_json, choose, parse, rules
from layertap.capture.taps import TapName

MAPS, TOKENS, VECTOR, NUMBER = (6, 5, 8), (9, 4), (7,), ()
LAST = Rows((5, 8, 6), ("y", "x", "feature"), np.dtype(np.float32))
TINY, HUGE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)


CHOSEN = (9, 36, 39, 61)
BASIS = [
    [0.5474082231521606, 0.07819361984729767, 0.7686170339584351],
    [0.9912360310554504, -0.4666164815425873, -0.1941176801919937],
]


def rows(shape: tuple[int, ...], dtype: Any = np.float32) -> Rows:
    return Rows(shape, dims_of(shape)[1:], np.dtype(dtype))


def adversarial(dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Maps with all that has gone wrong before: shape (8, *MAPS)."""
    values = np.random.default_rng(0).standard_normal((8, *MAPS)).astype(np.float64)
    values[0] = 0
    values[1] = 3.25
    values[2, 0], values[2, 1], values[2, 2] = np.nan, np.inf, -np.inf
    values[2, 3, 0, 0], values[2, 4, 1, 1], values[2, 5, 2, 2] = np.nan, np.inf, -np.inf
    values[3] *= TINY * 40
    values[4] *= 1e-38
    values[5] *= 7e4  # beyond float16
    values[6] *= 1e37
    values[7, 0] = -0.0
    with np.errstate(over="ignore"):
        return values.astype(dtype)


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("pool:7", Chain((Pool((7,)),))),
        ("pool:4x7,max", Chain((Pool((4, 7), "max"),))),
        ("pool:global", Chain((Pool(None),))),
        ("channels:0,3,-1", Chain((Channels((0, 3, -1)),))),
        ("channels:stride=4|pool:7|float16", Chain((Channels(stride=4), Pool((7,)), Cast("float16")))),
        ("channels:random=16,seed=1", Chain((Channels(random=16, seed=1),))),
        ("crop:14", Chain((Crop((14,)),))),
        ("crop:14x10@3,0", Chain((Crop((14, 10), (3, 0)),))),
        ("topk:5", Chain((TopK(5),))),
        ("topk:5,space", Chain((TopK(5, "space"),))),
        ("norm:max", Chain((Norm("max"),))),
        ("project:16,seed=2,sparse", Chain((Project(16, 2, True),))),
        ("pca:3,rows=50", Chain((Pca(3, rows=50),))),
        ("channels_first|float16", Chain((ChannelsFirst(), Cast("float16")))),
        ("tokens:last | int8", Chain((Tokens("last"), Int8()))),
        ("none", Chain()),
    ],
)
def test_text_is_read_written_and_read_again(text, chain):
    assert parse(text) == chain
    assert parse(str(chain)) == chain


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_is_reduced_or_refused_by_name(dtype):
    values = np.ones((2, *MAPS)).astype(dtype)
    for text in ("pool:2", "topk:2", "norm:l1", "int8", "float16", "project:2", "channels:1", "crop:2"):
        form = rows(MAPS, dtype)
        if dtype.kind == "c" and text.split(":")[0] in ("pool", "topk", "norm", "project"):
            with pytest.raises(lt.PlanError, match="real numbers"):
                parse(text).bind(form)
            continue
        bound = parse(text).bind(form)
        made = apply(bound, values, form)
        assert [(part.shape[1:], part.dtype) for part in made] == [
            (one.shape, one.dtype) for one in bound.after(form).values()
        ], text


@pytest.mark.parametrize("shape", [MAPS, TOKENS, VECTOR, NUMBER, (3, 4, 5, 6), (2, 2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "text", ["pool:2", "pool:global,max", "crop:2", "topk:2,space", "tokens:mean", "int8", "float8_e5m2"]
)
def test_a_step_says_what_it_makes_of_any_shape(shape, text):
    values = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    bound = parse(text).bind(rows(shape))
    made, said = apply(bound, values, rows(shape)), bound.after(rows(shape))
    assert [(part.shape[1:], part.dtype) for part in made] == [(r.shape, r.dtype) for r in said.values()]
    assert all(len(r.dims) == len(r.shape) for r in said.values())
    assert bound.bind(rows(shape)) == bound


@pytest.mark.parametrize(
    "text",
    [
        *("pool:2", "pool:3x4,max", "channels:stride=4|pool:2|float16", "channels:random=2,seed=3", "crop:2"),
        *(
            "channels_first|int8",
            "topk:2,space|bfloat16",
            "norm:l1",
            "project:2,sparse",
            "tokens:last",
            "int8",
            "float8_e4m3fn",
        ),
    ],
)
def test_json_gives_the_bound_chain_back(text):
    for form in (rows(MAPS), rows(TOKENS), LAST):
        if "3x4" in text and form.shape == TOKENS:
            continue
        bound = parse(text).bind(form)
        assert chain_from_json(json.loads(json.dumps(bound.to_json()))) == bound


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("poll:7", "pool"),
        ("pool", "pool:7"),
        ("pool:x", "pool:7"),
        ("pool:0", "pool:7"),
        ("pool:7,min", "mean or max"),
        ("pool:7,max,odd", "odd"),
        ("channels:", "list, a stride"),
        ("channels:1,stride=2,random=3", "one of these"),
        ("topk:0", "one value"),
        ("topk:3,rows", "channels or space"),
        ("norm:l3", "l1, l2 or max"),
        ("project:0", "one component"),
        ("tokens:middle", "first, last or mean"),
        ("float4", "no reduction"),
        ("channels_first:2", "2 means nothing there"),
        ("channels_frist", "channels_first"),
    ],
)
def test_text_that_means_nothing_is_refused_with_what_would(text, words):
    with pytest.raises(lt.PlanError, match=words):
        parse(text)


@pytest.mark.parametrize(
    ("shape", "text", "words"),
    [
        (MAPS, "pool:2x2x2", "3 sizes.*2 axes"),
        (MAPS, "channels:6", "no channel 6: the rows have 6"),
        (MAPS, "crop:4@3,3", "outside of 5 x 8"),
        (NUMBER, "norm:l2", "needs channels"),
        (MAPS, "int8|pool:2", "nothing can be done after"),
        (MAPS, "topk:2|pool:2", "nothing can be done after"),
        (MAPS, "project:2|project:2", "two projections"),
        (MAPS, "pca:2", "fit_pca"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused_with_the_reason(shape, text, words):
    with pytest.raises(lt.PlanError, match=words):
        parse(text).bind(rows(shape)).constants(rows(shape))


@pytest.mark.parametrize(
    "data",
    [
        *({}, [1], [{"kind": "melt"}], [{"kind": "pool"}], [{"kind": "pool", "size": "x", "by": "mean"}]),
        *(
            [{"kind": "topk", "k": 1.5, "over": "space"}],
            [{"kind": "own", "name": 7}],
            [{"kind": "cast"}] * 65,
        ),
        [{"kind": "pool", "size": [2, True], "by": "mean"}],
        [{"kind": ["pool"]}],
    ],
)
def test_json_of_something_else_is_a_format_error(data):
    with pytest.raises(lt.FormatError):
        chain_from_json(data)


def test_the_last_pattern_that_matches_counts():
    taps = [(TapName("conv1"), "Conv2d"), (TapName("layer1.0"), "Block"), (TapName("fc"), "Linear")]
    texts = ["float16", "type:Conv2d=pool:2", "layer*.0=channels:stride=2|int8", "fc=none"]
    chains = choose(texts, taps)
    assert list(map(str, chains)) == ["pool:2", "channels:stride=2 | int8", "none"]
    assert choose({"**": Cast("float16"), "fc": None}, taps) == [as_chain("float16")] * 2 + [Chain()]
    assert rules("re:a=b:c=pool:2") == [("re:a=b:c", parse("pool:2"))]
    assert rules("pool:input=pool:2") == [("pool:input", parse("pool:2"))]
    assert rules("pool=channels:stride=2|int8") == [("pool", parse("channels:stride=2|int8"))]
    assert rules("project:2,seed=1|pool:2") == [(None, parse("project:2,seed=1|pool:2"))]
    with pytest.raises(lt.SelectionError, match="conv1"):
        choose({"conv2": "pool:2"}, taps)
    with pytest.raises(lt.PlanError, match="no tap is reduced"):
        choose({"fc[3]": "pool:2"}, taps)


def error_bound(step: Any, form: Rows, values: Any) -> Any:
    """What `step.error` allows for each stored value."""
    error, wide = step.error(form), np.abs(values.astype(np.float64))
    axes = tuple(1 + axis for axis in form.space)
    channel = None if form.channel is None else 1 + form.channel
    if error.of == "value":
        base = apply(Chain((step,)), wide, Rows(form.shape, form.dims, np.dtype(np.float64)))[0]
        base = np.abs(base.astype(np.float64)) if not isinstance(step, Cast) else wide
    elif error.of == "largest magnitude":
        base = wide.max(axes if channel is not None and axes else tuple(range(1, wide.ndim)), keepdims=True)
    elif error.of == "mean magnitude":
        base = apply(Chain((step,)), wide, Rows(form.shape, form.dims, np.dtype(np.float64)))[0]
    else:
        basis, mean = step.matrix(form.shape[form.channel])
        along = np.moveaxis(wide, channel, -1) + (0 if mean is None else np.abs(mean.astype(np.float64)))
        base = np.moveaxis(along @ np.abs(basis.astype(np.float64)).T, -1, channel)
    return error.relative * base + error.absolute


def truth(step: Any, form: Rows, values: Any) -> Any:
    """What a step stands for, in float64 by numpy alone."""
    exact = values.astype(np.float64)
    if isinstance(step, Cast | Int8):
        return exact
    return apply(Chain((step,)), exact, Rows(form.shape, form.dims, np.dtype(np.float64)))[0]


def check_bound(step: Any, form: Rows, values: Any, stored: tuple[Any, ...]) -> None:
    """Require that what was stored of finite `values` lies within the step's error."""
    got = dequantized(stored[0], expanded(stored[1], form)) if isinstance(step, Int8) else stored[0]
    expected, allowed = truth(step, form, values), error_bound(step, form, values)
    got = got.astype(np.float64)
    limit = float(ml_dtypes.finfo(got.dtype if isinstance(step, Int8) else stored[0].dtype).max)
    fits = np.abs(expected) <= limit
    assert np.all((np.abs(got - expected) <= allowed) | ~fits), np.max(
        (np.abs(got - expected) - allowed)[fits]
    )
    assert not np.isfinite(got[~fits]).any() or (np.abs(expected[~fits]) < limit * 1.1).any()


def expanded(scale: Any, form: Rows) -> Any:
    shared = Int8().scaled(form)
    sizes = iter(scale.shape[1:])
    return scale.reshape(
        len(scale), *[1 if axis in shared else next(sizes) for axis in range(len(form.shape))]
    )


STEPS = [
    *(Cast(name) for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32")),
    *(Int8(), Pool((2,)), Pool((3,)), Pool(None), Norm("l1"), Norm("l2"), Norm("max")),
    *(Project(3), Project(3, 1, True), Pca(None, np.eye(6, dtype=np.float32)[:2], np.full(6, 9.0))),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_the_stated_error_is_a_bound_for_adversarial_values(step, dtype):
    values = adversarial(DTYPES[dtype])
    # NaN, infinity and what a cast of the test's own made infinite are another test's.
    finite = np.isfinite(values.astype(np.float64)).all((1, 2, 3))
    values, form = values[finite], rows(MAPS, DTYPES[dtype])
    assert len(values) >= 5
    bound = Chain((step,)).bind(form)
    if bound.steps:
        check_bound(bound.steps[0], form, values, apply(bound, values, form))


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_bound_that_is_a_tenth_of_it_does_not_hold(step):
    """The test above can fail: no stated error is far larger than need be, but for those of sums."""
    values = np.random.default_rng(5).standard_normal((64, *MAPS)).astype(np.float32)
    bound = Chain((step,)).bind(rows(MAPS))
    error = bound.steps[0].error(rows(MAPS)) if bound.steps else None
    if error is None or error.lossless or error.exact or error.of in ("mean magnitude", "sum of magnitudes"):
        return
    stored = apply(bound, values, rows(MAPS))
    got = dequantized(stored[0], expanded(stored[1], rows(MAPS))) if len(stored) > 1 else stored[0]
    off = np.abs(got.astype(np.float64) - truth(bound.steps[0], rows(MAPS), values))
    assert (off > error_bound(bound.steps[0], rows(MAPS), values) / 10).any()


def test_int8_keeps_nan_infinities_zeros_and_constants():
    values = adversarial()
    codes, scale = apply(as_chain("int8"), values, rows(MAPS))
    got = dequantized(codes, expanded(scale, rows(MAPS)))
    special = ~np.isfinite(values)
    assert np.array_equal(got[special], values[special], equal_nan=True)
    assert np.isfinite(got[~special]).all()
    assert not got[0].any()
    assert np.allclose(got[1], 3.25, rtol=1e-6)
    assert np.abs(codes[~special]).max() <= 126
    largest = np.nextafter(np.float32(HUGE), np.float32(0)) * np.linspace(0.99, 1, 500, dtype=np.float32)
    largest[-1] = HUGE
    codes, scale = apply(as_chain("int8"), largest[:, None, None, None], rows((1, 1, 1)))
    assert np.isfinite(dequantized(codes, scale[..., None, None])).all()


def test_overflow_shows_as_not_finite():
    values = np.array([[1e5, -1e5, 65504.0, 500.0, 1e9]], np.float32)
    made = {name: apply(as_chain(name), values, rows((5,)))[0][0] for name in ("float16", "float8_e4m3fn")}
    assert np.isposinf(made["float16"][0])
    assert np.isneginf(made["float16"][1])
    assert made["float16"][2] == 65504
    assert np.isnan(made["float8_e4m3fn"].astype(np.float32)).all()  # it has no infinity
    huge = np.full((1, 6, 5, 8), HUGE, np.float32)
    assert np.isposinf(apply(as_chain("norm:l1").bind(rows(MAPS)), huge, rows(MAPS))[0]).all()
    small = np.full((1, 6, 5, 8), 1e-30, np.float32)  # whose squares float32 does not hold
    assert np.allclose(
        apply(as_chain("norm:l2").bind(rows(MAPS)), small, rows(MAPS))[0], 1e-30 * math.sqrt(6)
    )


def test_top_values_come_with_their_places_and_the_first_of_equals():
    values = np.zeros((2, 3, 2, 2), np.float32)
    values[0, 2, 1, 0], values[0, 1, 0, 1], values[1, :, 1, 1] = 5, np.nan, 7
    form = rows((3, 2, 2))
    top, at = apply(as_chain("topk:2").bind(form), values, form)
    assert at[0, :, 1, 0].tolist() == [2, 0]
    assert at[0, :, 0, 0].tolist() == [0, 1]
    assert at[0, :, 0, 1].tolist() == [1, 0]
    assert np.isnan(top[0, 0, 0, 1])
    top, at = apply(as_chain("topk:2,space").bind(form), values, form)
    assert at[0, 2].tolist() == [2, 0]
    assert top[0, 2].tolist() == [5, 0]
    assert at[1].tolist() == [[3, 0]] * 3


def test_windows_are_those_of_adaptive_pooling():
    values = np.arange(10, dtype=np.float32).reshape(1, 1, 1, 10)
    form = rows((1, 1, 10))
    assert apply(as_chain("pool:1x3").bind(form), values, form)[0].ravel().tolist() == [1.5, 4.5, 7.5]
    assert apply(as_chain("pool:1x4,max").bind(form), values, form)[0].ravel().tolist() == [2, 4, 7, 9]


def test_random_choices_stay_what_they_are_for_a_seed():
    """A store says the seed, and a capture that goes on years later makes the same basis of it."""
    assert Channels(random=4, seed=1).bind(rows((64, 2, 2))).indices == CHOSEN
    basis, _ = Project(2, 7).matrix(3)
    assert np.array_equal(basis, np.array(BASIS, np.float32))
    sparse, _ = Project(300, 7, True).matrix(300)
    values, counts = np.unique(sparse, return_counts=True)
    assert np.allclose(values, [-0.1, 0, 0.1])
    assert np.allclose(counts / sparse.size, [1 / 6, 2 / 3, 1 / 6], atol=0.01)


def test_a_random_projection_keeps_distances():
    values = np.random.default_rng(2).standard_normal((20, 400)).astype(np.float32)
    for step in (Project(256), Project(256, sparse=True)):
        made = apply(Chain((step,)), values, rows((400,)))[0]
        before = np.linalg.norm(values[:, None] - values[None], axis=-1)
        after = np.linalg.norm(made[:, None] - made[None], axis=-1)
        ratio = (after / np.where(before, before, 1))[before > 0]
        assert 0.8 < ratio.min() < 0.99
        assert 1.01 < ratio.max() < 1.2


def test_channels_first_turns_maps_and_loses_nothing():
    values = np.random.default_rng(0).standard_normal((3, *LAST.shape)).astype(np.float32)
    bound = as_chain("channels_first").bind(LAST)
    made = bound.after(LAST)["values"]
    assert (made.shape, made.dims, made.dtype) == ((6, 5, 8), ("channel", "y", "x"), np.float32)
    assert np.array_equal(apply(bound, values, LAST)[0], values.transpose(0, 3, 1, 2))
    assert bound.lossless(LAST)
    assert bound.said(LAST) == "channels_first: lossless"
    volume = Rows((2, 5, 8, 6), ("t", "y", "x", "feature"), np.dtype(np.float32))
    made = as_chain("channels_first").bind(volume).after(volume)["values"]
    assert (made.shape, made.dims) == ((6, 2, 5, 8), ("channel", "t", "y", "x"))


@pytest.mark.parametrize("shape", [MAPS, TOKENS, VECTOR, NUMBER, (3, 4, 5, 6), (2, 2, 2, 2, 2)], ids=str)
def test_channels_first_is_left_out_where_there_is_nothing_to_turn(shape):
    assert as_chain("channels_first").bind(rows(shape)) == Chain()
    attention = Rows((4, 4, 6), ("query", "key", "head"), np.dtype(np.float32))
    assert as_chain("channels_first").bind(attention) == Chain()


@pytest.mark.parametrize(
    "text", ["pool:2", "channels:stride=2", "crop:3", "pca:2", "int8", "topk:3", "norm:l2"]
)
def test_steps_do_the_same_before_and_behind_channels_first(text):
    values = np.random.default_rng(0).standard_normal((3, *LAST.shape)).astype(np.float32)
    step = as_chain(text) if text != "pca:2" else Chain((Pca(None, np.eye(6, dtype=np.float32)[:2]),))
    first = Rows((6, 5, 8), ("channel", "y", "x"), LAST.dtype)
    behind = (ChannelsFirst() | step).bind(LAST)
    assert [part.shape for part in apply(behind, values, LAST)] == [
        (3, *form.shape) for form in behind.after(LAST).values()
    ]
    for one, other in zip(
        apply(behind, values, LAST), apply(step.bind(first), values.transpose(0, 3, 1, 2), first), strict=True
    ):
        assert np.array_equal(one, other)
    if text in ("int8", "topk:3"):
        return
    before = (step | ChannelsFirst()).bind(LAST)
    assert np.array_equal(apply(before, values, LAST)[0], apply(behind, values, LAST)[0])


def own_function(batch: Any) -> Any:
    return batch[:, :2] * 2


def test_an_own_function_is_recorded_by_name_and_source_and_said_to_be_opaque():
    step = as_chain(own_function).steps[0]
    form = rows(MAPS)
    bound = as_chain(own_function).bind(form, lambda chain: Rows((2, 5, 8), form.dims, form.dtype))
    data = bound.to_json()[0]
    assert data["name"] == "own_function"
    assert data["opaque"] is True
    assert data["makes"]["shape"] == [2, 5, 8]
    assert len(data["source"]) == 32
    assert data["source"] != as_chain(lambda batch: batch).steps[0].source
    assert "not known" in bound.said(form)
    assert isinstance(step, Own)
    assert as_chain(len).steps[0].source is None


def test_steps_are_put_together_with_a_bar():
    assert Channels(stride=2) | Pool(7) | "float16" == parse("channels:stride=2") | Pool(7) | Cast("float16")
    assert ("pool:7" | Int8()).steps == (Pool((7,)), Int8())


def test_what_is_lossless_says_so():
    form = rows(MAPS, np.float16)
    assert as_chain("float32").bind(form).lossless(form)
    assert Chain().lossless(form)
    for text in ("bfloat16", "crop:2", "channels:1", "pool:2,max", "topk:6", "int8"):
        assert not as_chain(text).bind(form).lossless(form), text


@pytest.mark.parametrize("name", ["b.npy", "b.npz"])
def test_a_basis_is_read_from_a_file(tmp_path: Path, name: str) -> None:
    basis, mean = np.eye(6)[:2], np.ones(6)
    path = tmp_path / name
    np.save(path, basis) if name == "b.npy" else np.savez(path, basis=basis, mean=mean)
    step = parse(f"pca:{path}").steps[0]
    assert step.n == 2
    values = np.arange(6, dtype=np.float32)[None]
    expected = [[0, 1]] if name == "b.npy" else [[-1, 0]]
    assert apply(Chain((step,)), values, rows((6,)))[0].tolist() == expected
    with pytest.raises(lt.PlanError, match="6 channels, and the rows have 7"):
        Chain((step,)).bind(rows((7,)))
    with pytest.raises(lt.StoreNotFoundError, match="nosuch"):
        parse("pca:nosuch.npy")
