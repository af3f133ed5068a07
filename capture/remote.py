"""A store behind a URL: S3, Google Cloud Storage, Azure, and HTTP for reading. obstore does the transfer.

An object is there whole or not at all, so a shard goes straight to its final name: no reader looks at it
before its block's commit record is there, which is put last. What a folder's rename and the kernel's locks do
on a disk is done by conditional puts:

* A new store's root is put only where there is none: of several processes, one wins.
* A lock is a *lease*, an object that its owner puts anew every few seconds, each time on the condition that
  nobody else has. A second process watches the object: where it changes, its owner lives, and the second is
  refused; where it stays the same for `LEASE_S` seconds, the owner is dead and the lease is taken over. No
  clock of another machine is trusted.
* An owner that was stopped for longer finds that its lease is gone, and commits nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from .errors import LayertapError, PlanError, StoreError, StoreExistsError, why
from .place import Blob, Bytes, Lock, Place
from .store import COMMITS, LOG, ROOT, check_removable
from .trust import check_length
from .zipped import ZipPlace

#: Seconds that a lease is watched before its owner is held for dead.
LEASE_S = float(os.environ.get("LAYERTAP_LEASE_S", "20"))
#: Bytes of one part of an upload: S3 takes 10,000 parts of at least 5 MiB.
PART_BYTES = 8 * 2**20
#: Parts of one upload that are under way at the same time.
PARTS_AT_ONCE = 2
#: Bytes that are read ahead at most.
READ_BYTES = 32 * 2**20
_WEB = ("http", "https")
_STAMP_S = 1.0
_REASON_CHARACTERS = 300
_REQUEST = re.compile(r"Error performing \w+ \S+ in [0-9.]+\w+,? ?")  # the URL is told already


def place(url: str, options: dict[str, Any]) -> Place:
    """Return the place at `url`.

    Raises:
        PlanError: the URL or an option is not what its kind of store takes.
    """
    if urlsplit(url).path.lower().endswith(".zip"):
        parent, _, name = url.rpartition("/")
        return ZipPlace(RemotePlace(parent, options), name, url)
    return RemotePlace(url, options)


class _Client:
    """Whether obstore's threads are of this process: a fork leaves them behind, and its calls then fail."""

    used = lost = False

    def check(self, place: RemotePlace) -> None:
        if self.lost:
            raise StoreError(
                f"{place} cannot be read or written in a forked process: the threads of its client stayed "
                "with the parent. Start processes by spawn, for a data loader's workers: "
                "DataLoader(..., multiprocessing_context='spawn')"
            )
        self.used = True

    def forked(self) -> None:
        self.lost = self.used


_client = _Client()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_client.forked)


class RemotePlace(Place):
    """A prefix of a bucket, or a folder of a web server.

    Args:
        url: where it is.
        options: what obstore's `from_url` takes.
    """

    parallel = 16
    upload_bytes = PART_BYTES * (1 + PARTS_AT_ONCE)

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._url, self._options = url.rstrip("/"), dict(options)
        self._web = urlsplit(url).scheme in _WEB
        given = dict(options)
        if self._web:
            given["client_options"] = {"allow_http": True} | dict(given.get("client_options") or {})
        try:
            self._objects: Any = from_url(self._url, **given)
        except (exceptions.BaseError, ValueError, TypeError) as error:
            raise PlanError(f"{url} cannot be used: {_reason(error)}") from None
        self._stamps: dict[str, tuple[float, Any]] = {}

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, Any]]]:
        return RemotePlace, (self._url, self._options)

    @property
    def path(self) -> str:
        """The URL."""
        return self._url

    def read(self, name: str, most: int) -> bytes:
        """Return an object."""
        with self.explained("read", name):
            found = obstore.get(self._objects, name)
            check_length(f"{self}/{name}", int(found.meta["size"]), most)
            return bytes(found.bytes())

    def blob(self, name: str) -> Blob:
        """Return an object's reader; nothing is asked for yet."""
        return RemoteBlob(self, name)

    def get(self, name: str, start: int, n_bytes: int) -> tuple[bytes, int]:
        """Return a range of an object, and the size of the whole."""
        with self.explained("read", name):
            found = obstore.get(self._objects, name, options={"range": (start, start + n_bytes)})
            return bytes(found.bytes()), int(found.meta["size"])

    def get_many(self, name: str, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return ranges of an object; those near each other are fetched as one."""
        starts = [start for start, n_bytes in extents if n_bytes]
        lengths = [n_bytes for _, n_bytes in extents if n_bytes]
        with self.explained("read", name):
            found = iter(obstore.get_ranges(self._objects, name, starts=starts, lengths=lengths))
            return [bytes(next(found)) if n_bytes else b"" for _, n_bytes in extents]

    def head(self, name: str) -> Any:
        """Return what is known of an object beside its bytes."""
        with self.explained("read", name):
            return obstore.head(self._objects, name)

    def names(self, folder: str) -> list[str] | None:
        """List objects under a prefix; a web server does not tell."""
        if self._web:
            return None
        with self.explained("list", folder):
            found = obstore.list_with_delimiter(self._objects, folder)["objects"]
        return [item["path"].rpartition("/")[2] for item in found]

    def stamp(self, name: str) -> Any:
        """Return an object's tag, at most a second old."""
        asked, stamp = self._stamps.get(name, (-_STAMP_S, None))
        if time.monotonic() - asked > _STAMP_S:
            try:
                about = self.head(name)
                stamp = (about["e_tag"], about["last_modified"], about["size"])
            except FileNotFoundError:
                stamp = None
            self._stamps[name] = time.monotonic(), stamp
        return stamp

    def exists(self) -> bool:
        """Return whether there is anything under the prefix."""
        self._stamps.clear()
        if self.stamp(ROOT) is not None:
            return True
        if self._web:
            return False
        with self.explained("list", ""):
            return any(len(found) for found in obstore.list(self._objects, chunk_size=1))

    def zarr(self) -> Any:
        """Return zarr-python's own view of it."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._objects, read_only=True)

    def new_file(self, name: str) -> RemoteFile:
        """Begin an upload."""
        self._check_writable()
        return RemoteFile(self, name)

    def begin(self, name: str) -> Any:
        """Return obstore's writer of an object."""
        with self.explained("write", name):
            return obstore.open_writer(
                self._objects, name, buffer_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
            )

    def publish(self, names: Sequence[str]) -> None:
        """Do nothing: an object has its name once its upload ends, and counts once its block is committed."""

    def write(self, name: str, data: bytes) -> None:
        """Put an object."""
        self.put(name, data)

    def put(self, name: str, data: bytes, mode: Any = None) -> Any:
        """Put an object, on a condition if `mode` has one, and return its tag.

        Raises:
            StoreExistsError: the condition does not hold.
        """
        self._check_writable()
        self._stamps.pop(name, None)
        with self.explained("write", name):
            try:
                put = obstore.put(self._objects, name, data, mode=mode, use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                raise StoreExistsError(f"{self}/{name} is another's") from None
        return {key: value for key, value in dict(put).items() if value is not None}

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects."""
        self._check_writable()
        for name in names:
            with contextlib.suppress(FileNotFoundError), self.explained("delete", name):
                obstore.delete(self._objects, name)

    def make(self, files: Mapping[str, bytes], *, overwrite: bool, blocks: range | None) -> Lock:
        """Put the root where there is none, then the rest, which others mend if this process dies between."""
        if self.exists():
            if not overwrite:
                raise StoreExistsError(f"{self} exists already")
            check_removable(self)
            replaced = self.lock(None)  # nobody may be writing what is removed
            try:
                self.remove()
            finally:
                replaced.release()
        try:
            self.put(ROOT, files[ROOT], mode="create")
        except StoreExistsError:
            raise StoreExistsError(f"{self} exists already") from None
        lock = self.lock(blocks)
        try:
            for name, data in files.items():
                if name != ROOT:
                    self.write(name, data)
        except BaseException:
            lock.release()
            raise
        return lock

    def lock(self, blocks: range | None) -> Lease:
        """Take a lease of `blocks`; where another process that died has it, that takes `LEASE_S` seconds."""
        self._check_writable()
        return Lease(self, blocks)

    def remove(self) -> None:
        """Delete every object of the store: the commit records first, the root last."""
        check_removable(self)
        with self.explained("list", ""):
            found = [item["path"] for listed in obstore.list(self._objects) for item in listed]
        records = [name for name in found if name.startswith(f"{COMMITS}/c.")]
        self.delete([*records, *(name for name in found if name not in (ROOT, *records)), ROOT])
        self._stamps.clear()

    def _check_writable(self) -> None:
        if self._web:
            raise StoreError(
                f"{self} is read over HTTP and cannot be written; write to s3://, gs:// or az://"
            )

    @contextlib.contextmanager
    def explained(self, verb: str, name: str) -> Iterator[None]:
        """Turn obstore's errors into ours."""
        _client.check(self)
        try:
            yield
        except Exception as error:
            raise self._explanation(error, verb, name) from None

    def _explanation(self, error: Exception, verb: str, name: str) -> Exception:
        text = str(error)
        what = f"{self}/{name}" if name else str(self)
        if isinstance(error, LayertapError):
            return error
        if "NoSuchBucket" in text or "ContainerNotFound" in text:
            return StoreError(f"{self}: there is no such bucket; make it first")
        if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
            return FileNotFoundError(2, "no such object", what)
        if isinstance(error, exceptions.NotSupportedError) and "Range" in text:
            return StoreError(
                f"{what} cannot be read: the server does not answer requests for a part of a file (HTTP "
                "Range, status 206). Serve the store by one that does, or copy it"
            )
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            return StoreError(
                f"cannot {verb} {what}: access is denied ({_reason(error)}). Check the credentials in the "
                "environment, or give storage="
            )
        if isinstance(error, exceptions.BaseError | OSError | ValueError):
            return StoreError(f"cannot {verb} {what}: {_reason(error)}")
        return error


class RemoteBlob(Blob):
    """An object, read by ranges."""

    def __init__(self, place: RemotePlace, name: str) -> None:
        self._place, self._name = place, name
        self._size: int | None = None

    @property
    def n_bytes(self) -> int:
        """Its size, as the last answer had it."""
        if self._size is None:
            self._size = int(self._place.head(self._name)["size"])
        return self._size

    def read(self, start: int, n_bytes: int) -> bytes:
        """Ask for a range."""
        if n_bytes < 1 or (self._size is not None and start >= self._size):
            return b""
        try:
            data, self._size = self._place.get(self._name, start, n_bytes)
        except StoreError:
            # A range that begins behind the end is an error there, and no bytes here.
            if self._size is None and start >= self.n_bytes:
                return b""
            raise
        return data

    def read_many(self, extents: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Ask for ranges at the same time, as far as `READ_BYTES` go."""
        group: list[tuple[int, int]] = []
        n_bytes = 0
        for extent in extents:
            if group and n_bytes + extent[1] > READ_BYTES:
                yield from self._place.get_many(self._name, group)
                group, n_bytes = [], 0
            group.append(extent)
            n_bytes += extent[1]
        if group:
            yield from self._place.get_many(self._name, group)


class RemoteFile:
    """An object that is uploaded as it is written; there once the block is left without an error."""

    def __init__(self, place: RemotePlace, name: str) -> None:
        self.n_bytes = 0
        self._place, self._name = place, name
        self._writer: Any = None

    def __enter__(self) -> RemoteFile:
        self._writer = self._place.begin(self._name)
        return self

    def write(self, buffers: Sequence[Bytes], *, direct: bool = False) -> None:
        """Append all of `buffers`."""
        with self._place.explained("write", self._name):
            for buffer in buffers:
                self._writer.write(buffer)
                self.n_bytes += memoryview(buffer).nbytes

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        writer, self._writer = self._writer, None
        if kind is None:
            with self._place.explained("write", self._name):
                writer.close()

    def settle(self) -> None:
        """Do nothing: an object that is there is durable."""

    def discard(self) -> None:
        """Do nothing: it is put anew by the next."""


class Lease:
    """The right to write some blocks, kept by putting an object anew before others hold its owner for dead.

    Args:
        place: the store.
        blocks: the blocks; None for all there will ever be.

    Raises:
        StoreError: another process holds some of them.
    """

    def __init__(self, place: RemotePlace, blocks: range | None) -> None:
        self._place = place
        self._lost = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if blocks is not None and not len(blocks):
            return
        name = "all" if blocks is None else f"{blocks.start}-{blocks.stop}"
        self._name = f"{LOG}/lease-{name}"
        self._count = 0
        self._owner = f"{platform.node()} {os.getpid()} {os.urandom(8).hex()}"
        self._version = self._take()
        self._thread = threading.Thread(target=self._renew, name="layertap-lease", daemon=True)
        self._thread.start()  # of two that watch each other, both must be seen to live
        try:
            for other in self._others(blocks):
                if self._watch(other):
                    place.delete([other])  # should its owner wake up, it finds that it has lost it
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Refuse to go on where the lease was lost.

        Raises:
            StoreError: another process took it over, or it could not be renewed.
        """
        if self._lost:
            raise StoreError(self._lost)

    def release(self) -> None:
        """Let the next one in."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        if not self._lost:
            with contextlib.suppress(OSError):  # who comes next waits a little longer then
                self._place.delete([self._name])

    def _text(self) -> bytes:
        self._count += 1
        return json.dumps({"owner": self._owner, "count": self._count}).encode()

    def _take(self) -> Any:
        try:
            return self._place.put(self._name, self._text(), mode="create")
        except StoreExistsError:
            version = self._watch(self._name)
        try:
            return self._place.put(self._name, self._text(), mode=version or "create")
        except StoreExistsError:
            raise self._refusal() from None

    def _watch(self, name: str) -> dict[str, Any]:
        """Return the version of a lease whose owner is dead, an empty one where it was given up.

        Raises:
            StoreError: its owner lives.
        """
        first = now = self._version_of(name)
        deadline = time.monotonic() + LEASE_S
        while now and time.monotonic() < deadline:
            time.sleep(LEASE_S / 10)
            now = self._version_of(name)
            if now and now != first:
                raise self._refusal()
        return now

    def _version_of(self, name: str) -> dict[str, Any]:
        try:
            about = self._place.head(name)
        except FileNotFoundError:
            return {}
        return {key: about[key] for key in ("e_tag", "version") if about.get(key) is not None}

    def _others(self, blocks: range | None) -> list[str]:
        """Return the leases of blocks that overlap ours."""
        found = []
        for name in self._place.names(LOG) or ():
            if not name.startswith("lease-") or f"{LOG}/{name}" == self._name:
                continue
            first, _, stop = name.removeprefix("lease-").partition("-")
            if (
                name == "lease-all"
                or blocks is None
                or (first.isdecimal() and stop.isdecimal() and _overlap(blocks, range(int(first), int(stop))))
            ):
                found.append(f"{LOG}/{name}")
        return found

    def _refusal(self) -> StoreError:
        return StoreError(
            f"another process is capturing into {self._place}; wait for it, end it, or give each its --part"
        )

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(LEASE_S / 5):
            try:
                self._version = self._place.put(self._name, self._text(), mode=self._version)
                renewed = time.monotonic()
            except StoreExistsError:
                self._lost = (
                    f"another process took over the blocks of {self._place} that this one was writing, which "
                    f"had not shown itself for {LEASE_S:g} seconds; what it committed is kept"
                )
                return
            except OSError as error:
                if time.monotonic() - renewed > LEASE_S:
                    self._lost = f"the lease of {self._place} could not be renewed: {why(error)}"
                    return


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def _reason(error: BaseException) -> str:
    """Return the first line of what obstore says; its debug text goes on for pages."""
    text = str(error).split("\n\nDebug source", 1)[0].replace("\n", " ")
    text = _REQUEST.sub("", text).strip(" :.")
    return text if len(text) <= _REASON_CHARACTERS else text[:_REASON_CHARACTERS] + "..."
