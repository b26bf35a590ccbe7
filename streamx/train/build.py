"""From the name of a model to its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from streamx.config import ScalexConfig, build
from streamx.schema import Schema

NETWORKS: dict[str, type] = {"scalex": ScalexConfig}


def network_of(kind: str, settings: Mapping[str, Any]) -> Any:
    """The network's settings as its config class."""
    return build(NETWORKS[kind], dict(settings))


def build_module(
    kind: str, schema: Schema, network: Any, generator: torch.Generator | None = None
) -> nn.Module:
    """A new network for the genes and categories of a schema, on the CPU."""
    n_genes, n_batches = len(schema.genes), max(1, len(schema.batches))
    assert kind == "scalex"
    from streamx.models.scalex import Scalex

    return Scalex(n_genes, n_batches, network, generator)
