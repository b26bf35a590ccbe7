"""Small AnnData objects for the room `arches`, and models that are trained on them for a moment."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pandas as pd
from views import make_counts

ARCHES: dict[str, Any] = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
N_GENES, N_PROTEINS = 30, 5
KEYS: dict[str, Any] = {
    "batch_key": "study",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}


def cells(names: str = "ab", n: int = 60, seed: int = 0) -> anndata.AnnData:
    """Cells of several studies in random order; study b lacks a protein."""
    x_ng, batch_n, type_n = make_counts([n] * len(names), N_GENES, seed=seed)
    rng = np.random.default_rng(seed)
    study = np.array(list(names))[batch_n]
    obs = pd.DataFrame(
        {
            "study": study,
            "type": pd.Categorical(np.array(["B", "T", "NK", "Mono"])[type_n]),
            "donor": rng.choice(["1", "2", "3"], len(study)),
            "age": rng.normal(size=len(study)).astype(np.float32),
        },
        index=[f"{name}{number}" for number, name in enumerate(study)],
    )
    obs.loc[rng.random(len(obs)) < 0.2, "type"] = np.nan
    adata = anndata.AnnData(x_ng, obs, pd.DataFrame(index=[f"g{g}" for g in range(N_GENES)]))
    y_np = rng.poisson(4 + 4 * (type_n[:, None] % 2), (len(obs), N_PROTEINS)).astype(np.float32)
    y_np[study == "b", 2] = 0
    names_p = [f"p{p}" for p in range(N_PROTEINS)]
    adata.obsm["adt"] = pd.DataFrame(y_np, index=adata.obs_names, columns=names_p)
    return adata[rng.permutation(len(obs))].copy()


QUICK: dict[str, Any] = {"progress": False, "use_early_stopping": False}
