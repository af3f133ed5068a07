"""The contract suite finds what is broken: every test of it fails for a backend that is broken on purpose."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layertap.backends import arrays
from layertap.capture import reduce_arrays, returned, tapping
from layertap.capture.data import as_source
from layertap.capture.dtypes import BFLOAT16
from layertap.capture.reduce import Cast
from layertap.capture.taps import as_list
from layertap.capture.testing import BackendContract, ContractError, StopError
from test_backend_arrays import TestArrays as OfArrays

ArraysSession = arrays.ArraysSession
Patch = pytest.MonkeyPatch
Broken = Callable[[Patch], None]


def copies(patch: Patch, change: Callable[[Any, Any], Any]) -> None:
    """Let a session of arrays copy something else than what the model gave."""
    copy = ArraysSession.copy
    patch.setattr(
        ArraysSession, "copy", lambda self, i, value, n, pieces: copy(self, i, change(self, value), n, pieces)
    )


# Taps


def keeps_references(patch: Patch) -> None:
    """Copies at the end of the forward instead of at once."""
    copy, step = ArraysSession.copy_heard, ArraysSession.step

    def later(self: Any, call: int, name: str, *given: Any) -> Any:
        self.__dict__.setdefault("_later", []).append((call, name, *given))
        return {tap for tap in self.taps if (tap.layer, tap.call) == (name, call)}

    def at_the_end(self: Any, *args: Any) -> Any:
        output = step(self, *args)
        for given in self.__dict__.pop("_later", []):
            copy(self, *given)
        return output

    patch.setattr(ArraysSession, "copy_heard", later)
    patch.setattr(ArraysSession, "step", at_the_end)


def has_the_order_of_what_is_asked(patch: Patch) -> None:
    choose = arrays.choose
    patch.setattr(
        arrays, "choose", lambda layers, p: ([c for one in as_list(p) for c in choose(layers, one)[0]], [])
    )


def surveys_rows_without_the_batch(patch: Patch) -> None:
    surveyed = arrays.surveyed

    def of_a_row(*args: Any) -> Any:
        one = surveyed(*args)
        return replace(one, outputs=tuple((tap, shape[1:], dtype) for tap, shape, dtype in one.outputs))

    patch.setattr(arrays, "surveyed", of_a_row)


def ignores_what_a_callable_says(patch: Patch) -> None:
    choose = arrays.choose
    patch.setattr(arrays, "choose", lambda layers, p: choose(layers, "**" if callable(p) else p))


def names_no_layer_that_is_there(patch: Patch) -> None:
    patch.setattr(arrays, "no_match", lambda layers, pattern: f"there is no {pattern}")


def ignores_later_calls(patch: Patch) -> None:
    hear = ArraysSession.hear
    patch.setattr(
        ArraysSession, "hear", lambda self, call, *args: hear(self, call, *args) if call == 1 else {}
    )


def counts_parts(patch: Patch) -> None:
    """Addresses the parts of an output by their number."""
    flat = ArraysSession.flat

    def numbered(self: Any, value: Any) -> Any:
        parts = [leaf for _, leaf in flat(self, value)]
        return [((i,) if parts[1:] else (), leaf) for i, leaf in enumerate(parts)]

    patch.setattr(ArraysSession, "flat", numbered)
    patch.setattr(ArraysSession, "follow", lambda self, value, tap: dict(self.flat(value))[tap.path])


def widens_bfloat16(patch: Patch) -> None:
    to_numpy = returned.to_numpy

    def wide(self: Any, values: Any) -> Any:
        array = to_numpy(values)
        return array.astype(np.float32) if array.dtype == BFLOAT16 else array

    patch.setattr(ArraysSession, "to_numpy", wide)


def truncates(patch: Patch) -> None:
    """Casts by cutting bits off instead of rounding."""
    cast = reduce_arrays._STEPS[Cast]

    def cuts(step: Any, values: Any, rows: Any) -> Any:
        if step.to == "bfloat16" and values.dtype == np.float32:
            return ((values.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16),)
        return cast(step, values, rows)

    patch.setitem(reduce_arrays._STEPS, Cast, cuts)


def replaces_nan(patch: Patch) -> None:
    copies(patch, lambda session, value: np.nan_to_num(value) if value.dtype == np.float32 else value)


def forgets_the_last_row(patch: Patch) -> None:
    copies(patch, lambda session, value: np.concatenate([value[:-1], np.zeros_like(value[-1:])]))


def reduces_other_rows(patch: Patch) -> None:
    apply = reduce_arrays.apply
    patch.setattr(returned, "apply", lambda chain, values, *more: apply(chain, values[::-1], *more))


# Runs


def forgets_rows(patch: Patch) -> None:
    """Copies only the first piece of a batch that lies across slabs."""
    copy = ArraysSession.copy
    patch.setattr(
        ArraysSession, "copy", lambda self, i, value, n, pieces: copy(self, i, value, n, pieces[:1])
    )


def changes_the_output(patch: Patch) -> None:
    tapped = ArraysSession.tapped

    def changed(self: Any, *args: Any) -> Any:
        output, found = tapped(self, *args)
        return {name: value + 1 for name, value in output.items() if name == "logits"}, found

    patch.setattr(ArraysSession, "tapped", changed)


def leaves_a_listener(patch: Patch) -> None:
    @contextlib.contextmanager
    def listens_for_ever(listener: Any) -> Iterator[None]:
        tapping.listen(listener)
        yield

    patch.setattr(tapping, "_listeners", tapping._listeners)  # which is put back for the tests that follow
    patch.setattr(tapping, "heard_by", listens_for_ever)


def counts_batches_that_failed(patch: Patch) -> None:
    forward = ArraysSession.forward

    def ends_well(self: Any, *args: Any) -> Any:
        try:
            return forward(self, *args)
        except StopError:
            self._sink.done()
            raise

    patch.setattr(ArraysSession, "forward", ends_well)


def raises_another_error(patch: Patch) -> None:
    forward = ArraysSession.forward

    def wraps(self: Any, *args: Any) -> Any:
        try:
            return forward(self, *args)
        except StopError as error:
            raise RuntimeError("the model failed") from error

    patch.setattr(ArraysSession, "forward", wraps)


def stretches(patch: Patch) -> None:
    """Makes what has another shape fit."""
    copy = ArraysSession.copy

    def fitted(self: Any, i: int, value: Any, n: int, pieces: Any) -> None:
        copy(self, i, np.resize(value, (n, *self._shapes[i])), n, pieces)

    patch.setattr(ArraysSession, "copy", fitted)


def is_never_the_same(patch: Patch) -> None:
    count = itertools.count()
    copies(patch, lambda session, value: value + np.float32(next(count)))


def depends_on_the_steps_before(patch: Patch) -> None:
    def change(session: Any, value: Any) -> Any:
        session.n_copies = getattr(session, "n_copies", 0) + 1
        return value + np.float32(session.n_copies)

    copies(patch, change)


def knows_no_data_set_from_another(patch: Patch) -> None:
    def source(self: Any, data: Any) -> Any:
        made = as_source(data)
        made.fingerprint = lambda: "data"  # type: ignore[method-assign]
        return made

    patch.setattr(arrays.ArraysBackend, "source", source)


def loses_columns(patch: Patch) -> None:
    patch.setattr(ArraysSession, "put", lambda self, view, values: view.fill(0))


def keeps_every_batch(patch: Patch) -> None:
    kept: list[Any] = []

    def change(session: Any, value: Any) -> Any:
        kept.append(value.copy())
        return value

    copies(patch, change)


#: For every test of the suite, what is broken; all of it in the backend of plain arrays.
BROKEN: dict[str, Broken] = {
    "test_values_are_bit_equal_to_the_frameworks_own": keeps_references,
    "test_layers_and_taps_are_in_the_order_of_the_model": has_the_order_of_what_is_asked,
    "test_a_survey_agrees_with_what_is_captured": surveys_rows_without_the_batch,
    "test_layers_are_chosen_alike_by_name_pattern_and_function": ignores_what_a_callable_says,
    "test_a_misspelt_layer_is_named_with_the_closest": names_no_layer_that_is_there,
    "test_a_layer_that_is_called_again_has_a_tap_for_each_call": ignores_later_calls,
    "test_a_part_of_a_nested_output_is_a_tap_by_its_path": counts_parts,
    "test_bfloat16_comes_back_bit_equal": widens_bfloat16,
    "test_casts_are_those_of_the_framework": truncates,
    "test_not_finite_values_are_kept_and_counted": replaces_nan,
    "test_statistics_are_those_of_the_values": forgets_the_last_row,
    "test_reductions_are_those_of_the_reference": reduces_other_rows,
    "test_batches_may_change_size": forgets_rows,
    "test_the_models_own_output_is_untouched": changes_the_output,
    "test_nothing_is_left_behind": leaves_a_listener,
    "test_a_batch_that_fails_is_not_captured_and_the_loop_may_go_on": counts_batches_that_failed,
    "test_what_the_model_raises_ends_the_run_and_what_was_committed_stays": raises_another_error,
    "test_a_shape_that_changes_is_refused": stretches,
    "test_the_same_run_twice_gives_the_same_bytes": is_never_the_same,
    "test_a_run_that_died_goes_on_and_ends_byte_identical": depends_on_the_steps_before,
    "test_a_loop_that_died_goes_on": depends_on_the_steps_before,
    "test_parts_of_a_data_set_make_the_store_that_one_process_makes": depends_on_the_steps_before,
    "test_another_plan_is_refused_with_the_difference": knows_no_data_set_from_another,
    "test_columns_are_kept_and_must_fit_the_batch": loses_columns,
    "test_memory_does_not_grow_with_the_rows": keeps_every_batch,
}


def check_found(contract: BackendContract, test: str, break_it: Broken, path: Path, patch: Patch) -> None:
    """Require that a test passes, and that it fails once `break_it` was done, for what the suite looks at."""
    run = getattr(contract, test)
    try:
        run(path / "whole")
        break_it(patch)
        with pytest.raises(ContractError):
            run(path / "broken")
    except pytest.skip.Exception as skipped:
        pytest.fail(f"{test} was skipped: {skipped}")


def test_no_test_of_the_suite_is_without_a_broken_backend():
    assert {name for name in dir(BackendContract) if name.startswith("test_")} == set(BROKEN)


@pytest.mark.parametrize("test", BROKEN)
def test_a_broken_backend_fails(test, tmp_path, monkeypatch):
    check_found(OfArrays(), test, BROKEN[test], tmp_path, monkeypatch)


# What can be broken in PyTorch alone: hooks, and tensors that share memory


def copies_tensors_at_the_end(patch: Patch) -> None:
    from layertap.backends.torch import TorchSession

    copy, end = TorchSession.copy, TorchSession.end

    def later(self: Any, tap: Any, tensor: Any) -> None:
        tap.step = self.step
        self.__dict__.setdefault("_later", []).append((tap, tensor))

    def at_the_end(self: Any, *args: Any) -> None:
        for tap, tensor in self.__dict__.pop("_later", []):
            copy(self, tap, tensor)
        end(self, *args)

    patch.setattr(TorchSession, "copy", later)
    patch.setattr(TorchSession, "end", at_the_end)


def leaks_hooks(patch: Patch) -> None:
    from layertap.backends.torch import TorchSession

    # What is no part of the model goes, or it would stay for the tests that follow.
    patch.setattr(TorchSession, "detach", lambda self: tapping.leave(self.listener))


def replaces_outputs(patch: Patch) -> None:
    from layertap.backends.torch_hooks import Hook

    call = Hook.__call__

    def returns_something(self: Any, module: Any, args: Any, output: Any) -> Any:
        call(self, module, args, output)
        return output * 1.5 if hasattr(output, "shape") else None

    patch.setattr(Hook, "__call__", returns_something)


def learns_first_calls_alone(patch: Patch) -> None:
    from layertap.backends.torch import TorchSession

    learn = TorchSession.learn

    def first_call_only(self: Any, choice: Any, call: int, output: Any) -> None:
        if call == 1:
            learn(self, choice, call, output)

    patch.setattr(TorchSession, "learn", first_call_only)


def keeps_every_tensor(patch: Patch) -> None:
    from layertap.backends.torch import TorchSession

    copy, kept = TorchSession.copy, []

    def keeps(self: Any, tap: Any, tensor: Any) -> None:
        kept.append(tensor.detach())
        copy(self, tap, tensor)

    patch.setattr(TorchSession, "copy", keeps)


@pytest.mark.parametrize(
    ("break_it", "test"),
    [
        (copies_tensors_at_the_end, "test_values_are_bit_equal_to_the_frameworks_own"),
        (leaks_hooks, "test_nothing_is_left_behind"),
        (replaces_outputs, "test_the_models_own_output_is_untouched"),
        (learns_first_calls_alone, "test_a_layer_that_is_called_again_has_a_tap_for_each_call"),
        (keeps_every_tensor, "test_memory_does_not_grow_with_the_rows"),
    ],
)
def test_a_broken_backend_of_torch_fails(break_it, test, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from test_backend_torch import TestTorch as OfTorch

    check_found(OfTorch(), test, break_it, tmp_path, monkeypatch)
