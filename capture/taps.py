"""Names of layers and taps, and choosing among them.

A tap is named `layer`, `layer[path]` for a part of a tuple or dict, `layer#2` for the layer's second call
in one forward, and `layer#2[path]` for both. The model itself is the layer `.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PlanError, SelectionError, closest
from .trust import is_device

#: The name of the whole model as a layer.
ROOT = "."

Key = int | str
Path = tuple[Key, ...]

_TAP = re.compile(r"(?P<layer>.+?)(#(?P<call>[1-9]\d*))?(?P<path>(\[[^\[\]]+\])*)", re.DOTALL)
_INT = re.compile(r"0|-?[1-9][0-9]*")
_SAFE = re.compile(r"[A-Za-z0-9_.-]")


@dataclass(frozen=True)
class Layer:
    """A place in a model that can be tapped."""

    name: str
    """Dotted name; `.` is the model."""
    types: tuple[str, ...]
    """Names of its class and of the classes that it derives from, the nearest first."""
    module: Any = None
    """The framework's own object."""

    @property
    def type(self) -> str:
        """Name of its class."""
        return self.types[0] if self.types else ""


@dataclass(frozen=True, order=True)
class TapName:
    """The name of a tap in its parts."""

    layer: str
    """Name of the layer."""
    call: int = 1
    """Which call of the layer in one forward, from 1."""
    path: Path = ()
    """Keys and indices that lead to the tensor inside the layer's output."""

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call > 1 else ""
        return self.layer + call + "".join(f"[{key}]" for key in self.path)

    @classmethod
    def parse(cls, text: str) -> TapName:
        """Read what `str` wrote."""
        match = _TAP.fullmatch(text)
        if match is None:
            return cls(text)
        keys = re.findall(r"\[([^\[\]]+)\]", match["path"])
        return cls(match["layer"], int(match["call"] or 1), tuple(_key(key) for key in keys))


@dataclass(frozen=True)
class Choice:
    """A chosen layer, and which of its taps."""

    layer: Layer
    """The layer."""
    only: frozenset[TapName] = frozenset()
    """Its taps to capture, and what lies inside them; all where this is empty."""

    def takes(self, tap: TapName) -> bool:
        """Return whether `tap` was asked for."""
        return not self.only or any(
            tap.call == one.call and tap.path[: len(one.path)] == one.path for one in self.only
        )


Pattern = str | Callable[[str, Any], bool]
Patterns = Pattern | Sequence[Pattern]


def select(layers: Sequence[Layer], patterns: Patterns) -> list[Choice]:
    """Choose layers, in the order of the model.

    Args:
        layers: what there is.
        patterns: one, or several of: an exact name; a name of a tap (`lstm[0]`, `conv#2`); a glob, in which
            `*` and `?` stay between dots and `**` crosses them (`layer*.1`, `**.conv2`); a regular
            expression that matches the whole name (`re:layer[12].*`); a type, inherited ones included
            (`type:Conv2d`); a callable of name and module. One of these behind `!` takes away what those
            before it chose (`**`, then `!type:LSTM`).

    Raises:
        SelectionError: a pattern matches nothing; the closest names are shown.
    """
    if isinstance(patterns, str) or callable(patterns):
        patterns = [patterns]
    if not patterns:
        raise SelectionError("no layers were asked for; name some, or ** for all of them")
    chosen: dict[str, set[TapName] | None] = {}
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith("!"):
            for name, _ in _matches(layers, pattern[1:]):
                chosen.pop(name, None)
            continue
        matches = _matches(layers, pattern)
        if not matches:
            raise SelectionError(_no_match(layers, pattern))
        for name, tap in matches:
            if tap is None:
                chosen[name] = None
            elif (taps := chosen.setdefault(name, set())) is not None:
                taps.add(tap)
    if not chosen:
        raise SelectionError("every layer that was chosen was taken away again by a pattern with !")
    return [Choice(layer, frozenset(chosen[layer.name] or ())) for layer in layers if layer.name in chosen]


def _matches(layers: Sequence[Layer], pattern: Pattern) -> list[tuple[str, TapName | None]]:
    if not isinstance(pattern, str):
        return [(layer.name, None) for layer in layers if pattern(layer.name, layer.module)]
    names = [layer.name for layer in layers]
    if pattern in names:
        return [(pattern, None)]
    if pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:")
        return [(layer.name, None) for layer in layers if wanted in layer.types]
    if pattern.startswith("re:"):
        expression = _compile(pattern.removeprefix("re:"))
        return [(name, None) for name in names if expression.fullmatch(name)]
    tap = TapName.parse(pattern)
    if tap.layer in names:
        return [(tap.layer, tap)]
    glob = re.compile(_glob(pattern), re.DOTALL)
    return [(name, None) for name in names if glob.fullmatch(name)]


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise SelectionError(f"'re:{expression}' is no regular expression: {error}") from None


def _glob(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    meaning = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)


def _no_match(layers: Sequence[Layer], pattern: Pattern) -> str:
    if not isinstance(pattern, str):
        return f"the callable {pattern!r} chose no layer"
    if pattern.startswith("type:"):
        types = dict.fromkeys(layer.type for layer in layers)
        near = closest(pattern.removeprefix("type:"), types)
        return f"no layer has the type of {pattern!r}. {near}"
    names = [layer.name for layer in layers]
    hint = " Brackets name a part of an output; for a choice of characters, use re:" if "[" in pattern else ""
    return f"no layer matches {pattern!r}. {closest(TapName.parse(pattern).layer, names)}{hint}"


def flatten(value: Any, is_leaf: Callable[[Any], bool], path: Path = ()) -> Iterable[tuple[Path, Any]]:
    """Yield the path and value of every leaf inside tuples, lists, dicts and dataclass-like values."""
    if is_leaf(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, is_leaf, (*path, _key(key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from flatten(getattr(value, key), is_leaf, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flatten(item, is_leaf, (*path, i))
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from flatten(getattr(value, key), is_leaf, (*path, key))


def follow(value: Any, path: Path) -> Any:
    """Return what lies at `path` inside `value`.

    Raises:
        LookupError: nothing does.
    """
    for key in path:
        if isinstance(value, dict):
            if key not in value:  # `flatten` made a text or an int of it
                key = next((other for other in value if _key(other) == key), key)
            value = value[key]
        elif isinstance(key, int) and isinstance(value, list | tuple):
            value = value[key]
        elif isinstance(key, str) and hasattr(value, key):
            value = getattr(value, key)
        else:
            raise KeyError(key)
    return value


def _key(key: Any) -> Key:
    """Return a dict's key as its tap's name gives it back: an int where it reads as one, else a text."""
    text = str(key)
    return int(text) if _INT.fullmatch(text) else text


def folder_name(name: str, *, marked: bool = False) -> str:
    """Return a folder name for a tap's or column's name: one name each, safe on every file system.

    Letters, digits, `_`, `-` and inner dots stay; any other byte of the UTF-8 text becomes `~` and two hex
    digits. Long names are cut; they, and `marked` ones, end with `~~` and a hash.

    Raises:
        PlanError: the name is empty.
    """
    if not name:
        raise PlanError("a tap or column needs a name that is not empty")
    escaped = "".join(c if _SAFE.fullmatch(c) else _escape(c) for c in name)
    if escaped[0] == ".":
        escaped = _escape(".") + escaped[1:]
    if escaped[-1] == ".":  # Windows drops it
        escaped = escaped[:-1] + _escape(".")
    if escaped.lower() == "zarr.json":  # the group's own file
        escaped = _escape(escaped[0]) + escaped[1:]
    if escaped.startswith("__"):  # Zarr keeps such names to itself
        escaped = _escape("_") + escaped[1:]
    if is_device(escaped):  # Windows opens the device, whatever the folder
        escaped = _escape(escaped[0]) + escaped[1:]
    if len(escaped) > 200 or marked:
        import hashlib

        escaped = f"{escaped[:180]}~~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return escaped


def distinct_folders(names: Sequence[str]) -> list[str]:
    """Return a folder name for each name; `Conv` and `conv` differ in more than case, which macOS ignores."""
    folders: list[str] = []
    taken: set[str] = set()
    for name in names:
        folder = folder_name(name)
        if folder.lower() in taken:
            folder = folder_name(name, marked=True)
        taken.add(folder.lower())
        folders.append(folder)
    return folders


def _escape(character: str) -> str:
    return "".join(f"~{byte:02x}" for byte in character.encode())
