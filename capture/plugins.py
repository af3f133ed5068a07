"""What other packages bring: backends and painters, announced by entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import PluginError

#: What stands in a group -> the group's name.
GROUPS = {"backend": "layertap.backends", "painter": "layertap.painters"}


def announced(what: str) -> dict[str, EntryPoint]:
    """Return what other packages announce as a `backend` or `painter`, by its name."""
    return {point.name: point for point in entry_points(group=GROUPS[what])}


def made(what: str, point: EntryPoint) -> Any:
    """Return an object of the class that a package announces.

    Raises:
        PluginError: it cannot be loaded or made; what it said is the cause.
    """
    try:
        return point.load()()
    except Exception as error:
        package = point.dist.name if point.dist is not None else point.module.partition(".")[0]
        raise PluginError(
            f"the {what} {point.name!r} of the package {package} cannot be loaded ({point.value}): "
            f"{type(error).__name__}: {error}. Update or uninstall {package}, or ask who wrote it"
        ) from error
