"""From a store to a picture, in one call."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .carried import values_of
from .kinds import kind as kind_of
from .painters import Painter, default_painter, painter
from .selection import Rows, class_column, select_rows
from .sheet import Sheet
from .spec import Spec
from .view import class_name

if TYPE_CHECKING:
    from ..capture.reader import Run

FORMATS = ("png", "svg", "pdf", "html")


class Picture:
    """A drawn figure: save it, or have its pixels. In a notebook it shows itself."""

    def __init__(self, sheet: Sheet, spec: Spec, painter: str | None = None) -> None:
        #: Where everything stands, as data; `sheet.notes` tells of NaN, all-zero channels and the like.
        self.sheet = replace(sheet, spec=values_of(spec))
        #: What was drawn; `spec.to_json()` draws it again.
        self.spec = spec
        self._painter = painter

    def __repr__(self) -> str:
        return f"<Picture {self.spec.kind}: {self.sheet.width} x {self.sheet.height} pixels>"

    def array(self) -> NDArray[np.uint8]:
        """Return the pixels, RGB, shape (height, width, 3)."""
        return self._paint(None).array(self.sheet)

    def png(self) -> bytes:
        """Return the bytes of a PNG file."""
        return self._png

    def encode(self, format: str) -> bytes:
        """Return the bytes of a file of a format: png, svg, pdf or html, or what a named painter writes.

        The file carries the specification; `read_spec` gives it again.

        Raises:
            DrawError: there is no such format, or the chosen painter does not write it.
            MissingPackageError: the format takes a package that is not installed.

        """
        known = FORMATS if self._painter is None else (*FORMATS, *painter(self._painter).formats)
        if format not in known:
            known = tuple(dict.fromkeys(known))
            raise DrawError(f"a picture is saved as {', '.join(known)}, not as {format or 'no format'!r}")
        return self._paint(format).encode(self.sheet, format)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file whose suffix says its format, whole or not at all; return its path.

        Raises:
            DrawError: the format is unknown, or the file cannot be written.

        """
        target = Path(path)
        format = target.suffix.lower().removeprefix(".")
        write_whole(target, [self.png() if format == "png" else self.encode(format)])
        return target

    def _repr_png_(self) -> bytes:
        return self.png()

    def _repr_html_(self) -> str:
        """Return the PNG in its own size, which many a notebook would shrink, above the notes.

        It is an image and not a page's text and fonts, so that it looks the same wherever a notebook is
        shown; most places that show one take its styles away.
        """
        from .paint_html import image_element

        size = self.sheet.width, self.sheet.height
        return image_element("image/png", self.png(), *size, repr(self)[1:-1], self.sheet.notes)

    def _repr_mimebundle_(
        self, include: Container[str] | None = None, exclude: Container[str] | None = None
    ) -> dict[str, Any]:
        forms = {
            "text/plain": lambda: repr(self),
            "image/png": self._repr_png_,
            "text/html": self._repr_html_,
        }
        return wanted_forms(forms, include, exclude)

    @cached_property
    def _png(self) -> bytes:
        return self.encode("png")

    def _paint(self, format: str | None) -> Painter:
        return painter(self._painter or default_painter(self.spec.kind, format))


def wanted_forms(
    forms: Mapping[str, Callable[[], Any]], include: Container[str] | None, exclude: Container[str] | None
) -> dict[str, Any]:
    """Return what a notebook asks for, by type; what it does not ask for is not made."""
    names = [name for name in forms if (include is None or name in include) and name not in (exclude or ())]
    return {name: forms[name]() for name in names}


def draw(
    run: Run,
    kind: str | Spec = "grid",
    *,
    rows: Rows = None,
    layers: str | Sequence[str] | None = None,
    channels: str | int | Sequence[int] | None = None,
    painter: str | None = None,
    **options: Any,
) -> Picture:
    """Draw from a store.

    Args:
        run: the store.
        kind: `grid` (the row's picture and a block of channels for each layer), `montage` (all channels of
            a layer, or one channel over many rows), `overlay` (heat maps over the row's picture), `top` (the
            rows that excite channels most), `pca`
            (components as colours), `statistics`, or a whole specification.
        rows: an int, ints, a slice, or text such as `0,5,10:20`; None is the first captured row, for `top`
            all of them.
        layers: names or patterns of taps; None is every tap for a grid, the first one for a montage or `top`.
        channels: `all`, `first:9`, `top:9`, `top:9:variance`, `page:2:64`, a number or numbers; None is the
            first nine of a grid's maps, and all of a vector or a montage.
        painter: `matplotlib` or `pillow`; None is what suits the file.
        options: other fields of `GridSpec` or `MontageSpec`: `by`, `over`, `scope`, `clip`, `sign`,
            `columns`, `colormap`, `magnification`, `numbers`, `title`, `picture`; or of `TopSpec`: `k`,
            `crop`.

    Raises:
        SelectionError: a layer, row, channel or class is not there; the closest are named.
        DrawError: what was asked for cannot be drawn, or is not captured yet.

    """
    if isinstance(kind, Spec):
        given = [rows, layers, channels, *options.values()]
        if any(value is not None for value in given):
            raise DrawError("a specification says it all; give other rows or options within it")
        spec = kind
    else:
        spec = kind_of(kind).choose(run, _named(rows, layers, channels, options))
    return Picture(kind_of(spec.kind).sheet(run, spec), spec, painter)


def draw_many(
    run: Run,
    kind: str,
    rows: Rows,
    template: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    jobs: int = 1,
    report: Callable[[Path, bool], None] | None = None,
    painter: str | None = None,
    **options: Any,
) -> list[Path]:
    """Draw each row by itself into a file whose name comes from a template.

    Args:
        run: the store.
        kind: as for `draw`.
        rows: as for `draw`; None is every captured row.
        template: a path with fields: `{row}`, `{label}` (number), `{class}` (its name), `{predicted}`
            (name), `{id}`; as in `{row:05d}_{class}.png`. What a value holds that a file name should not
            becomes `_`.
        overwrite: draw anew what is there already; otherwise it is left as it is, so that the same call goes
            on with what is missing.
        jobs: processes that draw. More than one are started anew, so a script that says so needs
            `if __name__ == "__main__":`; they pay from some hundred pictures on.
        report: called for each path once it is there, with whether it was drawn now.
        painter: as for `draw`.
        options: as for `draw`.

    Returns:
        The path for each row, drawn now or before.

    Raises:
        DrawError: an option is wrong, or the template has an unknown field, or gives two rows one name;
            nothing is drawn then.

    """
    from .batch import Batch, draw_batch

    chosen = tuple(dict.fromkeys(select_rows(run, rows)))
    check_options(run, kind, **options)
    if jobs < 1:
        raise DrawError(f"jobs must be 1 or more, not {jobs}")
    paths = [Path(name) for name in file_names(run, chosen, os.fspath(template))]
    named = {name: value for name, value in options.items() if value is not None}
    for path, drawn in draw_batch(Batch(run, kind, named, painter, overwrite), chosen, paths, jobs):
        if report is not None:
            report(path, drawn)
    return paths


def check_options(
    run: Run,
    kind: str,
    *,
    layers: str | Sequence[str] | None = None,
    channels: str | int | Sequence[int] | None = None,
    painter: str | None = None,
    **options: Any,
) -> None:
    """Raise what `draw` would of the options by themselves, whatever the rows; `painter` is not looked at."""
    kind_of(kind).choose(run, _named(None, layers, channels, options))


def _named(rows: Rows, layers: Any, channels: Any, options: dict[str, Any]) -> dict[str, Any]:
    given = {"rows": rows, "layers": layers, "channels": channels}
    return options | {name: value for name, value in given.items() if value is not None}


def file_names(run: Run, rows: Sequence[int], template: str) -> list[str]:
    """Return the file name that `template` gives each row; see `draw_many`."""
    fields = _fields(run, rows)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DrawError(f"the template {template!r} cannot be read: {error}") from error
    used = [name for _, name, _, _ in parsed if name is not None]
    for name in used:
        if name not in fields:
            has = ", ".join(f"{{{field}}}" for field in fields)
            raise DrawError(f"the template has no field {{{name}}}; it has {has}")
    names: dict[str, int] = {}
    for i, row in enumerate(rows):
        name = "".join(
            literal + ("" if field is None else _filled(fields[field][i], spec or "", field))
            for literal, field, spec, _ in parsed
        )
        if name in names:
            raise DrawError(f"{template!r} gives rows {names[name]} and {row} one name, {name}; add {{row}}")
        names[name] = row
    return list(names)


def _fields(run: Run, rows: Sequence[int]) -> dict[str, list[Any]]:
    """Return what a template may name, as far as the store has it: a value for each row."""
    indices = np.array(rows)
    fields: dict[str, list[Any]] = {"row": list(rows)}
    labels, predictions = (class_column(run, name, indices) for name in ("label", "prediction"))
    if labels is not None:
        fields["label"] = labels.tolist()
        fields["class"] = [class_name(run.classes, label) or "unknown" for label in labels.tolist()]
    if predictions is not None:
        fields["predicted"] = [class_name(run.classes, label) or "unknown" for label in predictions.tolist()]
    if "id" in run.rows:
        fields["id"] = run.rows["id"][indices].tolist()
    return fields


def _filled(value: Any, spec: str, field: str) -> str:
    try:
        text = format(value, spec)
    except ValueError as error:
        raise DrawError(f"the template's {{{field}:{spec}}} does not suit {value!r}: {error}") from error
    # Letters of any script stay; separators, control characters and what Windows forbids do not.
    return re.sub(r"[^\w.+-]", "_", text).strip(".")[:100] or "_"


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file piece by piece, whole or not at all.

    Raises:
        DrawError: it cannot be written.

    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.writelines(pieces)
            beside.replace(path)
        finally:
            with suppress(FileNotFoundError):
                beside.unlink()
    except OSError as error:
        raise DrawError(f"{path} cannot be written: {error.strerror}") from error
