"""RNA and ATAC of different cells in one space: peaks become gene activity, and SCALEX takes two batches.

    python examples/11_rna_and_atac.py -o results/rna_and_atac
    python examples/11_rna_and_atac.py --data rna.h5ad atac.h5ad --genes gencode.gtf.gz

Raw counts in X, peaks named like chr1:100-200. Without --data, cells of four types are simulated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

import streamx as sx
from streamx.transfer import directions, transfer_labels

parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs=2, metavar=("RNA", "ATAC"), type=Path, help="h5ad files")
parser.add_argument("--genes", help="annotation: gtf, gff3 or bed")
parser.add_argument("--peak-genes", help="beside it or instead: a table with columns gene and peak")
parser.add_argument("-o", "--output", default="results/rna_and_atac", type=Path)
parser.add_argument("--quick", action="store_true", help="few training steps: shows that it runs")


def simulated(folder: Path) -> tuple[list[Path], str]:
    """RNA, ATAC of other cells of the same types (three peaks a gene), and a BED file of the genes."""
    shape = {"n_cells": 1500, "n_genes": 300, "n_batches": 2, "n_types": 4, "depth": 2000}
    rna, others = sx.simulate(folder, format="h5ad", batch_effect=0.1, **shape)
    cells = anndata.read_h5ad(others)
    x_ngp = np.random.default_rng(0).multinomial(cells.X.toarray().astype(int), [0.5, 0.3, 0.2])
    peaks = [f"chr1:{10_000 * g + at}-{10_000 * g + at + 500}" for g in range(300) for at in (35, 55, 70)]
    x_np = csr_matrix(x_ngp.reshape(cells.n_obs, -1), dtype=np.float32)
    anndata.AnnData(x_np, cells.obs, pd.DataFrame(index=peaks)).write_h5ad(folder / "atac.h5ad")
    genes = enumerate(cells.var_names)
    rows = [f"chr1\t{10_000 * g + 50}\t{10_000 * g + 90}\t{name}\t0\t+\n" for g, name in genes]
    (folder / "genes.bed").write_text("".join(rows))
    return [rna, folder / "atac.h5ad"], str(folder / "genes.bed")


def main() -> None:
    args = parser.parse_args()
    out = args.output
    (rna, atac), genes = (args.data, args.genes) if args.data else simulated(out / "files")
    sx.convert(atac, out / "peaks", batch_key="_streamx_file")  # one batch, whatever obs says
    sx.gene_activity(out / "peaks", out / "both", genes=genes, peak_genes=args.peak_genes)
    both = sx.convert({"rna": rna}, out / "both", append=True)
    view = sx.preprocess(both, out / "view", min_features=0, min_cells=0)
    # both hold the same types in the same shares, so each modality goes by its own statistics
    steps = 300 if args.quick else 30_000
    sx.train(view, out / "model", norm="domain", n_latent=30, max_iteration=steps)
    scores = sx.metrics(out / "model", label_key="cell_type")
    print(both, *(f"{name} {scores[name]:.3f}" for name in scores["details"]), sep="\n")

    cells = anndata.read_zarr(out / "model" / "reference.zarr")  # labels of RNA for the cells of ATAC
    latent_nk, is_rna = directions(cells.obsm["X_scalex"], cells.obs["batch"]), cells.obs["batch"] == "rna"
    labels = cells.obs["cell_type"].to_numpy(str)
    found = transfer_labels(latent_nk[is_rna], labels[is_rna], latent_nk[~is_rna], n_neighbors=15)
    print(f"labels of RNA are right for {(found.labels_n == labels[~is_rna]).mean():.3f} of the ATAC cells")


if __name__ == "__main__":
    main()
