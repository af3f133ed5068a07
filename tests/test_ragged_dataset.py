"""Data sets of rows that differ in shape: each in its own, and batches of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.checksum import sealed
from layertap.capture.store import commit_path, record_bytes

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader  # noqa: E402

N_ROWS = 83
RNG = np.random.default_rng(0)
TOKENS = [RNG.standard_normal((n, 6)).astype(np.float32) for n in RNG.integers(0, 12, N_ROWS)]
MAPS = [RNG.standard_normal((2, *size)).astype(np.float16) for size in RNG.integers(1, 9, (N_ROWS, 2))]
BOXES = [RNG.integers(0, 99, n) for n in RNG.integers(0, 5, N_ROWS)]
ROWS_OF: dict[str, list[Any]] = {"tokens": TOKENS, "maps": MAPS, "boxes": BOXES}
LABELS = RNG.integers(0, 10, N_ROWS)


def capture(path: Path, codec: str = "none") -> lt.Run:
    def model(numbers: Any) -> dict[str, Any]:
        found: dict[str, Any] = {n: [rows[i] for i in numbers.tolist()] for n, rows in ROWS_OF.items()}
        return found | {"one": numbers * 2.0}

    return lt.record_dataset(
        model, lt.ArraySource(np.arange(N_ROWS), LABELS), path, ["**"], batch_size=4, codec=codec,
        ragged=["tokens:11", "maps:8", "boxes:4"], memory="1MiB" if codec == "none" else "3MiB", writers=1,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["none", "zstd"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: Any) -> lt.Run:
    return capture(tmp_path_factory.mktemp("ragged") / "s", request.param)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    """Let blocks be of a few steps, and inner chunks cut through rows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_BLOCK_BYTES", "_SHARD_BYTES"):
            patch.setattr(f"layertap.capture.plan.{name}", 12_000)
        patch.setattr("layertap.capture.ragged.CHUNK_BYTES", 1000)
        yield patch


def same(found: Any, true: Any) -> bool:
    array = found.numpy()
    return array.shape == true.shape and array.dtype == true.dtype and array.tobytes() == true.tobytes()


def test_each_row_is_a_tensor_of_its_own_shape(run: lt.Run) -> None:
    assert run.manifest.n_blocks > 3
    rows = run.torch_dataset(columns=["label", "row"])
    assert len(rows) == N_ROWS
    for i in (0, 5, 40, 82, -1):
        item = rows[i]
        for name, true in ROWS_OF.items():
            assert same(item[name], true[i]), (name, i)
        assert item["one"] == 2 * (i % N_ROWS)
        assert item["label"] == LABELS[i]
    batch = rows[[70, 3, 3, 12]]
    assert [same(a, TOKENS[i]) for a, i in zip(batch["tokens"], (70, 3, 3, 12), strict=True)] == [True] * 4
    assert rows[[]]["tokens"] == []
    few = run.torch_dataset("tokens", rows=slice(10, 30, 3))
    assert all(same(few[i]["tokens"], TOKENS[row]) for i, row in enumerate(range(10, 30, 3)))


def check_padded(batch: Any, numbers: list[int]) -> None:
    for name, true in ROWS_OF.items():
        values, mask = batch[name], batch[f"{name}/mask"]
        axes = {"tokens": (0,), "maps": (1, 2), "boxes": (0,)}[name]
        sizes = np.array([true[i].shape for i in numbers])
        assert values.shape == (len(numbers), *sizes.max(0))
        assert mask.shape == (len(numbers), *(sizes[:, axis].max() for axis in axes))
        for row, own, i in zip(values, mask, numbers, strict=True):
            assert same(row[tuple(map(slice, true[i].shape))], true[i])
            assert own.sum() == np.prod([true[i].shape[axis] for axis in axes])
            assert row.count_nonzero() == np.count_nonzero(true[i])


def check_offsets(batch: Any, numbers: list[int]) -> None:
    for name, true in ROWS_OF.items():
        values, ends, sizes = (batch[name + end] for end in ("", "/offsets", "/sizes"))
        assert sizes.tolist() == [list(true[i].shape) for i in numbers]
        assert ends[-1] == len(values)
        for i, (number, size) in enumerate(zip(numbers, sizes.tolist(), strict=True)):
            row = values[ends[i] : ends[i + 1]]
            assert same(row if name != "maps" else row.view(size), true[number])


CHECKS: dict[str, Any] = {"pad": check_padded, "offsets": check_offsets}


@pytest.mark.parametrize("how", CHECKS)
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loader_of_rows_makes_batches_by_the_data_sets_collate(
    run: lt.Run, how: str, n_workers: int
) -> None:
    rows = run.torch_dataset(columns="row", collate=how)
    CHECKS[how](rows[[5, 80, 2]], [5, 80, 2])
    seen = []
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=rows.collate, num_workers=n_workers)
    for batch in loader:
        CHECKS[how](batch, batch["row"].tolist())
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(N_ROWS))


@pytest.mark.parametrize("how", ["list", *CHECKS])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_stream_gives_every_row_once_in_its_own_shape(run: lt.Run, how: str, n_workers: int) -> None:
    stream = run.torch_dataset(
        columns=["row", "label"], batch_size=7, shuffle=True, memory="1MiB", collate=how
    )
    orders = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        seen = []
        for batch in DataLoader(stream, batch_size=None, num_workers=n_workers):
            numbers = batch["row"].tolist()
            if how == "list":
                for name, true in ROWS_OF.items():
                    assert all(same(a, true[i]) for a, i in zip(batch[name], numbers, strict=True))
            else:
                CHECKS[how](batch, numbers)
            assert batch["label"].tolist() == LABELS[numbers].tolist()
            assert batch["one"].tolist() == [2 * i for i in numbers]
            seen += numbers
        assert sorted(seen) == list(range(N_ROWS))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_a_flipped_bit_is_found_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = capture(tmp_path / "s")
    shard = tmp_path / "s/taps/tokens/values/c.0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(lt.ChecksumError, match="damaged"):
        _ = run.torch_dataset("tokens")[next(i for i, row in enumerate(TOKENS) if row.size)]
    with pytest.raises(lt.ChecksumError, match="damaged"):
        list(run.torch_dataset("tokens", batch_size=8))


def test_extents_that_cannot_be_are_refused(tmp_path: Path) -> None:
    import struct

    from layertap.capture.checksum import crc32c

    run = capture(tmp_path / "s")
    layout = run.manifest.layout
    (part,) = (i for i, array in enumerate(layout.stored) if array.path == "taps/tokens/extents")
    path = tmp_path / "s/taps/tokens/extents/c.0.0"
    data = bytearray(path.read_bytes())
    n = layout.chunk_rows(layout.stored[part]) * 24
    data[72:96] = struct.pack("<3Q", 2**40, 1, 6)
    crc = struct.pack("<I", crc32c(bytes(data[:n])))
    data[n : n + 4] = crc
    path.write_bytes(data)
    record = tmp_path / "s" / commit_path(0)
    values = np.frombuffer(record.read_bytes()[: record_bytes(len(layout.stored)) - 4], "<u8").copy()
    values[1 + 5 * part + 2] = crc32c(crc)
    record.write_bytes(sealed(values.tobytes()))
    for options in ({}, {"batch_size": 4}):
        made = lt.open(tmp_path / "s").torch_dataset("tokens", **options)
        with pytest.raises(lt.FormatError, match="row 3 of tokens lies where no row can"):
            _ = list(made) if options else made[3]


def test_what_a_collate_cannot_tell_and_another_name_are_refused(tmp_path: Path, run: lt.Run) -> None:
    with pytest.raises(lt.PlanError, match="no collate='padded'; choose one of list, pad, offsets"):
        run.torch_dataset(collate="padded")
    rows = [np.zeros(shape, np.float32) for shape in ((2, 3), (1, 2))]
    varied = lt.record_dataset(
        lambda numbers: {"a": [rows[i] for i in numbers.tolist()]}, np.arange(2), tmp_path / "s", ["a"],
        ragged="a:2x3", batch_size=2,
    )  # fmt: skip
    for how in CHECKS:
        with pytest.raises(lt.SelectionError, match=r"rows of a differ in axis 1 too.*collate='list'"):
            _ = varied.torch_dataset(collate=how)[[0, 1]]
    assert [one.shape for one in varied.torch_dataset()[[0, 1]]["a"]] == [(2, 3), (1, 2)]
