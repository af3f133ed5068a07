"""What is damaged is found and named; what is repaired is captured again, byte for byte."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.store import commit_path, shard_name
from layertap.capture.testing import contents
from layertap.capture.verify import Damage, repair, verify


def values() -> Any:
    return np.random.default_rng(0).standard_normal((40, 4, 16, 16), np.float32)


def capture(path: Path, codec: str = "none") -> lt.Run:
    class Named(lt.ArraySource):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.columns["id"] = [f"row {row}" for row in rows]
            return batch

    return lt.record_dataset(
        lambda batch: {"whole": batch, "odd": batch[:, :3, :5, 0]},
        Named(values(), np.arange(40), classes=["猫", "dog"]),
        path,
        ["whole", "odd"],
        batch_size=4,
        codec=codec,
        memory="700KiB" if codec == "none" else "1766KiB",
        writers=1,
    )


def kinds_of_bytes(run: lt.Run) -> dict[str, list[tuple[Path, range]]]:
    """Return the bytes of a store by what they are: each kind's files, and which part of them."""
    kinds: dict[str, list[tuple[Path, range]]] = {
        "root": [(run.path / "zarr.json", range((run.path / "zarr.json").stat().st_size))],
        "metadata": [],
        "record": [],
        "index": [],
        "chunk": [],
        "checksum": [],
        "padding": [],
    }
    for file in run.path.rglob("*/zarr.json"):
        kinds["metadata"].append((file, range(file.stat().st_size)))
    for block in range(run.manifest.n_blocks):
        file = run.path / commit_path(block)
        kinds["record"].append((file, range(file.stat().st_size)))
        for array in run.manifest.layout.arrays:
            file = run.path / array.path / shard_name(block, len(array.dims))
            n_bytes = file.stat().st_size
            n_chunks = run.manifest.layout.block_rows // run.manifest.layout.chunk_rows(array)
            start = n_bytes - 16 * n_chunks - 4
            kinds["index"].append((file, range(start, n_bytes)))
            extents = list(struct.iter_unpack("<QQ", file.read_bytes()[start:-4]))
            stops = [*(offset for offset, _ in extents[1:]), start]
            for (offset, length), stop in zip(extents, stops, strict=True):
                kinds["chunk"].append((file, range(offset, offset + length - 4)))
                kinds["checksum"].append((file, range(offset + length - 4, offset + length)))
                if offset + length < stop:
                    kinds["padding"].append((file, range(offset + length, stop)))
    return kinds


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_flipped_bit_is_found_wherever_it_is(tmp_path, codec):
    run = capture(tmp_path / "s", codec)
    assert run.manifest.n_blocks > 3
    kinds = kinds_of_bytes(run)
    assert [kind for kind, parts in kinds.items() if not parts] == ([] if codec == "none" else ["padding"])
    n_bytes = sum(len(part) for parts in kinds.values() for _, part in parts)
    files = [f for f in run.path.rglob("*") if f.is_file() and "log" not in f.parts]
    assert n_bytes == sum(file.stat().st_size for file in files)  # no byte is of no kind
    rng = random.Random(0)
    for kind, parts in kinds.items():
        found = 0
        for _ in range(40 if parts else 0):
            file, part = rng.choices(parts, [len(part) for _, part in parts])[0]
            sound = file.read_bytes()
            at, bit = rng.choice(part), 1 << rng.randrange(8)
            file.write_bytes(sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :])
            try:
                damages = list(verify(run.path))
            except lt.FormatError:
                assert kind == "root"
                damages = [Damage(file, "the root cannot be read")]
            file.write_bytes(sound)
            assert [run.path / damage.file for damage in damages] == [file], (
                f"bit {bit} of byte {at} of {file}, {kind}"
            )
            found += 1
        assert found == (40 if parts else 0)
    assert list(verify(run.path)) == []


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("taps/whole/values/c.1.0.0.0", "rows 8 to 15, whole: "),
        ("rows/label/c.2", "rows 16 to 23, label: "),
        ("commits/c.3.0", "rows 24 to 31, all taps and columns: "),
    ],
)
def test_damage_is_named_by_rows_and_tap_and_repaired_by_the_same_capture(tmp_path, file, words):
    run = capture(tmp_path / "s")
    assert run.manifest.layout.block_rows == 8
    before = contents(tmp_path / "s")
    damaged = bytearray((tmp_path / "s" / file).read_bytes())
    damaged[0] ^= 1
    (tmp_path / "s" / file).write_bytes(bytes(damaged))
    command = CliRunner().invoke(main, ["verify", str(tmp_path / "s")])
    assert command.exit_code == 1
    assert command.stdout.startswith(words)
    command = CliRunner().invoke(main, ["verify", str(tmp_path / "s"), "--repair"])
    assert command.exit_code == 0
    assert "dropped 1 blocks (8 rows)" in command.stdout
    assert lt.open(tmp_path / "s").committed().sum() == 32
    assert list(verify(tmp_path / "s")) == []
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_a_shard_that_is_gone_cut_short_or_of_another_run_is_found(tmp_path):
    capture(tmp_path / "s")
    shard = tmp_path / "s" / "taps" / "whole" / "values" / "c.0.0.0.0"
    sound = shard.read_bytes()
    other = shard.with_name("c.1.0.0.0").read_bytes()
    assert len(other) == len(sound)
    for replace, words in (
        (None, "cannot be opened"),
        (b"", "0 bytes"),
        (sound[:-1], "were committed"),
        (other, "other values than those that were committed"),
    ):
        shard.unlink(missing_ok=True)
        if replace is not None:
            shard.write_bytes(replace)
        (damage,) = verify(tmp_path / "s")
        assert (damage.block, damage.rows, damage.name) == (0, (0, 7), "whole")
        assert words in str(damage)
    shard.write_bytes(sound)
    assert list(verify(tmp_path / "s")) == []


def test_damaged_metadata_is_written_anew_and_no_row_is_lost(tmp_path):
    capture(tmp_path / "s")
    before = contents(tmp_path / "s")
    for name in ("taps/whole/values/zarr.json", "rows/zarr.json", "commits/zarr.json"):
        file = tmp_path / "s" / name
        file.write_text(file.read_text().replace("3", "4", 1))
    (tmp_path / "s" / "taps" / "zarr.json").unlink()
    damages = list(verify(tmp_path / "s"))
    assert len(damages) == 4
    assert repair(tmp_path / "s", damages) == []
    assert contents(tmp_path / "s") == before


def test_metadata_whose_folder_is_gone_are_written_anew(tmp_path):
    capture(tmp_path / "s")
    before = contents(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "rows" / "label")
    damages = list(verify(tmp_path / "s"))
    assert repair(tmp_path / "s", damages) == [0, 1, 2, 3, 4]
    assert (tmp_path / "s" / "rows" / "label" / "zarr.json").is_file()
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_a_sound_store_is_said_to_be_sound(tmp_path):
    capture(tmp_path / "s")
    command = CliRunner().invoke(main, ["verify", str(tmp_path / "s")])
    assert command.exit_code == 0
    assert "40 of 40 rows captured, all sound" in command.output


def test_a_loop_that_died_is_verified_as_far_as_it_came(tmp_path):
    with (
        pytest.raises(RuntimeError),
        lt.record(lambda b: {"a": b}, tmp_path / "s", "a", memory="700KiB", writers=1) as rec,
    ):
        for i in range(0, 40, 4):
            rec(values()[i : i + 4])
        raise RuntimeError
    assert 0 < lt.open(tmp_path / "s").n_rows < 40
    assert list(verify(tmp_path / "s")) == []
