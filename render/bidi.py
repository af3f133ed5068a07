"""Which way each part of a line of text runs, and in which order the parts stand.

Text in one font is left to the shaper, which knows all of this. Where a line has letters that run from right
to left and takes several fonts, its parts are set one by one, and somebody has to say in which order: that
is Unicode's bidirectional algorithm (UAX 9), here without embeddings, overrides and isolates, whose
characters labels have lost before.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_RIGHT = ("R", "AL")
_NEUTRAL = ("B", "S", "WS", "ON")
_PAIRS = dict(zip("([{⁅⟦⟨⟪⦅〈《「『【〔〖〘〚（［｛｟｢", ")]}⁆⟧⟩⟫⦆〉》」』】〕〗〙〛）］｝｠｣", strict=True))  # noqa: RUF001
_MIRRORED = _PAIRS | {closing: opening for opening, closing in _PAIRS.items()} | {"<": ">", ">": "<"}


def runs_right(text: str) -> bool:
    """Return whether any of `text` runs from right to left."""
    return not text.isascii() and any(unicodedata.bidirectional(char) in (*_RIGHT, "AN") for char in text)


def parts(text: str) -> list[tuple[str, bool]]:
    """Return `text` in parts as they stand from left to right, and whether each runs from right to left."""
    cut: list[tuple[str, int]] = []
    for char, level in zip(text, levels(text), strict=True):
        if cut and cut[-1][1] == level:
            cut[-1] = (cut[-1][0] + char, level)
        else:
            cut.append((char, level))
    highest = max((level for _, level in cut), default=0)
    for least in range(highest, 0, -1):
        start = 0
        while start < len(cut):
            end = start
            while end < len(cut) and cut[end][1] >= least:
                end += 1
            cut[start:end] = cut[start:end][::-1]
            start = end + 1
    return [(part, level % 2 == 1) for part, level in cut]


def turned(text: str) -> str:
    """Return `text` as it is seen from left to right, for what sets letters one after the other."""
    if not runs_right(text):
        return text
    return "".join(_reversed(part) if right else part for part, right in parts(text))


def _reversed(text: str) -> str:
    """Return `text` from its end, brackets mirrored, marks still behind their letters."""
    letters: list[str] = []
    for char in text:
        if letters and unicodedata.bidirectional(char) == "NSM":
            letters[-1] += char
        else:
            letters.append(_MIRRORED.get(char, char))
    return "".join(reversed(letters))


def levels(text: str) -> list[int]:
    """Return the level of each character: even ones run from left to right, odd ones from right to left."""
    given = [unicodedata.bidirectional(char) or "L" for char in text]
    first = next((kind for kind in given if kind in ("L", *_RIGHT)), "L")
    base = int(first in _RIGHT)
    start = "R" if base else "L"
    kinds = _weak(given, start)
    _brackets(text, given, kinds, start)
    _neutral(kinds, start)
    found = [base + _rise(kind, base) for kind in kinds]
    for i in reversed(range(len(found))):  # what is blank at the end goes with the line
        if given[i] not in ("WS", "S", "B", "BN"):
            break
        found[i] = base
    return found


def _weak(given: Sequence[str], start: str) -> list[str]:
    """Rules W1 to W7: marks, numbers and what stands between numbers."""
    kinds, strong, before = list(given), start, start
    for i, kind in enumerate(kinds):
        if kind in ("NSM", "BN"):
            kind = before
        elif kind == "EN" and strong == "AL":
            kind = "AN"
        strong = kind if kind in ("L", "R", "AL") else strong
        kinds[i] = before = kind
    kinds = ["R" if kind == "AL" else kind for kind in kinds]
    for i in range(1, len(kinds) - 1):
        left, kind, right = kinds[i - 1 : i + 2]
        if left == right and ((kind == "ES" and left == "EN") or (kind == "CS" and left in ("EN", "AN"))):
            kinds[i] = left
    for i, (j, run) in _runs_of(kinds, "ET"):
        if "EN" in (kinds[i - 1] if i else "", kinds[j] if j < len(kinds) else ""):
            kinds[i:j] = ["EN"] * run
    kinds = ["ON" if kind in ("ES", "ET", "CS") else kind for kind in kinds]
    strong = start
    for i, kind in enumerate(kinds):
        if kind == "EN" and strong == "L":
            kinds[i] = "L"
        strong = kind if kind in ("L", "R") else strong
    return kinds


def _runs_of(kinds: Sequence[str], *wanted: str) -> list[tuple[int, tuple[int, int]]]:
    """Return (start, (end, length)) of each run of the wanted kinds."""
    found, i = [], 0
    while i < len(kinds):
        j = i
        while j < len(kinds) and kinds[j] in wanted:
            j += 1
        if j > i:
            found.append((i, (j, j - i)))
        i = max(j, i + 1)
    return found


def _brackets(text: str, given: Sequence[str], kinds: list[str], start: str) -> None:
    """Rule N0: brackets go with what is within them, or with what is before."""
    for opening, closing in _pairs(text, kinds):
        within = {_strong(kind) for kind in kinds[opening + 1 : closing]} - {""}
        if not within:
            continue
        kind = start
        if start not in within:
            before = next((s for s in map(_strong, reversed(kinds[:opening])) if s), start)
            kind = before if before in within else start
        for at in (opening, closing):
            kinds[at] = kind
            while at + 1 < len(kinds) and given[at + 1] in ("NSM", "BN"):
                at += 1
                kinds[at] = kind


def _pairs(text: str, kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Return where brackets open and close, in the order in which they open."""
    stack: list[tuple[str, int]] = []
    found = []
    for i, char in enumerate(text):
        if kinds[i] != "ON":
            continue
        if char in _PAIRS:
            stack.append((_PAIRS[char], i))
            continue
        at = next((k for k in reversed(range(len(stack))) if stack[k][0] == char), None)
        if at is not None:
            found.append((stack[at][1], i))
            del stack[at:]
    return sorted(found)


def _strong(kind: str) -> str:
    return kind if kind in ("L", "R") else "R" if kind in ("EN", "AN") else ""


def _neutral(kinds: list[str], start: str) -> None:
    """Rules N1 and N2: what is between letters of one direction has it, else that of the line."""
    for i, (j, n) in _runs_of(kinds, *_NEUTRAL):
        left = _strong(kinds[i - 1]) if i else start
        right = _strong(kinds[j]) if j < len(kinds) else start
        kinds[i:j] = [left if left == right else start] * n


def _rise(kind: str, base: int) -> int:
    """Rules I1 and I2."""
    if base:
        return 0 if kind == "R" else 1
    return {"R": 1, "L": 0}.get(kind, 2)
