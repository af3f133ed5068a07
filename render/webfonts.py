"""The fonts of a page, within the page: of each only what its labels need.

A page may be opened where no font has its scripts, or another font would be wider than what was planned. So
the glyphs that are used go with it, as WOFF in data URIs, with what shapes and joins them. The plain font
always brings all of ASCII, so that pictures that are drawn one after the other share one subset.

A font whose maker does not allow it to be embedded (its `fsType`) is only named.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..capture.errors import MissingPackageError
from . import fonts

_ASCII = frozenset(map(chr, range(0x20, 0x7F)))
_NO_EMBEDDING, _NO_SUBSET = 0x2, 0x100


@dataclass(frozen=True)
class WebFonts:
    """What a page says about its fonts."""

    css: str
    """Rules `@font-face` with the fonts in them."""
    families: str
    """The value of `font-family` for every label."""


def web_fonts(labels: Iterable[tuple[str, bool]]) -> WebFonts:
    """Return the fonts for labels, each a text and whether it is bold.

    Raises:
        MissingPackageError: fontTools is not installed; the line that installs it.

    """
    faces, families = [], []
    for path, used in _chars_by_font(labels).items():
        plain = path in (fonts.base_font(), fonts.bold_font())
        family = family_name(path)
        families.append(f"'{family}'")
        font = _subset(path, frozenset(used | _ASCII if plain else used))
        if font is not None:
            # One file serves both weights, unless it is one of the plain pair.
            weight = "400 700" if not plain else "400" if path == fonts.base_font() else "700"
            faces.append(
                f"@font-face {{ font-family: '{family}'; font-weight: {weight}; "
                f"src: url(data:font/woff;base64,{font}) format('woff') }}"
            )
    return WebFonts("\n".join(faces), ", ".join([*dict.fromkeys(families), "sans-serif"]))


def _chars_by_font(labels: Iterable[tuple[str, bool]]) -> dict[str, set[str]]:
    """Return the characters that each font file is to set, the plain fonts first."""
    chars: dict[str, set[str]] = {path: set() for path in (fonts.base_font(),) if path is not None}
    for text, bold in labels:
        for path, piece in fonts.runs(text, bold=bold, joiners=True):
            if path is not None:
                chars.setdefault(path, set()).update(piece)
    return chars


@lru_cache(maxsize=64)
def _subset(path: str, chars: frozenset[str]) -> str | None:
    """Return the font at `path` with glyphs for `chars` alone, as WOFF in base64; None if it may not be."""
    try:
        from fontTools import subset
        from fontTools.ttLib import TTLibError
    except ImportError as error:
        raise _missing() from error
    options = subset.Options(flavor="woff", name_IDs=[0, 13], notdef_outline=True, font_number=0)
    out = io.BytesIO()
    try:
        with subset.load_font(path, options) as font:
            allowed = int(font["OS/2"].fsType) if "OS/2" in font else 0
            if allowed & _NO_SUBSET or allowed & 0xF == _NO_EMBEDDING:
                return None
            # Tables of other programs, which fontTools would drop with a warning each.
            tags = [str(tag).strip() for tag in font.keys()]  # noqa: SIM118
            options.drop_tables += [tag for tag in tags if not _is_known(tag, options)]
            subsetter = subset.Subsetter(options)
            subsetter.populate(unicodes=map(ord, chars))
            subsetter.subset(font)
            subset.save_font(font, out, options)
    except (TTLibError, subset.Subsetter.SubsettingError):
        return None
    return base64.b64encode(out.getvalue()).decode("ascii")


def _is_known(tag: str, options: Any) -> bool:
    from fontTools.ttLib import getTableClass

    return tag in ("GlyphOrder", *options.no_subset_tables) or hasattr(
        getTableClass(tag.ljust(4)), "subset_glyphs"
    )


@lru_cache(maxsize=64)
def family_name(path: str) -> str:
    """Return a font's family, as it may stand in CSS within a page."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError as error:
        raise _missing() from error
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            family = font["name"].getBestFamilyName() or "sans-serif"
    except (TTLibError, KeyError):
        return "sans-serif"
    return "".join(char for char in family if char.isalnum() or char in " -_")


def _missing() -> MissingPackageError:
    return MissingPackageError(
        "a page holds its fonts, which takes fontTools, which is not installed: pip install 'layertap[html]'"
    )
