"""Data sets of PyTorch, and what their transforms say of the normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..capture.data import Batch, Preprocess, SampleSource
from ..capture.errors import DataError

#: Of models that were built by name, what gives some rows that they take, without data.
EXAMPLES: MutableMapping[nn.Module, Callable[[int], Batch | None]] = WeakKeyDictionary()


def handed_over(loader: Any) -> Iterator[list[Any]]:
    """Yield what the workers load; name one that dies while it hands over a batch, which torch does not."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        raise DataError(
            "a DataLoader worker died while it handed over a batch: killed, perhaps for want of memory. "
            "Give fewer workers; with none (--workers 0, workers=0) an error of the data shows where it is"
        ) from error


class TorchSource(SampleSource):
    """A torch `Dataset` of tensors, PIL images or dicts."""

    def stack(self, values: Sequence[Any]) -> Any:
        """Stack to one tensor; where rows may differ, leave those that do as a list.

        Raises:
            DataError: the values differ in shape.
        """
        tensors = [torch.as_tensor(value) for value in values]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1 and self.lists:
            return tensors
        if len(shapes) > 1:
            raise DataError(
                f"the inputs of one batch differ in shape: {', '.join(map(str, sorted(shapes)))}; "
                "resize or pad them in the data set's transform, or keep them so with ragged= or pad="
            )
        return torch.stack(tensors)


def normalisation(transform: Any) -> Preprocess:
    """Read mean and standard deviation from a torchvision `Normalize` inside `transform`."""
    for part in (transform, *getattr(transform, "transforms", ())):
        if type(part).__name__ == "Normalize" and hasattr(part, "mean") and hasattr(part, "std"):
            return Preprocess(tuple(map(float, part.mean)), tuple(map(float, part.std)))
    return Preprocess()
