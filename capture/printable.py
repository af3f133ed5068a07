"""Text from a store on its way to a terminal.

A class name could clear the screen, set its title, or turn the reading direction around. What does not print
is written as JSON writes it, `\\u001b`, so that `info --json` stays JSON.
"""

from __future__ import annotations

import json

_KEPT = "\u200c\u200d"  # between letters: joined or not, which scripts and emoji need


def printable(text: object, keep: str = "") -> str:
    """Return `text` with every character that does not print escaped, but for those in `keep`."""
    return "".join(c if c.isprintable() or c in keep or c in _KEPT else _escaped(c) for c in str(text))


def _escaped(char: str) -> str:
    return json.dumps(char)[1:-1]
