"""The demonstration: a small network, real handwritten digits, a store, and its pictures.

The digits are the 1,797 of scikit-learn's wheel (8 x 8 pixels, 17 grey levels; E. Alpaydin, C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998), scaled up to 32 x 32 so
that three layers with pooling between them have something to show.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import ArraySource, Preprocess
from .errors import MissingPackageError
from .reader import Run
from .record import record_dataset

SIDE = 32
LAYERS = ("conv1", "conv2", "conv3")

#: Backend -> function that trains the network: `train(inputs, labels)` returns the model.
TRAINERS = {
    "torch": "layertap.backends.demo_torch:train",
    "jax": "layertap.backends.demo_jax:train",
    "keras": "layertap.backends.demo_keras:train",
    "onnx": "layertap.backends.demo_onnx:train",
}


@dataclass(frozen=True)
class Digits:
    """Digits to learn from and digits held out."""

    train_inputs: NDArray[np.float32]
    """Shape (rows, 1, 32, 32), normalised."""
    train_labels: NDArray[np.int64]
    """The digits, 0 to 9."""
    held_out: ArraySource
    """What is captured."""


def load_digits() -> Digits:
    """Return the digits; every fourth is held out.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the demonstration's digits come with scikit-learn; install it with: pip install 'layertap[demo]'"
        ) from error
    images, labels = load(return_X_y=True)
    pictures = np.stack([_enlarged(image) for image in images.reshape(-1, 8, 8)])[..., None]
    held = np.arange(len(labels)) % 4 == 3
    values = pictures[~held] / 255
    preprocess = Preprocess((round(float(values.mean()), 4),), (round(float(values.std()), 4),))
    source = ArraySource(
        pictures[held],
        labels[held].astype(np.int64),
        name="handwritten digits",
        classes=[str(digit) for digit in range(10)],
        preprocess=preprocess,
    )
    return Digits(preprocess(pictures[~held]), labels[~held].astype(np.int64), source)


def run_demo(folder: Path, backend: str, say: Callable[[str], None]) -> Run:
    """Train, capture and draw into `folder`.

    Args:
        folder: where the store and the pictures go; what an earlier demonstration left is replaced.
        backend: which framework trains.
        say: takes each line of the report.

    Raises:
        MissingPackageError: scikit-learn, the framework or matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    say(f"training three convolutions on {len(digits.train_labels):,} handwritten digits ...")
    started = time.perf_counter()
    model = _trainer(backend)(digits.train_inputs, digits.train_labels)
    say(f"trained in {time.perf_counter() - started:.1f} s")
    store = folder / "digits.zarr"
    run = record_dataset(
        model,
        digits.held_out,
        store,
        LAYERS,
        reduce="channels_first",
        backend=backend,
        overwrite=True,
        name="digits",
    )
    right = np.asarray(run.rows["label"]) == np.asarray(run.rows["prediction"])
    say(f"accuracy on the {run.n_rows} held-out digits: {100 * right.mean():.1f} %")
    say(f"captured {', '.join(run.taps)} of all of them: {store}")
    for path in _draw(run, folder):
        say(f"drew {path}")
    say("")
    say("go on with (the command is in this environment's bin folder):")
    say(f"  layertap info {store}")
    say(f"  layertap render grid {store} --wrong --one-file --channels top:9 --out {folder}/wrong.png")
    say(f"  layertap render montage {store} --layers conv3 --rows 7 --out {folder}/conv3.png")
    return run


def _draw(run: Run, folder: Path) -> list[Path]:
    import layertap as lt

    labels = np.asarray(run.rows["label"])
    firsts = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
    paths = []
    for digit, row in enumerate(firsts):
        path = folder / f"grid-{digit}.png"
        lt.draw(run, "grid", rows=[row], layers=LAYERS).save(path)
        paths.append(path)
    for name, picture in {
        "grid-all": lt.draw(run, "grid", rows=firsts, layers=LAYERS, channels="top:9:variance"),
        "montage-conv3": lt.draw(run, "montage", rows=firsts[3], layers="conv3"),
        "montage-channel": lt.draw(run, "montage", rows=firsts, layers="conv2", channels=0),
    }.items():
        picture.save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


def _enlarged(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    from PIL import Image

    # A pixel of margin: in the data the digits touch the edges.
    small = Image.fromarray(np.pad(np.rint(image * (255 / 16)).astype(np.uint8), 1))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _trainer(backend: str) -> Callable[[NDArray[Any], NDArray[Any]], Any]:
    module, name = TRAINERS[backend].split(":")
    try:
        train: Callable[[NDArray[Any], NDArray[Any]], Any] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the demonstration needs {error.name}; install it with: pip install "
            f"'layertap[{'demo' if backend == 'torch' else f'demo,{backend}'}]'"
        ) from error
    return train
