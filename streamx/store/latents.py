"""Cells without counts: obs and latents as one AnnData-Zarr, put in place whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.store.draft import Draft, draft_frame, draft_mapping, draft_obs
from streamx.store.location import Location, Put, open_location
from streamx.store.obs import Obs, as_obs


def write_latents(
    place: Path | Location,
    obs: Obs | pd.DataFrame,
    obsm: Mapping[str, np.ndarray],
    uns: Mapping[str, Any],
) -> None:
    """Write an AnnData-Zarr v3 of obs, obsm and uns, with no genes; ``anndata.read_zarr`` opens it.

    It is put in place when it is complete, replacing what was there.
    """

    def encode(put: Put) -> None:
        draft = Draft(put)
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
            put(key, data)

    open_location(place).put_tree(encode)


def latent_names(location: Location) -> list[str]:
    """Names of the AnnData-Zarrs at a location, sorted."""
    if location.shared:
        found = {key.removesuffix("/zarr.json") for key in location.list() if key.endswith("/zarr.json")}
    else:
        found = {path.name for path in Path(location.root).glob("*.zarr")}
    return sorted(
        name for name in found if name.endswith(".zarr") and "/" not in name and not name.startswith(".")
    )
