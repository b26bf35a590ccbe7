"""Cells without counts: obs and latents as one AnnData-Zarr, put in place whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.store.draft import Draft, draft_frame, draft_mapping, draft_obs
from streamx.store.location import Location
from streamx.store.obs import Obs, as_obs


def write_latents(
    path: Path, obs: Obs | pd.DataFrame, obsm: Mapping[str, np.ndarray], uns: Mapping[str, Any]
) -> None:
    """Write an AnnData-Zarr v3 of obs, obsm and uns, with no genes; ``anndata.read_zarr`` opens it.

    It is written beside its place under a hidden name and renamed when it is complete, replacing what was
    there.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    location = Location(partial)
    draft = Draft(location.write)
    mapping = {"encoding-type": "dict", "encoding-version": "0.1.0"}
    draft.group("", {"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsm", "obsp", "varm", "varp"):
        draft.group(name, mapping)
    draft_mapping(draft, "uns", uns)
    draft_obs(draft, "obs", as_obs(obs))
    draft_frame(draft, "var", pd.DataFrame(index=pd.Index([], dtype=object)))
    for name, values in obsm.items():
        draft.array(f"obsm/{name}", values)
    for key, data in draft.consolidated().items():
        location.write(key, data)
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
