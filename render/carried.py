"""The specification of a picture within the file of the picture, so that it can be drawn again from a store.

It is JSON in ASCII, and says nothing of the store or the machine; where a specification names another store,
it is the name without the folders.

    PNG, APNG   a chunk tEXt with the keyword `layertap`
    SVG         the description in its metadata
    PDF         the subject in its document information
    HTML        an element `script` of the type application/json with the id `layertap-spec`
    GIF         a comment
    WebP        the description in its XMP
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..capture.errors import DrawError
from .kinds import spec_from_json
from .spec import Spec

KEYWORD = "layertap"
HTML_ID = "layertap-spec"

_FOLDERS = re.compile(r"(?:file://|[/~]|[A-Za-z]:[/\\]|\\\\)")
_PREFIX = f"{KEYWORD}:"  # where a format gives no place of our own


def values_of(spec: Spec) -> dict[str, Any]:
    """Return what a file carries of a specification: `to_json`, and of a path in it no more than the name."""
    return _without_folders(spec.to_json())


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = _without_folders(value)
        kept[name] = _name(value) if isinstance(value, str) and name != "title" else value
    return kept


def _name(value: str) -> str:
    """Return the last part of a value that is an absolute path; any other as it is."""
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if _FOLDERS.match(value) else value


def text_of(spec: Mapping[str, Any]) -> str:
    """Return a specification's JSON in ASCII."""
    return json.dumps(spec, ensure_ascii=True, separators=(", ", ": "))


def marked(spec: Mapping[str, Any]) -> str:
    """Return a specification's JSON as it stands where others write too; empty where there is none."""
    return _PREFIX + text_of(spec) if spec else ""


def in_script(spec: Mapping[str, Any]) -> str:
    """Return a specification's JSON as it may stand within an element `script` of a page."""
    escapes = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}  # only strings hold these
    return text_of(spec).translate(escapes)


def xmp(spec: Mapping[str, Any]) -> bytes:
    """Return an XMP packet whose description is the specification."""
    description = f'<rdf:Alt><rdf:li xml:lang="x-default">{html.escape(marked(spec))}</rdf:li></rdf:Alt>'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<dc:description>{description}</dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """Return the specification that a file of a picture or an animation carries; `draw` takes it.

    Raises:
        DrawError: the file cannot be read, or carries none.

    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DrawError(f"{path} cannot be read: {error.strerror}") from error
    text = _found(data)
    if text is None:
        raise DrawError(
            f"{path} carries no specification: it was not drawn by layertap, or another program wrote it anew"
        )
    return spec_from_json(text)


def _found(data: bytes) -> str | None:
    """Return the JSON that a file carries, or None."""
    if data.startswith(b"\x89PNG"):
        found = re.search(rb"tEXt" + KEYWORD.encode() + rb"\0([\x20-\x7e]*)", data)
        length = int.from_bytes(data[found.start() - 4 : found.start()], "big") if found else 0
        return found[1][: length - len(KEYWORD) - 1].decode() if found else None
    if data.startswith(b"GIF8"):
        return _in_gif(data)
    if data.startswith(b"%PDF"):
        found = re.search(rb"/Subject\s*\(" + _PREFIX.encode() + rb"((?:[^()\\]|\\.)*)\)", data, re.DOTALL)
        return re.sub(rb"\\(.)", rb"\1", found[1]).decode("ascii", "replace") if found else None
    text = data.decode("utf-8", "replace")
    in_page = re.search(rf'<script type="application/json" id="{HTML_ID}">(.*?)</script>', text, re.DOTALL)
    if in_page:
        return in_page[1]
    in_xml = re.search(rf">{_PREFIX}([^<]*)<", text)
    return html.unescape(in_xml[1]) if in_xml else None


def _in_gif(data: bytes) -> str | None:
    start = data.find(b"\x21\xfe" + bytes([len(_PREFIX)]) + _PREFIX.encode())
    if start < 0:
        return None
    at, text = start + 3 + len(_PREFIX), b""
    while at < len(data) and data[at]:
        text += data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
    return text.decode("ascii", "replace")
