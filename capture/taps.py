"""Names of layers and taps, and choosing among them.

A tap is named `layer`, `layer[path]` for a part of a tuple or dict, `layer#2` for the layer's second call
in one forward, and `layer#2[path]` for both. What is not the layer's output has its kind behind a colon:
`layer:input`, `layer#2:input[0]`, `layer:grad`, `layer:attention`. The model itself is the layer `.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import PlanError, SelectionError, closest
from .trust import is_device

#: The name of the whole model as a layer.
ROOT = "."

#: What a layer may be tapped for, in the order in which a store holds it: what goes in, how it attends, what
#: comes out, and the gradient of what came out.
KINDS = ("input", "attention", "output", "grad")
OUTPUT, ATTENTION = "output", "attention"

Key = int | str
Path = tuple[Key, ...]

_KIND = rf"(?P<kind>{'|'.join(KINDS)})"
_PATH = r"(?P<path>(\[[^\[\]]+\])*)"
_TAP = re.compile(rf"(?P<layer>.+?)(#(?P<call>[1-9]\d*))?(:{_KIND})?{_PATH}", re.DOTALL)
_OF_KIND = re.compile(rf"(?P<base>.+?):{_KIND}{_PATH}", re.DOTALL)
_SUFFIX = re.compile(rf":{_KIND}{_PATH}", re.DOTALL)
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
    aliases: tuple[str, ...] = ()
    """Other names of the same object."""
    kinds: tuple[str, ...] = KINDS
    """What it can be tapped for."""

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
    """Keys and indices that lead to the tensor inside what the layer gives or gets."""
    kind: str = OUTPUT
    """What of the layer it is, one of `KINDS`."""

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call > 1 else ""
        kind = f":{self.kind}" if self.kind != OUTPUT else ""
        return self.layer + call + kind + "".join(f"[{key}]" for key in self.path)

    @classmethod
    def parse(cls, text: str) -> TapName:
        """Read what `str` wrote."""
        match = _TAP.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(
            match["layer"], int(match["call"] or 1), _read_path(match["path"]), match["kind"] or OUTPUT
        )


@dataclass(frozen=True)
class Choice:
    """A chosen layer, what it is tapped for, and which of those taps."""

    layer: Layer
    """The layer."""
    only: frozenset[TapName] = frozenset()
    """Its taps to capture, and what lies inside them; all where this is empty."""
    kind: str = OUTPUT
    """What of the layer is captured, one of `KINDS`."""
    named: frozenset[TapName] | None = None
    """Those that were asked for by name, not by a pattern, and so may not be left out; None: all."""

    def takes(self, tap: TapName) -> bool:
        """Return whether `tap` was asked for."""
        return tap.kind == self.kind and (not self.only or _is_among(tap, self.only))

    def insists(self, tap: TapName) -> bool:
        """Return whether `tap` was asked for by name, so that an error must say why it cannot be had."""
        return self.named is None or _is_among(tap, self.named)


def _is_among(tap: TapName, taps: Iterable[TapName]) -> bool:
    return any(tap.call == one.call and tap.path[: len(one.path)] == one.path for one in taps)


Pattern = str | Callable[[str, Any], bool] | tuple[Callable[[str, Any], bool], str]
Patterns = Pattern | Sequence[Pattern]


def select(layers: Sequence[Layer], patterns: Patterns) -> list[Choice]:
    """Choose layers, in the order of the model.

    Args:
        layers: what there is.
        patterns: one, or several of: an exact name; a name of a tap (`lstm[0]`, `conv#2`); a glob, in which
            `*` and `?` stay between dots and `**` crosses them (`layer*.1`, `**.conv2`); a regular
            expression that matches the whole name (`re:layer[12].*`); a type, inherited ones included
            (`type:Conv2d`); a callable of name and module. Behind each of them, `:input`, `:grad` or
            `:attention` asks for another kind of tap than the output, also for a part of it
            (`type:Linear:input[0]`); a callable has it beside it: `(callable, ":input")`. A text behind `!`
            takes away what those before it chose (`**`, then `!type:LSTM`; `!conv1:grad` the gradient alone).

    Raises:
        SelectionError: a pattern matches nothing; the closest names are shown.
    """
    choices, misses = choose(layers, patterns)
    if misses:
        raise SelectionError(no_match(layers, misses[0]))
    check_some(choices)
    return choices


def check_some(choices: Sequence[Choice]) -> None:
    """Refuse that nothing is left.

    Raises:
        SelectionError: nothing is.
    """
    if not choices:
        raise SelectionError("every layer that was chosen was taken away again by a pattern with !")


def choose(layers: Sequence[Layer], patterns: Patterns) -> tuple[list[Choice], list[Pattern]]:
    """Return what `select` does, and the patterns that match nothing.

    Raises:
        SelectionError: there is no pattern.
    """
    chosen: dict[tuple[str, str], set[TapName] | None] = {}
    named: dict[tuple[str, str], set[TapName] | None] = {}
    misses: list[Pattern] = []
    for pattern in as_list(patterns):
        if isinstance(pattern, str) and pattern.startswith("!"):
            _take_away(layers, pattern[1:], chosen)
            named = {key: taps for key, taps in named.items() if key in chosen}
            continue
        matches = _matches(layers, pattern)
        if not matches:
            misses.append(pattern)
        by_name = _is_name(layers, pattern)
        for name, kind, tap in matches:
            for into in (chosen, named) if by_name else (chosen,):
                if tap is None:
                    into[name, kind] = None
                elif (taps := into.setdefault((name, kind), set())) is not None:
                    taps.add(tap)
    found = [
        Choice(layer, frozenset(chosen[key] or ()), kind, None if taps is None else frozenset(taps))
        for layer in layers
        for kind in KINDS
        for key in [(layer.name, kind)]
        if key in chosen
        for taps in [named.get(key, set())]
    ]
    return found, misses


def as_list(patterns: Patterns) -> list[Pattern]:
    """Return `patterns` as a list.

    Raises:
        SelectionError: there is none.
    """
    if isinstance(patterns, str) or callable(patterns):
        return [patterns]
    if _is_pair(patterns):
        return [(patterns[0], patterns[1])]  # type: ignore[list-item]
    if not patterns:
        raise SelectionError("no layers were asked for; name some, or ** for all of them")
    return list(patterns)


def asks_for(patterns: Patterns, kind: str) -> bool:
    """Return whether one of `patterns` asks for taps of `kind`."""
    return any(_split(pattern)[1] == kind for pattern in as_list(patterns))


def _is_pair(pattern: Any) -> bool:
    return (
        isinstance(pattern, tuple)
        and len(pattern) == 2
        and callable(pattern[0])
        and isinstance(pattern[1], str)
        and pattern[1].startswith(":")
    )


def _split(pattern: Pattern) -> tuple[Any, str, str]:
    """Return what a pattern says of layers, the kind that it asks for, and a path."""
    if isinstance(pattern, tuple):
        function, suffix = pattern
        match = _SUFFIX.fullmatch(suffix)
        if match is None:
            kinds = ", ".join(f":{kind}" for kind in KINDS)
            raise SelectionError(f"{suffix!r} is no kind of tap; there are {kinds}")
        return function, match["kind"], match["path"]
    match = _OF_KIND.fullmatch(pattern) if isinstance(pattern, str) else None
    if match is None or match["base"] in ("re", "type"):
        return pattern, OUTPUT, ""
    return match["base"], match["kind"], match["path"]


def _is_name(layers: Sequence[Layer], pattern: Pattern) -> bool:
    """Return whether `pattern` names one layer, or a tap of one."""
    if not isinstance(pattern, str):
        return False
    names = {name for layer in layers for name in (layer.name, *layer.aliases)}
    return not names.isdisjoint((pattern, _split(pattern)[0], TapName.parse(pattern).layer))


def _take_away(
    layers: Sequence[Layer], pattern: str, chosen: dict[tuple[str, str], set[TapName] | None]
) -> None:
    of_kind = _split(pattern)[0] != pattern
    for name, kind, _ in _matches(layers, pattern):
        for gone in (kind,) if of_kind else KINDS:
            chosen.pop((name, gone), None)


def _matches(layers: Sequence[Layer], pattern: Pattern) -> list[tuple[str, str, TapName | None]]:
    """Return the name and kind of what matches, with a tap where it is not all of them."""
    base, kind, path = _split(pattern)
    named = {name: layer for layer in reversed(layers) for name in (layer.name, *layer.aliases)}
    named |= {layer.name: layer for layer in layers}
    if pattern in named:  # a name may look like one with a kind
        base, kind, path = pattern, OUTPUT, ""
    if base not in named and isinstance(base, str):
        tap = TapName.parse(pattern)  # type: ignore[arg-type]
        if (
            tap.layer in named
            and tap.kind in named[tap.layer].kinds
            and not base.startswith(("re:", "type:"))
        ):
            name = named[tap.layer].name
            return [(name, tap.kind, replace(tap, layer=name))]
    return [
        (name, kind, TapName(name, 1, _read_path(path), kind) if path else None)
        for name in _layers_of(layers, named, base)
        if kind in named[name].kinds
    ]


def _layers_of(layers: Sequence[Layer], named: dict[str, Layer], base: Any) -> list[str]:
    if not isinstance(base, str):
        return [layer.name for layer in layers if base(layer.name, layer.module)]
    if base in named:
        return [named[base].name]
    if base.startswith("type:"):
        wanted = base.removeprefix("type:")
        return [layer.name for layer in layers if wanted in layer.types]
    if base.startswith("re:"):
        expression = _compile(base.removeprefix("re:"))
    else:
        expression = re.compile(_glob(base), re.DOTALL)
    return [layer.name for layer in layers if any(map(expression.fullmatch, (layer.name, *layer.aliases)))]


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise SelectionError(f"'re:{expression}' is no regular expression: {error}") from None


def _glob(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    meaning = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)


def no_match(layers: Sequence[Layer], pattern: Pattern) -> str:
    """Return a sentence that says that `pattern` matches nothing, and what is near it."""
    if not isinstance(pattern, str):
        return f"the callable {pattern!r} chose no layer"
    base, kind, _ = _split(pattern)
    if base.startswith("type:"):
        types = dict.fromkeys(layer.type for layer in layers)
        near = closest(base.removeprefix("type:"), types)
        return f"no layer has the type of {pattern!r}. {near}"
    name = TapName.parse(pattern).layer
    there = next((layer for layer in layers if layer.name == name and kind not in layer.kinds), None)
    if there is not None:
        return f"{name} has no {kind} to capture; it has {', '.join(there.kinds)}"
    hint = ""
    if "[" in pattern:
        hint = " Brackets name a part of an output; for a choice of characters, use re:"
    elif ":" in name and not base.startswith("re:"):
        hint = f" Behind a colon comes {', '.join(KINDS[:-1])} or {KINDS[-1]}"
    return f"no layer matches {pattern!r}. {closest(name, [layer.name for layer in layers])}{hint}"


def flatten(value: Any, is_leaf: Callable[[Any], bool], path: Path = ()) -> Iterable[tuple[Path, Any]]:
    """Yield the path and value of every leaf inside tuples, lists, dicts and dataclass-like values."""
    if is_leaf(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, is_leaf, (*path, key_of(key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from flatten(getattr(value, key), is_leaf, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flatten(item, is_leaf, (*path, i))
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from flatten(getattr(value, key), is_leaf, (*path, key))


def lists_of_rows(value: Any, n_rows: int, path: Path = ()) -> Iterable[tuple[Path, list[Any]]]:
    """Yield the path and entries of each list inside `value` that has one entry for each row."""
    if isinstance(value, list):
        if len(value) == n_rows:
            yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from lists_of_rows(inner, n_rows, (*path, key_of(key)))
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from lists_of_rows(inner, n_rows, (*path, i))


def follow(value: Any, path: Path) -> Any:
    """Return what lies at `path` inside `value`.

    Raises:
        LookupError: nothing does.
    """
    for key in path:
        if isinstance(value, dict):
            if key not in value:  # `flatten` made a text or an int of it
                key = next((other for other in value if key_of(other) == key), key)
            value = value[key]
        elif isinstance(key, int) and isinstance(value, list | tuple):
            value = value[key]
        elif isinstance(key, str) and hasattr(value, key):
            value = getattr(value, key)
        else:
            raise KeyError(key)
    return value


def replaced(value: Any, path: Path, leaf: Any) -> Any:
    """Return `value` with `leaf` at `path`; dicts, lists and dataclasses are changed themselves."""
    if not path:
        return leaf
    key, rest = path[0], path[1:]
    inner = replaced(follow(value, (key,)), rest, leaf)
    if isinstance(value, dict):
        value[next(other for other in value if other == key or key_of(other) == key)] = inner
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[inner if name == key else getattr(value, name) for name in value._fields])
    elif isinstance(value, tuple):
        return type(value)([inner if i == key else item for i, item in enumerate(value)])
    elif isinstance(value, list):
        value[int(key)] = inner
    else:
        object.__setattr__(value, str(key), inner)
    return value


def _read_path(text: str) -> Path:
    return tuple(key_of(key) for key in re.findall(r"\[([^\[\]]+)\]", text))


def key_of(key: Any) -> Key:
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
