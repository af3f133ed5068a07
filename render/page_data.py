"""What the web page is told of a store, as JSON and PNG: the same from a server and in a file of its own."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..capture.errors import SelectionError
from .atlas import CLIPS, Atlas
from .channel_facts import finite
from .colormaps import COLORMAPS, DIVERGING, Mark, palette
from .ranges import MEASURES
from .row_filter import check_rows, classes_of
from .scale import colormap_for
from .view import has_pictures, row_views

if TYPE_CHECKING:
    from ..capture.reader import Run

Json = dict[str, Any]

PAGE = Path(__file__).parent / "page"
#: In this order: what one declares is there for those after it.
SCRIPTS = ("store.js", "board.js", "page.js")


def as_json(values: Any) -> bytes:
    """Return JSON that a browser takes: no number is NaN or infinite."""
    return json.dumps(values, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode()


def run_facts(atlas: Atlas) -> Json:
    """Return what the page must know of a store before it shows anything."""
    run = atlas.run
    classes, outcome = classes_of(run)
    info = run.info
    return {
        "path": str(run.path),
        "version": _version(run),
        "rows": run.n_rows,
        "captured": run.n_committed,
        "complete": run.complete,
        "values": run.manifest.layout.values,
        "statistics": list(run.stats.names),
        "model": str(info.get("model", {}).get("name") or ""),
        "data": str(info.get("data", {}).get("name") or ""),
        "columns": list(run.rows),
        "pictures": has_pictures(run),
        "classes": classes,
        "outcome": outcome,
        "layers": [asdict(layer) | {"wire": _wire(atlas, layer.name)} for layer in atlas.layers.values()],
        "measures": list(MEASURES),
        "clips": [f"{clip:g}" for clip in CLIPS],
        "palettes": {name: palette(name).tobytes().hex() for name in COLORMAPS},
        "diverging": list(DIVERGING),
        "by_sign": [colormap_for("auto", signed) for signed in (False, True)],
        "marks": {mark.name: int(mark) for mark in Mark},
    }


def _wire(atlas: Atlas, name: str) -> str:
    return "" if atlas.layers[name].refusal else atlas.wire(name)


def _version(run: Run) -> str:
    """Return something that is another for another store, or for more of its rows."""
    about = f"{run.path} {run.info.get('crc32c')} {json.dumps(run.info, sort_keys=True)} {run.blocks}"
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def layer_facts(atlas: Atlas, name: str) -> Json:
    """Return a layer's limits, and how much each of its channels matters."""
    known = atlas.ranges(name)
    low, high = known.limits
    return {
        "low": finite(low),
        "high": finite(high),
        "signed": known.signed,
        "channel_low": [finite(value) for value in known.low.tolist()],
        "channel_high": [finite(value) for value in known.high.tolist()],
        "odd": known.odd,
        "rows": known.n_rows,
        "whole": known.whole,
        "measures": {
            by: [finite(value) for value in values.tolist()] for by, values in known.measures.items()
        },
    }


def cut_facts(atlas: Atlas, name: str, clip: float, symmetric: bool, by_channel: bool) -> Json:
    """Return where a percentile cuts the scale of a layer, or those of its channels; None: it does not."""
    cuts = atlas.cuts(name, clip, symmetric, by_channel)
    pairs = [[finite(limit) for limit in pair] for pair in cuts.limits.reshape(-1, 2).tolist()]
    limits = pairs if cuts.limits.ndim == 2 else pairs[0]
    return {"rows": cuts.n_rows, "about": cuts.about, "limits": limits}


def picture_png(run: Run, row: int) -> bytes:
    """Return a row's picture.

    Raises:
        SelectionError: there is no such row, or the store keeps no pictures.
    """
    from PIL import Image

    check_rows(run, [row])
    pixels = row_views(run, (row,), True)[0].picture
    if pixels is None:
        raise SelectionError("the store keeps no pictures of its rows")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


@lru_cache
def page_file(name: str) -> bytes:
    """Return a file of the page."""
    return (PAGE / name).read_bytes()
