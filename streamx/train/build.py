"""From the name of a model to its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from streamx.config import NETWORKS, build
from streamx.schema import Schema

# Models that take sparse rows on the CPU.
TAKES_ROWS = ("scalex", "scvi", "scanvi", "trvae")


def network_of(kind: str, settings: Mapping[str, Any]) -> Any:
    """The network's settings as its config class."""
    many = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return build(NETWORKS[kind], dict(settings) | many)


def n_latent_of(network: Any) -> int:
    """Width of the latent, by the name that the model's own documentation gives to it."""
    return int(getattr(network, "n_latent", 0) or network.latent_dim)


def build_module(
    kind: str,
    schema: Schema,
    network: Any,
    generator: torch.Generator | None = None,
    library_b: tuple[np.ndarray, np.ndarray] | None = None,
) -> Any:
    """A new network for the genes and categories of a schema, on the CPU.

    ``library_b``: mean and variance of ln(library size) per batch, where that is a latent variable; without,
    the tables are to be loaded.
    """
    n_genes, n_batches = len(schema.genes), max(1, len(schema.batches))
    if kind == "scalex":
        from streamx.models.scalex import Scalex

        return Scalex(n_genes, n_batches, network, generator)
    from streamx.models.scvi import Scvi

    covariates: dict[str, Any] = {
        "n_labels": len(schema.labels),
        "n_levels": tuple(len(names) for _, names in schema.categories),
        "n_continuous": len(schema.continuous),
        "generator": generator,
    }
    if not network.use_observed_lib_size:
        covariates["library_b"] = library_b or (np.zeros(n_batches), np.ones(n_batches))
    vae = Scvi(n_genes, n_batches, network, **covariates)
    if kind == "scvi":
        return vae
    assert kind == "scanvi"
    from streamx.models.scanvi import Scanvi

    return Scanvi(vae, len(schema.labels), network, generator=generator)
