"""Every error that layertap raises on purpose.

Each is also the builtin that a caller would think of first::

    LayertapError
    ├── SelectionError        LookupError        a layer, row, column or class that is not there
    ├── PlanError             ValueError         what was asked for cannot be captured so
    ├── CaptureError          RuntimeError       the run met something that the plan does not hold
    ├── DataError             ValueError         a sample or a label that cannot be used
    ├── StoreError            OSError            the store cannot be read or written
    │   ├── StoreExistsError  FileExistsError    another run's store, or a finished one, is in the way
    │   ├── StoreNotFoundError FileNotFoundError there is nothing at that path
    │   └── NoSpaceError                         the disk is too small for what is planned
    ├── FormatError           ValueError         what is there is not a store that this version reads
    │   └── ChecksumError                        stored bytes are not what was written
    ├── DrawError             ValueError         what was asked for cannot be drawn
    ├── MissingPackageError   ImportError        an optional package is not installed
    └── PluginError           ImportError        what another package brings cannot be loaded
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayertapError(Exception):
    """The base of every error that layertap raises on purpose."""

    def __str__(self) -> str:
        # KeyError and OSError would show a repr or an errno instead of the message.
        return str(self.args[0]) if self.args else ""


class SelectionError(LayertapError, LookupError):
    """A layer, row, column or class that is not there."""


class PlanError(LayertapError, ValueError):
    """What was asked for cannot be captured so."""


class CaptureError(LayertapError, RuntimeError):
    """The run met something that the plan does not hold."""


class DataError(LayertapError, ValueError):
    """A sample or a label that cannot be used."""


class StoreError(LayertapError, OSError):
    """The store cannot be read or written."""


class StoreExistsError(StoreError, FileExistsError):
    """Another run's store, or a finished one, is in the way."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is nothing at that path."""


class NoSpaceError(StoreError):
    """The disk is too small for what is planned."""


class FormatError(LayertapError, ValueError):
    """What is there is not a store that this version reads."""


class ChecksumError(FormatError):
    """Stored bytes are not what was written."""


class DrawError(LayertapError, ValueError):
    """What was asked for cannot be drawn."""


class MissingPackageError(LayertapError, ImportError):
    """An optional package is not installed."""


class PluginError(LayertapError, ImportError):
    """What another package brings cannot be loaded."""


class LeftOutWarning(UserWarning):
    """Some of what a pattern chose cannot be captured, and is left out."""


def why(error: OSError) -> str:
    """Return what an error of the system, or of a store's place, says of its reason."""
    return error.strerror or str(error)


def closest(name: str, known: Iterable[str], n: int = 5) -> str:
    """Return a sentence that names what is closest to `name` among `known`, or all of a few."""
    names = list(known)
    if not names:
        return "There are none."
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.4)
    if not near and len(names) <= 2 * n:
        near = names
    if near:
        return "The closest are: " + ", ".join(near) + "."
    return f"There are {len(names)}, from {names[0]} to {names[-1]}."
