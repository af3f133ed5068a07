"""A store, its names and its texts come from anywhere: nothing leads out, runs, fills memory or is obeyed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import layertap as lt
import numcodecs
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture import layout, trust
from layertap.capture.codecs import Codec
from layertap.capture.store import commit_path
from layertap.capture.taps import folder_name
from layertap.capture.trust import LONGEST_NAME, METADATA_BYTES, MOST_ROWS
from layertap.capture.verify import repair, verify
from numcodecs.blosc import Blosc

ROOT = Path(__file__).parents[1]
GIB = 2**30


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 6000)
        for codec in hostile.CODECS:
            hostile.capture(folder / codec, codec)
    return {codec: folder / codec for codec in hostile.CODECS}


@pytest.fixture
def store(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 6000)
    return hostile.copy(stores["none"], tmp_path / "store")


@pytest.fixture
def zstd_store(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 6000)
    return hostile.copy(stores["zstd"], tmp_path / "store")


def refused(path: Path, words: str = "layertap") -> None:
    with pytest.raises(lt.FormatError, match=words):
        lt.open(path)
    with pytest.raises(lt.FormatError, match=words):
        list(verify(path))


# Code


def calls(tree: ast.AST) -> set[str]:
    """Return the dotted names that are called, and the modules that are imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
            found |= {
                f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if k.arg in ("allow_pickle", "shell")
            }
        elif isinstance(node, ast.Import):
            found |= {f"import {alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"import {node.module}")
    return found


RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system"),
    *("torch.load", "torch.export.load", "yaml.load", "joblib.load"),
    *("import pickle", "import marshal", "import shelve", "import dill", "import cloudpickle"),
    *("allow_pickle=True", "shell=True", "numpy.load", "np.load"),
}
ALLOWED = {
    ("backends/torchvision.py", "import pickle"),  # for the name of an error
    ("backends/torch_export.py", "torch.export.load"),  # of tensors alone, by TORCH_FORCE_WEIGHTS_ONLY_LOAD
    ("backends/torch_weights.py", "import pickle"),  # for the name of an error
    ("backends/torch_weights.py", "torch.load"),  # once, with weights_only=True
    ("capture/specs.py", "np.load"),  # three times, with allow_pickle=False
}


def test_nothing_that_runs_code_from_files_is_called():
    found = set()
    for folder in ("capture", "backends", "render"):
        for file in (ROOT / folder).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            found |= {(name, call) for call in calls(ast.parse(file.read_text())) & RUNS_CODE}
    assert found == ALLOWED
    source = (ROOT / "capture" / "specs.py").read_text()
    assert source.count("np.load(") == source.count("allow_pickle=False") == 3
    source = (ROOT / "backends" / "torchvision.py").read_text()
    assert source.count("pickle.") == source.count("pickle.UnpicklingError") == 1
    source = (ROOT / "backends" / "torch_weights.py").read_text()
    assert source.count("pickle.") == source.count("pickle.UnpicklingError") == 1
    assert source.count("torch.load(") == source.count("weights_only=True") == 1
    source = (ROOT / "backends" / "torch_export.py").read_text()
    assert source.index("_check_objects(path)\n") < source.index("= _read(path)\n")
    assert "with tensors_alone(), " in source


def test_the_search_for_such_calls_finds_them():
    text = "import pickle\nfrom shelve import x\ntorch.load(f)\nnp.load(f, allow_pickle=True)\neval('1')"
    wanted = {"import pickle", "import shelve", "torch.load", "np.load", "allow_pickle=True", "eval"}
    assert calls(ast.parse(text)) & RUNS_CODE == wanted


class Runs:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return (open, (self.file, "w"))


def test_a_file_of_weights_gives_weights_and_runs_nothing(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    from layertap.backends.torchvision import load_model

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save(state, file)
    loaded = load_model("squeezenet1_1", {"weights": "IMAGENET1K_V1"}).model
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    torch.save(Runs(tmp_path / "ran"), file)
    with pytest.raises(lt.DataError, match="holds more than weights"):
        load_model("squeezenet1_1", {"weights": "IMAGENET1K_V1"})
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    pickle.loads(pickle.dumps(Runs(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


# Names and paths

OUTSIDE = [
    *(
        "../x",
        "taps/../../x",
        "/etc",
        "/taps/a",
        "",
        ".",
        "taps",
        "taps/",
        "taps//a",
        "taps/./a",
        "a/b",
        7,
        None,
    ),
    *("taps\\a", "taps/..\\..\\x", "C:/taps/a", "taps/c:a", "taps/a:stream", "//host/taps/a", "taps/a\0b"),
    *(
        "taps/con",
        "taps/NUL.x/values",
        "taps/com1",
        "taps/a.",
        "taps/.a",
        "taps/a b",
        "taps/\u202ea",
        "taps/é",
    ),
    *("commits/a", "Commits/log", "taps/zarr.json", "taps/x/Zarr.JSON", "taps/__x", "taps/" + "x" * 300),
    *("taps/" + "x/" * 600 + "x", ["taps", "a"], {"taps": "a"}, "taps/a\n", "TAPS/a", "taps/\ud800"),
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: ascii(path)[:24])
@pytest.mark.parametrize("group", ["taps", "columns"])
def test_a_path_that_is_none_inside_the_store_on_some_system_is_refused(store, group, path):
    hostile.edit(store, lambda manifest: manifest[group][0].update(path=path))
    refused(store, "attribute 'layertap' is not of format 1")


@pytest.mark.parametrize(
    "other", ["taps/maps/values", "taps/Maps/values", "TAPS", "taps/maps", "taps/maps/values/inner"]
)
def test_two_arrays_of_one_path_or_one_inside_the_other_are_refused(store, other):
    hostile.edit(store, lambda manifest: manifest["taps"][1].update(path=other))
    refused(store)


def test_two_taps_or_columns_of_one_name_are_refused(store):
    hostile.edit(store, lambda manifest: manifest["taps"][1].update(name="maps"))
    refused(store, "two taps have the name 'maps'")


def test_commit_records_elsewhere_are_refused(store):
    hostile.edit(store, lambda manifest: manifest.update(commits="rows"))
    refused(store, "commit records")


@pytest.mark.parametrize("name", ["con", "NUL", "aux.conv", "com1", "lpt9.x.y"])
def test_a_layer_called_as_a_windows_device_gets_a_folder_that_is_none(tmp_path, name):
    assert folder_name(name).startswith("~")
    run = lt.record_dataset(lambda b: {name: b}, np.ones((2, 3), np.float32), tmp_path / "s", ["**"])
    assert run[name][...].sum() == 6
    assert folder_name("conv1") == "conv1"
    assert folder_name("console") == "console"


def test_names_of_records_count_only_as_they_are_written(store):
    for name in (
        "c.00.0",
        "c.0.1",
        "c.-1.0",
        "c.٣.0",
        "c.1e3.0",
        "c.0.0.part",
        "c." + "9" * 100 + ".0",
        "c.7.0 ",
    ):
        (store / "commits" / name).write_bytes(b"")
    assert lt.open(store).complete
    assert hostile.use(store) == []


# Links and pipes


@pytest.fixture
def secret(stores: dict[str, Path], tmp_path: Path) -> Path:
    return hostile.copy(stores["none"], tmp_path / "secret")


def test_a_link_is_not_followed_whatever_it_leads_to(store, secret):
    shard = hostile.shard_of(store, "maps", 0)
    for file in (shard, (store / commit_path(0)), store / "zarr.json"):
        target = secret / file.relative_to(store)
        assert target.read_bytes() == file.read_bytes()
        file.unlink()
        file.symlink_to(target)
        assert "FormatError" in hostile.use(store)
        file.unlink()
        file.write_bytes(target.read_bytes())
    assert hostile.use(store) == []


@pytest.mark.parametrize("name", ["taps", "taps/maps", "taps/maps/values", "commits", "commits/log"])
def test_a_folder_that_is_a_link_is_refused_and_nothing_behind_it_is_written_or_removed(store, secret, name):
    damages = list(verify(store))
    os.rename(store / name, store / "moved")
    (store / name).symlink_to(secret / name)
    before = {file: file.read_bytes() for file in secret.rglob("*") if file.is_file()}
    refused(store, "is a link, or lies behind one")
    with pytest.raises(lt.FormatError):
        repair(store, damages)
    with pytest.raises(lt.FormatError):
        hostile.capture(store)
    assert {file: file.read_bytes() for file in secret.rglob("*") if file.is_file()} == before


def test_the_store_itself_may_be_reached_by_a_link(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    assert hostile.use(tmp_path / "link") == []


def test_what_a_capture_writes_does_not_follow_a_link(store, tmp_path):
    shard = hostile.shard_of(store, "maps", 0)
    (tmp_path / "precious").write_text("mine")
    shard.with_name(shard.name + ".part").symlink_to(tmp_path / "precious")
    (store / commit_path(0)).unlink()
    with pytest.raises((lt.LayertapError, OSError)):
        hostile.capture(store)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_not_waited_for(store):
    for file in (hostile.shard_of(store, "maps", 0), (store / commit_path(1)), store / "zarr.json"):
        sound = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert "FormatError" in hostile.use(store)
        file.unlink()
        file.write_bytes(sound)
    assert hostile.use(store) == []


# The manifest

NUMBERS = [True, 2.0, 2.5, "4", -1, 0, 10**30, 2**62, None, [4], {}, 1e308]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["step_rows", "block_rows", "rows", "shape", "format"])
def test_what_is_no_count_is_refused(store, key, value):
    if key == "rows" and value in (0, None):
        return  # a data set of no rows, a loop that has not ended
    change = {"shape": lambda m: m["taps"][0]["shape"].__setitem__(0, value)}
    hostile.edit(store, change.get(key, lambda m: m.update({key: value})))
    refused(store)


@pytest.mark.parametrize(
    "text",
    [
        '{"attributes": {"layertap": {"format": 1, "rows": NaN}}}',
        '{"attributes": {"layertap": {"format": 1, "rows": 1e999}}}',
        '{"attributes": {"layertap": {"format": 1, "x": "\\ud800"}}}',
        '{"attributes": {"layertap": {"format": 1}}, "attributes": {"layertap": {"format": 1}}}',
        '{"attributes": {"layertap": {"format": 1, "rows": ' + "9" * 10_000 + "}}}",
        '{"attributes": {"layertap": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"attributes": {"layertap": {"format": 1, "x": ' + '{"a":' * 900 + "1" + "}" * 900 + "}}}",
        "[" * 1_000_000,
    ],
    ids=lambda text: text[:70],
)
def test_json_that_is_not_what_a_manifest_can_be_is_refused(store, text):
    (store / "zarr.json").write_text(text)
    refused(store)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("-inf"), 2**64, -(10**30), "\ud800", {"\udfff": 1}, nested(40), {"a": nested(31)}],
)
def test_values_that_cannot_be_computed_with_or_written_again_are_refused(store, value):
    hostile.edit(store, lambda manifest: manifest.update(note=nested(20)))
    assert lt.open(store).info["note"] == nested(20)
    hostile.edit(store, lambda manifest: manifest.update(note=[value]))
    refused(store, "is not of format 1: it|is not of format 1: the text")


def test_a_key_that_is_said_twice_is_refused(store):
    text = (store / "zarr.json").read_text()
    assert text.count('"step_rows":') == 1
    (store / "zarr.json").write_text(text.replace('"step_rows":', '"step_rows": 2, "step_rows":'))
    refused(store, "has no attribute 'layertap'")


def test_a_root_of_any_length_is_not_read(store):
    os.truncate(store / "zarr.json", 100 * GIB)
    refused(store, f"should be no more than {METADATA_BYTES:,}")


def test_other_metadata_and_records_of_any_length_are_not_read(store):
    os.truncate(store / "taps" / "zarr.json", 100 * GIB)
    os.truncate((store / commit_path(0)), 100 * GIB)
    with hostile.little_memory(GIB // 4):
        assert [store / damage.file for damage in verify(store)] == [
            store / "taps" / "zarr.json",
            (store / commit_path(0)),
        ]


FACTS: list[tuple[str, Any]] = [
    *(("classes", value) for value in (3, "cat", {"0": "cat"}, [1, 2], [None], ["cat", ["dog"]], True)),
    *(("classes", ["x" * (LONGEST_NAME + 1)]), ("model", []), ("model", "resnet"), ("model", {"name": 3})),
    *(
        ("data", [1]),
        ("data", {"name": {}}),
        ("data", {"name": ["x"]}),
        ("versions", 3),
        ("versions", {"a": 1}),
    ),
    *(
        ("preprocess", value)
        for value in ([1], "x", {"mean": "0.5"}, {"std": ["a"]}, {"mean": {}}, {"std": [[1]]})
    ),
]


@pytest.mark.parametrize(("key", "value"), FACTS, ids=lambda x: repr(x)[:30])
def test_facts_of_another_type_are_refused(store, key, value):
    hostile.edit(store, lambda manifest: manifest.update({key: value}))
    refused(store, "attribute 'layertap' is not of format 1")


@pytest.mark.parametrize("key", ["layer", "type", "kind", "source_dtype", "name", "dtype", "codec", "dims"])
@pytest.mark.parametrize("value", [{}, [], 3, ["x"], True])
def test_a_tap_described_in_another_type_is_refused(store, key, value):
    hostile.edit(store, lambda manifest: manifest["taps"][0].update({key: value}))
    refused(store)


@pytest.mark.parametrize("value", ["x", {}, 3, [3], [["x"]], ["x" * 70_000]])
def test_other_names_of_a_tap_that_are_no_texts_are_refused(store, value):
    hostile.edit(store, lambda manifest: manifest["taps"][0].update(aliases=value))
    refused(store, "alias")


@pytest.mark.parametrize("value", [{}, 3, ["x"], True, "x" * 70_000])
def test_a_score_that_is_no_text_is_refused(store, value):
    hostile.edit(store, lambda manifest: manifest.update(score=value))
    refused(store, "'score'")


@pytest.mark.parametrize(
    ("dims", "shape", "dtype"),
    [
        (["row", "maps_byte"], [768], "float32"),
        (["row", "y", "x", "maps_byte"], [16, 16, 3], "uint8"),
        (["x", "y", "z", "channel"], [16, 16, 3], "float32"),
        (["row", *["x"] * 40], [1] * 40, "float32"),
        (["row", "x"], [2**20] * 2, "float32"),
        (["row", *["x"] * 3], [2**31] * 3, "float32"),
    ],
)
def test_axes_that_no_array_has_are_refused(store, dims, shape, dtype):
    hostile.edit(store, lambda m: m["taps"][0].update(dims=dims, shape=shape, dtype=dtype))
    refused(store)


def test_facts_that_are_missing_are_not_needed(store):
    for key in ("model", "data", "preprocess", "classes", "score", "versions"):
        hostile.edit(store, lambda manifest, key=key: manifest.pop(key))
    for key in ("layer", "type", "kind", "aliases", "source_dtype"):
        hostile.edit(store, lambda manifest, key=key: manifest["taps"][0].pop(key))
    assert [error for error in hostile.use(store) if error != "FormatError"] == []
    assert lt.open(store).classes is None
    shown = CliRunner().invoke(main, ["info", str(store)])
    assert shown.exit_code == 0
    assert "None (None, None)" in shown.output


def test_columns_that_are_not_what_their_name_says_are_not_drawn(tmp_path):
    path = tmp_path / "s"
    with lt.record(lambda b: {"a": b}, path, ["a"], classes=["x", "y"]) as rec:
        rec(np.ones((4, 3, 5, 5), np.float32))
        rec.annotate(odd=np.ones((4, 5, 5, 2), np.uint8), pairs=np.ones((4, 2)), one=np.ones((4, 2, 2)))

    def rename(manifest: Any) -> None:
        for column in manifest["columns"]:
            column["name"] = {"odd": "picture", "pairs": "label", "one": "id"}[column["name"]]

    hostile.edit(path, rename)
    assert hostile.use(path) == []


# How much there is


def test_a_store_that_claims_many_rows_and_holds_none_is_cheap(store):
    for block in range(lt.open(store).manifest.n_blocks):
        (store / commit_path(block)).unlink()
    hostile.edit(store, lambda manifest: manifest.update(rows=MOST_ROWS, block_rows=2**32, step_rows=2**16))
    with hostile.little_memory(GIB // 4):
        run = lt.open(store)
        assert (run.n_rows, len(run), run.n_committed, run.complete) == (MOST_ROWS, 2, 0, False)
        assert repr(run) == f"<Run {store}: 2 taps x {MOST_ROWS} rows, 0 captured>"
        assert run.info["rows"] == MOST_ROWS
        assert run["maps"].shape[0] == len(run["maps"]) == MOST_ROWS
        assert (run.stats.not_finite("maps"), run.n_bytes) == ((0, 0), 0)
        for key in (..., slice(None, None, 7), slice(None, None, -1), -1, [0, 2**39], (slice(None), 0)):
            with pytest.raises(lt.StoreError, match="not captured yet"):
                run["maps"][key]
        with pytest.raises(lt.DrawError, match="no captured rows"):
            lt.draw(run)
        with pytest.raises(lt.StoreError, match=r"a mask of all rows .* memory"):
            run.committed()
    assert CliRunner().invoke(main, ["info", str(store)]).exit_code == 0


def test_rows_that_are_not_there_are_named_before_memory_is_taken(store, monkeypatch):
    (store / commit_path(2)).unlink()
    run = lt.open(store)
    block_rows = run.manifest.layout.block_rows
    assert run.n_committed == run.committed().sum() == run.n_rows - block_rows
    monkeypatch.setattr(np, "empty", None)
    first = 2 * block_rows
    for key in (..., slice(first, None), slice(None, first - 1, -1), [0, first + 1], slice(1, None, first)):
        with pytest.raises(lt.StoreError, match=f"rows {first} to {first + block_rows - 1} .* not captured"):
            run["maps"][key]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (0, 10**15, "speaks of 1000000000000000 rows"),
        (0, 0, "speaks of 0 rows"),
        (1, 100, "cannot hold"),
        (1, 2**63, None),
        (4, 10**9, "counts more values"),
        (5, 2**64 - 1, "counts more values"),
    ],
)
def test_a_commit_record_that_cannot_be_true_is_refused(store, field, value, words):
    values = hostile.record_of(store, 0)
    values[field] = value
    hostile.put_record(store, 0, values)
    run = lt.open(store)
    with hostile.little_memory(GIB // 4), pytest.raises(lt.FormatError, match=words):
        run["maps"][0]
    (damage,) = verify(store)
    assert damage.block == 0


def test_a_loop_that_died_has_no_more_rows_than_its_last_block(store):
    hostile.edit(store, lambda manifest: manifest.update(rows=None))
    run = lt.open(store)
    assert (run.n_rows, run.n_committed, run.committed().sum()) == (24, 24, 24)
    last = run.n_rows // run.manifest.layout.block_rows - 1
    values = hostile.record_of(store, last)
    for n_rows in (run.manifest.layout.block_rows + 1, 10**15, 0):
        hostile.put_record(store, last, [n_rows, *values[1:]])
        with pytest.raises(lt.FormatError, match=f"speaks of {n_rows} rows"):
            lt.open(store).n_rows  # noqa: B018


def test_a_record_beyond_the_last_block_is_damage_and_makes_no_row(store):
    (store / commit_path(999)).write_bytes((store / commit_path(0)).read_bytes())
    run = lt.open(store)
    assert (run.n_committed, run.complete, run.n_rows) == (24, True, 24)
    (damage,) = damages = list(verify(store))
    assert damage.block == 999
    assert repair(store, damages) == [999]
    assert list(verify(store)) == []


# Shards

MISSING = (2**64 - 1, 2**64 - 1)


N = 16 * 16 * 3 * 4 + 4  # bytes of an inner chunk of one row, with its checksum


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([(0, 2**63)], "points outside"),
        ([(2**63, 100)], "points outside"),
        ([(2**64 - 50, 100)], "points outside"),
        ([(0, 2**64 - 1)], "points outside"),
        ([(0, N), (0, N)], "follow each other"),
        ([(N, N), (0, N)], "follow each other"),
        ([MISSING, (N, N)], "points outside"),
        ([(0, N), (N, N + 1)], "follow each other"),
        ([(0, N), (2**64 - 1, 0)], "points outside"),
        ([(0, 3), (N, N)], "cannot be its rows"),
        ([(0, N - 1), (N, N)], "cannot be its rows"),
    ],
)
def test_an_index_that_does_not_lie_within_its_shard_is_refused(store, index, words):
    body, sound = hostile.parts_of(store, "maps", 0)
    assert sound[:2] == [(0, N), (N, N)]
    hostile.put_raw_shard(store, "maps", 0, body, sound)
    assert hostile.use(store) == []
    hostile.put_raw_shard(store, "maps", 0, body, index + sound[len(index) :])
    with hostile.little_memory(GIB // 4):
        for key in (0, (0, slice(0, 1))):
            with pytest.raises(lt.FormatError, match=words):
                lt.open(store)["maps"][key]
        assert [damage.name for damage in verify(store)] == ["maps"]


# Encoded chunks


def zstd_frame(content: bytes, n_claimed: int | None) -> bytes:
    """Return a frame of one RLE block for each byte of `content`, 128 KiB of it; with any claimed size."""
    head = b"\x28\xb5\x2f\xfd" + (
        b"\x00\x58" if n_claimed is None else b"\xc0\x58" + struct.pack("<Q", n_claimed)
    )
    blocks = [
        struct.pack("<I", 131072 << 3 | 2 | (i == len(content) - 1))[:3] + bytes([byte])
        for i, byte in enumerate(content)
    ]
    return head + b"".join(blocks)


def blosc_frame(length: int = 64, **header: int) -> bytes:
    data = Blosc("lz4", 5, Blosc.BITSHUFFLE).encode(np.arange(length // 4, dtype="<i4"))
    names = ("version", "lz", "flags", "typesize", "n_bytes", "block_bytes", "n_encoded")
    fields = dict(zip(names, struct.unpack_from("<4B3I", data), strict=True)) | header
    return struct.pack("<4B3I", *fields.values()) + bytes(data[16:])


ZSTD = bytes(numcodecs.Zstd(1).encode(bytes(range(64))))
BOMBS = [
    ("zstd", zstd_frame(b"a", 100 * GIB)),
    ("zstd", zstd_frame(b"a", 2**64 - 3)),
    ("zstd", zstd_frame(b"a", 64)),
    ("zstd", zstd_frame(b"a" * 50_000, None)),
    ("zstd", zstd_frame(b"a" * 50_000, 64)),
    ("zstd", zstd_frame(b"a" * 50_000, 50_000 * 131072)),
    ("zstd", ZSTD + ZSTD),
    ("zstd", ZSTD + zstd_frame(b"a" * 50_000, None)),
    ("zstd", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + ZSTD),
    ("zstd", ZSTD[:-3]),
    ("zstd", ZSTD[:5]),
    ("zstd", ZSTD[:6]),
    ("zstd", b""),
    ("zstd", bytes(numcodecs.Zstd(1).encode(bytes(63)))),
    ("lz4", b""),
    ("lz4", blosc_frame()[:15]),
    ("lz4", blosc_frame()[:16]),
    ("lz4", blosc_frame()[:-1]),
    ("lz4", blosc_frame() + b"x"),
    ("lz4", blosc_frame(n_bytes=64, n_encoded=2**31)),
    ("lz4", blosc_frame(2**16)),
    ("lz4", blosc_frame(typesize=0)),
    ("lz4", blosc_frame(block_bytes=0)),
    ("lz4", blosc_frame(block_bytes=2**31)),
    ("lz4", blosc_frame(block_bytes=2**32 - 1)),
    ("lz4", blosc_frame(version=3)),
    ("lz4", bytes(Blosc("zstd", 5, Blosc.BITSHUFFLE).encode(bytes(range(64))))),
]


@pytest.mark.parametrize(("codec", "data"), BOMBS, ids=lambda x: ascii(x[:24]))
def test_a_frame_that_is_not_of_the_chunks_size_is_refused_before_memory_is_taken(codec, data):
    with hostile.little_memory(GIB // 16), pytest.raises(lt.FormatError) as refusal:
        Codec(codec, 4).decode(data, 64)
    if codec == "lz4":  # without asking C-Blosc
        assert "does not decode" not in str(refusal.value)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_frame_cannot_hold_more_than_its_bytes_can_stand_for(codec):
    frame = {"zstd": zstd_frame(b"a" * 8, 2**40), "lz4": blosc_frame(64, n_bytes=2**30)}[codec]
    with hostile.little_memory(GIB // 16), pytest.raises(lt.FormatError, match=r"cannot decode to|not true"):
        Codec(codec, 4).decode(frame, {"zstd": 2**40, "lz4": 2**30}[codec])
    zeros = bytes(2**22)
    encoded = Codec(codec, 4).encode(zeros)
    assert Codec(codec, 4).least_bytes(len(zeros)) <= len(encoded)
    assert bytes(Codec(codec, 4).decode(encoded, len(zeros))) == zeros


def test_a_frame_of_zstd_without_its_size_is_read_where_it_fits():
    whole = zstd_frame(b"abc", None)
    expected = b"".join(bytes([c]) * 131072 for c in b"abc")
    assert bytes(Codec("zstd", 1).decode(whole, len(expected))) == expected
    for n in (len(expected) - 1, len(expected) + 1):
        with pytest.raises(lt.FormatError):
            Codec("zstd", 1).decode(whole, n)


@pytest.mark.parametrize("frame", [zstd_frame(b"a", 100 * GIB), zstd_frame(b"a" * 50_000, None)])
def test_a_bomb_in_a_store_does_not_go_off(zstd_store, frame):
    chunks = hostile.chunks_of(zstd_store, "maps", 0)
    hostile.put_shard(zstd_store, "maps", 0, [frame, *chunks[1:]])
    with hostile.little_memory(GIB // 4):
        with pytest.raises(lt.FormatError):
            lt.open(zstd_store)["maps"][0]
        assert [damage.name for damage in verify(zstd_store)] == ["maps"]


SPOILS = """
import random, struct, sys
import numpy as np
from numcodecs.blosc import Blosc
from layertap.capture.codecs import Codec
from layertap.capture.errors import FormatError
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
rng, noise = random.Random(0), np.random.default_rng(0)
values = [np.maximum(noise.standard_normal(n), 0).astype("f4") for n in (4, 100, 5000, 70_000)]
values += [np.zeros(40_000, "f4"), np.arange(9000, dtype="f4")]
refused = read = 0
for name, itemsize in [("lz4", 4), ("lz4", 1), ("lz4", 16), ("zstd", 4)]:
    frames = [(bytes(Codec(name, itemsize).encode(v.tobytes())), v.nbytes) for v in values]
    for _ in range(6000):
        sound, n_bytes = rng.choice(frames)
        frame = bytearray(sound)
        for _ in range(rng.randint(1, 6)):
            early = rng.random() < 0.6
            frame[rng.randrange(min(len(frame), 200) if early else len(frame))] = rng.randrange(256)
        if rng.random() < 0.3:
            del frame[rng.randrange(1, len(frame)):]
        if name == "lz4" and len(frame) >= 16 and rng.random() < 0.8:
            frame[4:8], frame[12:16] = sound[4:8], struct.pack("<I", len(frame))
        try:
            Codec(name, itemsize).decode(bytes(frame), n_bytes)
            read += 1
        except FormatError:
            refused += 1
print(refused, read)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of memory to set")
def test_no_frame_crashes_the_process():
    done = subprocess.run([sys.executable, "-c", SPOILS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    n_refused, n_read = map(int, done.stdout.split())
    assert n_refused > 2000
    assert n_read > 500


# Terminals

EVIL = "a\x1b[2J\x1b]0;title\x07\u202eb\u2066\x9b31m\r\nfalse line\x00\x7f\u2028"


@pytest.fixture
def evil_store(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    with lt.record(lambda b: {"a": b, EVIL: b}, path, ["**"], classes=[EVIL, "猫"], name=EVIL) as rec:
        rec(np.full((4, 3, 5, 5), np.nan, np.float32))
        rec.annotate(
            label=np.array([0, 1, 0, 1]),
            prediction=np.array([0, 0, 1, 1]),
            id=["../../x", "/etc/passwd", EVIL.replace("\x00", ""), "C:\\x\\..\\y"],
            **{EVIL: np.zeros(4)},
        )
    return path


def plain(output: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in output)


def test_nothing_that_a_store_says_is_obeyed_by_a_terminal(evil_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [["info", "s"], ["verify", "s"], ["info", "s", "--json"]]
    commands += [["render", "grid", "s", "--layers", "nosuch"], ["render", "grid", "s", "--class", "nosuch"]]
    commands += [["render", "grid", "s", "--layers", "a", "--rows", "0:4", "--out", "{id}-{class}.png"]]
    for command in commands:
        done = CliRunner().invoke(main, command)
        assert isinstance(done.exception, SystemExit | None), done.exception
        assert plain(done.output), command
        assert not any(line.startswith("false line") for line in done.output.split("\n"))
    shown = CliRunner().invoke(main, ["info", "s"]).output
    assert "a\\u001b[2J" in shown
    assert "猫" in shown
    printed = CliRunner().invoke(main, ["info", "s", "--json"]).output
    assert json.loads(printed) == lt.open("s").info
    record = Path("s") / commit_path(0)
    sound = record.read_bytes()
    record.write_bytes(b"x" + sound[1:])
    damaged = CliRunner().invoke(main, ["verify", "s"])
    assert plain(damaged.output)
    record.write_bytes(sound)
    for file in Path("s/taps").rglob("c.*"):
        file.unlink()
    for command in (["verify", "s"], ["verify", "s", "--repair"], ["info", "s"]):
        done = CliRunner().invoke(main, command)
        assert plain(done.output)
        assert command != ["verify", "s"] or "a\\u001b[2J" in done.output


def test_pictures_are_named_inside_the_folder_that_was_asked_for(evil_store, tmp_path):
    run = lt.open(evil_store)
    out = tmp_path / "deep" / "out"
    for template in ("{id}.png", "{class}{row}.png", "{id}/{predicted}-{row}.png"):
        paths = lt.draw_many(run, "grid", None, out / template, layers="a", painter="pillow")
        for path in paths:
            assert path.resolve().is_relative_to(out)
            assert plain(str(path))
            assert not set(path.name) & set('\\/:*?"<>|')
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "s"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.filterwarnings("ignore:no installed font")
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_names_that_a_terminal_would_obey_are_drawn(evil_store, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from xml.etree import ElementTree

    file = tmp_path / f"x.{suffix}"
    lt.draw(lt.open(evil_store), "grid", rows=[2]).save(file)
    if suffix == "svg":
        ElementTree.parse(file)
        assert "\x1b" not in file.read_text()


def test_a_name_of_any_length_is_drawn_shortened(tmp_path):
    long = "x." * (LONGEST_NAME // 2 - 1) + "xx"
    path = tmp_path / "s"
    with lt.record(lambda b: {long: b}, path, ["**"], classes=["word " * 12_000, "y"]) as rec:
        rec(np.ones((2, 3, 5, 5), np.float32))
        rec.annotate(label=np.array([0, 1]), id=["word " * 200, "b"])
    run = lt.open(path)
    for kind in ("grid", "montage"):
        sheet = lt.draw(run, kind, rows=[0]).sheet
        assert sheet.height < 2000
        assert all(len(text.text) < 1000 for text in sheet.texts)


def test_texts_of_very_different_lengths_do_not_fill_memory(tmp_path, monkeypatch):
    path = tmp_path / "s"
    texts = ["x" * 1000, *[""] * 999]
    with lt.record(lambda b: {"a": b}, path, ["**"]) as rec:
        rec(np.ones((1000, 3), np.float32))
        rec.annotate(id=texts)
    assert lt.open(path).rows["id"][...].tolist() == texts
    monkeypatch.setattr(trust, "_ASKED_BYTES", 1_500_000)
    monkeypatch.setattr(trust, "available_bytes", lambda: 1_500_000)
    assert lt.open(path).rows["id"][0] == "x" * 1000
    with pytest.raises(lt.StoreError, match="an array of 1000 texts takes"):
        lt.open(path).rows["id"][...]
