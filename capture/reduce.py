"""Reductions: what is kept of a tap instead of all of it, and how far that is from the truth.

A reduction is a chain of small steps, each a value: it says what it makes of rows of a given shape, whether
something is lost, and how to write itself as text and as JSON. How it is computed is a framework's matter
(`reduce_arrays` is the reference in numpy), on the device, in the hook, before anything is transferred.

    pool:7 | pool:4x7,max | pool:global      the mean, or maximum, of windows of the axes beside the channels
    channels:0,3,5 | channels:stride=4       some of the channels; channels:random=16,seed=1
    crop:14 | crop:14x10@3,0                 the middle of each axis beside the channels, or from an offset on
    topk:5 | topk:5,space                    the largest values with their positions, over channels or space
    norm:l2 | norm:l1 | norm:max             one number for all channels of a place
    project:16,seed=0 | project:16,sparse    a random projection of the channels; its basis is stored
    pca:16 | pca:basis.npz                   their principal components, fitted to the first rows, or given
    tokens:last | tokens:first | tokens:mean one of the tokens of a sequence, or their mean
    channels_first                           (y, x, feature) as (channel, y, x); nothing is lost
    float16 | bfloat16 | float8_e4m3fn | ... a cast
    int8                                     int8 with a scale for each row and channel
    file.py:function                         one's own function of a batch

A step that has nothing to do for a tap (a pool of a vector, a cast of whole numbers) is left out, and what is
recorded is what was done.
"""

from __future__ import annotations

from .reduce_base import (
    VALUES,
    Chain,
    Error,
    Json,
    Probe,
    Reduction,
    Reductions,
    Rows,
    Step,
    Values,
    as_chain,
)
from .reduce_projections import FIT_ROWS, Pca, Project, Projection
from .reduce_steps import CASTS, Cast, Channels, ChannelsFirst, Crop, Int8, Norm, Own, Pool, Tokens, TopK

__all__ = [
    "CASTS",
    "FIT_ROWS",
    "VALUES",
    "Cast",
    "Chain",
    "Channels",
    "ChannelsFirst",
    "Crop",
    "Error",
    "Int8",
    "Json",
    "Norm",
    "Own",
    "Pca",
    "Pool",
    "Probe",
    "Project",
    "Projection",
    "Reduction",
    "Reductions",
    "Rows",
    "Step",
    "Tokens",
    "TopK",
    "Values",
    "as_chain",
]
