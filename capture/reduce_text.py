"""Reductions as the user writes them and as a store keeps them, and which of them a tap gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .dtypes import named_dtype
from .errors import FormatError, PlanError, closest
from .reduce import (
    CASTS,
    FIT_ROWS,
    Cast,
    Chain,
    Channels,
    ChannelsFirst,
    Crop,
    Int8,
    Json,
    Norm,
    Own,
    Pca,
    Pool,
    Project,
    Reductions,
    Rows,
    Step,
    Tokens,
    TopK,
    as_chain,
)
from .taps import Layer, TapName, select

_SIZES = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*)*")


def rules(reductions: Reductions) -> list[tuple[str | None, Chain]]:
    """Return (pattern, chain) for all that was asked for; the pattern None means every tap.

    Raises:
        PlanError: something is no reduction.
    """
    if isinstance(reductions, Mapping):
        return [(pattern, as_chain(value)) for pattern, value in reductions.items()]
    if isinstance(reductions, list | tuple):
        if not all(isinstance(text, str) for text in reductions):
            raise PlanError(
                "a list of reductions is of texts; put steps together with | or layertap.reduce.Chain"
            )
        return [_rule(text) for text in reductions]
    return [_rule(reductions)] if isinstance(reductions, str) else [(None, as_chain(reductions))]


def choose(reductions: Reductions, taps: Sequence[tuple[TapName, str]]) -> list[Chain]:
    """Return the chain of each tap: that of the last pattern that matches it.

    Args:
        reductions: what the user asked for.
        taps: name and layer's type of each.

    Raises:
        PlanError: something is no reduction.
        SelectionError: a pattern matches no tap.
    """
    chains = [Chain()] * len(taps)
    layers = [Layer(name, (kind,)) for name, kind in {tap.layer: kind for tap, kind in taps}.items()]
    for pattern, chain in rules(reductions):
        choices = [] if pattern is None else select(layers, pattern)
        taken = [
            pattern is None or any(one.layer.name == tap.layer and one.takes(tap) for one in choices)
            for tap, _ in taps
        ]
        if not any(taken):
            names = [str(tap) for tap, _ in taps]
            raise PlanError(f"no tap is reduced by {pattern}={chain}. {closest(str(pattern), names)}")
        chains = [chain if take else before for take, before in zip(taken, chains, strict=True)]
    return chains


# Text


def parse(text: str) -> Chain:
    """Read a chain: `channels:stride=4|pool:7|float16`.

    Raises:
        PlanError: a step is not known, or has other arguments.
    """
    if text.strip() == "none":
        return Chain()
    return Chain(tuple(_parse_step(part.strip()) for part in text.split("|")))


def _rule(text: str) -> tuple[str | None, Chain]:
    """Read `steps` or `pattern=steps`."""
    # A step's own = never stands before the name of a step, so a layer may be called like one.
    for match in re.finditer("=", text):
        if match.start() and _begins(text[match.end() :]):
            return text[: match.start()].strip(), parse(text[match.end() :])
    return None, parse(text)


def _begins(text: str) -> bool:
    """Return whether `text` begins with a step."""
    first = text.split("|")[0].strip()
    kind, _, _ = first.partition(":")
    return kind in (*_PARSERS, *CASTS, "int8", "none") or _is_file(first)


def _is_file(text: str) -> bool:
    path, _, name = text.rpartition(":")
    return path.endswith(".py") and "=" not in path and name.isidentifier()


def _parse_step(text: str) -> Step:
    kind, _, arguments = text.partition(":")
    if text in CASTS:
        return Cast(text)
    if text == "int8":
        return Int8()
    if _is_file(text):
        from .specs import load_function

        return Own(load_function(text), name=text.rpartition("/")[2])
    if kind not in _PARSERS:
        raise PlanError(
            f"there is no reduction {text!r}. {closest(kind, [*_PARSERS, *CASTS, 'int8'])} A function of "
            "your own is file.py:function"
        )
    given: dict[str, str] = {}
    free: list[str] = []
    for part in filter(None, (part.strip() for part in arguments.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            given[key] = value
        else:
            free.append(part)
    try:
        step = _PARSERS[kind](free, given)
    except (ValueError, IndexError, KeyError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{text!r} cannot be read; write for example {_EXAMPLES[kind]}") from None
    if free or given:
        left = [*free, *given]
        raise PlanError(
            f"{text!r}: {', '.join(left)} means nothing there; write for example {_EXAMPLES[kind]}"
        )
    return step


def _parse_pool(free: list[str], given: dict[str, str]) -> Step:
    size = free.pop(0)
    by = free.pop(0) if free else given.pop("by", "mean")
    return Pool(None if size == "global" else _read_sizes(size), by)


def _parse_channels(free: list[str], given: dict[str, str]) -> Step:
    indices = tuple(map(int, free)) or None
    free.clear()
    stride, random = (int(given.pop(key)) if key in given else None for key in ("stride", "random"))
    return Channels(indices, stride, random, int(given.pop("seed", 0)) if random else 0)


def _parse_crop(free: list[str], given: dict[str, str]) -> Step:
    size, at_sign, first = free.pop(0).partition("@")
    at = (int(first), *map(int, free)) if at_sign else None
    if at_sign:
        free.clear()
    return Crop(_read_sizes(size), at)


def _parse_topk(free: list[str], given: dict[str, str]) -> Step:
    return TopK(int(free.pop(0)), free.pop(0) if free else given.pop("over", "channels"))


def _parse_norm(free: list[str], given: dict[str, str]) -> Step:
    return Norm(free.pop(0) if free else "l2")


def _parse_project(free: list[str], given: dict[str, str]) -> Step:
    n, sparse = int(free.pop(0)), "sparse" in free
    if sparse:
        free.remove("sparse")
    return Project(n, int(given.pop("seed", 0)), sparse)


def _parse_pca(free: list[str], given: dict[str, str]) -> Step:
    what = free.pop(0)
    if what.isdecimal():
        return Pca(int(what), rows=int(given.pop("rows", FIT_ROWS)))
    from .specs import load_basis

    return Pca(None, *load_basis(what))


def _parse_tokens(free: list[str], given: dict[str, str]) -> Step:
    return Tokens(free.pop(0))


_PARSERS: dict[str, Callable[[list[str], dict[str, str]], Step]] = {
    "pool": _parse_pool,
    "channels": _parse_channels,
    "crop": _parse_crop,
    "topk": _parse_topk,
    "norm": _parse_norm,
    "project": _parse_project,
    "pca": _parse_pca,
    "tokens": _parse_tokens,
    "channels_first": lambda free, given: ChannelsFirst(),
}
_EXAMPLES = {
    "pool": "pool:7, pool:4x7,max or pool:global",
    "channels": "channels:0,3,5, channels:stride=4 or channels:random=16,seed=1",
    "crop": "crop:14, crop:14x10 or crop:14x10@3,0",
    "topk": "topk:5 or topk:5,space",
    "norm": "norm:l2",
    "project": "project:16,seed=1 or project:16,sparse",
    "pca": "pca:16, pca:16,rows=500, pca:basis.npy or pca:basis.npz",
    "tokens": "tokens:last",
    "channels_first": "channels_first",
}


def _read_sizes(text: str) -> tuple[int, ...]:
    if not _SIZES.fullmatch(text):
        raise ValueError(text)
    return tuple(map(int, text.split("x")))


# JSON


def chain_from_json(data: Any) -> Chain:
    """Read what `Chain.to_json` returned.

    Raises:
        FormatError: it is none of this version's reductions.
    """
    if not isinstance(data, list) or len(data) > 64:
        raise FormatError("a reduction is a list of steps")
    try:
        return Chain(tuple(map(_step_from_json, data)))
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"a reduction cannot be read: {error}") from None


def _step_from_json(data: Any) -> Step:
    if not isinstance(data, dict) or data.get("kind") not in _READERS:
        raise FormatError("a reduction is of a kind that this version does not know")
    return _READERS[data["kind"]](data)


def _own_from_json(data: Json) -> Step:
    form = data.get("makes")
    rows = form and Rows(_ints(form["shape"]), tuple(map(str, form["dims"])), named_dtype(form["dtype"]))
    return Own(None, _text(data["name"]), data.get("source"), rows)


def _pca_from_json(data: Json) -> Step:
    rows, explained = data.get("rows"), data.get("explained")
    return Pca(data["n"], rows=None if rows is None else int(rows), explained=explained and float(explained))


_READERS: dict[str, Callable[[Json], Step]] = {
    "cast": lambda d: Cast(d["to"]),
    "int8": lambda d: Int8(),
    "pool": lambda d: Pool(_sizes_from(d["size"]), d["by"]),
    "channels": lambda d: Channels(
        _sizes_from(d["indices"]), d.get("stride"), d.get("random"), d.get("seed", 0)
    ),
    "crop": lambda d: Crop(_sizes_from(d["size"]) or (), _sizes_from(d["at"])),
    "topk": lambda d: TopK(d["k"], d["over"]),
    "norm": lambda d: Norm(d["by"]),
    "project": lambda d: Project(d["n"], d["seed"], bool(d["sparse"])),
    "pca": _pca_from_json,
    "tokens": lambda d: Tokens(d["which"]),
    "channels_first": lambda d: ChannelsFirst(),
    "own": _own_from_json,
}


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int for n in values):
        raise FormatError("a reduction names whole numbers, and something else stands there")
    return tuple(values)


def _sizes_from(values: Any) -> Any:
    return None if values is None else _ints(values)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise FormatError("a reduction has a name that is no text")
    return value
