"""Small stores that the web page is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np

HOSTILE = "<img src=x onerror=\"document.title='hit'\">"
CLASSES = ["frog", HOSTILE, "雨 \N{RIGHT-TO-LEFT OVERRIDE}x"]
N_ROWS = 40


def layers(inputs: Any) -> dict[str, Any]:
    """Return maps >= 0 with a dead and a constant channel, signed maps, doubles, and a sequence."""
    n = len(inputs)
    rng = np.random.default_rng(abs(int(1000 * inputs[0].sum())))
    conv = np.maximum(rng.standard_normal((n, 12, 6, 5)), 0).astype(np.float32)
    conv[:, 3], conv[:, 4] = 0, 2.5
    signed = rng.standard_normal((n, 5, 4, 4)).astype(np.float16)
    signed[0, 0, 1, 2], signed[0, 1, 0, 0], signed[0, 1, 3, 3] = np.nan, np.inf, -np.inf
    return {
        "conv1": conv,
        "layer2.<b>x</b>": signed,
        "fc": rng.standard_normal((n, 3)),
        "tokens": rng.integers(-(2**62), 2**62, (n, 7, 4)),
    }


class Named(lt.ArraySource):
    """Pictures with ids, and every third prediction wrong."""

    def batch(self, rows: range) -> Any:
        batch = super().batch(rows)
        numbers = np.arange(rows.start, rows.stop)
        batch.columns["id"] = np.array(
            [f"set/{i:03d}-\N{LATIN CAPITAL LETTER E WITH ACUTE}.png" for i in numbers]
        )
        batch.columns["prediction"] = np.where(numbers % 3 == 2, (numbers + 1) % 3, numbers % 3)
        batch.columns["note"] = np.array([f"{HOSTILE} {i}" for i in numbers])
        return batch


def a_store(path: Path, n_rows: int = N_ROWS, **options: Any) -> Any:
    """Return a run in batches of 8 rows."""
    pictures = np.random.default_rng(1).integers(0, 256, (n_rows, 8, 8, 3), np.uint8)
    source = Named(pictures, np.arange(n_rows) % 3, classes=CLASSES)
    given: dict[str, Any] = {"batch_size": 8, "memory": "50MiB", "backend": "arrays"} | options
    return lt.record_dataset(layers, source, path, "**", **given)
