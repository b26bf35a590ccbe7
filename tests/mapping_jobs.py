"""A small reference, query files for it, and what a mapping job leaves of them, for tests of jobs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
from views import make_counts, write_view

from streamx.train.run import train

N_GENES = 40
SETTINGS: dict[str, Any] = {  # of a job whose queries are small
    "label_key": "type",
    "truth_key": "type",
    "min_query_cells": 20,
    "max_cells": 200,
    "resolution": "1",
    "progress": False,
}


def make_reference(folder: Path, model: str = "scalex") -> Path:
    """A model of two batches whose cells have a ``type``."""
    view = write_view(folder / "view", [120, 80], n_genes=N_GENES)
    counts = {"n_layers": 1, "max_epochs": 2, "encode_covariates": True, "use_batch_norm": "none"}
    settings = {"max_iteration": 20} if model == "scalex" else counts
    train(view, folder / "model", model=model, n_hidden=16, progress=False, threads=1, **settings)
    return folder / "model"


def make_queries(folder: Path, n: int, cells: int = 60) -> list[str]:
    """Files of one batch each, ``q00.h5ad`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        x_ng, _, type_n = make_counts([cells], N_GENES, seed=100 + number)
        obs = pd.DataFrame(
            {"type": [f"type{t}" for t in type_n], "donor": f"donor{number}"},
            index=[f"q{number}-{i}" for i in range(cells)],
        )
        var = pd.DataFrame(index=[f"GENE{g}" for g in range(N_GENES)])
        ad.AnnData(x_ng, obs=obs, var=var).write_h5ad(folder / f"q{number:02d}.h5ad")
    return [str(path) for path in sorted(folder.glob("q*.h5ad"))]


def digests(out: Path) -> dict[str, str]:
    """Of every file that follows from the plan and the inputs."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    named = {path.relative_to(out).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not name.startswith("timings/")
    }
