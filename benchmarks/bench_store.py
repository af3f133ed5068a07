"""How long activations take to the disk and back, beside other ways to write and read arrays.

    python -m pytest benchmarks/bench_store.py --benchmark-only

256 MiB of maps, half of them zeros, come in batches of 64 rows. Written: `layertap` by its engine,
`np.save` a file a batch, `memmap` into one .npy file, and `zarr-python`, `zarrs` (its pipeline of codecs in
Rust) and `TensorStore` as Zarr v3 with the same shards, inner chunks, codec and checksums, a shard at a
time. `np.save` and `memmap` have no checksums. Every arm ends when its files are synced. `layertap again`
is the control.

Read, from the page cache: by the same libraries from the same store, and by `memmap` from the .npy file.
`window` is a quarter of all rows, `channel` is one channel of each. The store reads whole inner chunks
against their checksums and single channels without; the others decode whole inner chunks in every case, and
`memmap` checks nothing.

The bucket is a server of S3's protocol on the same machine, in Python, and its rate is the server's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness import n_rounds, replayed, tell

pytestmark = replayed
SHAPE, BATCH, CODECS = (64, 28, 28), 64, ("none", "zstd")
ROW_BYTES = 4 * int(np.prod(SHAPE))
N_ROWS = 256 * 2**20 // ROW_BYTES // BATCH * BATCH
BUCKET_ROWS = 128
READERS = ("layertap", "layertap again", "memmap", "zarr-python", "zarrs", "TensorStore")
ARM_S = 0.03
Way = Callable[[Path], None]


@cache
def values() -> Any:
    return np.maximum(np.random.default_rng(0).standard_normal((N_ROWS, *SHAPE), np.float32), 0)


def by_layertap(where: Any, codec: str, n_rows: int = N_ROWS) -> Any:
    given = values()

    def layers(rows: Any) -> dict[str, Any]:
        first = int(np.asarray(rows)[0, 0])
        return {"a": given[first : first + len(rows)]}

    numbers = np.arange(n_rows)[:, None]
    return lt.record_dataset(
        layers, numbers, where, "a", batch_size=BATCH, memory="512MiB", codec=codec, backend="arrays"
    )


def batches() -> Iterator[slice]:
    for row in range(0, N_ROWS, BATCH):
        yield slice(row, row + BATCH)


def by_save(folder: Path) -> None:
    folder.mkdir()
    for i, rows in enumerate(batches()):
        np.save(folder / f"{i:05d}.npy", values()[rows])


def by_memmap(folder: Path) -> None:
    folder.mkdir()
    whole = np.lib.format.open_memmap(folder / "a.npy", "w+", np.float32, (N_ROWS, *SHAPE))
    for rows in batches():
        whole[rows] = values()[rows]
    whole.flush()


@cache
def layout() -> tuple[int, int]:
    """Return rows of a shard and of an inner chunk, as the engine chooses them."""
    with tempfile.TemporaryDirectory() as folder:
        array = by_layertap(Path(folder) / "s", "none").zarr()["taps/a/values"]
        return array.shards[0], array.chunks[0]


def shards() -> Iterator[slice]:
    for row in range(0, N_ROWS, layout()[0]):
        yield slice(row, min(N_ROWS, row + layout()[0]))


@contextlib.contextmanager
def pipeline(name: str) -> Iterator[None]:
    """Let zarr-python encode and decode by itself, or by zarrs."""
    import zarr

    if name == "zarr-python":
        yield
        return
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def by_zarr(name: str, codec: str, where: Any, n_rows: int = N_ROWS) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    with pipeline(name):
        array = zarr.create_array(
            str(where) if isinstance(where, Path) else where,
            shape=(n_rows, *SHAPE),
            dtype="float32",
            chunks=(layout()[1], *SHAPE),
            shards=(layout()[0], *SHAPE),
            compressors=[*([ZstdCodec(level=1)] if codec == "zstd" else []), Crc32cCodec()],
        )
        for rows in shards():
            if rows.start < n_rows:
                array[rows] = values()[rows][: n_rows - rows.start]


def by_tensorstore(codec: str, folder: Path) -> None:
    ts = pytest.importorskip("tensorstore")
    packed = [{"name": "zstd", "configuration": {"level": 1}}] if codec == "zstd" else []
    bytes_ = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [layout()[1], *SHAPE],
        "codecs": [bytes_, *packed, {"name": "crc32c"}],
        "index_codecs": [bytes_, {"name": "crc32c"}],
    }
    array = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "shape": [N_ROWS, *SHAPE],
                "data_type": "float32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout()[0], *SHAPE]}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
            "create": True,
        }
    ).result()
    for rows in shards():
        array[rows].write(values()[rows]).result()


def settle(folder: Path) -> None:
    """Sync every file of a folder."""
    for file in folder.rglob("*"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def ways(codec: str) -> dict[str, Way]:
    """Return each way to write."""

    def ours(folder: Path) -> None:
        by_layertap(folder, codec)

    plain: dict[str, Way] = {"np.save": by_save, "memmap": by_memmap} if codec == "none" else {}
    return {
        "layertap": ours,
        "layertap again": ours,
        **plain,
        "zarr-python": partial(by_zarr, "zarr-python", codec),
        "zarrs": partial(by_zarr, "zarrs", codec),
        "TensorStore": partial(by_tensorstore, codec),
    }


@cache
def written(codec: str) -> tuple[Rounds, dict[str, tuple[int, int]]]:
    """Return the rounds of all ways, and the bytes and files that each made."""
    values(), layout()
    made: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        target = Path(folder) / "s"

        def before(arm: str) -> None:
            shutil.rmtree(target, ignore_errors=True)
            os.sync()

        def run(name: str, way: Way) -> None:
            way(target)
            settle(target)
            files = [file for file in target.rglob("*") if file.is_file()]
            made[name] = sum(file.stat().st_size for file in files), len(files)

        arms = {name: partial(run, name, way) for name, way in ways(codec).items()}
        return interleaved(arms, n_rounds(5), before=before, warm=1), made


@pytest.mark.parametrize("arm", ways("none"))
@pytest.mark.parametrize("codec", CODECS)
def test_writing(benchmark: Any, codec: str, arm: str) -> None:
    if arm not in ways(codec):
        pytest.skip("has no codec")
    rounds, made = written(codec)
    n_bytes, n_files = made[arm]
    rate = round(N_ROWS * ROW_BYTES / statistics.median(rounds.wall(arm)) / 1e6)
    figures = {"MB_s": rate, "MB": round(n_bytes / 1e6), "files": n_files}
    tell(benchmark, rounds, arm, group=f"write, codec {codec}", over="layertap", **figures)


class Readers:
    """One store, and an .npy file of the same values, and who reads them."""

    def __init__(self, codec: str, folder: Path) -> None:
        ts = pytest.importorskip("tensorstore")
        self.run = by_layertap(folder / "s", codec)
        by_memmap(folder / "npy")
        self.npy = np.load(folder / "npy" / "a.npy", mmap_mode="r")
        with pipeline("zarrs"):
            self.zarrs = self.run.zarr()["taps/a/values"]
        self.zarr = self.run.zarr()["taps/a/values"]
        store = {"driver": "file", "path": str(folder / "s" / "taps" / "a" / "values")}
        self.tensorstore = ts.open({"driver": "zarr3", "kvstore": store}).result()

    def arms(self, what: str) -> dict[str, Callable[[], Any]]:
        """Return how each reads a row, a channel of all rows, a window, or all."""
        select: dict[str, Any] = {
            "row": (N_ROWS // 2,),
            "channel": (slice(None), 5),
            "window": (slice(N_ROWS // 4, N_ROWS // 2),),
            "all": (slice(None),),
        }
        at = select[what]
        taps = self.run["a"]
        return {
            "layertap": lambda: taps[at],
            "layertap again": lambda: taps[at],
            "memmap": lambda: np.array(self.npy[at]),
            "zarr-python": lambda: self.zarr[at],
            "zarrs": lambda: self.zarrs[at],
            "TensorStore": lambda: self.tensorstore[at].read().result(),
        }


@cache
def read(codec: str, what: str) -> dict[str, tuple[Rounds, int]]:
    """Return the rounds, and how often an arm read in one."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        arms = Readers(codec, Path(folder)).arms(what)
        expected = arms["memmap"]()
        assert all(np.array_equal(call(), expected) for call in arms.values())
        started = time.perf_counter()
        arms["layertap"]()
        n = max(1, min(200, round(ARM_S / (time.perf_counter() - started))))

        def repeated(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(n):
                    call()

            return run

        rounds = interleaved({name: repeated(call) for name, call in arms.items()}, n_rounds(5), warm=1)
        return dict.fromkeys(arms, (rounds, n))


@pytest.mark.parametrize(
    "arm", ["layertap", "layertap again", "memmap", "zarr-python", "zarrs", "TensorStore"]
)
@pytest.mark.parametrize("what", ["row", "channel", "window", "all"])
@pytest.mark.parametrize("codec", CODECS)
def test_reading(benchmark: Any, codec: str, what: str, arm: str) -> None:
    rounds, n = read(codec, what)[arm]
    tell(benchmark, rounds, arm, group=f"read {what}, codec {codec}", over="layertap", each=n)


@cache
def put() -> Rounds:
    """Return the rounds of writing to a bucket."""
    pytest.importorskip("moto")
    from object_server import BUCKET, CREDENTIALS, S3Server
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = S3Server()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        numbers = iter(range(10**6))

        def ours() -> None:
            by_layertap(f"s3://{BUCKET}/ours{next(numbers)}", "none", BUCKET_ROWS)

        def theirs() -> None:
            store = S3Store(BUCKET, prefix=f"theirs{next(numbers)}")
            by_zarr("zarr-python", "none", ObjectStore(store), BUCKET_ROWS)

        try:
            arms = {"layertap": ours, "layertap again": ours, "zarr-python": theirs}
            return interleaved(arms, n_rounds(5), warm=1)
        finally:
            server.stop()


@pytest.mark.parametrize("arm", ["layertap", "layertap again", "zarr-python"])
def test_writing_to_a_bucket(benchmark: Any, arm: str) -> None:
    rounds = put()
    rate = round(BUCKET_ROWS * ROW_BYTES / statistics.median(rounds.wall(arm)) / 1e6)
    tell(benchmark, rounds, arm, group="write to a bucket, codec none", over="layertap", MB_s=rate)
