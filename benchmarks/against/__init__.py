"""Ways to keep the activations of a network over a data set: layertap's, and what one would do without it.

Each module is one way, as its own documentation shows it: `store` runs the model over all inputs and leaves
the chosen layers' outputs in a folder, `load` reads them back. `job` runs one in a process of its own.
"""

from __future__ import annotations

#: The ways, by their modules, in the order in which they are told.
WAYS = (
    *("layertap_way", "lists", "memmap", "zarr_default", "zarr_tuned"),
    *("extractor", "captum_av", "nnsight_way", "torchlens_way"),
)
FORWARD = "forward"
