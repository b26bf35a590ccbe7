"""How the files in ``data/`` were cut out of CellBench; run once, kept so that anybody can run it again.

``python -m streamx.demo.cut cellbench_5batch.h5ad FOLDER`` writes the five files byte for byte as they lie
here (with the same h5py). Genes are chosen without looking at a label or at the Drop-seq batch, which the
demo maps as a query.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import scipy.sparse as sp
from anndata.io import write_elem

from streamx.demo import LABEL_KEY, QUERY

MIN_CELLS = 10  # a chosen gene is seen in at least this many cells of every plate
N_GENES = 5_000
GENES_PER_CHUNK = 256  # genes are ordered by abundance: columns of one kind in a chunk compress best


def choose_genes(counts: sp.csr_matrix, batch: np.ndarray) -> np.ndarray:
    """Indices of the genes to keep, most abundant first.

    Among genes seen in at least ``MIN_CELLS`` cells of every reference plate, the ``N_GENES`` with the
    highest variance of log1p(counts per 10,000), taken within each plate and averaged over plates.

    Parameters
    ----------
    counts
        Raw counts, (n_cells, n_genes), of the reference plates only.
    batch
        Plate of each cell, (n_cells,).
    """
    total_n1 = np.asarray(counts.sum(axis=1), dtype=np.float64)
    log_ng = counts.astype(np.float64).multiply(1e4 / total_n1).tocsr()
    log_ng.data = np.log1p(log_ng.data)
    seen_everywhere = np.ones(counts.shape[1], dtype=bool)
    variance_g = np.zeros(counts.shape[1])
    for plate in np.unique(batch):
        rows = np.flatnonzero(batch == plate)
        seen_everywhere &= counts[rows].getnnz(axis=0) >= MIN_CELLS
        x = log_ng[rows]
        mean_g = np.asarray(x.mean(axis=0)).ravel()
        variance_g += np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean_g**2
    variance_g[~seen_everywhere] = -1
    chosen = np.argsort(-variance_g, kind="stable")[:N_GENES]
    abundance = np.asarray(counts[:, chosen].sum(axis=0)).ravel()
    return chosen[np.argsort(-abundance, kind="stable")]


def write(path: Path, part: anndata.AnnData) -> None:
    """One small h5ad: X dense uint16, compressed by columns; names of fixed length, which compress."""
    gzip: dict[str, Any] = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
    with h5py.File(path, "w") as f:
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = part.X.toarray().astype(np.uint16)
        f.create_dataset("X", data=x, chunks=(x.shape[0], GENES_PER_CHUNK), **gzip)
        f["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for axis, frame in (("obs", part.obs), ("var", part.var)):
            group = f.create_group(axis)
            group.attrs.update(
                {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
            )
            group.attrs["column-order"] = np.array(list(frame.columns), dtype=h5py.string_dtype())
            group.create_dataset("_index", data=frame.index.to_numpy().astype("S"), **gzip)
            group["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
            for column in frame.columns:
                write_elem(group, column, frame[column].array)


def cut(source: Path, folder: Path) -> list[Path]:
    """Write one file per batch of ``source`` into ``folder``; the paths, sorted."""
    whole = anndata.read_h5ad(source)
    counts = sp.csr_matrix(whole.X)
    batch = whole.obs["batch"].astype(str).to_numpy()
    reference = batch != QUERY
    genes = choose_genes(counts[reference], batch[reference])
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in sorted(set(batch)):
        part = anndata.AnnData(X=counts[batch == name][:, genes], var=whole.var.iloc[genes])
        part.obs_names = whole.obs_names[batch == name]
        part.obs[LABEL_KEY] = whole.obs.loc[batch == name, "cell_type"].astype(str).astype("category")
        paths.append(folder / f"{name}.h5ad")
        write(paths[-1], part)
    return paths


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
