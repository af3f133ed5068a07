"""The arrays backend holds the contract, without torch."""

from __future__ import annotations

from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import tapping
from layertap.capture.dtypes import BFLOAT16
from layertap.capture.testing import BackendContract, StopError, Subject


class TestArrays(BackendContract):
    def subject(self) -> Subject:
        failing = [False]

        def model(batch: Any) -> dict[str, Any]:
            first = np.maximum(batch, 0)
            again = lt.tap("again", first.copy())
            again -= 1  # in place
            lt.tap("again", again)
            parts = {"sum": batch.sum((2, 3)), "pair": (batch[:, :2] * 2, batch > 0)}
            if failing[0]:
                raise StopError
            made = {"first": first, "rounded": batch.astype(BFLOAT16), "parts": parts}
            return {**made, "unused": batch, "logits": batch.mean((2, 3))}

        def reference(values: Any) -> dict[str, Any]:
            return {
                "first": np.maximum(values, 0),
                "rounded": values.astype(BFLOAT16),
                "parts[sum]": values.sum((2, 3)),
                "parts[pair][0]": values[:, :2] * 2,
                "parts[pair][1]": values > 0,
                "again": np.maximum(values, 0),
                "again#2": np.maximum(values, 0) - 1,
            }

        return Subject(
            model,
            ["first", "rounded", "parts", "again"],
            lambda values: values,
            reference,
            lambda output: output["logits"],
            lambda: tapping._listeners,
            lambda on: failing.__setitem__(0, on),
        )


def test_dlpack_arrays_of_another_library_are_taken(tmp_path):
    torch = pytest.importorskip("torch")
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    run = lt.record_dataset(
        lambda batch: {"t": torch.from_numpy(batch) * 2}, values, tmp_path / "s", "t", backend="arrays"
    )
    assert np.array_equal(run["t"][...], values * 2)


def test_an_array_that_the_caller_overwrites_later_was_copied_in_time(tmp_path):
    buffer = np.zeros((4, 3), np.float32)

    def reuses_its_buffer(batch):
        buffer[: len(batch)] = batch
        return {"out": buffer[: len(batch)]}

    values = np.arange(48, dtype=np.float32).reshape(16, 3)
    run = lt.record_dataset(reuses_its_buffer, values, tmp_path / "s", ["out"], batch_size=4)
    assert np.array_equal(run["out"][...], values)


def test_a_function_that_returns_no_dict_is_refused(tmp_path):
    with pytest.raises(lt.CaptureError, match="not a dict of arrays"):
        lt.record_dataset(lambda batch: batch, np.ones((4, 3)), tmp_path / "s", ["a"])


def test_rows_must_come_first(tmp_path):
    with pytest.raises(lt.CaptureError, match="rows come first"):
        lt.record_dataset(lambda batch: {"a": batch.T}, np.ones((4, 3)), tmp_path / "s", ["a"])


def test_text_cannot_be_captured(tmp_path):
    with pytest.raises(lt.CaptureError, match="cannot hold"):
        lt.record_dataset(lambda b: {"a": np.array(["x"] * len(b))}, np.ones((4, 3)), tmp_path / "s", ["a"])


def test_part_of_a_result_is_chosen_by_its_path(tmp_path):
    run = lt.record_dataset(
        lambda b: {"a": (b, {"x": b + 1, "y": b + 2})}, np.ones((4, 3)), tmp_path / "s", ["a[1][y]"]
    )
    assert list(run.taps) == ["a[1][y]"]
    assert run["a[1][y]"][0, 0] == 3


def test_something_that_vanishes_is_named(tmp_path):
    def model(batch):
        return {"a": batch} if batch[0, 0] == 0 else {"b": batch}

    with pytest.raises(lt.CaptureError, match="the model gave no a this time"):
        lt.record_dataset(model, np.arange(24.0).reshape(8, 3), tmp_path / "s", ["a"], batch_size=4)
