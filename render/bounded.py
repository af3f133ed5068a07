"""A cache that holds a number of bytes and no more."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Bounded(Generic[T]):
    """What was made lately, for several threads; what was not asked for the longest makes room.

    Args:
        most: bytes that it holds. What is larger by itself is made, returned and not kept.
        size: tells how many bytes a value has.
    """

    def __init__(self, most: int, size: Callable[[T], int]) -> None:
        self.n_bytes = 0
        self._most, self._size = most, size
        self._held: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def find(self, key: Hashable) -> T | None:
        """Return what is held under `key`, or None."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def keep(self, key: Hashable, value: T) -> T:
        """Hold `value` under `key`, and return it."""
        n_bytes = self._size(value)
        with self._lock:
            if key in self._held or n_bytes > self._most:
                return value
            self._held[key] = value
            self.n_bytes += n_bytes
            while self.n_bytes > self._most:
                _, old = self._held.popitem(last=False)
                self.n_bytes -= self._size(old)
        return value

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what is held under `key`, or make it; of threads that come at once, one does."""
        found = self.find(key)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            found = self.find(key)
            try:
                return self.keep(key, make()) if found is None else found
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._held.clear()
            self.n_bytes = 0
