"""Stores as somebody hostile would write them: any change, with every checksum that belongs to it."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
from layertap.capture.checksum import crc32c, sealed
from layertap.capture.store import commit_path, manifest_crc, shard_name
from layertap.capture.verify import verify

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

N_ROWS = 24
CODECS = ("none", "lz4", "zstd")


class Named(lt.ArraySource):
    """Rows with a text beside each."""

    def batch(self, rows: range) -> lt.Batch:
        batch = super().batch(rows)
        batch.columns["id"] = [f"row {row}" for row in rows]
        return batch


def capture(path: Path, codec: str = "none", classes: tuple[str, ...] = ("cat", "dog", "fish")) -> lt.Run:
    """Make a store of several blocks: maps, vectors, labels, predictions, texts and pictures."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (N_ROWS, 16, 16, 3), np.uint8)

    def model(batch: Any) -> dict[str, Any]:
        maps = np.maximum(batch, 0)
        return {"maps": maps, "vector": maps[:, 0, 0, :5], "logits": batch[:, :, 0, 0]}

    for n_kib in range(256, 16_384, 64):  # the least that is enough gives the shortest blocks
        try:
            return lt.record_dataset(
                model,
                Named(pictures, np.arange(N_ROWS) % 3, classes=list(classes)),
                path,
                ["maps", "vector"],
                batch_size=4,
                codec=codec,
                memory=f"{n_kib}KiB",
                writers=1,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            )
        except lt.PlanError:
            continue
    raise AssertionError("no memory is enough")


def copy(store: Path, to: Path) -> Path:
    """Copy a store over what is at `to`."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(store, to)
    return to


def restore(store: Path, sound: dict[str, bytes]) -> Path:
    """Give the store at `store` the files that it had, of those that are changed here; return its path."""
    for name, data in sound.items():
        (store / name).write_bytes(data)
    return store


def changeable(store: Path) -> dict[str, bytes]:
    """Return the root, the commit record and the shards of block 0, and all metadata, by name."""
    files = [*store.rglob("zarr.json"), *store.rglob("c.0*")]
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in files}


def manifest_of(path: Path) -> Any:
    return json.loads((path / "zarr.json").read_bytes())["attributes"]["layertap"]


def put_manifest(path: Path, manifest: Any) -> None:
    """Write a manifest, with the checksum that belongs to it where it can have one."""
    if isinstance(manifest, dict):
        manifest["crc32c"] = manifest_crc(manifest)
    (path / "zarr.json").write_text(json.dumps({"attributes": {"layertap": manifest}}))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the manifest in place."""
    manifest = manifest_of(path)
    change(manifest)
    put_manifest(path, manifest)


def record_of(path: Path, block: int) -> list[int]:
    """Return the values of a commit record."""
    return np.frombuffer((path / commit_path(block)).read_bytes()[:-4], "<u8").tolist()


def put_record(path: Path, block: int, values: list[int]) -> None:
    (path / commit_path(block)).write_bytes(sealed(np.array(values, "<u8").tobytes()))


def shard_of(path: Path, name: str, block: int) -> Path:
    arrays = lt.open(path).manifest.layout.arrays
    (array,) = (a for a in arrays if a.name == name)
    return path / array.path / shard_name(block, len(array.dims))


def extents(path: Path, name: str) -> int:
    """Return how many inner chunks a shard has places for."""
    layout = lt.open(path).manifest.layout
    (array,) = (a for a in layout.arrays if a.name == name)
    return layout.block_rows // layout.chunk_rows(array)


def parts_of(path: Path, name: str, block: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a shard's chunks as they lie, and its index."""
    data = shard_of(path, name, block).read_bytes()
    start = len(data) - 4 - 16 * extents(path, name)
    return data[:start], list(struct.iter_unpack("<QQ", data[start:-4]))


def chunks_of(path: Path, name: str, block: int) -> list[bytes]:
    """Return the encoded inner chunks of a shard."""
    body, index = parts_of(path, name, block)
    return [body[start : start + n_bytes - 4] for start, n_bytes in index if start < 2**63]


def put_shard(path: Path, name: str, block: int, chunks: list[bytes]) -> None:
    """Write a shard of these encoded chunks, sound in itself, and let the commit record say so."""
    n = extents(path, name)
    body, index, crcs = b"", [], b""
    for chunk in chunks:
        stored = sealed(chunk)
        index.append((len(body), len(stored)))
        body, crcs = body + stored, crcs + stored[-4:]
    index += [(2**64 - 1, 2**64 - 1)] * (n - len(index))
    put_raw_shard(path, name, block, body, index, crc32c(crcs))


def put_raw_shard(
    path: Path, name: str, block: int, body: bytes, index: list[tuple[int, int]], chunks_crc: int = 0
) -> None:
    """Write a shard of any bytes and any index, and let the commit record say so."""
    encoded = b"".join(struct.pack("<QQ", *extent) for extent in index)
    file, at = shard_of(path, name, block), record_at(path, name)
    values = record_of(path, block)
    values[at : at + 3] = [len(body) + len(encoded) + 4, crc32c(encoded), chunks_crc or values[at + 2]]
    file.write_bytes(body + sealed(encoded))
    put_record(path, block, values)


def record_at(path: Path, name: str) -> int:
    """Return where in a commit record the fields of an array begin."""
    names = [array.name for array in lt.open(path).manifest.layout.arrays]
    return 1 + 5 * names.index(name)


@contextlib.contextmanager
def little_memory(n_bytes: int) -> Iterator[None]:
    """Let this process take `n_bytes` of memory more and none beyond, where the system has such a limit."""
    statm = Path("/proc/self/statm")
    if resource is None or not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def use(path: Path, draws: bool = True) -> list[str]:
    """Do with a store whatever one does; return the names of the errors, all of them layertap's own."""
    steps: list[Callable[[], Any]] = [lambda: list(verify(path))]
    errors: list[str] = []
    try:
        run = lt.open(path)
    except lt.LayertapError as error:
        errors.append(type(error).__name__)
    else:
        layer = next(iter(run))
        steps += [
            lambda: (repr(run), len(run), run.n_rows, run.info, run.complete, run.classes, run.mean, run.std),
            lambda: (run.n_committed, run.committed().sum()),
            lambda: (dict(run.stats), run.n_bytes),
            lambda: [(array[0], array[-1], array[:], array[::-5]) for array in run.taps.values()],
            lambda: [array[...] for array in run.rows.values()],
            lambda: run[layer][:, :1],
            lambda: [repr(array) + array.name for array in (*run.taps.values(), *run.rows.values())],
            lambda: list(lt.open(path, check=True)[layer][[0, 1]]),
        ]
        if draws:
            steps.append(lambda: lt.draw(run, "grid", painter="pillow").png())
            steps.append(lambda: lt.draw(run, "montage", painter="pillow").png())
    for step in steps:
        try:
            step()
        except lt.LayertapError as error:
            errors.append(type(error).__name__)
    return errors
