"""Reductions in JAX: equal to numpy's where nothing is summed, and within the stated error elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from layertap.backends.jax_reduce import can_reduce, reduced  # noqa: E402
from layertap.capture.axes import dims_of  # noqa: E402
from layertap.capture.dtypes import DTYPES  # noqa: E402
from layertap.capture.reduce import Rows, as_chain  # noqa: E402
from layertap.capture.reduce_arrays import apply  # noqa: E402
from test_reduce import MAPS, TOKENS, VECTOR, adversarial, check_bound  # noqa: E402

#: Bit for bit the reference's: selections, roundings and maxima.
EXACT = [
    *("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "pool:2,max", "pool:3x4,max"),
    *("channels:0,3,1", "channels:stride=2", "channels:random=3", "crop:2", "topk:2", "topk:3,space"),
    *(
        "norm:max",
        "tokens:last",
        "tokens:first",
        "crop:3|float8_e5m2",
        "channels:stride=2|pool:2,max|float16",
    ),
    "channels_first",
]
#: Within the stated error of the truth: sums in another order, and a quotient that XLA rounds twice.
CLOSE = [
    *(
        "pool:2",
        "pool:3",
        "pool:global",
        "norm:l1",
        "norm:l2",
        "int8",
        "project:3",
        "project:3,sparse",
        "tokens:mean",
    ),
]


def rows(shape: tuple[int, ...], dtype: Any) -> Rows:
    return Rows(shape, dims_of(shape)[1:], np.dtype(dtype))


def samples(shape: tuple[int, ...], dtype: Any) -> Any:
    if shape == MAPS:
        values = adversarial(dtype)
        values[3:5] = adversarial(dtype)[:2]  # XLA takes numbers below the smallest normal one for zero
        return values
    values = np.random.default_rng(3).standard_normal((6, *shape))
    values[0, ..., 0], values[1] = np.nan, 0
    return values.astype(dtype)


def in_jax(chain: Any, values: Any, form: Rows) -> tuple[Any, ...]:
    return tuple(map(np.asarray, jax.jit(lambda given: reduced(chain, given, form))(values)))


def same(a: Any, b: Any) -> bool:
    """Equal bits, but for the sign and payload of NaN and the sign of zero."""
    wide = [x.astype(np.float64) if x.dtype.kind not in "iub" else x for x in (a, b)]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.array_equal(*wide, equal_nan=a.dtype.kind not in "iub")
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("text", EXACT)
def test_jax_and_numpy_agree_bit_for_bit_where_nothing_is_summed(text, dtype):
    for shape in (MAPS, TOKENS, VECTOR):
        form = rows(shape, DTYPES[dtype])
        if "3x4" in text and shape != MAPS:
            continue
        chain, values = as_chain(text).bind(form), samples(shape, DTYPES[dtype])
        assert can_reduce(chain)
        for ours, theirs in zip(in_jax(chain, values, form), apply(chain, values, form), strict=True):
            assert same(ours, theirs), (shape, ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("text", CLOSE)
def test_sums_in_jax_are_within_the_stated_error(text, dtype):
    for shape in (TOKENS,) if "tokens" in text else (MAPS, TOKENS):
        form = rows(shape, DTYPES[dtype])
        values = samples(shape, DTYPES[dtype])
        finite = np.isfinite(values.astype(np.float64)).all(tuple(range(1, values.ndim)))
        chain = as_chain(text).bind(form)
        made = in_jax(chain, values, form)
        check_bound(chain.steps[0], form, values[finite], tuple(part[finite] for part in made))


def test_a_function_of_ones_own_is_not_for_the_device():
    assert not can_reduce(as_chain(np.abs))
