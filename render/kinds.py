"""The kinds of pictures: each has a specification, and is made into a sheet from a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..capture.errors import DrawError, closest
from .sheet import Sheet
from .spec import Spec

if TYPE_CHECKING:
    from ..capture.reader import Run


@dataclass(frozen=True)
class Kind:
    """A kind of picture."""

    spec: type[Spec]
    """What says everything about a picture of this kind but the store."""
    choose: Callable[[Run, Mapping[str, Any]], Spec]
    """Makes a specification from what a user names: patterns of layers, rows as text, and other options."""
    sheet: Callable[[Run, Any], Sheet]
    """Reads what a specification draws and lays it out."""
    many: Callable[[Run, Sequence[Any]], Iterator[Sheet]] | None = None
    """The same of many, one after the other, where it is faster to read what they draw together."""

    def sheets(self, run: Run, specs: Sequence[Any]) -> Iterator[Sheet]:
        """Yield the sheet of each specification, in their order."""
        if self.many is not None:
            return self.many(run, specs)
        return (self.sheet(run, spec) for spec in specs)


#: Where each kind is made; a module is imported when its kind is first drawn.
KINDS = {
    "animation": "animation:ANIMATION",
    "classes": "classes:CLASSES",
    "grid": "tiles:GRID",
    "layers": "layers:LAYERS",
    "montage": "tiles:MONTAGE",
    "outcomes": "classes:OUTCOMES",
    "overlay": "overlay:OVERLAY",
    "pca": "pca:PCA",
    "statistics": "statistics:STATISTICS",
    "stores": "stores:STORES",
    "top": "top:TOP",
}


def kind(name: str) -> Kind:
    """Return the kind of that name.

    Raises:
        DrawError: there is none; the closest is named.
    """
    if name not in KINDS:
        raise DrawError(f"there is no picture of kind {name!r}. {closest(name, KINDS)}")
    module, _, attribute = KINDS[name].partition(":")
    made: Kind = getattr(import_module(f".{module}", __package__), attribute)
    return made


def spec_from_json(values: Mapping[str, Any] | str) -> Spec:
    """Return the specification, of whichever kind, that `Spec.to_json` gave, from its values or their text.

    Raises:
        DrawError: it is not one, or holds an option that its kind does not have.
    """
    given = values
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise DrawError(f"the specification is not JSON: {error}") from error
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        raise DrawError("the specification does not say of which kind it is")
    return kind(given["kind"]).spec.from_json(given)
