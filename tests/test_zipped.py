"""A finished store in one zip file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import layertap as lt
import numpy as np
import pytest
import zarr
from layertap.capture.testing import contents
from layertap.capture.verify import verify

VALUES = np.random.default_rng(0).standard_normal((40, 4, 16, 16), np.float32)


def capture(path: Path, **options: object) -> lt.Run:
    data = VALUES, np.arange(40) % 3
    arguments = {"batch_size": 4, "memory": "700KiB", "writers": 1, **options}
    return lt.record_dataset(
        lambda batch: {"maps": batch, "sums": batch.sum((2, 3))}, data, path, ["**"], **arguments
    )


def test_a_packed_store_holds_what_the_store_holds_and_is_read_in_place(tmp_path):
    run = capture(tmp_path / "run.zarr")
    assert run.manifest.n_blocks > 2
    path = lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip")
    with zipfile.ZipFile(path) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == contents(tmp_path / "run.zarr")
        assert packed.namelist()[0] == "zarr.json"
        assert packed.testzip() is None
    read = lt.open(path)
    assert read.complete
    assert read["maps"][[1, 39], 2:4, 3].tobytes() == VALUES[[1, 39], 2:4, 3].tobytes()
    assert read["maps"][:, 1].tobytes() == VALUES[:, 1].tobytes()
    assert read["sums"][...].tobytes() == run["sums"][...].tobytes()
    assert read.rows["label"][:].tolist() == run.rows["label"][:].tolist()
    assert [read.stats.not_finite(name) for name in read] == [run.stats.not_finite(name) for name in run]
    assert list(verify(path)) == []
    assert lt.draw(read, "grid", rows=[3], layers="maps", painter="pillow").png() == (
        lt.draw(run, "grid", rows=[3], layers="maps", painter="pillow").png()
    )


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_encoded_stores_are_packed_too(tmp_path, codec):
    capture(tmp_path / "run.zarr", codec=codec, memory="12MiB")
    run = lt.open(lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip"))
    assert run["maps"][...].tobytes() == VALUES.tobytes()


def test_the_same_store_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        capture(tmp_path / f"{name}.zarr")
        lt.pack(tmp_path / f"{name}.zarr", tmp_path / f"{name}.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_zarr_python_reads_the_file(tmp_path):
    run = capture(tmp_path / "run.zarr")
    group = lt.open(lt.pack(run.place, tmp_path / "run.zip")).zarr()
    assert isinstance(group, zarr.Group)
    assert (group["taps/maps/values"][7] == VALUES[7]).all()


def test_an_unfinished_store_is_not_packed(tmp_path):
    capture(tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / "commits" / "c.1.0").unlink()
    with pytest.raises(lt.StoreError, match="is not finished"):
        lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip")
    assert not list(tmp_path.glob("run.zip*"))


def test_a_file_that_is_there_stays_unless_that_is_said(tmp_path):
    capture(tmp_path / "run.zarr")
    (tmp_path / "run.zip").write_text("mine")
    with pytest.raises(lt.StoreExistsError, match=r"run\.zip exists"):
        lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip")
    assert (tmp_path / "run.zip").read_text() == "mine"
    lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip", overwrite=True)
    assert lt.open(tmp_path / "run.zip").complete
    with pytest.raises(lt.StoreError, match=r"does not end in \.zip"):
        lt.pack(tmp_path / "run.zarr", tmp_path / "run.tar")


def test_a_packed_store_is_not_written_to(tmp_path):
    capture(tmp_path / "run.zarr")
    before = lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip").read_bytes()
    capture(tmp_path / "run.zip")  # it is finished: nothing is changed
    with pytest.raises(lt.StoreError, match="can be read and not written"):
        capture(tmp_path / "run.zip", overwrite=True)
    assert (tmp_path / "run.zip").read_bytes() == before


def test_what_is_no_packed_store_is_refused(tmp_path):
    capture(tmp_path / "run.zarr")
    whole = lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip").read_bytes()
    with pytest.raises(lt.StoreNotFoundError, match="there is no store at"):
        lt.open(tmp_path / "nothing.zip")
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lt.FormatError, match="no zip file"):
        lt.open(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zarr.json", "{}" * 100)
    with pytest.raises(lt.FormatError, match="compressed or encrypted"):
        lt.open(tmp_path / "deflated.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as packed:
        packed.writestr("readme", "x")
    with pytest.raises(lt.FormatError, match="has no zarr"):
        lt.open(tmp_path / "other.zip")


def test_a_flipped_bit_in_a_packed_store_is_found(tmp_path):
    capture(tmp_path / "run.zarr")
    data = bytearray(lt.pack(tmp_path / "run.zarr", tmp_path / "run.zip").read_bytes())
    data[data.index(VALUES[20].tobytes()[:64]) + 5] ^= 1
    (tmp_path / "run.zip").write_bytes(data)
    (damage,) = verify(tmp_path / "run.zip")
    assert damage.name == "maps"
    with pytest.raises(lt.ChecksumError):
        lt.open(tmp_path / "run.zip")["maps"][20]
