"""What a store may say: it comes from anywhere, and whoever wrote it could compute every checksum.

Checksums find accidents, not intent. So what is read is held to its form before anything is done with it:
only plain files of the store's own folders are opened, JSON is small and flat and says nothing twice, counts
are whole numbers that can be, names lead nowhere else, and memory is taken only for what the files can hold.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType
from .errors import FormatError, StoreError
from .machine import available_bytes

Json = dict[str, Any]

#: Longest `zarr.json` that is read: 20,000 taps. Parsed, it may take 25 times its length.
METADATA_BYTES = 32 * 1024 * 1024
#: Most rows of a store, of one of its blocks, and entries of one axis.
MOST_ROWS, MOST_BLOCK_ROWS, LONGEST_AXIS = 2**40, 2**32, 2**32
#: Most axes of an array, rows included; numpy had this limit for long.
MOST_AXES = 32
#: Longest name of a tap, column, class or axis, in characters.
LONGEST_NAME = 65_536

_DEPTH = 32  # of JSON; a manifest needs 5
_ASKED_BYTES = 64 * 1024 * 1024  # memory that is taken without asking whether it is there
_INSIDE = ("taps", "rows")  # where arrays lie
_FOLDER = re.compile(r"(?!\.|__)[A-Za-z0-9_.~-]{1,255}(?<!\.)")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


# Files


def open_plain(path: Path) -> int:
    """Open the plain file at `path` for reading; return its descriptor.

    Links are not followed (one could lead to another's data), and nothing that is no file is opened (a pipe
    would wait for ever).

    Raises:
        FormatError: it is a link or no file.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise FormatError(f"{path} is a link, or no file at all; a store holds plain files alone")
    flags = (getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
    return os.open(path, os.O_RDONLY | sum(flags))


def read_plain(path: Path, most: int) -> bytes:
    """Return the bytes of the plain file at `path`, of at most `most`.

    Raises:
        FormatError: it is longer, or no plain file.
        OSError: it cannot be read.
    """
    with open(open_plain(path), "rb") as file:
        check_length(str(path), os.fstat(file.fileno()).st_size, most)
        return file.read(most)


def check_length(what: str, n_bytes: int, most: int) -> None:
    """Refuse a small file that is not small.

    Raises:
        FormatError: it is longer than `most` bytes.
    """
    if n_bytes > most:
        raise FormatError(f"{what} has {n_bytes:,} bytes; there should be no more than {most:,}")


def check_folders(store: Path, names: Iterable[str]) -> None:
    """Refuse a store one of whose folders is a link that leads out of it.

    Raises:
        FormatError: with the folder.
    """
    root = os.path.realpath(store)
    for name in names:
        if os.path.realpath(store / name) != os.path.join(root, *name.split("/")):
            raise FormatError(f"{store / name} is a link, or lies behind one; a store's folders are its own")


# JSON


def parse_json(data: bytes) -> Any:
    """Return what JSON text in UTF-8 says; see `check_tree` for what it may hold.

    Raises:
        ValueError: it is no JSON, says a key twice, or nests too deeply.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_said_once)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _said_once(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it says a key twice")
    return found


def check_tree(value: Any) -> None:
    """Hold values as they come of JSON to what can be computed with, shown and written again.

    Raises:
        FormatError: it nests too deeply, or holds a number that is infinite, NaN or of more than 64 bits, or
            a text that is not Unicode.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise FormatError("it nests too deeply")
        for one in level:
            if isinstance(one, float) and not math.isfinite(one):
                raise FormatError(f"it holds the number {one}")
            if isinstance(one, int) and abs(one) >= 2**64:
                raise FormatError("it holds a number of more than 64 bits")
            if isinstance(one, str) and not _is_unicode(one):
                raise FormatError(f"the text {shown(one)} in it is not Unicode")
        level = [inner for one in level for inner in _inside(one)]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list | tuple) else ()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole(value: Any, what: str, least: int, most: int) -> int:
    """Return `value` where it is a whole number from `least` to `most`; neither `true` nor 2.0 is one.

    Raises:
        FormatError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise FormatError(f"{what} is {shown(value)}; it should be a whole number from {least} to {most}")
    return value


def name(value: Any, what: str) -> str:
    """Return `value` where it is a text that can name something.

    Raises:
        FormatError: it is not.
    """
    if type(value) is not str or not 0 < len(value) <= LONGEST_NAME:
        raise FormatError(f"{what} is {shown(value)}; it should be a text of 1 to {LONGEST_NAME} characters")
    return value


def listed(value: Any, what: str) -> list[Any]:
    """Return `value` where it is a list.

    Raises:
        FormatError: it is not.
    """
    if not isinstance(value, list):
        raise FormatError(f"{what} is {shown(value)}; it should be a list")
    return value


def shown(value: Any) -> str:
    """Return a value as an error names it: on one line, in ASCII, not all of a long one."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# What a manifest says


def check_path(path: Any, what: str) -> str:
    """Return the path of an array where it lies inside the store, on every system.

    Raises:
        FormatError: it could lead elsewhere: up, to another drive, to a device, to a file of the store's own.
    """
    parts = path.split("/") if isinstance(path, str) else []
    if len(parts) < 2 or parts[0] not in _INSIDE or len(path) > 1024 or not all(map(_is_folder, parts)):
        raise FormatError(f"{what} has the path {shown(path)}, which is no path of an array inside the store")
    return str(path)


def _is_folder(part: str) -> bool:
    return bool(_FOLDER.fullmatch(part)) and not is_device(part) and part.lower() != "zarr.json"


def is_device(part: str) -> bool:
    """Return whether Windows takes a file of this name for a device."""
    return _DEVICE.fullmatch(part) is not None


def check_distinct(what: str, names: Sequence[str], paths: Sequence[str] = ()) -> None:
    """Refuse two arrays of one name, or of paths that are one, or one inside the other, on some system.

    Raises:
        FormatError: with the name or the path.
    """
    seen: set[str] = set()
    for one in names:
        if one in seen:
            raise FormatError(f"two {what} have the name {shown(one)}")
        seen.add(one)
    taken = {path.lower() for path in paths}
    above = {
        "/".join(parts[:n]) for parts in (path.split("/") for path in taken) for n in range(1, len(parts))
    }
    if len(taken) < len(paths) or taken & above:
        raise FormatError("two arrays have one path, or one lies inside the other")


def check_facts(facts: Json) -> None:
    """Hold what a manifest says beside its arrays to the types that readers expect; what is not there may be.

    Raises:
        FormatError: with the key.
    """
    for key in ("model", "data", "preprocess", "versions", "left_out"):
        if not isinstance(facts.get(key, {}), dict):
            raise FormatError(f"{key!r} is {shown(facts[key])}; it should be an object")
    if not isinstance(facts.get("score"), str | None) or len(facts.get("score") or "") > LONGEST_NAME:
        raise FormatError(f"'score' is {shown(facts['score'])}; it should be a text")
    texts: dict[str, tuple[str, ...]] = {
        "model": ("name", "type", "backend", "weights"),
        "data": ("name", "fingerprint"),
        "versions": tuple(facts.get("versions", {})),
    }
    about = [(key, facts.get(key, {}), keys) for key, keys in texts.items()]
    about += [
        (shown(tap), its, ("layer", "type", "kind", "source_dtype")) for tap, its in facts["taps"].items()
    ]
    for what, its, keys in about:
        for key in keys:
            if not isinstance(its.get(key, ""), str | None) or len(its.get(key) or "") > LONGEST_NAME:
                raise FormatError(f"{key!r} of {what} is {shown(its[key])}; it should be a text")
    for tap, its in facts["taps"].items():
        for alias in listed(its.get("aliases", []), f"'aliases' of {shown(tap)}"):
            if type(alias) is not str or len(alias) > LONGEST_NAME:
                raise FormatError(f"the alias {shown(alias)} of {shown(tap)} is no text")
    if facts.get("classes") is not None:
        for one in listed(facts["classes"], "'classes'"):
            if type(one) is not str or len(one) > LONGEST_NAME:
                raise FormatError(f"the class {shown(one)} is no text of at most {LONGEST_NAME} characters")
    for one, reason in facts.get("left_out", {}).items():
        name(reason, f"why {shown(one)} is left out")
    for key in ("mean", "std"):
        values = facts.get("preprocess", {}).get(key)
        if values is not None and not all(type(n) in (int, float) for n in listed(values, repr(key))):
            raise FormatError(f"{key!r} holds something that is no number")
    for key in ("resize", "crop"):
        pixels = facts.get("preprocess", {}).get(key)
        if pixels is not None:
            whole(pixels, repr(key), 1, LONGEST_AXIS)
    name(facts.get("preprocess", {}).get("interpolation", "bilinear"), "'interpolation'")


# Memory


def check_room(n_bytes: int, what: str) -> None:
    """Refuse to take memory that is not there.

    Raises:
        StoreError: with how much `what` takes.
    """
    if n_bytes <= _ASKED_BYTES:
        return
    left = available_bytes()
    if left is not None and n_bytes > left:
        raise StoreError(
            f"{what} takes {n_bytes / 2**30:,.2f}GiB of memory and {left / 2**30:,.2f}GiB can be had; "
            "take fewer rows, or a window of each"
        )


def empty(
    shape: Sequence[int], dtype: DType, what: str, make: Callable[..., NDArray[Any]] = np.empty
) -> NDArray[Any]:
    """Return an array to be filled (of zeros, by `make=np.zeros`), where there is memory for it.

    Raises:
        StoreError: there is not.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    check_room(n_bytes, what)
    try:
        return make(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise StoreError(
            f"{what} takes {n_bytes / 2**30:,.2f}GiB of memory, which cannot be had; take fewer rows, or a "
            "window of each"
        ) from error
