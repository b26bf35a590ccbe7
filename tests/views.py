"""Small views and stores, written as `preprocess` and `convert` write them, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.store.collection import Collection
from streamx.store.pack import Content, write_part
from streamx.store.spill import Slab

TRANSFORM = {"binarize": False, "target_sum": 1e4, "total": "view_total", "log1p": True, "scale": "batch"}


def make_counts(
    sizes: list[int], n_genes: int = 40, n_types: int = 4, seed: int = 0, expressed: float = 0.5
) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Counts of cells of several types in several batches: x, batch codes, types."""
    rng = np.random.default_rng(seed)
    profile_tg = rng.gamma(0.3, 8, (n_types, n_genes)) * (rng.random((n_types, n_genes)) < expressed)
    effect_bg = rng.lognormal(0, 0.4, (len(sizes), n_genes))
    batch_n = np.repeat(np.arange(len(sizes)), sizes)
    type_n = rng.integers(n_types, size=len(batch_n))
    depth_n = rng.lognormal(0, 0.3, len(batch_n))
    x_ng = rng.poisson(profile_tg[type_n] * effect_bg[batch_n] * depth_n[:, None])
    return sparse.csr_matrix(x_ng.astype(np.float32)), batch_n, type_n


def batch_maxima(x_ng: sparse.csr_matrix, total_n: np.ndarray, batch_n: np.ndarray, n: int) -> np.ndarray:
    """Largest transformed value per batch and gene, 1 where there is none."""
    y = np.log1p(x_ng.toarray() * (1e4 / np.maximum(total_n, 1))[:, None])
    table = np.stack(
        [y[batch_n == b].max(0) if (batch_n == b).any() else np.zeros(y.shape[1]) for b in range(n)]
    )
    return np.where(table == 0, 1, table).astype(np.float32)


def write_view(
    path: Path,
    sizes: list[int],
    *,
    n_genes: int = 40,
    seed: int = 0,
    expressed: float = 0.5,
    proteins: int = 0,
    **view: Any,
) -> Collection:
    """A view of simulated cells; ``obs["type"]`` is their type. The totals count ten genes that it lacks.

    A type expresses a share of about ``expressed`` of the genes; training takes views below .25 as sparse.
    """
    x_ng, batch_n, type_n = make_counts(sizes, n_genes, seed=seed, expressed=expressed)
    rng = np.random.default_rng(seed + 1)
    total_n = np.asarray(x_ng.sum(1)).ravel() + rng.integers(1, 30, len(batch_n))
    batches = [f"batch{b}" for b in range(len(sizes))]
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(batch_n, batches),
            "type": pd.Categorical.from_codes(type_n, [f"type{t}" for t in range(4)]),
            "_streamx_total": total_n.astype(np.float64),
            "_streamx_row": np.arange(len(batch_n)),
        },
        index=[f"cell{i}" for i in range(len(batch_n))],
    )
    protein_np = rng.random((len(batch_n), proteins)).astype(np.float32)
    names = [f"protein{p}" for p in range(proteins)]
    slab = Slab(
        "all", np.arange(len(batch_n)), lambda: (x_ng, {"protein_expression": protein_np} if proteins else {})
    )
    parameters = {"profile": "RNA", "min_features": 5, "keep_mt": False, "target_sum": 1e4, "scale": "batch"}
    recipe = {"min_features": 5, "drop": ["ERCC", "MT-", "mt-"], "total": "kept", "profile": "RNA"}
    declared = {"store": "store", "store_generation": 1, "transform": TRANSFORM}
    content = Content(
        kind="view",
        obs=obs,
        var=pd.DataFrame(index=[f"GENE{g}" for g in range(n_genes)]),
        batch_key="batch",
        fingerprint={"test": str(sizes), "seed": seed},
        obsm={"protein_expression": (names, {b: [True] * proteins for b in batches})} if proteins else {},
        tables={"scale_bg": batch_maxima(x_ng, total_n, batch_n, len(sizes))},
        view=declared | {"parameters": parameters, "recipe": recipe} | view,
    )
    return write_part(path, [slab], content)
