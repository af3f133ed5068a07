"""Reading in a random order: each row once, whoever takes part, mixed as it is said, in bounded memory."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import shard
from layertap.capture.chunks import Chunks
from layertap.capture.parts import Part
from layertap.capture.rowset import RowSet
from layertap.capture.shuffle import Order, Share, Windows, stream

N_ROWS = 331
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((N_ROWS, 12, 16, 16)).astype(np.float32)
SMALL = VALUES[:, :3, 0, 0]
LABELS = np.arange(N_ROWS) * 7
GROUP_BYTES = 600_000


def capture(path: Path, codec: str = "none") -> lt.Run:
    return lt.record_dataset(
        lambda batch: {"maps": batch, "small": batch[:, :3, 0, 0]},
        (VALUES, LABELS),
        path,
        ["maps", "small"],
        batch_size=8,
        memory="3MiB" if codec == "none" else "6MiB",
        codec=codec,
        writers=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shuffle")
    for codec in ("none", "zstd", "lz4"):
        assert capture(made / codec, codec).manifest.n_blocks > 3
    return made


@pytest.fixture
def run(folder: Path) -> lt.Run:
    return lt.open(folder / "none")


def flat(made: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(made))


class Memory:
    """Arrays for a batch."""

    def __init__(self, chunks: Chunks, n_rows: int) -> None:
        self.arrays = [np.full((n_rows, spec.row_bytes), 0xAB, np.uint8) for spec in chunks.specs]


def chunks_of(run: lt.Run, keep_bytes: int = 100_000) -> Chunks:
    return Chunks(run, range(len(run.manifest.layout.arrays)), keep_bytes)


def order_of(
    chunks: Chunks, rows: RowSet | None = None, group_bytes: int = GROUP_BYTES, **options: Any
) -> Order:
    every = RowSet.of_spans([0], [N_ROWS]) if rows is None else rows
    windows = Windows.plan(chunks, every, group_bytes)
    return Order(windows, **({"batch_size": 16, "shuffle": True, "seed": 0, "drop_last": False} | options))


def batches(
    chunks: Chunks, order: Order, share: Share | None = None, epoch: int = 0, skip: int = 0
) -> Iterator[list[int]]:
    """Yield the rows of each batch, whose values are held to what was captured."""
    expected = [VALUES, SMALL, LABELS]
    made = stream(chunks, order, epoch, share or Share(Part(), Part()), lambda n: Memory(chunks, n), skip)
    for rows, memory in made:
        for array, values in zip(memory.arrays, expected, strict=True):
            assert array.tobytes() == values[rows].tobytes()
        yield rows.tolist()


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_with_its_values(folder, codec, shuffle):
    chunks = chunks_of(lt.open(folder / codec))
    order = order_of(chunks, shuffle=shuffle)
    assert 1 < order.windows.mixed < len(order.windows.first) / 3
    made = list(batches(chunks, order))
    assert [len(rows) for rows in made] == [16] * (N_ROWS // 16) + [N_ROWS % 16]
    assert sorted(flat(made)) == list(range(N_ROWS))
    assert (flat(made) == list(range(N_ROWS))) is not shuffle


@pytest.mark.parametrize("batch_size", [1, 7, 100, N_ROWS, 1000])
def test_batches_may_be_smaller_or_larger_than_what_is_mixed(run, batch_size):
    chunks = chunks_of(run)
    made = list(batches(chunks, order_of(chunks, batch_size=batch_size)))
    assert [len(rows) for rows in made[:-1]] == [batch_size] * (len(made) - 1)
    assert sorted(flat(made)) == list(range(N_ROWS))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n_workers", [1, 2, 5, 30])
@pytest.mark.parametrize("n_ranks", [1, 3, 8])
def test_ranks_and_workers_have_every_row_once_among_them(run, n_ranks, n_workers, drop_last):
    chunks = chunks_of(run)
    order = order_of(chunks, drop_last=drop_last)
    seen: list[int] = []
    counts = []
    for k in range(n_ranks):
        shares = [Share(Part(k + 1, n_ranks), Part(j + 1, n_workers)) for j in range(n_workers)]
        made = [list(batches(chunks, order, share)) for share in shares]
        counts.append(sum(map(len, made)))
        assert counts[-1] == order.n_batches(shares[0])
        # A loader takes batch after batch from its workers in turn: the short one comes last.
        in_turn = [made[i % n_workers].pop(0) for i in range(counts[-1])]
        assert not any(made)
        assert all(len(rows) == 16 for rows in in_turn[:-1])
        seen += flat(in_turn)
    assert len(seen) == len(set(seen))
    if drop_last:
        assert len(set(counts)) == 1
        assert len(seen) == 16 * n_ranks * (N_ROWS // n_ranks // 16)
    else:
        assert len(seen) == N_ROWS
        assert max(counts) - min(counts) <= 1


def test_without_the_last_batches_every_rank_has_as_many_where_rows_do_not_divide(run):
    order = order_of(chunks_of(run), batch_size=83)  # the ranks have 165 and 166 rows
    for drop_last, expected in ((True, [1, 1]), (False, [2, 2])):
        counts = [Share(Part(k, 2), Part()).n_batches(N_ROWS, 83, drop_last) for k in (1, 2)]
        assert counts == expected
    assert order.n_batches(Share(Part(), Part())) == 4


def test_no_group_is_much_smaller_than_another(run):
    for n_workers in (1, 2, 3):
        order = order_of(chunks_of(run))
        groups = order.groups(0, Share(Part(), Part(1, n_workers)))
        sizes = [len(pieces) for _, pieces in groups]
        assert max(sizes) <= order.windows.mixed
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-sum(sizes) // order.windows.mixed)


def test_some_rows_alone_are_read_where_those_are_asked_for(run):
    chunks = chunks_of(run)
    for chosen in (np.arange(40, 90), np.arange(0, N_ROWS, 7), np.array([5]), np.array([], int)):
        made = list(batches(chunks, order_of(chunks, RowSet.of_rows(chosen))))
        assert sorted(flat(made)) == chosen.tolist()


def test_the_seed_and_the_epoch_make_the_order(run):
    chunks = chunks_of(run)

    def rows(epoch: int, **options: Any) -> list[list[int]]:
        return list(batches(chunks, order_of(chunks, **options), epoch=epoch))

    assert rows(1) == rows(1)
    assert len({str(rows(epoch, seed=seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_going_on_gives_what_was_left_and_reads_no_more_than_that(run, monkeypatch):
    chunks = chunks_of(run)
    order, share = order_of(chunks), Share(Part(2, 2), Part(1, 2))
    whole = list(batches(chunks, order, share, epoch=4))
    for n in (0, 1, 3, len(whole) - 1, len(whole)):
        assert list(batches(chunks, order, share, epoch=4, skip=n)) == whole[n:]
    read: list[int] = []
    window = Chunks.window
    monkeypatch.setattr(Chunks, "window", lambda self, *args: (read.append(args[1]), window(self, *args))[1])
    list(batches(chunks, order_of(chunks), skip=18))
    last = order.groups(0, Share(Part(), Part()))[-1][1]
    assert set(read) == {int(order.windows.first[piece.window]) for piece in last}


# How well rows are mixed


def test_each_batch_holds_rows_of_many_places(run):
    chunks = chunks_of(run)
    order = order_of(chunks)
    length = order.windows.length
    for rows in list(batches(chunks, order))[:-1]:
        assert len({row // length for row in rows}) > 0.5 * min(16, order.windows.mixed)


def test_a_row_comes_anywhere_in_the_epoch_and_next_to_any_other(run):
    chunks = chunks_of(run)
    order = order_of(chunks, batch_size=N_ROWS)
    n_epochs = 60
    places = np.array([np.argsort(next(batches(chunks, order, epoch=e))) for e in range(n_epochs)])
    # The mean place of a row over the epochs: uniform ones scatter by N / sqrt(12 * epochs) about the middle.
    spread = N_ROWS / np.sqrt(12 * n_epochs)
    assert abs(places.mean(0) - N_ROWS / 2).max() < 5 * spread
    assert 0.6 * spread < places.mean(0).std() < 1.4 * spread
    # The first row of the epoch is another nearly every time.
    assert len(set(places.argmin(1))) > 0.8 * n_epochs


def test_rows_of_a_group_come_in_any_order(run):
    order = order_of(chunks_of(run))
    lots = np.array([order.shuffled(epoch, 0, 6) for epoch in range(9000)])
    assert len({tuple(lot) for lot in lots}) == 720
    assert max(Counter(map(tuple, lots.tolist())).values()) < 40


# What it takes


def test_memory_is_bounded_by_the_number_that_was_given(run):
    chunks = chunks_of(run, keep_bytes=GROUP_BYTES // 4)
    order = order_of(chunks)
    list(batches(chunks, order))
    whole = sum(spec.row_bytes for spec in chunks.specs) * N_ROWS
    assert whole > 5 * GROUP_BYTES
    made = stream(chunks, order, 1, Share(Part(), Part()), lambda n: Memory(chunks, n))
    tracemalloc.start()
    for _ in made:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batch_bytes = whole // N_ROWS * 16
    assert peak < 2 * GROUP_BYTES + GROUP_BYTES // 4 + 2 * batch_bytes + 100_000


def test_an_epoch_reads_each_byte_once_in_few_calls_and_opens_each_shard_once(run, monkeypatch):
    layout = run.manifest.layout
    opened: list[str] = []
    calls: list[tuple[int, int]] = []
    real_open, real_read = shard.Shard.__init__, os.preadv

    def opening(self: Any, place: Any, name: str, *rest: Any) -> None:
        opened.append(name)
        real_open(self, place, name, *rest)

    def reading(fd: int, buffers: list[memoryview], at: int) -> int:
        time.sleep(0.002)  # long enough for another reader to want the same
        n_bytes = real_read(fd, buffers, at)
        calls.append((len(buffers), n_bytes))
        return n_bytes

    monkeypatch.setattr(shard.Shard, "__init__", opening)
    monkeypatch.setattr(os, "preadv", reading)
    chunks = chunks_of(run, keep_bytes=2**20)
    order = order_of(chunks)
    list(batches(chunks, order))
    assert len(opened) == len(set(opened)) == 3 * run.manifest.n_blocks
    # Once, with the checksums and the padding between them, and the last block up to a whole chunk.
    n_padded = -(-N_ROWS // 8) * 8
    n_bytes = sum(array.row_bytes for array in layout.arrays) * n_padded
    n_chunks = sum(-(-n_padded // layout.chunk_rows(array)) for array in layout.arrays)
    assert n_bytes < sum(n for _, n in calls) <= n_bytes + 4096 * n_chunks
    # The maps of a window come in one call; of labels and the small tap, a chunk.
    assert len(calls) <= len(order.windows.first) + 2 * run.manifest.n_blocks


def test_chunks_that_windows_cut_through_are_kept_as_far_as_memory_goes(run):
    chunks = chunks_of(run, keep_bytes=2000)
    list(batches(chunks, order_of(chunks)))
    own = chunks._own
    assert 0 < own.n_bytes == sum(chunk.nbytes for chunk in own.chunks.values()) <= 2000


def test_memory_that_holds_no_window_is_refused_with_the_arithmetic(run):
    with pytest.raises(
        lt.PlanError, match=r"8 rows that are read at once take 96\.\dKiB.* is 220KiB at least"
    ):
        order_of(chunks_of(run), group_bytes=50_000)


def test_leaving_early_and_failing_leave_no_thread(run, folder, tmp_path):
    chunks = chunks_of(run)
    for _ in batches(chunks, order_of(chunks)):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layertap-read")]
    copy = capture(tmp_path / "s")
    file = next((tmp_path / "s" / "taps" / "maps" / "values").glob("c.2.*"))
    data = bytearray(file.read_bytes())
    data[4000] ^= 1
    file.write_bytes(data)
    chunks = chunks_of(copy)
    with pytest.raises(lt.ChecksumError, match=r"inner chunk \d of .*c\.2\.0\.0\.0 is damaged"):
        list(batches(chunks, order_of(chunks)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layertap-read")]


def test_few_files_are_open_at_once(run, monkeypatch):
    monkeypatch.setattr("layertap.capture.chunks.MOST_OPEN", 2)
    chunks = chunks_of(run)
    assert sorted(flat(batches(chunks, order_of(chunks)))) == list(range(N_ROWS))
    assert len(chunks._own.shards) == 2


def test_a_store_that_was_replaced_is_not_read_on(tmp_path):
    run = capture(tmp_path / "s")
    chunks = chunks_of(run)
    made = batches(chunks, order_of(chunks))
    next(made)
    lt.record_dataset(
        lambda b: {"maps": b * 2, "small": b[:, :3, 0, 0]}, (VALUES, LABELS), run.path, ["maps", "small"],
        batch_size=8, memory="3MiB", writers=1, overwrite=True,
    )  # fmt: skip
    with pytest.raises(lt.StoreError, match="was replaced or removed since it was opened"):
        list(made)
