"""The contract suite finds what is broken: each broken backend fails the test that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import test_backend_arrays
import test_backend_torch
from layertap.backends import arrays, torch_hooks
from layertap.backends import torch as torch_backend
from layertap.capture import reduce_arrays, tapping
from layertap.capture.dtypes import BFLOAT16
from layertap.capture.reduce import Cast
from layertap.capture.testing import BackendContract

Broken = Callable[[pytest.MonkeyPatch], None]


def keeps_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies at the end of the forward instead of at once."""
    copy, end = torch_backend.TorchSession.copy, torch_backend.TorchSession.end

    def later(self: Any, tap: Any, tensor: Any) -> None:
        tap.step = self.step
        self.__dict__.setdefault("_later", []).append((tap, tensor))

    def at_the_end(self: Any, *args: Any) -> None:
        for tap, tensor in self.__dict__.pop("_later", []):
            copy(self, tap, tensor)
        end(self, *args)

    monkeypatch.setattr(torch_backend.TorchSession, "copy", later)
    monkeypatch.setattr(torch_backend.TorchSession, "end", at_the_end)


def leaks_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is no part of the model goes, or it would stay for the tests that follow.
    monkeypatch.setattr(torch_backend.TorchSession, "detach", lambda self: tapping.leave(self.listener))


def replaces_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    call = torch_hooks.Hook.__call__

    def returns_something(self: Any, module: Any, args: Any, output: Any) -> Any:
        call(self, module, args, output)
        return output * 1.5 if hasattr(output, "shape") else None

    monkeypatch.setattr(torch_hooks.Hook, "__call__", returns_something)


def ignores_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = torch_backend.TorchSession.learn

    def first_call_only(self: Any, choice: Any, call: int, output: Any) -> None:
        if call == 1:
            learn(self, choice, call, output)

    monkeypatch.setattr(torch_backend.TorchSession, "learn", first_call_only)


def broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend.TorchSession, "_check_shape", lambda self, tap, tensor: None)


def truncates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts by cutting bits off instead of rounding."""
    cast = reduce_arrays._STEPS[Cast]

    def cuts(step: Any, values: Any, rows: Any) -> Any:
        if step.to == "bfloat16" and values.dtype == np.float32:
            return ((values.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16),)
        return cast(step, values, rows)

    monkeypatch.setitem(reduce_arrays._STEPS, Cast, cuts)


def forgets_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies only the first piece of a batch that lies across slabs."""
    copy = arrays.ArraysSession.copy
    monkeypatch.setattr(
        arrays.ArraysSession, "copy", lambda self, i, value, n, pieces: copy(self, i, value, n, pieces[:1])
    )


@pytest.mark.parametrize(
    ("break_it", "suite", "test"),
    [
        (keeps_references, test_backend_torch.TestTorch, "test_values_are_bit_equal_to_the_frameworks_own"),
        (leaks_hooks, test_backend_torch.TestTorch, "test_nothing_is_left_behind"),
        (replaces_outputs, test_backend_torch.TestTorch, "test_the_models_own_output_is_untouched"),
        (
            ignores_later_calls,
            test_backend_torch.TestTorch,
            "test_values_are_bit_equal_to_the_frameworks_own",
        ),
        (broadcasts, test_backend_torch.TestTorch, "test_a_shape_that_changes_is_refused"),
        (truncates, test_backend_arrays.TestArrays, "test_casts_are_those_of_the_framework"),
        (forgets_rows, test_backend_arrays.TestArrays, "test_batches_may_change_size"),
    ],
)
def test_a_broken_backend_fails(
    break_it: Broken, suite: type[BackendContract], test: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = suite()
    getattr(contract, test)(tmp_path / "whole")
    break_it(monkeypatch)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, the suite must not pass
        getattr(contract, test)(tmp_path / "broken")
    assert not isinstance(caught.value, (AttributeError, NameError))
