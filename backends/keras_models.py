"""Keras models by name (`keras:ResNet50`) and from `.keras` files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..capture.data import Preprocess
from ..capture.errors import DataError, FormatError, SelectionError, closest
from ..capture.specs import LoadedModel
from .keras_framework import keras, keras_home


def load_model(name: str, options: dict[str, Any]) -> LoadedModel:
    """Build a model of keras.applications; without `weights` they are random, from a fixed seed.

    Pictures are scaled to the model's own size and cropped, which Keras leaves to its users.

    Raises:
        SelectionError: there is no such model.
        DataError: it cannot be built so, or its weights are not on this machine and cannot be downloaded.
    """
    known = [one for one in dir(keras.applications) if one[0].isupper()]
    if name not in known:
        raise SelectionError(f"keras.applications has no model {name!r}. {closest(name, known)}")
    options.setdefault("weights", None)
    keras.utils.set_random_seed(0)
    build = getattr(keras.applications, name)
    try:
        model = build(**options)
    except Exception as error:
        if "URL fetch failure" in str(error):
            url = str(error).partition(" on ")[2].partition(": ")[0]
            raise DataError(
                f"the weights of {name} cannot be downloaded ({error}). Put {url.rpartition('/')[2]} into "
                f"{keras_home() / 'models'}"
            ) from error
        raise DataError(f"keras:{name} cannot be built: {error}") from error
    return LoadedModel(model, name, preprocess_of(build, model.input_shape[2]))


def load_file(path: Path, options: dict[str, Any]) -> LoadedModel:
    """Return the model of a `.keras` file; nothing in it is run.

    Raises:
        SelectionError: an option was given, and there are none.
        FormatError: it is no such file, or has layers that Keras does not know.
    """
    if options:
        raise SelectionError(f"a .keras file has no option {min(options)!r}, and none at all")
    try:
        return LoadedModel(keras.models.load_model(path, compile=False, safe_mode=True), path.name)
    except Exception as error:
        raise FormatError(
            f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}. If it has layers of your own, "
            "write file.py:factory, a function that registers them and loads it"
        ) from error


def preprocess_of(build: Any, size: int | None) -> Preprocess:
    """Return what the models' own `preprocess_input` does to pictures, found by trying it on five of them."""
    module: Any = sys.modules[build.__module__]
    probe = np.zeros((1, 2, 2, 3), np.float32)
    probe[0, 0, 1, 0] = probe[0, 1, 0, 1] = probe[0, 1, 1, 2] = 255
    made = np.asarray(module.preprocess_input(probe.copy(), data_format="channels_last"))[0]
    black, slopes = made[0, 0], np.stack([made[0, 1], made[1, 0], made[1, 1]]) - made[0, 0]
    bgr = bool(slopes[0, 2])
    scale = np.diag(slopes[:, ::-1] if bgr else slopes)
    # Of channels in their own order: what 0..255 pixels become is (x / 255 - mean) / std.
    offset = black[::-1] if bgr else black
    std = tuple(float(1 / one) for one in scale)
    mean = tuple(float(-o / s) for o, s in zip(offset, scale, strict=True))
    last = keras.config.image_data_format() == "channels_last"
    return Preprocess(mean, std, size, size, channels_last=last or None, bgr=bgr or None)
