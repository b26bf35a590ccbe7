"""From the name of a model to its network."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from streamx.config import NETWORKS, build
from streamx.schema import Schema

# Models that take sparse rows on the CPU.
TAKES_ROWS = ("scalex", "scvi", "scanvi", "totalvi", "trvae")


def network_of(kind: str, settings: Mapping[str, Any]) -> Any:
    """The network's settings as its config class."""
    many = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return build(NETWORKS[kind], dict(settings) | many)


def n_latent_of(network: Any) -> int:
    """Width of the latent, by the name that the model's own documentation gives to it."""
    return int(getattr(network, "n_latent", 0) or network.latent_dim)


def takes_floats(network: Any) -> bool:
    """Whether the model fits values as they are, so that they may be normalised: trVAE with mse."""
    return getattr(network, "recon_loss", None) == "mse"


def build_module(
    kind: str,
    schema: Schema,
    network: Any,
    generator: torch.Generator | None = None,
    tables: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A new network for the genes and categories of a schema, on the CPU.

    ``tables``: what it begins with besides random weights (``library_b``; of totalVI ``measured_bp`` and
    ``background``); without, they are to be loaded.
    """
    n_genes, n_batches = len(schema.genes), max(1, len(schema.batches))
    if kind == "scalex":
        from streamx.models.scalex import Scalex

        return Scalex(n_genes, n_batches, network, generator)
    if kind == "trvae":
        from streamx.models.trvae import Trvae

        return Trvae(n_genes, n_batches, network, generator=generator)
    more: dict[str, Any] = {
        "n_labels": len(schema.labels),
        "n_levels": tuple(len(names) for _, names in schema.categories),
        "n_continuous": len(schema.continuous),
        "generator": generator,
        **tables,
    }
    if not network.use_observed_lib_size:
        more.setdefault("library_b", (np.zeros(n_batches), np.ones(n_batches)))
    if kind == "totalvi":
        from streamx.models.totalvi import Totalvi

        return Totalvi(n_genes, n_batches, network, n_proteins=len(schema.proteins), **more)
    from streamx.models.scanvi import Scanvi
    from streamx.models.scvi import Scvi

    vae = Scvi(n_genes, n_batches, network, **more)
    return vae if kind == "scvi" else Scanvi(vae, len(schema.labels), network, generator=generator)
