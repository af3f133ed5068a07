"""The part of a backend's contract that is about taps: which there are, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .axes import dims_of
from .backend import Session
from .contract import raises, require
from .dtypes import BFLOAT16, is_float
from .errors import PlanError, SelectionError
from .reader import Run
from .record import record
from .reduce import Chain, Rows, as_chain
from .reduce_arrays import apply
from .taps import OUTPUT, TapName
from .testing_subject import MEASURING_MEMORY, Contract, Subject, Values, inputs

#: Reductions, and how far a backend's may be from the reference's, as a share of the greatest magnitude:
#: not at all where values are selected or rounded, by what float32 (float16) may lose where they are summed.
REDUCTIONS = {
    "float16": 0.0,
    "channels:stride=2": 0.0,
    "crop:8": 0.0,
    "topk:2": 0.0,
    "pool:4,max": 0.0,
    "pool:4": 1e-5,
    "norm:l2": 1e-5,
    "project:2,seed=1": 1e-5,
    "crop:8 | pool:4 | float16": 2e-3,
    "int8": 1 / 127,  # one code, where a device rounds a quotient otherwise
}


class TapsContract(Contract):
    """Names, order, choice and values of taps."""

    def test_values_are_bit_equal_to_the_frameworks_own(self, tmp_path: Path) -> None:
        """Over several blocks, the last one short."""
        subject, values = self.subject(), inputs(30)
        run = self.capture(subject, tmp_path / "s", [values[i : i + 4] for i in range(0, 30, 4)])
        require(run.complete, "the store is not complete")
        require(run.manifest.n_blocks > 2, "there are too few blocks for the test to tell")
        self.check_values(subject, run, values)

    def test_layers_and_taps_are_in_the_order_of_the_model(self, tmp_path: Path) -> None:
        """Every tap's layer is listed, once, and no order of what is asked for is that of the store."""
        subject, values = self.subject(), inputs(4)
        listed = self.listed(subject, values)
        require(len(set(listed)) == len(listed), f"a layer is listed twice: {listed}")
        run = self.capture(subject, tmp_path / "s", [values])
        names = _layers_of(run)
        for name in names:
            require(name in listed, f"{name} is captured, and listed are {', '.join(listed)}")
        places = [(listed.index(run[name].layer), TapName.parse(name).call) for name in run.taps]
        require(places == sorted(places), f"taps are {list(run.taps)}, and layers are {listed}")
        whole = self.capture(subject, tmp_path / "names", [values], layers=names)
        turned = self.capture(subject, tmp_path / "turned", [values], layers=names[::-1])
        require(
            list(turned.taps) == list(whole.taps),
            f"taps are {list(turned.taps)} where they are asked for in another order than {list(whole.taps)}",
        )

    def test_a_survey_agrees_with_what_is_captured(self, tmp_path: Path) -> None:
        """Names, shapes and element types of the taps, and calls; it leaves nothing behind."""
        subject, values = self.subject(), inputs(4)
        before = subject.traces()
        found = {str(tap): (one, shape, dtype) for one in self.survey(subject, values)
                 for tap, shape, dtype in one.outputs if tap not in one.refused}  # fmt: skip
        require(subject.traces() == before, "a survey left something in the model")
        run = self.capture(subject, tmp_path / "s", [values])
        taps = [name for name in run.taps if run[name].kind == OUTPUT]
        for name in taps:
            require(name in found, f"{name} is captured, and a survey shows {', '.join(found)}")
            one, *form = found[name]
            captured = [(len(values), *run[name].source_shape), run[name].source_dtype]
            require(form == captured, f"{name} is {captured}, and a survey says {form}")
            call = TapName.parse(name).call
            require(one.calls >= call, f"a survey says that {one.layer.name} was called {one.calls} times")
        require([name for name in found if name in taps] == taps, "a survey has another order")

    def test_layers_are_chosen_alike_by_name_pattern_and_function(self, tmp_path: Path) -> None:
        """A list of names, each name by itself, globs, a regular expression, a callable, all but some."""
        subject, values = self.subject(), inputs(4)
        names = _layers_of(self.capture(subject, tmp_path / "s", [values]))
        whole = list(self.capture(subject, tmp_path / "names", [values], layers=names).taps)
        missing = set(subject.reference(values)) - set(whole)
        require(not missing, f"the names {names} choose {whole}, and not {missing}")
        others = [f"!{name}" for name in self.listed(subject, values) if name not in names]
        ways = {
            "a glob": [re.sub(r"[^.]$", "?", name) for name in names] + others,
            "everything but the others": ["**", *others],
            "a regular expression": "re:" + "|".join(map(re.escape, names)),
            "a callable": lambda name, module: name in names,
        }
        for way, patterns in ways.items():
            got = list(self.capture(subject, tmp_path / way, [values], layers=patterns).taps)
            require(got == whole, f"{way} chooses {got}, and the names {whole}")
        for i, name in enumerate(names):
            run = self.capture(subject, tmp_path / f"{i}", [values], layers=name)
            require(_layers_of(run) == [name], f"{name} chooses {list(run.taps)}")

    def test_a_misspelt_layer_is_named_with_the_closest(self, tmp_path: Path) -> None:
        """The error shows a name that is there."""
        subject, values = self.subject(), inputs(4)
        name = next(iter(subject.reference(values))).split("[")[0].split("#")[0]
        wrong = f"{name[:1]}x{name[1:]}"  # which the right name is no part of
        with raises(SelectionError, name), record(subject.model, tmp_path / "s", [wrong]) as rec:
            rec(subject.batch(values))

    def test_a_layer_that_is_called_again_has_a_tap_for_each_call(self, tmp_path: Path) -> None:
        """`name#2` beside `name`, and by itself where it is asked for."""
        subject, values = self.subject(), inputs(8)
        expected = subject.reference(values)
        again = [name for name in expected if TapName.parse(name).call > 1]
        self.skip_unless(again, subject, "calls")
        run = self.capture(subject, tmp_path / "s", [values[:4], values[4:]])
        for i, name in enumerate(again):
            first = expected[str(replace(TapName.parse(name), call=1))]
            require(
                first.tobytes() != expected[name].tobytes(), f"{name} is like the first call; make it differ"
            )
            self.check_tap(run, name, expected[name])
            alone = self.capture(subject, tmp_path / f"{i}", [values[:4], values[4:]], layers=name)
            require(list(alone.taps) == [name], f"{name} chooses {list(alone.taps)}")
            self.check_tap(alone, name, expected[name])

    def test_a_part_of_a_nested_output_is_a_tap_by_its_path(self, tmp_path: Path) -> None:
        """`name[path]` beside the other parts, and by itself where it is asked for."""
        subject, values = self.subject(), inputs(8)
        expected = subject.reference(values)
        parts = [name for name in expected if TapName.parse(name).path]
        self.skip_unless(parts, subject, "nested")
        run = self.capture(subject, tmp_path / "s", [values[:4], values[4:]])
        for i, name in enumerate(parts):
            self.check_tap(run, name, expected[name])
            alone = self.capture(subject, tmp_path / f"{i}", [values[:4], values[4:]], layers=name)
            require(list(alone.taps) == [name], f"{name} chooses {list(alone.taps)}")
            self.check_tap(alone, name, expected[name])

    def test_bfloat16_comes_back_bit_equal(self, tmp_path: Path) -> None:
        """With values that are rounded, too small, infinite and no numbers."""
        subject, values = self.subject(), inputs(8)
        values[0, :, 0, :6] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-39, np.inf, np.nan]
        expected = subject.reference(values)
        names = [name for name, array in expected.items() if array.dtype == BFLOAT16]
        self.skip_unless(names, subject, "bfloat16")
        run = self.capture(subject, tmp_path / "s", [values[:4], values[4:]])
        for name in names:
            require(run[name].source_dtype == "bfloat16", f"{name} was {run[name].source_dtype}")
            self.check_tap(run, name, expected[name])

    def test_casts_are_those_of_the_framework(self, tmp_path: Path) -> None:
        """Rounded to nearest, as numpy does."""
        subject, values = self.subject(), inputs(8)
        for name, dtype in (("float16", np.dtype(np.float16)), ("bfloat16", BFLOAT16)):
            run = self.capture(subject, tmp_path / name, [values[:4], values[4:]], dtype=name)
            for tap, array in subject.reference(values).items():
                expected = array.astype(dtype) if is_float(array.dtype) else array
                got = run[tap][...]
                require(got.dtype == expected.dtype, f"{tap} is {got.dtype}")
                require(got.tobytes() == expected.tobytes(), f"{tap} is rounded otherwise")

    def test_not_finite_values_are_kept_and_counted(self, tmp_path: Path) -> None:
        """NaN and infinity pass through as they are."""
        subject, values = self.subject(), inputs(8)
        values[1, 2, 3, 4], values[6, 0, 0, 0] = np.nan, np.inf
        run = self.capture(subject, tmp_path / "s", [values[:4], values[4:]])
        for name, array in _floats(subject, values):
            counts = {"nan": int(np.isnan(array).sum()), "inf": int(np.isinf(array).sum())}
            counted = {"nan": run.stats[name].nan, "inf": run.stats[name].inf}
            require(counted == counts, f"{name}: counted {counted}, not {counts}")
            got = run[name][...].astype(np.float64)
            require(np.array_equal(got, array, equal_nan=True), f"{name} differs")

    def test_statistics_are_those_of_the_values(self, tmp_path: Path) -> None:
        """Counts and limits are exact, means and variances to 1e-5 of the values; over several blocks."""
        subject, values = self.subject(), inputs(30)
        values[1, 2, 3, 4], values[29, 0, 0, 0] = np.nan, np.inf
        run = self.capture_set(subject, tmp_path / "s", values, stats="channels", memory=MEASURING_MEMORY)
        require(run.manifest.n_blocks > 2, "there are too few blocks for the test to tell")
        for name, array in subject.reference(values).items():
            its, along = run.stats[name], _channels(run, name, array)
            for i, channel in enumerate(along):
                found = channel[np.isfinite(channel)]
                said = {"count": found.size, "n_nan": np.isnan(channel).sum(), "n_zero": (found == 0).sum()}
                if found.size:
                    said |= {"minimum": found.min(), "maximum": found.max()}
                for what, number in said.items():
                    got = getattr(its, what)[i]
                    require(got == number, f"channel {i} of {name}: {what} is {got}, not {number}")
                if found.size and its.mean is not None and its.variance is not None:
                    scale = np.abs(found).max()
                    _near(its.mean[i], found.mean(), 1e-5 * scale, f"the mean of channel {i} of {name}")
                    _near(its.variance[i], found.var(), 1e-5 * scale**2, f"the variance of {i} of {name}")

    def test_reductions_are_those_of_the_reference(self, tmp_path: Path) -> None:
        """Of every tap that they can be done to, within `REDUCTIONS` of `reduce_arrays.apply`."""
        subject, values = self.subject(), inputs(8)
        session = self.backend(subject).session(subject.model, subject.layers)
        self.skip_unless(type(session).reduce is not Session.reduce, subject, "reductions")
        plain = self.capture(subject, tmp_path / "s", [values[:4], values[4:]])
        reference = subject.reference(values)
        for i, (text, share) in enumerate(REDUCTIONS.items()):
            bound = _bound(plain, text, reference)
            require(
                bool(bound), f"{text} can be done to no tap of the subject; give it one of maps in float32"
            )
            options = {"layers": list(bound), "reduce": text, "memory": "8MiB"}
            run = self.capture(subject, tmp_path / f"{i}", [values[:4], values[4:]], **options)
            for name, (chain, rows) in bound.items():
                expected = apply(chain, reference[name], rows)
                got = [part[...] for part in run[name].parts.values()]
                require(len(got) == len(expected), f"{text} of {name} has {len(got)} parts")
                for ours, theirs in zip(got, expected, strict=True):
                    what = f"{text} of {name}"
                    require(ours.dtype == theirs.dtype, f"{what} is {ours.dtype}, not {theirs.dtype}")
                    require(ours.shape == theirs.shape, f"{what} has shape {ours.shape}, not {theirs.shape}")
                    wide = theirs.astype(np.float64)
                    _near(ours.astype(np.float64), wide, share * float(np.abs(wide).max()), what)


def _layers_of(run: Run) -> list[str]:
    """Return the layers of a store's taps, each once."""
    return list(dict.fromkeys(run[name].layer for name in run.taps))


def _floats(subject: Subject, values: Values) -> Iterator[tuple[str, Values]]:
    """Yield name and reference, in float64, of the taps that hold floating-point numbers."""
    for name, array in subject.reference(values).items():
        if is_float(array.dtype):
            yield name, array.astype(np.float64)


def _channels(run: Run, name: str, array: Values) -> Values:
    """Return the values of each channel of a tap, float64 (channels, ...)."""
    axis, wide = run.stats[name].axis, array.astype(np.float64)
    return wide[None] if axis is None else np.moveaxis(wide, run[name].dims.index(axis), 0)


def _bound(run: Run, text: str, reference: dict[str, Values]) -> dict[str, tuple[Chain, Rows]]:
    """Return the taps of float32 that a reduction can be done to, bound to the form of their rows."""
    found = {}
    for name, array in reference.items():
        if array.dtype == np.float32:
            rows = Rows(array.shape[1:], run[name].dims[1:] or dims_of(array.shape)[1:], array.dtype)
            try:
                chain = as_chain(text).bind(rows)
            except PlanError:
                continue
            if len(chain.steps) == len(as_chain(text).steps):
                found[name] = chain, rows
    return found


def _near(got: Any, expected: Any, most: float, what: str) -> None:
    """Require that numbers, or arrays of them, are no further than `most` apart."""
    gap = float(np.max(np.abs(got - expected), initial=0))
    require(gap <= most, f"{what} is {gap:g} off, and {most:g} is allowed")
