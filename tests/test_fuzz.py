"""Whatever is written into a store, with sound checksums: layertap's own errors, no hang, bounded memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import hostile
import layertap as lt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layertap.capture import layout
from layertap.capture.store import commit_path
from layertap.capture.verify import verify

#: Bytes that the process may take while it uses a store of 200 KiB, whatever that says.
MOST_BYTES = 192 * 1024 * 1024

pytestmark = pytest.mark.filterwarnings("ignore:no installed font")

fuzz = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=30),
    suppress_health_check=[HealthCheck.too_slow],
)

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 16, 24, -1, 2**31, 2**32, 2**40, 2**63, 2**64, 10**30, 10**15])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.integers(),
    st.sampled_from([2.0, 2.5, 1e300, float("nan"), float("inf"), -0.0]),
    st.sampled_from(["", "..", "/etc/passwd", "taps/maps/values", "rows/label", "\ud800", "\x1b[2J", "row"]),
    st.sampled_from(["id_byte", "channel", "none", "zstd", "lz4", "uint8", "float64", "bfloat16", "picture"]),
    st.text(max_size=8),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Several inner chunks in each shard of a small store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 6000)
        yield


@pytest.fixture(scope="module")
def stores(small_chunks: None, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    folder = tmp_path_factory.mktemp("stores")
    for codec in hostile.CODECS:
        run = hostile.capture(folder / codec, codec)
        assert run.manifest.n_blocks > 1
        assert hostile.extents(run.path, "maps") > 1
        assert hostile.use(run.path) == []
    return Stores({codec: folder / codec for codec in hostile.CODECS})


class Stores:
    """A store for each codec, as it was captured whenever it is asked for."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self._paths = paths
        self._sound = {codec: hostile.changeable(path) for codec, path in paths.items()}

    def __getitem__(self, codec: str) -> Path:
        return hostile.restore(self._paths[codec], self._sound[codec])


def use(path: Path, draws: bool = True) -> list[str]:
    """Use a store in a process that gets `MOST_BYTES` more: an allocation beyond that is a `MemoryError`."""
    with hostile.little_memory(MOST_BYTES):
        return hostile.use(path, draws)


def places(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each part of a JSON value."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*way, key)
        yield from places(tree[key], (*way, key))


def at(tree: Any, way: Sequence[Any]) -> Any:
    """Return the part of a JSON value to which `way` leads."""
    for step in way:
        tree = tree[step]
    return tree


def seldom(data: st.DataObject) -> bool:
    return data.draw(st.integers(0, 5)) == 5


@st.composite
def changed(draw: Any, tree: Any, kept: tuple[str, ...] = ()) -> Any:
    """Draw a value that differs from `tree` in a few places."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        ways = [way for way in places(tree) if way[0] not in kept]
        counts = [way for way in ways if type(at(tree, way)) is int]
        if not ways:
            break
        if counts and draw(st.booleans()):  # what is computed with
            *way, key = draw(st.sampled_from(counts))
            inside = at(tree, way)
            near = st.integers(inside[key] - 2, 2 * inside[key])
            inside[key] = draw(near | NUMBERS | st.sampled_from([float(inside[key]), 2.5, True, None, "4"]))
            continue
        *way, key = draw(st.sampled_from(ways))
        inside = at(tree, way)
        how = draw(st.sampled_from(["value", "leaf", "delete", "copy", "twice", "other"]))
        if how == "delete":
            del inside[key]
        elif how == "copy":
            inside[key] = copy.deepcopy(at(tree, draw(st.sampled_from(ways))))
        elif how == "twice" and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[key]))
        elif how == "other" and isinstance(inside, dict):
            inside[draw(st.text(max_size=4))] = inside.pop(key)
        else:
            inside[key] = draw(JSON if how == "value" else LEAVES)
    return tree


@st.composite
def spoilt(draw: Any, data: bytes) -> bytes:
    """Draw bytes that were `data`: bits flipped, cut, spliced, doubled, or others altogether."""
    how = draw(st.sampled_from(["flip", "cut", "splice", "insert", "double", "other", "zeros"]))
    start = draw(st.integers(0, max(0, len(data) - 1)))
    some = draw(st.binary(max_size=40))
    if how == "flip" and data:
        spoilt = bytearray(data)
        for i in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
            spoilt[i] ^= 1 << draw(st.integers(0, 7))
        return bytes(spoilt)
    if how == "splice":
        return data[:start] + some + data[start + len(some) :]
    changes = {
        "cut": data[:start],
        "insert": data[:start] + some + data[start:],
        "double": data + data,
        "zeros": data[:start] + bytes(len(data) - start),
    }
    return changes.get(how, some)


@fuzz
@given(root=JSON, key=st.sampled_from(["", "attributes", "layertap"]))
def test_any_json_as_the_root_is_refused(stores, root, key):
    store = stores["none"]
    if key == "layertap":
        if isinstance(root, dict):
            root.setdefault("format", 1)
        hostile.put_manifest(store, root)
    else:
        (store / "zarr.json").write_text(json.dumps({key: root} if key else root))
    assert set(use(store)) == {"FormatError"}


@fuzz
@given(data=st.data())
def test_any_bytes_as_the_root_are_refused_or_read(stores, data):
    store = stores["none"]
    root = (store / "zarr.json").read_bytes()
    (store / "zarr.json").write_bytes(data.draw(spoilt(root)))
    assert set(use(store)) <= {"FormatError", "ChecksumError", "StoreError"}


@settings(fuzz, max_examples=200)
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_read(stores, data):
    codec = data.draw(st.sampled_from(hostile.CODECS))
    store = stores[codec]
    hostile.put_manifest(store, data.draw(changed(hostile.manifest_of(store), ("crc32c", "format"))))
    use(store)


@fuzz
@given(data=st.data())
def test_changed_facts_alone_are_refused_or_read_and_drawn(stores, data):
    store = stores["none"]
    facts = ("model", "data", "preprocess", "classes", "versions")
    others = tuple(key for key in hostile.manifest_of(store) if key not in facts)
    hostile.put_manifest(store, data.draw(changed(hostile.manifest_of(store), others)))
    assert use(store) in ([], ["FormatError"] * 2, ["FormatError"])


@fuzz
@given(data=st.data())
def test_a_changed_commit_record_is_refused_or_read(stores, data):
    codec = data.draw(st.sampled_from(hostile.CODECS))
    store = stores[codec]
    values = hostile.record_of(store, 0)
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(values) - 1))
        near = st.integers(max(0, values[i] - 5), min(2**64 - 1, values[i] + 5))
        values[i] = data.draw(near | st.integers(0, 2**64 - 1) | NUMBERS.map(lambda n: n % 2**64))
    if seldom(data):
        values = values[: data.draw(st.integers(0, len(values)))] + data.draw(
            st.lists(st.integers(0, 2**64 - 1), max_size=4)
        )
    changed = values != hostile.record_of(store, 0)
    hostile.put_record(store, 0, values)
    errors = use(store, draws=False)
    counts = {i for i in range(len(values)) if i % 5 in (4, 0) and i > 0}  # of NaN and infinite values
    if changed and not counts:
        assert errors


@fuzz
@given(data=st.data())
def test_any_bytes_as_a_commit_record_are_found(stores, data):
    store = stores["none"]
    record = store / commit_path(0)
    sound = record.read_bytes()
    record.write_bytes(data.draw(spoilt(sound)))
    errors = use(store, draws=False)
    assert errors or record.read_bytes() == sound
    assert record.read_bytes() == sound or any(store / d.file == record for d in verify(store))


@settings(fuzz, max_examples=200)
@given(data=st.data())
def test_changed_chunks_of_a_shard_are_refused_or_read(stores, data):
    codec = data.draw(st.sampled_from(hostile.CODECS))
    name = data.draw(st.sampled_from(["maps", "vector", "id", "label", "picture"]))
    store = stores[codec]
    chunks = hostile.chunks_of(store, name, 0)
    for _ in range(data.draw(st.integers(1, 2))):
        i = data.draw(st.integers(0, len(chunks) - 1))
        chunks[i] = data.draw(spoilt(chunks[i]))
    if seldom(data):
        chunks = chunks[: data.draw(st.integers(0, len(chunks)))]
    hostile.put_shard(store, name, 0, chunks)
    use(store, draws=False)


@settings(fuzz, max_examples=200)
@given(data=st.data())
def test_a_changed_index_of_a_shard_is_refused_or_read(stores, data):
    codec = data.draw(st.sampled_from(hostile.CODECS))
    name = data.draw(st.sampled_from(["maps", "id", "picture"]))
    store = stores[codec]
    body, index = hostile.parts_of(store, name, 0)
    for _ in range(data.draw(st.integers(0, 3))):
        i, field = data.draw(st.integers(0, len(index) - 1)), data.draw(st.integers(0, 1))
        extent = list(index[i])
        near = st.integers(max(0, extent[field] - 20), min(2**64 - 1, extent[field] + 20))
        edges = st.sampled_from([len(body), 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
        extent[field] = data.draw(near | edges | st.integers(0, 2**64 - 1))
        index[i] = (extent[0], extent[1])
    if seldom(data):
        index = data.draw(st.permutations(index))
    if seldom(data):
        index = (index + index)[: data.draw(st.integers(0, 2 * len(index)))]
    if seldom(data):
        body = data.draw(spoilt(body))
    hostile.put_raw_shard(store, name, 0, body, index)
    use(store, draws=False)


@fuzz
@given(data=st.data())
def test_changed_metadata_of_an_array_are_found_by_verify(stores, data):
    store = stores["zstd"]
    name = data.draw(st.sampled_from(["taps/maps/values", "rows/id", "commits", "taps", "rows"]))
    file = store / name / "zarr.json"
    sound = file.read_bytes()
    file.write_text(json.dumps(data.draw(changed(json.loads(sound))), indent=1, ensure_ascii=True))
    found = [store / damage.file for damage in verify(store)]
    assert found == ([] if file.read_bytes() == sound else [file])
    file.write_bytes(data.draw(spoilt(sound)))
    found = [store / damage.file for damage in verify(store)]
    assert found == ([] if file.read_bytes() == sound else [file])
    assert lt.open(store)["maps"][5].any()  # nothing else looks at it
