"""A reference and a finished mapping job as they lie on disk, for the tests of what reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.store.latents import write_latents

KINDS = ("B", "NK", "T", "mono", "pDC")


def latents(rng: np.random.Generator, kinds: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """float32 (n, 6): a cloud per kind."""
    place = np.unique(kinds, return_inverse=True)[1]
    return (rng.normal(size=(len(kinds), 6)) + 5 * np.eye(6)[place % 6] + shift).astype(np.float32)


def write_reference(model: Path, n: int = 240, kinds: Sequence[str] = KINDS) -> None:
    rng = np.random.default_rng(0)
    own = np.array(kinds, dtype=object)[np.arange(n) % len(kinds)]
    obs = pd.DataFrame({"study": np.repeat(["s1", "s2"], [n // 2, n - n // 2]), "kind": own})
    obs.index = pd.Index([f"r{i}" for i in range(n)])
    model.mkdir(parents=True)
    about = {"model": "abc", "batch_key": "study"}
    write_latents(model / "reference.zarr", obs, {"X_scalex": latents(rng, own)}, {"streamx": about})
    card = {
        "model": "scalex",
        "id": "abc",
        "batch_key": "study",
        "genes": [f"g{i}" for i in range(50)],
        "settings": {"train": {"seed": 7}},
        "training": {"epochs": 3},
        "versions": {"streamx": "0.1.0"},
    }
    (model / "model.json").write_text(json.dumps(card))


def write_query(out: Path, name: str, n: int = 40, seed: int = 1, **uns: Any) -> None:
    """One mapped query whose cells have given and transferred labels; every tenth did not pass.

    ``novelty``: also how strange each cell is; all of the last kind are.
    """
    rng = np.random.default_rng(seed)
    kinds, novelty = uns.pop("kinds", KINDS), uns.pop("novelty", False)
    given = np.array(kinds, dtype=object)[rng.integers(len(kinds), size=n)]
    predicted = np.where(rng.random(n) < 0.8, given, kinds[0]).astype(object)
    latent_nk, uncertainty = latents(rng, given, 0.3), rng.random(n).astype(np.float32) / 2
    latent_nk[::10], predicted[::10], uncertainty[::10] = np.nan, "Unknown", 1
    batches = uns.pop("batches", ("b1", "b2"))
    obs = pd.DataFrame({"kind": given, "donor": np.array(batches, dtype=object)[np.arange(n) % len(batches)]})
    obs["kind_pred"], obs["kind_uncertainty"] = pd.Categorical(predicted), uncertainty
    if novelty:
        obs["kind_novelty"] = np.where(predicted == kinds[-1], 0.96, 0.5).astype(np.float32)
    obs.index = pd.Index([f"{seed}-{i}" for i in range(n)])
    about = {"query": name, "model": "abc", "norm": "matched", "gene_overlap": 0.9, "n_genes_found": 45}
    about |= {"batch_key": "donor", "missing_genes": ["g1", "g2"], "fingerprint": json.dumps({"inputs": {}})}
    write_latents(out / f"{name}.zarr", obs, {"X_scalex": latent_nk}, {"streamx": about | uns})


def write_job(model: Path, out: Path, names: Sequence[str], failed: Sequence[str] = (), **uns: Any) -> None:
    """``map.json``, records, timings and cells of queries; the last `failed` ones have none."""
    out.mkdir(parents=True)
    for part in ("records", "timings"):
        (out / part).mkdir()
    every = [*names, *failed]
    plan = {
        "reference": {"path": f"../{model.name}", "id": "abc"},
        "settings": {
            "label_key": "kind",
            "transfer": {"truth_key": "kind"},
            "metrics": {"max_cells": 200, "resolution": "1", "unlabeled": ["Unknown"]},
        },
        "queries": [{"name": name, "source": [f"/data/{at}.h5ad"]} for at, name in enumerate(every)],
        "versions": {"streamx": "0.1.0"},
    }
    (out / "map.json").write_text(json.dumps(plan))
    details = {
        "ilisi": {"exact": False, "n": 60, "ci95": [0.4, 0.45]},
        "nmi": {"exact": True, "n": 0, "reason": "no labels given"},
    }
    for at, name in enumerate(every):
        record: dict[str, Any] = {"name": name, "source": [f"/data/{at}.h5ad"], "warnings": [], "error": None}
        if name in failed:
            record["error"] = {"what": "no counts", "where": f"/data/{at}.h5ad", "fix": "--allow-float"}
        else:
            record["metrics"] = {"ilisi": 0.425, "nmi": None, "details": details}
            record["transfer"] = {"method": "vote", "n_neighbors": 5, "knn_recall": 1.0}
            if at < 3:
                write_query(out, name, seed=at + 1, **uns)
            else:  # quicker, where there are many
                shutil.copytree(out / f"{names[at % 3]}.zarr", out / f"{name}.zarr")
        (out / "records" / f"{name}.json").write_text(json.dumps(record))
        spent = {"seconds": 1.5, "cpu_seconds": 1.25, "peak_rss_bytes": 10**9}
        (out / "timings" / f"{name}.json").write_text(json.dumps(spent))
