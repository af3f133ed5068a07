"""Where a store lies: a folder, a bucket, a web server or a zip file, behind one small interface.

Names inside a place are relative, with `/` between their parts. What a store asks of a place is little, and
every kind gives it in its own terms:

* `new_file` makes a file that nobody sees before `publish`, or that no reader looks at before its block is
  committed;
* `write` and `create` put a small file whole or not at all, durable once they return;
* `make` brings a whole new store into being, so that of many processes one wins;
* `lock` keeps two writers of the same blocks apart.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

from .errors import MissingPackageError, PlanError, StoreError

PathLike = str | os.PathLike[str]
Bytes = bytes | bytearray | memoryview

#: Scheme of a URL -> module with `place(url, options)`, and the extra that it needs.
SCHEMES: dict[str, tuple[str, str]] = dict.fromkeys(
    ("s3", "s3a", "gs", "gcs", "az", "azure", "adl", "abfs", "abfss", "http", "https"),
    ("layertap.capture.remote", "remote"),
)

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)


class Blob(ABC):
    """One file, open for reading in ranges."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Its size."""

    @abstractmethod
    def read(self, start: int, n_bytes: int) -> bytes:
        """Return `n_bytes` from `start` on, fewer where the file ends before."""

    def read_many(self, extents: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield each (start, bytes) of `extents`; few are in memory at a time."""
        for start, n_bytes in extents:
            yield self.read(start, n_bytes)

    def fill(self, wanted: Sequence[tuple[int, memoryview]]) -> bool:
        """Fill each buffer with what the file has from its start on; return whether it has all of that."""
        found = self.read_many([(start, buffer.nbytes) for start, buffer in wanted])
        for (_, buffer), data in zip(wanted, found, strict=True):
            if len(data) < buffer.nbytes:
                return False
            buffer[:] = data
        return True

    def close(self) -> None:  # noqa: B027 - what holds nothing open has nothing to let go of
        """Let go of it; may be called more than once."""


class NewFile(Protocol):
    """A file that is being written: whole once its block is left without an error, durable once settled."""

    n_bytes: int

    def __enter__(self) -> NewFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def write(self, buffers: Sequence[Bytes], *, direct: bool = False) -> None:
        """Append all of `buffers` in their order."""

    def settle(self) -> None:
        """Make what was written durable; may be called more than once."""

    def discard(self) -> None:
        """Let go of it where it is not settled."""


class Lock(Protocol):
    """Keeps a second process from writing the same blocks."""

    def check(self) -> None:
        """Raise `StoreError` where it was lost."""

    def release(self) -> None:
        """Let the next one in; may be called more than once."""


class Place(ABC):
    """A folder of files, wherever it is. Reading is what every place can; the rest raises `StoreError`.

    A file that is not there raises `FileNotFoundError`, whatever else fails another `OSError`.
    """

    #: Requests that are worth making at the same time.
    parallel: int = 1
    #: Whether an open `Blob` goes on reading the file that it was opened from, whatever takes its name.
    keeps_open: bool = False
    #: Bytes that each writer thread may hold back beside the blocks.
    upload_bytes: int = 0

    @property
    @abstractmethod
    def path(self) -> Any:
        """The place as its user knows it: a path or a URL."""

    def __str__(self) -> str:
        return str(self.path)

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """Return a small file.

        Raises:
            FormatError: it has more than `most` bytes, or is no plain file.
        """

    @abstractmethod
    def blob(self, name: str) -> Blob:
        """Open a file for reading in ranges."""

    @abstractmethod
    def names(self, folder: str) -> list[str] | None:
        """Return the names of the files in `folder`; None where a place cannot tell."""

    @abstractmethod
    def stamp(self, name: str) -> Any:
        """Return something that changes where a file is replaced; None where it is not there."""

    @abstractmethod
    def exists(self) -> bool:
        """Return whether anything is there."""

    @abstractmethod
    def zarr(self) -> Any:
        """Return what `zarr.open_group` takes to read the place."""

    def read_many(self, names: Sequence[str], most: int) -> list[bytes | None]:
        """Return small files as `read` does, None for each that is not there."""

        def read(name: str) -> bytes | None:
            try:
                return self.read(name, most)
            except FileNotFoundError:
                return None

        if self.parallel == 1 or len(names) < 2:
            return list(map(read, names))
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(read, names))

    def check_folders(self, names: Sequence[str]) -> None:  # noqa: B027 - only a disk has links
        """Refuse a store one of whose folders is a link that leads out of it.

        Raises:
            FormatError: with the folder.
        """

    def new_file(self, name: str) -> NewFile:
        """Begin a file that is seen once it is published."""
        raise self._read_only()

    def publish(self, names: Sequence[str]) -> None:
        """Give files their names, durable."""
        raise self._read_only()

    def abandon(self, names: Sequence[str]) -> None:  # noqa: B027 - unseen objects are put anew by the next
        """Remove files that were written and are not published."""

    def write(self, name: str, data: bytes) -> None:
        """Put a small file in place of what is there."""
        raise self._read_only()

    def note(self, name: str, data: bytes) -> None:
        """Keep a small file that no reader needs, at little cost: a crash may lose it or cut it short."""
        self.write(name, data)

    def delete(self, names: Sequence[str]) -> None:
        """Remove files, durable; those that are not there are passed over."""
        raise self._read_only()

    def make(self, files: Mapping[str, bytes], *, overwrite: bool, blocks: range | None) -> Lock:
        """Make a store of `files`, the root's `zarr.json` among them, and lock `blocks` of it.

        Raises:
            StoreExistsError: something is there, and `overwrite` is false or it is no store.
            StoreError: it cannot be made.
        """
        raise self._read_only()

    def lock(self, blocks: range | None) -> Lock:
        """Lock `blocks`, None for all there will ever be, against other processes.

        Raises:
            StoreError: another process holds some of them.
        """
        raise self._read_only()

    def remove(self) -> None:
        """Remove the store."""
        raise self._read_only()

    def free_bytes(self) -> int | None:
        """Return the bytes that are free there; None where nobody tells."""
        return None

    def durable_rate(self, data: Bytes) -> float | None:
        """Return the bytes a second at which `data` become durable beside the store; None: not tried."""
        return None

    def _read_only(self) -> StoreError:
        return StoreError(f"{self} can be read and not written")


def place_of(path: PathLike | Place, options: Mapping[str, Any] | None = None) -> Place:
    """Return the place that a path or URL names.

    Args:
        path: a folder; a `.zip` file that `pack` made; `s3://bucket/name`, `gs://`, `az://`, `https://`, or
            a `.zip` file behind one of them.
        options: for a URL: what obstore's `from_url` takes, `client_options` and `retry_config` among it.
            What is not said comes from the environment (`AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
            `AZURE_STORAGE_ACCOUNT_NAME`, ...).

    Raises:
        PlanError: a URL of a scheme that is not known, or options for a path.
        MissingPackageError: the package that reads it is not installed.
    """
    if isinstance(path, Place):
        return path
    text = os.fspath(path)
    match = _URL.match(text)
    scheme = match["scheme"].lower() if match else None
    if scheme == "file":
        text, scheme = text[len("file://") :], None
    if scheme is None:
        if options:
            raise PlanError(f"{text} is a path; options are for stores behind a URL")
        return _on_disk(text)
    if scheme not in SCHEMES:
        raise PlanError(
            f"{text}: {scheme}:// is not known; there are {', '.join(f'{s}://' for s in SCHEMES)}"
        )
    module, extra = SCHEMES[scheme]
    try:
        place: Place = import_module(module).place(text, dict(options or {}))
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise MissingPackageError(
            f"{scheme}:// needs {error.name}; install it with: pip install 'layertap[{extra}]'"
        ) from error
    return place


def _on_disk(text: str) -> Place:
    if text.lower().endswith(".zip") and not os.path.isdir(text):
        from .zipped import ZipPlace

        return ZipPlace.at(text)
    from .local import LocalPlace

    return LocalPlace.at(text)
