"""Input files of any format -> rows as CSR, within a memory limit.

``source`` what every input becomes; ``inputs`` finds and opens them; ``elements`` AnnData in h5ad, zarr and
h5mu, ``frame`` their tables; ``objects`` AnnData in memory; ``tenx`` 10x HDF5; ``mtx`` MatrixMarket folders;
``table`` csv and tsv; ``obsm`` takes such a matrix for X; ``spill`` turns gene-major data into rows;
``counts`` looks at every value.
"""

from streamx.store.ingest.counts import check_counts
from streamx.store.ingest.inputs import open_sources
from streamx.store.ingest.obsm import of_obsm
from streamx.store.ingest.source import Source

__all__ = ["Source", "check_counts", "of_obsm", "open_sources"]
