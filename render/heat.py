"""What a heat map shows, in numbers: channels reduced to one, Grad-CAM, attention.

- `mean`, `maximum`, `l2`: over the channels of each place. A place where one of them is NaN is NaN.
- `channel`: channels as they are.
- `gradcam`: with A the output of a layer and G the gradient of a score with respect to it,
  relu(sum over channels k of a_k A_k), a_k the mean of G_k over all places (Selvaraju et al. 2017,
  "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", equations 1 and 2). Of a
  sequence, places are the patches: what stands before them, a class token, is left out of the mean too.
- `head`: the attention weights of each head, from one token, or the mean of all, to each patch.
- `rollout`: with W_i the attention weights of layer i, averaged over its heads, and
  A_i = 0.5 W_i + 0.5 I, each line divided by its sum, the product A_n ... A_2 A_1: how much each token at the
  input has part in each token after the last layer, residual connections included (Abnar and Zuidema 2020,
  "Quantifying Attention Flow in Transformers", section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError

HEATS = ("mean", "maximum", "l2", "channel", "gradcam", "head", "rollout")
OF_ATTENTION = ("head", "rollout")
Values = NDArray[Any]

TIMES = "\N{MULTIPLICATION SIGN}"
_MOST_BEFORE = 16  # tokens before the patches that an error looks for
_SQUARE = 1e-6  # sides that differ by no more than this share are the same


def reduced(values: Values, heat: str) -> Values:
    """Return one map for each row, shape (rows, 1, ...), of `values`, shape (rows, channels, ...)."""
    if heat == "maximum":
        return np.asarray(values.max(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs; float64 can overflow
        if heat == "mean":
            return np.asarray(values.mean(axis=1, keepdims=True, dtype=np.float64))
        return np.asarray(np.sqrt(np.square(values, dtype=np.float64).sum(axis=1, keepdims=True)))


def grad_cam(outputs: Values, gradients: Values) -> Values:
    """Return Grad-CAM, shape (rows, 1, height, width), of two arrays of shape (rows, channels, ...)."""
    with np.errstate(invalid="ignore", over="ignore"):
        weights = gradients.mean(axis=(2, 3), keepdims=True, dtype=np.float64)
        sums = (weights * outputs).sum(axis=1, keepdims=True)
        return np.asarray(np.maximum(sums, 0))  # NaN stays NaN


def rollout(layers: Iterable[Values]) -> Values:
    """Return attention rollout, shape (rows, query, key).

    Args:
        layers: attention weights of each layer from the first on, shape (rows, heads, query, key).

    """
    product: Values | None = None
    for weights in layers:
        mixed = 0.5 * weights.mean(axis=1, dtype=np.float64) + 0.5 * np.eye(weights.shape[-1])
        with np.errstate(invalid="ignore", divide="ignore"):
            mixed /= mixed.sum(axis=-1, keepdims=True)
            product = mixed if product is None else mixed @ product
    assert product is not None
    return product


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a sequence lie over a picture."""

    before: int
    """Tokens before the patches: a class token, registers."""
    height: int
    """Lines of patches."""
    width: int
    """Patches in a line."""

    @classmethod
    def of(cls, n: int, size: tuple[float, float], before: int | None, what: str) -> Tokens:
        """Return the patches of a sequence of `n` tokens over a picture of `size`, height and width.

        A patch is as high as it is wide. Unless `before` is given, one token before them is a class token, if
        that leaves patches that fill the picture; else there is none.

        Raises:
            DrawError: they do not fill it.

        """
        tried = (1, 0) if before is None else (before,)
        for k in tried:
            if (grid := _patches(n - k, size)) is not None:
                return cls(k, *grid)
        others = [(k, grid) for k in range(_MOST_BEFORE + 1) if (grid := _patches(n - k, size)) is not None]
        advice = f"; with prefix={others[0][0]} they would, {_times(*others[0][1])}" if others else ""
        left_out = "" if not before else f" without the first {before}"
        raise DrawError(
            f"the {n} tokens of {what}{left_out} are no patches that fill a picture of "
            f"{_times(*(round(side) for side in size))} pixels{advice}"
        )

    def maps(self, values: Values) -> Values:
        """Return maps of the patches, (..., height, width), of values for each token, (..., token)."""
        return values[..., self.before :].reshape(*values.shape[:-1], self.height, self.width)

    def token(self, patch: tuple[int, int]) -> int:
        """Return the number of a patch's token."""
        return self.before + patch[0] * self.width + patch[1]


def _patches(n: int, size: tuple[float, float]) -> tuple[int, int] | None:
    """Return how many patches, as high as wide, lie below and beside each other, if `n` fill a picture."""
    if n < 1:
        return None
    height = round(math.sqrt(n * size[0] / size[1]))
    if height < 1 or n % height:
        return None
    width = n // height
    same = abs(height * size[1] - width * size[0]) <= _SQUARE * height * size[1]
    return (height, width) if same else None


def _times(height: int, width: int) -> str:
    return f"{height} {TIMES} {width}"
