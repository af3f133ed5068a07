"""Data sets: rows by index, in batches.

A `Source` gives the same batch for the same rows every time: rows keep the order of the data set and are
never shuffled, so a killed run can go on, and many processes can share one data set.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksum import crc32c
from .columns import encoded_text
from .errors import DataError, StoreNotFoundError

Values = NDArray[Any]
Pictures = NDArray[np.uint8]

# Other data must not be taken for the data that a capture began with. What is longer than three of these is
# looked at in three places: of compressed pictures, no two are alike there.
_LOOK_BYTES = 16 * 1024
_WHOLE_BYTES = 256 * 1024 * 1024  # an array of up to so many bytes is read whole
_LOOK_SAMPLES = 16  # of a data set that has nothing but [], decoding included

#: Pillow's filters, which weight all pixels that go into one: no picture is aliased.
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")

PICTURE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass
class Batch:
    """Consecutive rows, ready for a model."""

    rows: range
    """Their indices in the data set."""
    inputs: tuple[Any, ...]
    """Positional arguments of the model."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What to keep of each row: `id`, `label`, `picture`, anything."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the input of a model: uint8 to 0..1, minus `mean`, over `std`."""

    mean: tuple[float, ...] | None = None
    """For each channel, in units of 0..1; None for zeros."""
    std: tuple[float, ...] | None = None
    """For each channel, in units of 0..1; None for ones."""
    resize: int | None = None
    """Scale the shorter side to this many pixels (antialiased), then crop the middle."""
    crop: int | None = None
    """Side of the square that is cropped from the middle; None for `resize`."""
    interpolation: str | None = None
    """How pixels are weighted in resizing: one of `INTERPOLATIONS`; None for bilinear."""
    stretch: bool | None = None
    """Whether both sides are scaled to `resize`, whatever the proportions."""
    channels_last: bool | None = None
    """Whether inputs are (rows, y, x, channels), as those of Keras and Flax are."""
    bgr: bool | None = None
    """Whether inputs have blue first; `mean` and `std` are of red, green and blue all the same."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and (not values or not all(np.isfinite(values))):
                raise DataError(f"{name} is {values}; it is one finite number for each channel")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise DataError(f"std is {self.std}; a standard deviation is above 0")
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}; it is a number of pixels above 0")
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise DataError(f"there is no interpolation {self.interpolation!r}; there are {INTERPOLATIONS}")

    def _channels(self, name: str, n_channels: int) -> NDArray[np.float32]:
        values = getattr(self, name)
        if len(values) not in (1, n_channels):
            raise DataError(
                f"{name} has {len(values)} numbers and the pictures have {n_channels} channels; give one "
                "number for each channel, or one for all"
            )
        return np.asarray(values, np.float32).reshape(1, -1, 1, 1)

    def __call__(self, pictures: Pictures) -> NDArray[np.float32]:
        """Turn uint8 pictures (rows, height, width, channels) into float32 (rows, channels, y, x).

        With `channels_last` they come out as (rows, y, x, channels).

        Raises:
            DataError: `mean` or `std` has another number of channels.
        """
        values = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32)
        values /= np.float32(255)
        if self.mean is not None:
            values -= self._channels("mean", values.shape[1])
        if self.std is not None:
            values /= self._channels("std", values.shape[1])
        if self.bgr:
            values = values[:, ::-1]
        return np.ascontiguousarray(values.transpose(0, 2, 3, 1) if self.channels_last else values)

    def each(self, pictures: Sequence[Pictures]) -> Any:
        """Do so to pictures (height, width, channels) of any size: a list of them where they differ."""
        inputs = [self(picture[None])[0] for picture in pictures]
        return inputs if _differ(inputs) else np.stack(inputs)

    def pictures(self, inputs: Values) -> Pictures | None:
        """Undo it: inputs of a model to uint8 pictures (rows, height, width, 1 or 3).

        A row that lies outside 0..1 after the undoing (because `mean` and `std` are not known, say) is
        stretched to its own range. None where the inputs are not pictures.
        """
        channels_first = inputs.ndim == 4 and inputs.shape[1] in (1, 3) and not self.channels_last
        if inputs.ndim == 4 and not channels_first and inputs.shape[3] in (1, 3):
            inputs = inputs.transpose(0, 3, 1, 2)
        elif inputs.ndim == 3 and min(inputs.shape[1:]) > 3:
            inputs = inputs[:, None]
        elif not channels_first:
            return None
        if inputs.dtype == np.uint8:
            return np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
        values = inputs.astype(np.float32)
        if self.bgr:
            values = values[:, ::-1]
        if self.std is not None:
            values = values * self._channels("std", values.shape[1])
        if self.mean is not None:
            values = values + self._channels("mean", values.shape[1])
        finite = np.isfinite(values)  # one bad pixel must not make the others of its row invisible
        low = np.min(values, axis=(1, 2, 3), keepdims=True, where=finite, initial=np.inf)
        high = np.max(values, axis=(1, 2, 3), keepdims=True, where=finite, initial=-np.inf)
        outside = (low < -1e-3) | (high > 1 + 1e-3)
        stretch = outside & (high > low)
        values = np.where(
            outside, (values - np.where(outside, low, 0)) / np.where(stretch, high - low, 1), values
        )
        values = np.nan_to_num(np.clip(values, 0, 1))
        return np.rint(values * 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


class Source(ABC):
    """A data set of a known number of rows."""

    name: str = "data"
    """What it is called in the store."""
    n_rows: int
    """Number of rows."""
    classes: tuple[str, ...] | None = None
    """Class names by label."""
    preprocess: Preprocess = Preprocess()
    """How pictures become inputs."""
    lists: bool = False
    """Whether inputs that differ in shape are a batch too: a list of them."""
    default_workers: int = 0
    """Threads that load batches where the user says nothing."""

    @property
    def resizes(self) -> bool:
        """Whether `preprocess` is applied to pictures, resizing included, and not only told of inputs."""
        return True

    @abstractmethod
    def batch(self, rows: range) -> Batch:
        """Load `rows`."""

    def fingerprint(self) -> str:
        """Return a text that differs where the data differ, as far as a cheap look can tell."""
        return f"{type(self).__name__}:{self.n_rows}"

    def text_bytes(self) -> dict[str, int]:
        """Return the longest text of each text column in UTF-8 bytes, where it is known beforehand."""
        return {}


class PictureFolder(Source):
    """Pictures in a folder: `class name/picture` in class folders, or all in one.

    Columns: `id` (the path inside the folder), `label` (the class folder's number in sorted order; absent
    without class folders), `picture`.

    Args:
        path: the folder.
        preprocess: resizing and normalisation.
        skip_bad: read the whole set once beforehand and leave out pictures that do not decode, so that
            rows number the good ones alone; `skipped` then names the bad ones.

    Raises:
        StoreNotFoundError: there is no such folder.
        DataError: it holds no pictures.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        preprocess: Preprocess | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise StoreNotFoundError(f"there is no folder {self.path}")
        self.name = self.path.resolve().name
        self.preprocess = preprocess or Preprocess()
        self.ids = sorted(
            file.relative_to(self.path).as_posix()
            for file in self.path.rglob("*")
            if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()
        )
        if not self.ids:
            raise DataError(f"{self.path} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        self.skipped = self._drop_bad() if skip_bad else []
        folders = sorted({name.partition("/")[0] for name in self.ids if "/" in name})
        self.classes = tuple(folders) or None
        self._labels = {name: i for i, name in enumerate(folders)}
        self.n_rows = len(self.ids)
        self.default_workers = min(4, os.cpu_count() or 1)
        loose = [name for name in self.ids if "/" not in name]
        if folders and loose:
            raise DataError(
                f"{self.path} holds class folders ({folders[0]}, ...) and loose pictures ({loose[0]}, "
                "...); move one of them elsewhere"
            )

    def batch(self, rows: range) -> Batch:
        """Decode `rows`.

        Raises:
            DataError: a picture does not decode, or differs in size from the first of the batch.
        """
        names = [self.ids[row] for row in rows]
        decoded = [self._decode(name) for name in names]
        columns: dict[str, Any] = {"id": names}
        if self._labels:
            columns["label"] = np.array([self._labels[n.partition("/")[0]] for n in names], np.int64)
        if self.lists:
            return Batch(rows, (self.preprocess.each(decoded),), columns=columns)
        for name, picture in zip(names, decoded, strict=True):
            if picture.shape != decoded[0].shape:
                (h, w), (h0, w0) = picture.shape[:2], decoded[0].shape[:2]
                raise DataError(
                    f"{self.path / name} is {w} x {h} pixels and {names[0]} is {w0} x {h0}; give one size "
                    "to all (--resize 224, or Preprocess(resize=224))"
                )
        pictures = np.stack(decoded)
        columns = {"id": names, "picture": pictures} | columns
        return Batch(rows, (self.preprocess(pictures),), columns=columns)

    def fingerprint(self) -> str:
        """Hash every picture's path, size in bytes, and bytes at its beginning, middle and end."""
        digest = hashlib.sha256()
        for name, look in zip(self.ids, self._each(self._look), strict=True):
            digest.update(encoded_text(f"{name}\0{look}\0"))
        return f"folder:{self.n_rows}:{digest.hexdigest()[:32]}"

    def _look(self, name: str) -> str:
        path = self.path / name
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                crc = 0
                for start, stop in _looks(size, _LOOK_BYTES):
                    file.seek(start)
                    crc = crc32c(file.read(stop - start), crc)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return f"{size}:{crc:08x}"

    def _each(self, function: Callable[[str], Any]) -> Iterator[Any]:
        """Yield `function` of each picture's path, in order, by a few threads."""
        groups = [self.ids[i : i + 64] for i in range(0, len(self.ids), 64)]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for results in pool.map(lambda group: list(map(function, group)), groups):
                yield from results

    def text_bytes(self) -> dict[str, int]:
        """Return the longest path."""
        return {"id": max(len(encoded_text(name)) for name in self.ids)}

    def _decode(self, name: str) -> Pictures:
        from PIL import Image

        path = self.path / name
        try:
            with Image.open(path) as image:
                picture = _rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path} does not decode: {error}. Remove it, or go on without such pictures with "
                "--skip-bad (skip_bad=True)"
            ) from error
        return np.asarray(_resized(picture, self.preprocess))

    def _drop_bad(self) -> list[str]:
        def bad(name: str) -> bool:
            try:
                self._decode(name)
            except DataError:
                return True
            return False

        flags = list(self._each(bad))
        skipped = [name for name, flag in zip(self.ids, flags, strict=True) if flag]
        self.ids = [name for name, flag in zip(self.ids, flags, strict=True) if not flag]
        if not self.ids:
            raise DataError(f"no picture of {self.path} decodes; the first is {skipped[0]}")
        return skipped


class ArraySource(Source):
    """Arrays in memory or memory-mapped: inputs, and labels where there are some.

    uint8 inputs of shape (rows, height, width, 1 or 3) are pictures and are preprocessed; anything else goes
    to the model as it is.

    Raises:
        DataError: inputs and labels differ in length.
    """

    def __init__(
        self,
        inputs: Values,
        labels: Values | None = None,
        *,
        name: str = "array",
        classes: Sequence[str] | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        if inputs.ndim == 0 or len(inputs) == 0:
            raise DataError("the array of inputs is empty")
        if labels is not None and len(labels) != len(inputs):
            raise DataError(f"there are {len(labels)} labels for {len(inputs)} inputs")
        self.name = name
        self.n_rows = len(inputs)
        self.inputs, self.labels = inputs, labels
        self.classes = None if classes is None else tuple(classes)
        self.preprocess = preprocess or Preprocess()

    @property
    def resizes(self) -> bool:
        """Whether the inputs are pictures."""
        return self.inputs.dtype == np.uint8 and self.inputs.ndim == 4 and self.inputs.shape[3] in (1, 3)

    def batch(self, rows: range) -> Batch:
        """Cut out `rows`."""
        window = slice(rows.start, rows.stop)
        values = np.asarray(self.inputs[window])
        columns: dict[str, Any] = {}
        if self.labels is not None:
            columns |= label_columns(self.labels[window])
        if self.resizes:
            values = _resized_arrays(values, self.preprocess)
            columns["picture"] = values
            return Batch(rows, (self.preprocess(values),), columns=columns)
        pictures = self.preprocess.pictures(values) if values.dtype.kind in "fu" else None
        if pictures is not None:
            columns["picture"] = pictures
        return Batch(rows, (values,), columns=columns)

    def fingerprint(self) -> str:
        """Hash shape, type and bytes: of a large set, each row's beginning, middle and end."""
        digest = hashlib.sha256(f"{self.inputs.shape}{self.inputs.dtype}".encode())
        digest.update(f"{rows_crc(self.inputs):08x}".encode())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).tobytes())
        return f"array:{self.n_rows}:{digest.hexdigest()[:32]}"


class SampleSource(Source):
    """Anything with `len` and `[]`: `(input, label)` pairs, inputs alone, dicts of keyword arguments.

    Inputs that are PIL images become pictures and are preprocessed; arrays go to the model as they are. In a
    dict, `label` or `labels` is the label and the rest goes to the model by name.
    """

    def __init__(self, samples: Any, *, preprocess: Preprocess | None = None) -> None:
        try:
            self.n_rows = len(samples)
        except TypeError:
            raise DataError(
                f"{type(samples).__name__} has no len(): rows need indices; for a stream, use record() with "
                "a loop of your own"
            ) from None
        if self.n_rows == 0:
            raise DataError("the data set is empty")
        if not hasattr(samples, "__getitem__"):
            raise DataError(f"{type(samples).__name__} has no [] to take rows by; for a stream, use record()")
        self.samples = samples
        self.name = type(samples).__name__
        classes = getattr(samples, "classes", None)
        self.classes = tuple(str(name) for name in classes) if classes else None
        self.preprocess = preprocess or Preprocess()

    @property
    def resizes(self) -> bool:
        """Whether the inputs are PIL images, by the first one."""
        first = self.samples[0]
        return hasattr(first[0] if isinstance(first, tuple | list) and first else first, "convert")

    def batch(self, rows: range) -> Batch:
        """Load and stack `rows`."""
        return self.collate(rows, [self.samples[row] for row in rows])

    def fingerprint(self) -> str:
        """Hash a few samples, spread over the set; to look at all of them would be to load it twice."""
        digest = hashlib.sha256()
        for row in np.unique(np.linspace(0, self.n_rows - 1, _LOOK_SAMPLES).astype(int)):
            batch = self.collate(range(row, row + 1), [self.samples[int(row)]])
            for values in (*batch.inputs, *batch.kwargs.values(), *batch.columns.values()):
                try:
                    array = np.asarray(values)
                except TypeError:  # numpy has no such type
                    continue
                if array.dtype.hasobject:
                    continue
                digest.update(f"{array.shape}{array.dtype}{rows_crc(array):08x}".encode())
        return f"{type(self).__name__}:{self.n_rows}:{digest.hexdigest()[:32]}"

    def collate(self, rows: range, samples: Sequence[Any]) -> Batch:
        """Stack samples to a batch."""
        inputs, kwargs, labels = [], {}, None
        first = samples[0]
        if isinstance(first, dict):
            key = next((k for k in ("label", "labels") if k in first), None)
            labels = None if key is None else [sample[key] for sample in samples]
            kwargs = {k: self.stack([s[k] for s in samples]) for k in first if k != key}
        elif isinstance(first, tuple | list) and len(first) > 1:
            inputs, labels = [sample[0] for sample in samples], [sample[1] for sample in samples]
        else:
            inputs = [s[0] if isinstance(s, tuple | list) else s for s in samples]
        columns: dict[str, Any] = {} if labels is None else label_columns(labels)
        if not inputs:
            return Batch(rows, (), kwargs, columns)
        if hasattr(inputs[0], "convert"):
            decoded = [np.asarray(_resized(_rgb(i), self.preprocess)) for i in inputs]
            if self.lists:
                return Batch(rows, (self.preprocess.each(decoded),), kwargs, columns)
            pictures = _stacked(decoded)
            columns["picture"] = pictures
            return Batch(rows, (self.preprocess(pictures),), kwargs, columns)
        stacked = self.stack(inputs)
        if not self.lists and (made := self.preprocess.pictures(np.asarray(stacked))) is not None:
            columns["picture"] = made
        return Batch(rows, (stacked,), kwargs, columns)

    def stack(self, values: Sequence[Any]) -> Any:
        """Make one array of the values of all rows.

        Raises:
            DataError: they differ in shape.
        """
        arrays = [np.asarray(value) for value in values]
        return arrays if self.lists and _differ(arrays) else _stacked(arrays)


def as_source(data: Any, preprocess: Preprocess | None = None) -> Source:
    """Return a source for `data`: a source, a folder, arrays, a dict of them, or what has `len` and `[]`."""
    from .named_arrays import NamedArrays, are_named

    if isinstance(data, Source):
        return data
    if are_named(data):
        return NamedArrays(data)
    if isinstance(data, str | os.PathLike):
        return PictureFolder(data, preprocess)
    if isinstance(data, np.ndarray):
        return ArraySource(data, preprocess=preprocess)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, np.ndarray) for part in data):
        return ArraySource(*data, preprocess=preprocess)
    return SampleSource(data, preprocess=preprocess)


def prefetched(source: Source, steps: Iterable[range], workers: int) -> Iterator[Batch]:
    """Yield the batches of `steps` in order, `workers` threads loading ahead of the reader.

    With the one that the reader holds, at most `workers` + 2 batches are alive.
    """
    if workers < 1:
        yield from map(source.batch, steps)
        return
    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="layertap-data")
    try:
        for step in steps:
            waiting.append(pool.submit(source.batch, step))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _looks(size: int, length: int) -> list[tuple[int, int]]:
    """Return where to look at `size` bytes: everywhere, or `length` at the beginning, middle and end."""
    if size <= 3 * length:
        return [(0, size)]
    return [(start, start + length) for start in (0, (size - length) // 2, size - length)]


def rows_crc(array: Values) -> int:
    """Return the CRC-32C of an array's rows, of each only a part where the whole is large."""
    if array.size == 0:
        return 0
    row_bytes = array.nbytes // len(array)
    looks = _looks(row_bytes, max(64, _WHOLE_BYTES // 3 // len(array)))
    together = max(1, 2**20 // row_bytes)
    crc = 0
    for first in range(0, len(array), together):
        rows = np.ascontiguousarray(array[first : first + together])
        data = rows.view(np.uint8).reshape(len(rows), row_bytes)
        for start, stop in looks:
            crc = crc32c(np.ascontiguousarray(data[:, start:stop]).reshape(-1).data, crc)
    return crc


def _differ(arrays: Sequence[Any]) -> bool:
    return len({tuple(array.shape) for array in arrays}) > 1


def _stacked(arrays: Sequence[Values]) -> Values:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(f"the inputs of one batch differ in shape: {', '.join(map(str, sorted(shapes)))}")
    return np.stack(arrays)


def label_columns(labels: Any) -> dict[str, Values]:
    """Return class numbers as the column `label`, any other numbers as `target`, and nothing else."""
    try:
        values = np.stack([np.asarray(label) for label in labels])
    except ValueError:
        return {}
    if values.dtype.kind not in "iufb":
        return {}
    return {"label" if values.ndim == 1 and values.dtype.kind in "iub" else "target": values}


def _rgb(image: Any) -> Any:
    """Return an image in 8-bit RGB; of 16-bit greys, which Pillow would clip, the upper 8 bits."""
    from PIL import Image

    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 2**16 - 1) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def _resized(image: Any, preprocess: Preprocess) -> Any:
    from PIL import Image

    width, height = image.size
    if preprocess.resize is not None:
        # The longer side is cut down to whole pixels, as torchvision does.
        size = tuple(
            preprocess.resize if preprocess.stretch else int(preprocess.resize * side / min(width, height))
            for side in (width, height)
        )
        image = image.resize(size, Image.Resampling[(preprocess.interpolation or "bilinear").upper()])
    side = preprocess.crop or preprocess.resize
    if side is None:
        return image
    left, top = (margin(length, side) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _resized_arrays(pictures: Pictures, preprocess: Preprocess) -> Pictures:
    from PIL import Image

    if preprocess.resize is None and preprocess.crop is None:
        return pictures
    images = [Image.fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in pictures]
    resized = np.stack([np.asarray(_resized(image, preprocess)) for image in images])
    return resized.reshape(*resized.shape[:3], pictures.shape[3])


def margin(length: int, side: int) -> int:
    """Return where a middle of `side` pixels begins; below 0 there is a black margin, as torchvision has."""
    return round((length - side) / 2) if length >= side else -((side - length) // 2)
