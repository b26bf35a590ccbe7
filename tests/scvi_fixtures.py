"""Models of scvi-tools 1.4.2, and what they computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamx.interop.scvi_tools import module_from
from streamx.models.cells import Cells

ARCHES = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "scvi_arches": ARCHES,
    "scvi_bn_deep": {"n_layers": 2, "encode_covariates": True},
    "scvi_nb_genebatch": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    "scanvi": ARCHES,
}


def fixture(golden: Path, name: str) -> tuple[Any, Cells, dict[str, torch.Tensor]]:
    """Our module in evaluation mode, its cells, and the arrays of the file."""
    with np.load(golden / f"{name}.npz") as file:
        f = {key: torch.as_tensor(value) for key, value in file.items() if value.dtype.kind != "U"}
    module = module_from(name.split("_")[0], weights(f), SETTINGS[name])
    return module.eval(), Cells(f["x"], f["b"][:, 0]), f


def weights(f: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("sd:"): value for key, value in f.items() if key.startswith("sd:")}
