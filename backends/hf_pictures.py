"""What an image processor of transformers does to pictures, as `Preprocess`.

Resizing to a square or by the shorter side, cropping the middle, rescaling and normalisation are told
exactly. Processors that resize tensors and not pictures may differ in the last of 8 bits. What a `Preprocess`
cannot say (sides that are not equal, a longest side, patches, padding) leaves mean and standard deviation
alone: then give pictures of the right size. A processor that resizes by the shorter side and crops nothing
gives pictures of many sizes; here, the middle is cropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import transformers
from PIL import Image

from ..capture.data import Preprocess
from .torch_weights import brief

_processors: Any = transformers.AutoImageProcessor
_FILES = ("preprocessor_config.json", "processor_config.json")

#: ConvNeXt takes pictures below this many pixels from the middle of larger ones, others whole.
_CROPPED_BELOW = 384


def preprocess_of(source: str, options: dict[str, Any], has: Callable[[str], bool]) -> Preprocess | None:
    """Return what the image processor of a model does, None where there is none."""
    if not any(map(has, _FILES)):
        return None
    try:
        processor = _processors.from_pretrained(source, **options)
    except Exception as error:
        warnings.warn(
            f"the preprocessing of {source} is not known: {brief(error)}. Give --mean, --std and --resize",
            stacklevel=2,
        )
        return None
    resize, crop, stretch = _geometry(processor)
    how = _interpolation(processor) if resize else None
    return Preprocess(*_scale(processor), resize, crop, how, stretch)


def _scale(processor: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation in units of 0..1, with what the processor multiplies by in them."""
    factor = getattr(processor, "rescale_factor", None) if _does(processor, "rescale") else 1.0
    unit = 255 * (1 / 255 if factor is None else factor)
    if abs(unit - 1) < 1e-6:
        unit = 1.0
    mean = std = None
    if _does(processor, "normalize") and getattr(processor, "image_mean", None) is not None:
        mean = tuple(float(value) / unit for value in _listed(processor.image_mean))
        std = tuple(float(value) / unit for value in _listed(processor.image_std))
    elif unit != 1:
        std = (1 / unit,)
    return mean, std


def _geometry(processor: Any) -> tuple[int | None, int | None, bool | None]:
    """Return `resize`, `crop` and `stretch`."""
    crop = _square(_sizes(processor, "crop_size")) if _does(processor, "center_crop") else None
    if not _does(processor, "resize"):
        return None, crop, None
    size = _sizes(processor, "size")
    if square := _square(size):
        return square, crop, True
    shortest = size.get("shortest_edge")
    if shortest is None or set(size) != {"shortest_edge"}:
        return None, None, None
    if (share := getattr(processor, "crop_pct", None)) is not None:
        if shortest >= _CROPPED_BELOW:
            return shortest, None, True
        return int(shortest / share), shortest, None
    return shortest, crop, None


def _does(processor: Any, what: str) -> bool:
    return bool(getattr(processor, f"do_{what}", False))


def _sizes(processor: Any, name: str) -> dict[str, int]:
    size = getattr(processor, name, None)
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _square(size: dict[str, int]) -> int | None:
    return size["height"] if set(size) == {"height", "width"} and size["height"] == size["width"] else None


def _interpolation(processor: Any) -> str | None:
    said: Any = getattr(processor, "resample", None)
    if said is None:
        return None
    value = getattr(said, "value", said)  # of Pillow a number, of torchvision a name
    name = value if isinstance(value, str) else Image.Resampling(value).name.lower()
    return None if name == "bilinear" else name


def _listed(values: Any) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list | tuple) else (values,)
