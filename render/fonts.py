"""Fonts for labels in any script, chosen by what they cover.

A label is split into runs, each in the first font that has all of its characters: a plain sans-serif font,
then any installed one; what stands together is in one font where one has it all. What no font has is written
as an ASCII escape, with one warning that says what to install; a box never stands for a character.

Coverage is read from a font's own `cmap` table, so that the answer is the same whichever painter asks.
matplotlib's "Last Resort" font is left out because it claims every character and draws boxes; fonts without
outlines (colour emoji) because neither painter can set them at any size.
"""

from __future__ import annotations

import os
import struct
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

_INSTALL = "install a font that has them, for example the package fonts-noto-cjk (Debian), or Noto Sans CJK"

# Of fonts that cover a label equally well, those with one of these in their name are better to read.
_PREFERRED = ("notosanscjk", "sourcehansans", "pingfang", "msyh", "hiragino", "notosans", "wqy-zenhei")
_WORSE = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "display")

_JOINERS = "\u200c\u200d"  # zero width: the letters beside it are not joined, or are

_LEANING = ("Mn", "Mc", "Me")  # marks, drawn on the character before
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"

# Unicode's Default_Ignorable_Code_Point: soft hyphens, directions, variation selectors, tags and the like.
_IGNORABLE = (
    *((0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F)),
    *((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F)),
    *((0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
    (0xE0000, 0xE0FFF),
)

_OUTLINES = (b"glyf", b"CFF ", b"CFF2")

_warned: list[str] = []  # what the one warning named


@lru_cache(maxsize=1024)
def runs(text: str, *, bold: bool = False, joiners: bool = False) -> tuple[tuple[str | None, str], ...]:
    """Return `text` in pieces, each with the path of a font that has all of its characters.

    A path of None means Pillow's built-in font, where not even a plain one is installed.
    Characters that no font has come back as ASCII escapes; a warning says so once. With `joiners`, those
    stay, whatever the fonts have; only a painter that shapes text can do something with them. What is `bold`
    is in the bold font as far as that has it.

    Letters that stand together are in one font where one has them all, because only within a font are they
    joined, and marks put in their places.
    """
    pieces: list[tuple[str | None, str]] = []
    missing: set[str] = set()
    plain = tuple(dict.fromkeys((bold_font(), base_font()) if bold else (base_font(),)))
    for stretch in _stretches(on_one_line(text, joiners=joiners)):
        for path, piece in _in_fonts(stretch, plain, missing):
            if pieces and pieces[-1][0] == path:
                pieces[-1] = (path, pieces[-1][1] + piece)
            else:
                pieces.append((path, piece))
    if missing:
        _warn_once("".join(sorted(missing)))
    return tuple(pieces)


def drawable(text: str, *, bold: bool = False, joiners: bool = False) -> str:
    """Return `text` with what no font has as ASCII escapes."""
    return "".join(piece for _, piece in runs(text, bold=bold, joiners=joiners))


def on_one_line(text: str, *, joiners: bool = False) -> str:
    """Return `text` on one line, composed, without what only steers how others look, joiners perhaps."""
    seen = (" " if char.isspace() or unicodedata.category(char) == "Cc" else char for char in text)
    composed = unicodedata.normalize("NFC", "".join(seen))
    return "".join(char for char in composed if not _steers(char) or (joiners and char in _JOINERS))


@lru_cache(maxsize=1)
def base_font() -> str | None:
    """Return the path of a plain sans-serif font, or None where there is none but Pillow's own."""
    bundled = _matplotlib_fonts()
    if bundled is not None and (bundled / "DejaVuSans.ttf").is_file():
        return str(bundled / "DejaVuSans.ttf")
    names = ("dejavusans", "notosans-regular", "liberationsans-regular", "arial", "helvetica", "segoeui")
    found = {Path(path).stem.lower(): path for path in reversed(installed()) if _latin(path)}
    return next((found[name] for name in names if name in found), None)


@lru_cache(maxsize=1)
def bold_font() -> str | None:
    """Return the bold font beside `base_font`, or the base font itself."""
    base = base_font()
    if base is None:
        return None
    path = Path(base)
    for name in (path.stem.removesuffix("-Regular") + "-Bold", path.stem + "bd"):
        bold = path.with_name(name + path.suffix)
        if bold.is_file():
            return str(bold)
    return base


@lru_cache(maxsize=1024)
def coverage(path: str) -> frozenset[int]:
    """Return the code points that the font file at `path` has outlines for; empty if it is no such font."""
    try:
        data = Path(path).read_bytes()
        return frozenset(_code_points(data))
    except (OSError, struct.error, IndexError, ValueError):
        return frozenset()


@lru_cache(maxsize=1)
def installed() -> tuple[str, ...]:
    """Return the paths of the installed font files, best to read first."""
    try:
        from matplotlib import font_manager
    except ImportError:
        found = (path for folder in font_folders() for path in folder.rglob("*"))
        paths = {str(path) for path in found if path.suffix.lower() in (".ttf", ".otf", ".ttc")}
    else:
        paths = set(font_manager.findSystemFonts())
    return tuple(sorted((p for p in paths if "lastresort" not in Path(p).name.lower()), key=_reading_order))


def font_folders() -> list[Path]:
    """Return the folders in which Linux, macOS and Windows keep fonts, as far as they exist."""
    home = Path.home()
    if sys.platform == "win32":
        folders = [
            Path(os.environ.get("WINDIR", "C:\\Windows"), "Fonts"),
            home / "AppData/Local/Microsoft/Windows/Fonts",
        ]
    elif sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    else:
        data = os.environ.get("XDG_DATA_HOME", home / ".local/share")
        system = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts")]
        folders = [*system, Path(data, "fonts"), home / ".fonts"]
    return [folder for folder in folders if folder.is_dir()]


def forget() -> None:
    """Look for fonts anew, and warn again of what they lack."""
    for cached in (runs, base_font, bold_font, coverage, installed, _installed_with):
        cached.cache_clear()
    _warned.clear()


def _stretches(text: str) -> list[str]:
    """Return `text` in stretches of ASCII and of what is not; marks and joiners go with what they follow."""
    stretches: list[str] = []
    for cluster in clusters(text):
        if stretches and stretches[-1].isascii() == cluster.isascii():
            stretches[-1] += cluster
        else:
            stretches.append(cluster)
    return stretches


def clusters(text: str) -> list[str]:
    """Return `text` in characters, each with the marks on it and what is joined to it."""
    found: list[str] = []
    for char in text:
        leans = char in _JOINERS or unicodedata.category(char) in _LEANING or char in _SKIN_TONES
        if found and (leans or found[-1][-1] == _JOINERS[1]):
            found[-1] += char
        else:
            found.append(char)
    return found


def _in_fonts(
    stretch: str, plain: tuple[str | None, ...], missing: set[str]
) -> Iterator[tuple[str | None, str]]:
    """Yield pieces of `stretch` with their fonts, escaped where there is none, which goes into `missing`."""
    whole = _font_of(stretch, plain)
    if whole is not None:
        yield whole, stretch
        return
    for cluster in clusters(stretch):
        path = _font_of(cluster, plain)
        yield from _alone(cluster, plain, missing) if path is None else [(path, cluster)]


def _alone(
    cluster: str, plain: tuple[str | None, ...], missing: set[str]
) -> Iterator[tuple[str | None, str]]:
    """Yield a cluster that no one font has, by characters; a mark is drawn only in the font of its letter."""
    path, has_letter = plain[0], False
    for i, char in enumerate(cluster):
        if char in _JOINERS:
            continue
        if i and unicodedata.category(char) in _LEANING:
            drawn = has_letter and _has(path, char)
        else:
            path = _font_of(char, plain)
            drawn = has_letter = path is not None or _has(plain[0], char)
        if drawn:
            yield path, char
        else:
            missing.add(char)
            yield plain[0], char.encode("ascii", "backslashreplace").decode()


def _font_of(text: str, plain: tuple[str | None, ...]) -> str | None:
    """Return the font for all of `text`: a plain one, or else the best installed one, or None."""
    chars = frozenset(text) - frozenset(_JOINERS)
    for path in plain:
        if all(_has(path, char) for char in chars):
            return path
    return _installed_with(chars)


@lru_cache(maxsize=1024)
def _installed_with(chars: frozenset[str]) -> str | None:
    points = {ord(char) for char in chars}
    return next((path for path in installed() if points <= coverage(path)), None)


def _warn_once(missing: str) -> None:
    if _warned:
        return
    shown = missing[:8].encode("ascii", "backslashreplace").decode()
    _warned.append(shown)
    warnings.warn(f"no installed font has the characters {shown}; {_INSTALL}", stacklevel=3)


def _has(path: str | None, char: str) -> bool:
    return " " <= char <= "~" or (path is not None and ord(char) in coverage(path))


def _latin(path: str) -> bool:
    return set(range(0x20, 0x7F)) <= coverage(path)


def _steers(char: str) -> bool:
    """Return whether a character has no look of its own: Unicode's "default ignorable" ones."""
    code = ord(char)
    return any(first <= code <= last for first, last in _IGNORABLE) if code > 0xAC else False


def _reading_order(path: str) -> tuple[int, int, str]:
    name = Path(path).name.lower().replace(" ", "")
    preference = next((i for i, part in enumerate(_PREFERRED) if part in name), len(_PREFERRED))
    return sum(part in name for part in _WORSE), preference, path


def _matplotlib_fonts() -> Path | None:
    """Return the folder of the fonts that matplotlib brings, without importing it."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


def _code_points(data: bytes) -> Iterator[int]:
    """Yield what the first face of an OpenType file maps to a glyph, by its widest Unicode `cmap`."""
    (start,) = struct.unpack_from(">I", data, 12) if data[:4] == b"ttcf" else (0,)
    (n_tables,) = struct.unpack_from(">H", data, start + 4)
    tables: dict[bytes, int] = {}
    for i in range(n_tables):
        tag, _, offset, _ = struct.unpack_from(">4sIII", data, start + 12 + 16 * i)
        tables[tag] = offset
    if b"cmap" not in tables or not any(tag in tables for tag in _OUTLINES):
        return
    cmap = tables[b"cmap"]
    (n_subtables,) = struct.unpack_from(">H", data, cmap + 2)
    formats: dict[int, int] = {}
    for i in range(n_subtables):
        platform, encoding, offset = struct.unpack_from(">HHI", data, cmap + 4 + 8 * i)
        if platform == 0 or (platform == 3 and encoding in (1, 10)):
            (number,) = struct.unpack_from(">H", data, cmap + offset)
            formats[number] = cmap + offset
    if 12 in formats:
        yield from _segments_32(data, formats[12])
    elif 4 in formats:
        yield from _segments_16(data, formats[4])


def _segments_32(data: bytes, at: int) -> Iterable[int]:
    """Format 12: groups of (first, last, first glyph)."""
    (n_groups,) = struct.unpack_from(">I", data, at + 12)
    for first, last, glyph in struct.iter_unpack(">III", data[at + 16 : at + 16 + 12 * n_groups]):
        yield from range(first + (glyph == 0), min(last, 0x10FFFF) + 1)


def _segments_16(data: bytes, at: int) -> Iterable[int]:
    """Format 4: arrays of last, first, delta and offset, 16 bits each."""
    (twice,) = struct.unpack_from(">H", data, at + 6)
    n = twice // 2
    lasts = struct.unpack_from(f">{n}H", data, at + 14)
    firsts = struct.unpack_from(f">{n}H", data, at + 16 + twice)
    deltas = struct.unpack_from(f">{n}H", data, at + 16 + 2 * twice)
    offsets_at = at + 16 + 3 * twice
    offsets = struct.unpack_from(f">{n}H", data, offsets_at)
    for i, (first, last, delta, offset) in enumerate(zip(firsts, lasts, deltas, offsets, strict=True)):
        for code in range(first, min(last, 0xFFFE) + 1):
            glyph = code
            if offset:
                (glyph,) = struct.unpack_from(">H", data, offsets_at + 2 * i + offset + 2 * (code - first))
                if glyph == 0:
                    continue
            if (glyph + delta) & 0xFFFF:
                yield code
