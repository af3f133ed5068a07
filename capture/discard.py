"""A place that keeps nothing: what a capture costs without the disk is measured by writing there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .place import Blob, Bytes, Lock, Place


class Discarded:
    """A file whose bytes are counted and thrown away."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def __enter__(self) -> Discarded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Leave it."""

    def write(self, buffers: Sequence[Bytes], *, direct: bool = False) -> None:
        """Count `buffers`."""
        self.n_bytes += sum(memoryview(buffer).nbytes for buffer in buffers)

    def settle(self) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""


class _NoLock:
    def check(self) -> None:
        """Nobody else is there."""

    def release(self) -> None:
        """Nobody waits."""


class DiscardPlace(Place):
    """Takes a whole capture and has nothing of it afterwards."""

    @property
    def path(self) -> Path:
        """A path where nothing is."""
        return Path("discarded.zarr")

    def read(self, name: str, most: int) -> bytes:
        """Find nothing."""
        raise FileNotFoundError(name)

    def blob(self, name: str) -> Blob:
        """Find nothing."""
        raise FileNotFoundError(name)

    def names(self, folder: str) -> list[str] | None:
        """Find nothing."""
        return []

    def stamp(self, name: str) -> Any:
        """Find nothing."""
        return None

    def exists(self) -> bool:
        """Find nothing."""
        return False

    def zarr(self) -> Any:
        """Find nothing."""
        raise FileNotFoundError(str(self))

    def new_file(self, name: str) -> Discarded:
        """Take a file."""
        return Discarded()

    def publish(self, names: Sequence[str]) -> None:
        """Do nothing."""

    def write(self, name: str, data: bytes) -> None:
        """Do nothing."""

    def delete(self, names: Sequence[str]) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Do nothing."""

    def make(self, files: Mapping[str, bytes], *, overwrite: bool, blocks: range | None) -> Lock:
        """Take a store."""
        return _NoLock()

    def lock(self, blocks: range | None) -> Lock:
        """Take it again."""
        return _NoLock()
