"""What follows once cells have latents on disk: labels for the mapped ones, metrics of all.

::

    MODEL/reference.zarr     obs and latents of the reference
    MODEL/added/*.zarr       those of the cells that surgery added to it
    MODEL/neighbors/         indexes of large references, made once
    OUT/<query>.zarr         the same of each mapped query; `transfer` adds to its obs
"""

from streamx.mapping.cells import (
    INDEXES,
    LATENT,
    REFERENCE,
    UPDATED,
    Cells,
    batches_of,
    read_cells,
    read_queries,
    read_reference,
)
from streamx.mapping.labels import transfer
from streamx.mapping.scores import metrics

__all__ = [
    "INDEXES",
    "LATENT",
    "REFERENCE",
    "UPDATED",
    "Cells",
    "batches_of",
    "metrics",
    "read_cells",
    "read_queries",
    "read_reference",
    "transfer",
]
