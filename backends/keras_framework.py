"""Keras, run by what is installed: by itself it asks for TensorFlow, whether that is there or not."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

from ..capture.errors import MissingPackageError


def keras_home() -> Path:
    """Return the folder where Keras keeps its settings and the weights that it has downloaded."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))


def _said() -> str | None:
    """Return what the settings say; where there are none, Keras writes some, with TensorFlow in them."""
    try:
        said = json.loads((keras_home() / "keras.json").read_text()).get("backend")
    except (OSError, ValueError, AttributeError):
        return None
    return said if isinstance(said, str) and said.isidentifier() else None


def _choose() -> None:
    if "KERAS_BACKEND" in os.environ or ((said := _said()) and find_spec(said) is not None):
        return
    for name in ("jax", "torch"):
        if find_spec(name) is not None:
            os.environ["KERAS_BACKEND"] = name
            return
    raise MissingPackageError(
        "Keras runs on JAX or PyTorch, and neither is installed; install one with: pip install "
        "'layertap[keras,jax]' or 'layertap[keras,torch]'"
    )


_choose()
import keras as keras  # noqa: E402 (it reads what was just chosen)
