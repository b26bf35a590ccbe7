"""Genes that scvi-tools 1.4.2 and scanpy call on ``cells.h5ad`` and ``model`` of a folder.

In a process of its own; needs only the peers' packages. Called by ``de.py``; prints one JSON
object, a list of calls per way.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from clock import pin_threads

pin_threads()
warnings.simplefilter("ignore")

import anndata as ad  # noqa: E402
import scanpy as sc  # noqa: E402
import scvi  # noqa: E402

TARGET = 0.05


def calls(folder: Path, name: str, settings: dict[str, Any]) -> list[bool]:
    """One way's, in the order of the genes."""
    adata = ad.read_h5ad(folder / "cells.h5ad")
    if "scanpy" in name:
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.tl.rank_genes_groups(adata, "group", groups=["y"], reference="x", method="wilcoxon")
        table = sc.get.rank_genes_groups_df(adata, "y").set_index("names").loc[adata.var_names]
        return (table["pvals_adj"] < TARGET).tolist()
    scvi.settings.verbosity, scvi.settings.seed = 40, 0
    model = scvi.model.SCVI.load(str(folder / "model"), adata, accelerator="cpu")
    asked = {"groupby": "group", "group1": "y", "group2": "x", "mode": "change", "fdr_target": TARGET}
    table = model.differential_expression(**asked, **settings, batch_correction=True, silent=True)
    return table.loc[adata.var_names, f"is_de_fdr_{TARGET}"].tolist()


def main() -> None:
    folder, ways = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps({name: calls(folder, name, settings) for name, settings in ways.items()}))


if __name__ == "__main__":
    main()
