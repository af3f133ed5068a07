"""What a store's files hold, and committing to it block by block; FORMAT.md is the specification."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import constants, trust
from .checksum import CRC_BYTES, crc32c, sealed, unsealed
from .codecs import CODECS
from .columns import is_text
from .dtypes import DType, dtype_name, fill_value, held_as, named_dtype
from .errors import ChecksumError, FormatError, StoreError, StoreExistsError, StoreNotFoundError, why
from .fields import ReceptiveField
from .layout import ArraySpec, Layout
from .place import Lock, NewFile, Place
from .printable import printable
from .ragged import as_stored, extents_spec
from .reduce import Int8
from .reduce_text import chain_from_json
from .shard import ShardRecord, least_bytes
from .statistics import Statistics

Json = dict[str, Any]

#: The version of FORMAT.md that this code writes, and the newest that it reads.
FORMAT_VERSION = 1
COMMITS = "commits"
#: What a store keeps of the runs that made it, where Zarr readers do not look and no reader needs to.
LOG = f"{COMMITS}/log"
ROOT = "zarr.json"
_ATTRIBUTE = "layertap"
_CRC_KEY = "crc32c"
_RECORD_BYTES = 2**20  # far more than any record has
_RECORD_FIELDS = ("bytes", "index_crc32c", "chunks_crc32c", "nan", "inf")


@dataclass(frozen=True)
class Manifest:
    """What the store's root says of it: all that is needed to read and to draw it."""

    layout: Layout
    """Its arrays."""
    n_rows: int | None
    """Rows of the data set; None while a loop of the user's own has not ended."""
    facts: Json
    """Model, data, classes, preprocessing, versions, and what is known of each tap beside its array."""
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False, repr=False)
    """The values of the arrays without rows, by their paths; empty where the store was only read."""

    def to_json(self) -> Json:
        """Return the value of the root's attribute `layertap`."""
        about = self.facts["taps"]
        data = {
            "format": FORMAT_VERSION,
            "rows": self.n_rows,
            "step_rows": self.layout.step_rows,
            "block_rows": self.layout.block_rows,
            "commits": COMMITS,
            "taps": [_tap_json(self.layout, i, about[tap.name]) for i, tap in enumerate(self.layout.taps)],
            "columns": [_array_json(column) for column in self.layout.columns],
            "values": self.layout.values,
            "statistics": self.layout.statistics and self.layout.statistics.to_json(self.layout.taps),
            **{key: value for key, value in self.facts.items() if key != "taps"},
        }
        return data | {_CRC_KEY: manifest_crc(data)}

    @classmethod
    def from_json(cls, data: Json) -> Manifest:
        """Read what `to_json` returned.

        Raises:
            ChecksumError: it is not what was written.
            FormatError: it is of a newer format, or not of this form.
        """
        version = data.get("format") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise FormatError("its attribute 'layertap' names no format")
        if version > FORMAT_VERSION:
            raise FormatError(
                f"it has format {version}; this version of layertap reads up to {FORMAT_VERSION}. "
                "Upgrade with: pip install --upgrade layertap"
            )
        try:
            trust.check_tree(data)
            if data.get(_CRC_KEY) != manifest_crc(data):
                raise ChecksumError("its attribute 'layertap' is damaged: it does not give its CRC-32C")
            layout, facts = _layout_from_json(data), _facts_from_json(data)
            trust.check_facts(facts)
            _check_reductions(layout, facts)
            n_rows = data["rows"]
            if n_rows is not None:
                trust.whole(n_rows, "'rows'", 0, trust.MOST_ROWS)
        except ChecksumError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise FormatError(f"its attribute 'layertap' is not of format {version}: {why}") from error
        return cls(layout, n_rows, facts)

    @property
    def constants_json(self) -> list[Json]:
        """What is said of each array without rows."""
        return [one for about in self.facts["taps"].values() for one in about.get("constants", ())]

    def constant_files(self) -> dict[str, bytes]:
        """Return the chunks of the arrays without rows by their names, as far as their values are known."""
        return {
            constants.file_of(one): constants.encoded(self.constants[one["path"]])
            for one in self.constants_json
            if one["path"] in self.constants
        }

    @property
    def n_blocks(self) -> int:
        """Blocks of a store whose rows are known."""
        return -(-(self.n_rows or 0) // self.layout.block_rows)

    def rows_of(self, block: int) -> int:
        """Return the rows that `block` should hold."""
        if self.n_rows is None:
            return self.layout.block_rows
        return max(0, min(self.layout.block_rows, self.n_rows - block * self.layout.block_rows))


class StoreWriter:
    """A store that blocks are committed to, locked against others that would write the same blocks.

    Safe to use from many threads and processes as long as no block is written by two of them.
    """

    def __init__(self, place: Place, manifest: Manifest, lock: Lock) -> None:
        self.place = place
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def create(
        cls, place: Place, manifest: Manifest, blocks: range | None, overwrite: bool = False
    ) -> StoreWriter:
        """Make an empty store at `place`.

        Args:
            place: where it appears, whole.
            manifest: what it will hold.
            blocks: the blocks to lock; None for all there will ever be.
            overwrite: remove the store that is there first.

        Raises:
            StoreExistsError: something is there already, and `overwrite` is false.
            StoreError: it cannot be made.
        """
        Manifest.from_json(manifest.to_json())  # what could not be read again is not begun
        files = manifest.constant_files() | metadata_files(manifest)  # the root's comes last
        return cls(place, manifest, place.make(files, overwrite=overwrite, blocks=blocks))

    @classmethod
    def join(cls, place: Place, manifest: Manifest, blocks: range | None) -> StoreWriter:
        """Go on with the store at `place`.

        Raises:
            StoreError: another process is writing some of `blocks`.
        """
        lock = place.lock(blocks)
        try:
            # Where the root is made first, a process that died next has left the rest to be made.
            mend(place, manifest)
        except BaseException:
            lock.release()
            raise
        return cls(place, manifest, lock)

    def new_shard(self, array: ArraySpec, block: int) -> NewFile:
        """Begin the shard that holds `block` of `array`."""
        return self.place.new_file(shard_path(array, block))

    def abandon(self, block: int, arrays: Sequence[ArraySpec]) -> None:
        """Remove shards of a block that will not be committed."""
        self.place.abandon([shard_path(array, block) for array in arrays])

    def commit(self, block: int, n_rows: int, records: Sequence[ShardRecord]) -> None:
        """Give the durable shards of `block` their names, then record it, all or nothing."""
        self.place.publish([shard_path(array, block) for array in self.manifest.layout.stored])
        self._lock.check()
        self.place.write(commit_path(block), encode_record(n_rows, records))

    def close_rows(self, n_rows: int) -> None:
        """Write the number of rows of a store that was made without it."""
        self.manifest = replace(self.manifest, n_rows=n_rows)
        for name, data in metadata_files(self.manifest).items():  # the root's comes last
            self.place.write(name, data)

    def release(self) -> None:
        """Let the next writer in; may be called more than once."""
        self._lock.release()


def mend(place: Place, manifest: Manifest) -> None:
    """Write what is missing of the files that belong to no block."""
    metadata, chunks = metadata_files(manifest), manifest.constant_files()
    for files, most in (
        (metadata, trust.METADATA_BYTES),
        (chunks, max(map(len, chunks.values()), default=0)),
    ):
        there = place.read_many(list(files), most)
        for (name, data), found in zip(files.items(), there, strict=True):
            if found is None:
                place.write(name, data)


def check_removable(place: Place) -> None:
    """Refuse to overwrite what is not a store, nor an empty folder.

    Raises:
        StoreExistsError: with the path; it is left as it is.
    """
    if not place.exists():
        return
    try:
        has_attribute = _ATTRIBUTE in _root(place)["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        has_attribute = False
    if not has_attribute:
        raise StoreExistsError(
            f"{place} exists and is not a layertap store, so it is not overwritten; choose another name"
        )


def read_manifest(place: Place, *, again: bool = False) -> Manifest:
    """Read the manifest of the store at `place`.

    Raises:
        StoreNotFoundError: nothing is there.
        FormatError: it is not a store, or one of a newer format.
    """
    try:
        attributes = _root(place)["attributes"][_ATTRIBUTE]
    except (FileNotFoundError, NotADirectoryError):
        if again:
            raise FormatError(f"{place} is not a layertap store: it has no zarr.json") from None
        if not place.exists():
            raise StoreNotFoundError(f"there is no store at {place}; a capture makes one") from None
        return read_manifest(place, again=True)  # it may have been made between the two looks
    except (FormatError, StoreError):
        raise
    except OSError as error:
        raise StoreError(f"{place} cannot be read: {why(error)}") from error
    except (ValueError, KeyError, TypeError):
        raise FormatError(
            f"{place} is not a layertap store: its zarr.json has no attribute 'layertap'"
        ) from None
    try:
        manifest = Manifest.from_json(attributes)
        paths = [array.path for array in manifest.layout.stored]
        place.check_folders([COMMITS, LOG, *paths, *(one["path"] for one in manifest.constants_json)])
    except FormatError as error:
        raise type(error)(f"{place} cannot be read: {error}") from error
    return manifest


def _root(place: Place) -> Any:
    return trust.parse_json(place.read(ROOT, trust.METADATA_BYTES))


def plan_differences(existing: Json, planned: Json) -> list[str]:
    """Return a line for each thing that makes two manifests two plans.

    What cannot change a value (versions, names, the memory that shapes blocks) makes no difference.
    """
    lines = [
        f"{_MEANING.get(key, key)}: {existing.get(key)} there, {planned.get(key)} now"
        for key in ("rows", "step_rows", "classes", "preprocess", "score")
        if existing.get(key) != planned.get(key)
    ]
    for group, key in (
        ("model", "backend"),
        ("model", "type"),
        ("model", "weights"),
        ("data", "fingerprint"),
    ):
        was, now = (m.get(group, {}).get(key) for m in (existing, planned))
        if was != now:
            lines.append(f"{_MEANING.get(key, key)}: {was} there, {now} now")
    lines += statistics_differences(existing, planned)
    was, now = ([tap["name"] for tap in m["taps"]] for m in (existing, planned))
    if was != now and set(was) == set(now):
        lines.append(f"order of the taps: {', '.join(was)} there, {', '.join(now)} now")
    for group in ("taps", "columns"):
        was, now = ({a["name"]: a for a in m[group]} for m in (existing, planned))
        for name in [*was, *(n for n in now if n not in was)]:
            if name not in now or name not in was:
                lines.append(f"{group[:-1]} {name}: {'there' if name in was else 'now'} alone")
                continue
            lines += [
                f"{group[:-1]} {name}: {field} {was[name].get(field)} there, {now[name].get(field)} now"
                for field in ("shape", "dtype", "codec", "ragged", "pad")
                if was[name].get(field) != now[name].get(field)
            ]
            lines += _reduced_otherwise(name, was[name], now[name])
            if (was[name].get("masked") is None) != (now[name].get("masked") is None):
                lines.append(f"tap {name}: {_with_mask(was[name])} there, {_with_mask(now[name])} now")
    return [printable(line) for line in lines]


def statistics_differences(existing: Json, planned: Json) -> list[str]:
    """Return a line for each difference in what is kept of the taps."""
    lines = []
    for what in ("names", "top_rows", "classes"):
        was, now = ((m.get("statistics") or {}).get(what) for m in (existing, planned))
        if was != now:
            lines.append(f"statistics ({what}): {was} there, {now} now")
            break
    was, now = ("values" if m.get("values", True) else "statistics alone" for m in (existing, planned))
    return lines + ([f"of the taps: {was} there, {now} now"] if was != now else [])


def _with_mask(tap: Json) -> str:
    return "without a mask" if tap.get("masked") is None else "with a mask"


def _reduced_otherwise(name: str, was: Json, now: Json) -> list[str]:
    """Return a line where two manifests reduce a tap otherwise, or by another basis."""
    steps = [(one.get("reduction") or {}).get("steps", []) for one in (was, now)]
    if steps[0] != steps[1]:
        texts = [(one.get("reduction") or {}).get("text", "none") for one in (was, now)]
        if texts[0] == texts[1]:
            texts = [json.dumps(one) for one in steps]
        return [f"tap {name}: reduction {texts[0]} there, {texts[1]} now"]
    found = [{c["name"]: c["crc32c"] for c in one.get("constants", ())} for one in (was, now)]
    return [
        f"tap {name}: another {part} of its reduction"
        for part in found[0]
        if found[0][part] != found[1].get(part)
    ]


_MEANING = {
    "rows": "rows of the data set",
    "step_rows": "batch size",
    "score": "score of the gradients",
    "type": "model",
    "weights": "weights of the model (fingerprint)",
    "fingerprint": "data (fingerprint)",
}


def manifest_crc(data: Json) -> int:
    """Return a manifest's CRC-32C: of its JSON in ASCII, sorted and without spaces, but for this key."""
    rest = {key: value for key, value in data.items() if key != _CRC_KEY}
    return crc32c(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def committed_blocks(place: Place, n_blocks: int = 0) -> set[int]:
    """Return the numbers of the blocks that have a commit record.

    Args:
        place: where the store is.
        n_blocks: how many to ask for one by one where the place cannot list its files; of a store whose rows
            are not known yet (0), as many as follow each other from the first on.
    """
    names = place.names(COMMITS)
    if names is None:
        return _asked_for(place, n_blocks)
    blocks = set()
    for name in names:
        if match := _RECORD_NAME.fullmatch(name):
            blocks.add(int(match[1]))
    return blocks


# As `shard_name` writes it, and no number beyond what rows there can be.
_RECORD_NAME = re.compile(r"c\.(0|[1-9][0-9]{0,12})\.0")


def _asked_for(place: Place, n_blocks: int) -> set[int]:
    if n_blocks:
        found = place.read_many([commit_path(block) for block in range(n_blocks)], _RECORD_BYTES)
        return {block for block, data in enumerate(found) if data is not None}
    block = 0
    while place.read_many([commit_path(block)], _RECORD_BYTES) != [None]:
        block += 1
    return set(range(block))


def shard_name(block: int, n_dims: int) -> str:
    """Return the chunk key of a block, as Zarr's default encoding with `.` gives it."""
    return ".".join(["c", str(block)] + ["0"] * (n_dims - 1))


def shard_path(array: ArraySpec, block: int) -> str:
    """Return the name inside the store of the shard that holds `block` of `array`."""
    return f"{array.path}/{shard_name(block, array.stored_axes)}"


def commit_path(block: int) -> str:
    """Return where the record of `block` is: itself a chunk of the array `commits`."""
    return f"{COMMITS}/{shard_name(block, 2)}"


def encode_record(n_rows: int, records: Sequence[ShardRecord]) -> bytes:
    """Return a commit record: little-endian uint64, then their CRC-32C."""
    values = [n_rows]
    for record in records:
        values += astuple(record)
    return sealed(np.array(values, "<u8").tobytes())


def read_record(place: Place, block: int, n_arrays: int) -> tuple[int, tuple[ShardRecord, ...]]:
    """Read the commit record of `block`: its rows, and one record for each array.

    Raises:
        ChecksumError: it is damaged.
        FormatError: it is no plain file, or far too long.
        StoreError: it cannot be read.
    """
    name = f"{place}/{commit_path(block)}"
    try:
        stored = place.read(commit_path(block), record_bytes(n_arrays))
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"the commit record {name} cannot be read: {why(error)}") from error
    return decode_record(stored, name, n_arrays)


def record_bytes(n_arrays: int) -> int:
    """Return the size of a commit record."""
    return 8 * (1 + n_arrays * len(_RECORD_FIELDS)) + CRC_BYTES


def decode_record(stored: bytes, name: str, n_arrays: int) -> tuple[int, tuple[ShardRecord, ...]]:
    """Read what `encode_record` returned; `name` is what an error calls it.

    Raises:
        ChecksumError: it is damaged.
    """
    data = unsealed(stored)
    if data is None or len(data) != record_bytes(n_arrays) - CRC_BYTES:
        raise ChecksumError(f"the commit record {name} is damaged")
    values: NDArray[np.uint64] = np.frombuffer(data, "<u8")
    fields = values[1:].reshape(n_arrays, len(_RECORD_FIELDS)).tolist()
    return int(values[0]), tuple(ShardRecord(*field) for field in fields)


def check_record(
    manifest: Manifest, block: int, n_rows: int, records: Sequence[ShardRecord]
) -> tuple[int, tuple[ShardRecord, ...]]:
    """Return what `read_record` did where it can be true of `block`.

    Raises:
        FormatError: the block has no such rows, its shards could not hold them, or more values are counted
            than there are.
    """
    layout = manifest.layout
    where = f"the commit record of block {block}"
    if not 0 < n_rows <= manifest.rows_of(block) or (
        manifest.n_rows is not None and n_rows != manifest.rows_of(block)
    ):
        raise FormatError(f"{where} speaks of {n_rows} rows")
    for array, record in zip(layout.stored, records, strict=True):
        stored, shard, n_shard_rows = as_stored(array, layout, n_rows)
        if record.n_bytes < least_bytes(stored, shard, n_shard_rows):
            raise FormatError(
                f"{where} gives {array.path} {record.n_bytes} bytes, which cannot hold {n_rows} rows"
            )
        n_most = n_rows if array.is_ragged else n_shard_rows
        n_parts = n_most * array.row_bytes // array.dtype.itemsize * (2 if array.dtype.kind == "c" else 1)
        if record.n_nan + record.n_inf > n_parts:
            raise FormatError(f"{where} counts more values that are not finite than {array.path} has")
    return n_rows, tuple(records)


def _array_json(array: ArraySpec) -> Json:
    return {
        "name": array.name,
        "path": array.path,
        "dims": list(array.dims),
        "shape": list(array.shape),
        "dtype": dtype_name(array.dtype),
        "codec": array.codec,
    } | ({"ragged": True} if array.is_ragged else {})


def _tap_json(layout: Layout, i: int, about: Json) -> Json:
    parts = [layout.arrays[number] for number in layout.numbers[i][1:]]
    named = [_array_json(part) | {"name": part.path.rpartition("/")[2]} for part in parts]
    return _array_json(layout.taps[i]) | {"parts": named} | about


def _has_codes(data: Json) -> bool:
    reduction = data.get("reduction")
    steps = () if reduction is None else chain_from_json(reduction["steps"]).steps
    return bool(steps) and isinstance(steps[-1], Int8)


def _parts_from_json(tap: ArraySpec, data: Json) -> list[ArraySpec]:
    parts = []
    for one in trust.listed(data.get("parts", []), f"the parts of {trust.shown(tap.name)}"):
        part = _array_from_json(one)
        if part.path != f"{tap.group}/{part.name}":
            raise FormatError(f"a part of {trust.shown(tap.name)} has the path {trust.shown(part.path)}")
        parts.append(replace(part, name=f"{tap.name}/{part.name}"))
    if tap.is_ragged:
        if parts != [replace(extents_spec(tap), role="")]:
            raise FormatError(f"the ragged tap {trust.shown(tap.name)} does not say where its rows lie")
        return [extents_spec(tap)]
    return parts


def _check_reductions(layout: Layout, facts: Json) -> None:
    """Hold what taps are said to be reduced by to what this version knows."""
    for tap in layout.taps:
        about, what = facts["taps"][tap.name], trust.shown(tap.name)
        if about.get("masked") not in (None, True, False):
            raise FormatError(f"{what} is said to be masked by {trust.shown(about['masked'])}")
        if "field" in about:
            ReceptiveField.from_json(about["field"], about.get("source_shape", tap.shape))
        reduction = about.get("reduction")
        if reduction is not None:
            chain_from_json(reduction["steps"])
            for key in ("text", "error"):
                trust.name(reduction[key], f"{key!r} of the reduction of {what}")
        for size in trust.listed(about.get("source_shape", []), f"the source's shape of {what}"):
            trust.whole(size, f"an axis of the source of {what}", 1, trust.LONGEST_AXIS)
        dims = trust.listed(about.get("source_dims", []), f"the names of the source's axes of {what}")
        if dims and len(dims) != len(about.get("source_shape", [])):
            raise FormatError(f"{what} has {len(dims)} names for the axes of its source")
        for dim in dims:
            trust.name(dim, f"an axis of the source of {what}")
        for one in trust.listed(about.get("constants", []), f"the constants of {what}"):
            constants.check(one, tap.group, what)
    paths = [array.path for array in layout.arrays]
    paths += [one["path"] for about in facts["taps"].values() for one in about.get("constants", ())]
    trust.check_distinct("arrays", [], paths)


def _layout_from_json(data: Json) -> Layout:
    taps, columns = (
        tuple(_array_from_json(array) for array in trust.listed(data[key], repr(key)))
        for key in ("taps", "columns")
    )
    for what, arrays in (("taps", taps), ("columns", columns)):
        trust.check_distinct(what, [array.name for array in arrays])
    trust.check_distinct("arrays", [], [array.path for array in taps + columns])
    if not taps:
        raise FormatError("it has no taps")
    folders = [tap.group for tap in taps]
    if len(set(folders)) < len(folders):
        raise FormatError("two taps share a folder")
    taps = tuple(replace(tap, codes=_has_codes(one)) for tap, one in zip(taps, data["taps"], strict=True))
    parts = [part for tap, one in zip(taps, data["taps"], strict=True) for part in _parts_from_json(tap, one)]
    step_rows, block_rows = (
        trust.whole(data[key], repr(key), 1, trust.MOST_BLOCK_ROWS) for key in ("step_rows", "block_rows")
    )
    if block_rows % step_rows:
        raise FormatError("its blocks are not a whole number of steps")
    if data["commits"] != COMMITS:
        raise FormatError(f"its commit records are said to lie in {trust.shown(data['commits'])}")
    values = data.get("values", True)
    statistics = Statistics.from_json(data.get("statistics"), taps)
    if type(values) is not bool or not (values or statistics):
        raise FormatError("it has neither values nor statistics, or does not say which")
    return Layout(taps, columns, step_rows, block_rows, statistics, values, tuple(parts))


_OF_LAYOUT = ("format", "rows", "step_rows", "block_rows", "commits", "columns", "values", "statistics")
_OF_ARRAY = ("name", "path", "dims", "shape", "dtype", "codec", "ragged", "parts")


def _facts_from_json(data: Json) -> Json:
    facts = {key: value for key, value in data.items() if key not in (*_OF_LAYOUT, _CRC_KEY)}
    facts["taps"] = {
        tap["name"]: {key: value for key, value in tap.items() if key not in _OF_ARRAY}
        for tap in data["taps"]
    }
    return facts


def _array_from_json(data: Json) -> ArraySpec:
    name = trust.name(data["name"], "the name of an array")
    what = trust.shown(name)
    path, codec = trust.check_path(data["path"], what), data["codec"]
    if not isinstance(codec, str) or codec not in CODECS:
        raise FormatError(f"{what} has the codec {trust.shown(codec)}; there are {', '.join(CODECS)}")
    shape = tuple(
        trust.whole(size, f"an axis of {what}", 1, trust.LONGEST_AXIS)
        for size in trust.listed(data["shape"], f"the shape of {what}")
    )
    dims = tuple(
        trust.name(dim, f"an axis' name of {what}")
        for dim in trust.listed(data["dims"], f"the axes of {what}")
    )
    spec = ArraySpec(name, path, dims, shape, named_dtype(data["dtype"]), codec)
    ragged = data.get("ragged", False)
    if ragged not in (True, False) or (ragged and not shape):
        raise FormatError(f"{what} is said to be ragged by {trust.shown(ragged)}")
    spec = replace(spec, role="ragged" if ragged else "padded" if "pad" in data else "")
    if dims[:1] != ("row",) or len(dims) != len(shape) + 1 or len(dims) > trust.MOST_AXES:
        raise FormatError(
            f"{what} has {len(dims)} names for {1 + len(shape)} axes, or rows do not come first"
        )
    if spec.row_bytes >= 2**62:
        raise FormatError(f"{what} has rows of {spec.row_bytes} bytes")
    if is_text(spec) and (len(shape) != 1 or spec.dtype != np.uint8):
        raise FormatError(f"the text column {what} is not of uint8 (row, byte)")
    return spec


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Return every zarr.json of a store by its name inside it, the root's last."""
    files = {array.path: _array_metadata(array, manifest) for array in manifest.layout.stored}
    files |= {one["path"]: _constant_metadata(one) for one in manifest.constants_json}
    files[COMMITS] = _commits_metadata(manifest)
    groups = sorted({str(parent) for name in files for parent in PurePosixPath(name).parents}, reverse=True)
    arrays = dict(files)
    for group in groups:
        prefix = "" if group == "." else f"{group}/"
        inside = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
        attributes = {_ATTRIBUTE: manifest.to_json()} if group == "." else {}
        files[group] = _group_metadata(attributes)
        arrays[group] = files[group] | {"consolidated_metadata": _consolidated(inside)}
    root = arrays.pop(".")
    return {f"{name}/{ROOT}": _dump(data) for name, data in arrays.items()} | {ROOT: _dump(root)}


def _group_metadata(attributes: Json) -> Json:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _consolidated(inside: dict[str, Json]) -> Json:
    # Saves a reader, a remote one most of all, one request for each array; xarray warns where it is missing.
    return {"kind": "inline", "must_understand": False, "metadata": dict(sorted(inside.items()))}


def _array_metadata(array: ArraySpec, manifest: Manifest) -> Json:
    layout = manifest.layout
    stored, shard, n_rows = as_stored(array, layout, layout.block_rows)
    shape, chunk, inner_chunk = (
        [n, *array.shape] for n in (manifest.n_rows or 0, layout.block_rows, shard.chunk_rows(stored))
    )
    if array.is_ragged:  # elements, of which a block has room for more than there are
        inner_chunk, chunk = [shard.chunk_rows(stored)], [shard.block_rows]
        shape = [manifest.n_blocks * shard.block_rows]
    elif shard is not layout:  # a block's pieces lie side by side
        inner_chunk, chunk = [1, *array.shape], [1, n_rows * array.shape[0]]
        shape = [manifest.n_blocks, chunk[1]]
    inner = [_BYTES, *array.encoding.json(), _CRC]
    sharding = {
        "chunk_shape": inner_chunk,
        "codecs": inner,
        "index_codecs": [_BYTES, _CRC],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": held_as(array.dtype),
        "chunk_grid": _grid(chunk),
        "chunk_key_encoding": _KEYS,
        "fill_value": fill_value(array.dtype),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(stored.dims),
        "attributes": _truly(array.dtype),
    }


def _constant_metadata(one: Json) -> Json:
    dtype = named_dtype(one["dtype"])
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": one["shape"],
        "data_type": held_as(dtype),
        "chunk_grid": _grid(one["shape"]),
        "chunk_key_encoding": _KEYS,
        "fill_value": fill_value(dtype),
        "codecs": [_BYTES, _CRC],
        "dimension_names": one["dims"],
        "attributes": _truly(dtype),
    }


def _truly(dtype: DType) -> Json:
    """Return the attributes of an array whose type Zarr does not know: what its bytes are."""
    return {} if held_as(dtype) == dtype_name(dtype) else {_ATTRIBUTE: {"dtype": dtype_name(dtype)}}


def _commits_metadata(manifest: Manifest) -> Json:
    arrays = manifest.layout.stored
    fields = ["rows", *(f"{a.path}/{field}" for a in arrays for field in _RECORD_FIELDS)]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [manifest.n_blocks, len(fields)],
        "data_type": "uint64",
        "chunk_grid": _grid([1, len(fields)]),
        "chunk_key_encoding": _KEYS,
        "fill_value": 0,
        "codecs": [_BYTES, _CRC],
        "dimension_names": ["block", "field"],
        "attributes": {"fields": fields},
    }


_BYTES: Json = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC: Json = {"name": "crc32c"}
# One flat folder of files for each array: no folder is made while capturing.
_KEYS: Json = {"name": "default", "configuration": {"separator": "."}}


def _grid(shape: list[int]) -> Json:
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def _dump(data: Json) -> bytes:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode()
