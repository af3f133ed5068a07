"""The web page with everything in it: a file or a folder that needs neither a server nor a network.

A page from a disk may fetch nothing, not even its neighbours. What it shows is therefore in *pieces*: JSON,
the exact values of a row of a layer, or a picture, each deflated and in base64. In one file they are data
blocks; in a folder each is a script of one call beside the page, loaded when it is first looked at.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..capture.errors import DrawError
from .atlas import CLIPS, Atlas
from .channel_facts import ChannelFacts, finite
from .page_data import SCRIPTS, as_json, cut_facts, layer_facts, page_file, picture_png, run_facts
from .row_filter import facts_of
from .scale import Limits
from .selection import ChannelChoice, Rows, select_layers, select_rows
from .spec import MontageSpec
from .view import has_pictures, take

if TYPE_CHECKING:
    from ..capture.reader import Run

Json = dict[str, Any]

#: Bytes of maps that go into one file: a browser reads all of it before it shows anything.
MOST_FILE_BYTES = 2**28
#: Rows of a page where none are named.
N_ROWS = 9
_LEVEL = 6
_RANKED_ROWS = 16


def export_html(
    run: Run,
    out: str | os.PathLike[str],
    rows: Rows = None,
    *,
    layers: str | Sequence[str] | None = None,
    channels: str | Sequence[int] = "all",
    overwrite: bool = False,
) -> Path:
    """Write the web page of some rows of a store, which needs nothing but a browser.

    Args:
        run: the store.
        out: a file that ends in `.html`, or a folder, of which `index.html` is the page.
        rows: an int, ints, a slice, or text such as `0,5,10:20`; None is the first nine captured rows.
        layers: names or patterns of taps; None is every tap that can be drawn.
        channels: of each layer: `all`, `first:9`, `top:9`, `top:9:variance` (of the first of the rows), or
            numbers.
        overwrite: replace what is there.

    Returns:
        The page's file.

    Raises:
        SelectionError: a row, layer or channel is not there.
        DrawError: something is at `out` already, it cannot be written, or one file would be too large.
    """
    target = Path(out)
    one_file = target.suffix.lower() in (".html", ".htm")
    _check_target(target, one_file, overwrite)
    selected = tuple(dict.fromkeys(select_rows(run, rows)))
    chosen = selected[:N_ROWS] if rows is None else selected
    names = select_layers(run, layers)
    pieces = _Pieces(run, chosen, {name: _channels(run, name, chosen, channels) for name in names})
    if one_file and pieces.n_bytes > MOST_FILE_BYTES:
        raise DrawError(
            f"one file would hold {pieces.n_bytes / 2**20:,.0f} MiB of maps; {MOST_FILE_BYTES // 2**20} MiB "
            "go in, as a browser reads all of it first. Name a folder, or fewer rows, layers or channels"
        )
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_file if one_file else _write_folder)(beside, pieces)
            if target.is_dir():
                shutil.rmtree(target)
            beside.replace(target)
        finally:
            _remove(beside)
    except OSError as error:
        raise DrawError(f"{target} cannot be written: {error.strerror or error}") from error
    return target if one_file else target / "index.html"


def _check_target(target: Path, one_file: bool, overwrite: bool) -> None:
    """Refuse to replace what was not asked to be replaced, or is no export."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise DrawError(f"{target} is there already; name another, or replace it (overwrite, --overwrite)")
    is_export = target.is_file() if one_file else target.is_dir() and _is_export(target)
    if target.is_symlink() or not is_export:
        raise DrawError(f"{target} is not what an export wrote, so it is not replaced; name another")


def _is_export(folder: Path) -> bool:
    """Return whether a folder is empty, or holds a page and its pieces and nothing else."""
    return {entry.name for entry in folder.iterdir()} in (set(), {"index.html", "pieces"})


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.unlink()


def _channels(run: Run, name: str, rows: tuple[int, ...], channels: str | Sequence[int]) -> tuple[int, ...]:
    """Return the channels of a layer that are meant, in the order of their numbers."""
    choice = ChannelChoice.parse(channels if isinstance(channels, str) else tuple(channels))
    if choice.how in ("all", "auto"):
        return tuple(range(Atlas(run).layer(name).n_channels))
    some = rows[:1] if run[name].is_ragged else rows[:_RANKED_ROWS]
    spec = MontageSpec(
        rows=some, layers=(name,), channels=channels if isinstance(channels, str) else tuple(channels)
    )
    return tuple(sorted(take(run, spec).layers[0].channels))


class _Pieces:
    """What a page of some rows and channels is made of.

    Args:
        run: the store.
        rows: the rows.
        channels: of each layer.
    """

    def __init__(self, run: Run, rows: tuple[int, ...], channels: dict[str, tuple[int, ...]]) -> None:
        self.run, self.rows, self.channels = run, rows, channels
        self.atlas = Atlas(run)
        self.layers = [self.atlas.layer(name) for name in channels]

    @property
    def n_bytes(self) -> int:
        """Bytes of the maps, at most."""
        sizes = [
            self.run[one.name].dtype.itemsize * len(self.channels[one.name]) * one.map.height * one.map.width
            for one in self.layers
        ]
        return len(self.rows) * sum(sizes)

    @cached_property
    def keys(self) -> list[str]:
        """What each piece is, in their order."""
        numbers = range(len(self.layers))
        rows = self.rows if self.run.manifest.layout.values else ()
        pictures = self.rows if has_pictures(self.run) else ()
        return [
            *(f"layer:{i}" for i in numbers),
            *(f"channels:{i}" for i in numbers),
            *(f"picture:{row}" for row in pictures),
            *(f"maps:{i}:{row}" for i in numbers for row in rows),
        ]

    def piece(self, key: str) -> str:
        """Return a piece as it stands in the page."""
        what, *numbers = key.split(":")
        at = int(numbers[0])
        if what == "picture":
            data = picture_png(self.run, at)
        elif what == "layer":
            data = as_json(self._layer(self.layers[at].name))
        elif what == "channels":
            name = self.layers[at].name
            its = ChannelFacts(self.run, name)
            data = as_json([its.of(channel, look=False) for channel in self.channels[name]])
        else:
            name = self.layers[at].name
            data = self.atlas.exact(name, int(numbers[1]), self.channels[name])[0].tobytes()
        return base64.b64encode(zlib.compress(data, _LEVEL)).decode()

    def _layer(self, name: str) -> Json:
        """Return what is known of a layer, with percentiles, and the ranges and shapes of its rows."""
        atlas, facts = self.atlas, layer_facts(self.atlas, name)
        rows = self.rows if self.run.manifest.layout.values else ()
        facts["row_range"] = {row: _pair(atlas.row_range(name, row)) for row in rows}
        facts["cuts"] = {
            f"{clip:g} {scope} {'symmetric' if symmetric else 'plain'}": (
                {"rows": 1, "limits": {row: _pair(atlas.row_cut(name, row, clip, symmetric)) for row in rows}}
                if scope == "row"
                else cut_facts(atlas, name, clip, symmetric, scope == "channel")
            )
            for clip, scope, symmetric in itertools.product(CLIPS, ("layer", "channel", "row"), (True, False))
        }
        if self.atlas.layers[name].is_ragged:
            shapes = {row: self.atlas.exact(name, row, [0])[1] for row in self.rows}
            facts["shapes"] = {str(row): asdict(shape) for row, shape in shapes.items()}
        return facts

    def run_json(self) -> str:
        """Return what the page must know before it shows anything, to stand in a data block."""
        facts = run_facts(self.atlas)
        rows = facts_of(self.run, self.rows, columns=True)
        low, high = self.atlas.store_limits()
        facts |= {
            "path": os.path.basename(str(self.run.path).rstrip("/")),  # where it lay is nobody's business
            "of_rows": self.run.n_rows,
            "rows": len(rows),
            "captured": len(rows),
            "complete": True,
            "layers": [self._about(layer, facts["layers"]) for layer in self.layers],
            "classes": _counted(facts["classes"], rows),
            "facts": rows,
            "limits": {"low": finite(low), "high": finite(high)},
            "pieces": {key: i for i, key in enumerate(self.keys)},
        }
        right = [one["right"] for one in rows if one["right"] is not None]
        if facts["outcome"]:
            facts["outcome"] = {"right": sum(right), "wrong": len(right) - sum(right)}
        return as_json(facts).decode().replace("<", "\\u003c")

    def _about(self, layer: Any, known: list[Json]) -> Json:
        channels = self.channels[layer.name]
        about = next(one for one in known if one["name"] == layer.name)
        return about | {"only": None if len(channels) == layer.n_channels else list(channels)}


def _pair(limits: Limits) -> list[float | None]:
    return [finite(limit) for limit in limits]


def _counted(classes: list[Json], rows: list[Json]) -> list[Json]:
    """Return the classes that rows have or are predicted to have, with how many."""
    found = [
        {
            "name": one["name"],
            "labelled": sum(row["true"] == one["name"] for row in rows),
            "predicted": sum(row["predicted"] == one["name"] for row in rows),
        }
        for one in classes
    ]
    return [one for one in found if one["labelled"] or one["predicted"]]


def _page(pieces: _Pieces, scripts: str) -> tuple[str, str]:
    """Return what stands before and behind the pieces in the page's file.

    Args:
        pieces: what the page is made of.
        scripts: where scripts may come from, beside the page itself.
    """
    html, style = (page_file(name).decode() for name in ("index.html", "page.css"))
    script = "".join(page_file(name).decode() for name in SCRIPTS)
    tags = "\n".join(f'<script defer src="{name}"></script>' for name in SCRIPTS)
    icon = base64.b64encode(page_file("icon.svg")).decode()
    policy = (
        f"default-src 'none'; script-src {_hash(script)} {scripts}; style-src {_hash(style)}; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )
    for old, new in {
        '<meta charset="utf-8">': f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{policy}">',
        'href="icon.svg"': f'href="data:image/svg+xml;base64,{icon}"',
        '<link rel="stylesheet" href="page.css">': f"<style>{style}</style>",
        tags: f'<script type="module">{script}</script>',
    }.items():
        assert html.count(old) == 1, old
        html = html.replace(old, new)
    before, after = html.split("</body>")
    data = f'<script type="application/json" id="layertap-run">{pieces.run_json()}</script>\n'
    return before + data, f"</body>{after}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write_file(path: Path, pieces: _Pieces) -> None:
    before, after = _page(pieces, "")
    with path.open("w", encoding="utf-8") as file:
        file.write(before)
        for i, key in enumerate(pieces.keys):
            file.write(f'<script type="text/plain" id="piece-{i}">{pieces.piece(key)}</script>\n')
        file.write(after)


def _write_folder(path: Path, pieces: _Pieces) -> None:
    (path / "pieces").mkdir(parents=True)
    for i, key in enumerate(pieces.keys):
        call = f"layertapPiece({i}, {json.dumps(pieces.piece(key))})\n"
        (path / "pieces" / f"{i}.js").write_text(call, encoding="utf-8")
    before, after = _page(pieces, "'self' file:")
    (path / "index.html").write_text(before + after, encoding="utf-8")
