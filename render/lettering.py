"""How much room a line of text takes, and how it is made to fit.

The widths are those of DejaVu Sans, rounded up, and not those of the font that will be used: a sheet is
then laid out alike on every machine that has a font for its labels. Few fonts are wider. What no font has is
drawn as an escape, and takes the room of one.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from functools import lru_cache

from . import fonts

_EM = dict.fromkeys("ijl'|", 0.32)
_EM |= dict.fromkeys('Iftr .,:;!()[]/\\`"-·', 0.42)
_EM |= dict.fromkeys("mwMWOQ@%#<>=+~—…", 0.99)
_EM |= dict.fromkeys("سشصض", 1.25) | dict.fromkeys("فبتثپطظ", 1.05)  # as wide as where they are not joined
_BOLD = 1.12


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Return about how many pixels `text` takes at `size` pixels an em; seldom too few."""
    drawn = text if text.isascii() else fonts.drawable(text, bold=bold, joiners=True)
    return sum(map(_advance, drawn)) * size * (_BOLD if bold else 1.0)


def _advance(char: str) -> float:
    if char in _EM:
        return _EM[char]
    if char.isascii():
        return 0.71 if char.isupper() else 0.64
    if unicodedata.combining(char) or unicodedata.category(char) == "Cf":
        return 0.0
    return 1.0 if unicodedata.east_asian_width(char) in "WFA" else 0.8


def shorten(text: str, width: float, size: float, bold: bool = False) -> str:
    """Return `text`, with its middle left out where it is wider than `width` pixels."""
    if text_width(text, size, bold) <= width:
        return text

    letters = fonts.clusters(text)  # a letter stays with the marks on it

    def with_kept(n: int) -> str:
        return "".join([*letters[: n - n // 2], "…", *(letters[-(n // 2) :] if n // 2 else ())])

    # The more is kept, the wider: by halves, as a store's texts may be as long as they like.
    wide = bisect_left(
        range(1, len(letters)), True, key=lambda n: text_width(with_kept(n), size, bold) > width
    )
    return with_kept(wide)


def wrap_name(name: str, width: float, size: float) -> list[str]:
    """Return a bold `name` on one line, or on two with the break after a dot, shortened only beyond that."""
    if text_width(name, size, bold=True) <= width:
        return [name]
    n = bisect_right(range(1, len(name)), width, key=lambda i: text_width(name[:i], size, bold=True))
    head = name[: name.rfind(".", 0, n) + 1]
    if not head:
        return [shorten(name, width, size, bold=True)]
    return [head, shorten(name[len(head) :], width, size, bold=True)]


def wrap(text: str, width: float, size: float) -> list[str]:
    """Return `text` in lines of at most `width` pixels; a word that is wider is shortened."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append(shorten(word, width, size))
        else:
            lines[-1] = shorten(word, width, size)
    return [line for line in lines if line]


@lru_cache(maxsize=1024)
def wrap_even(text: str, width: float, size: float) -> tuple[str, ...]:
    """Return `text` in as few lines as `wrap` does, about as long as each other: no word is left alone."""
    lines = wrap(text, width, size)
    while len(lines) > 1:
        narrower = wrap(text, max(text_width(line, size) for line in lines) - 1, size)
        if len(narrower) > len(lines) or any("…" in line for line in narrower):
            break
        lines = narrower
    return tuple(lines)
