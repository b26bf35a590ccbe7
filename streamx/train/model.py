"""A trained model and all that mapping new cells needs, as a value and as a folder.

::

    MODEL/
      model.json           schema, preprocessing, settings, versions, hash of every file; written last
      model.safetensors    weights; scale and normalisation tables of the reference
      README.md            the card for people, made from it (:mod:`streamx.train.card`)
      history.csv          mean losses per epoch
      reference.zarr       obs and latents of the reference cells (AnnData-Zarr)
      added/*.zarr         the same of cells that surgery added (which then keeps its weights in
                           model-<n>.safetensors: the card says which counts)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from streamx.errors import BadFileError, IncompleteError, IntegrityError
from streamx.interop.load import is_foreign, load_foreign
from streamx.loader.transform import Transform
from streamx.models.matched import Clusters
from streamx.models.scalex import NormStats
from streamx.schema import Schema
from streamx.store.location import Location, open_location
from streamx.store.manifest import describe, dump
from streamx.train.build import build_module, network_of

FORMAT = 1
WEIGHTS = "model.safetensors"
CARD = "model.json"
SCALEX_RNA = Transform(target_sum=1e4, total="view_total", log1p=True, scale="batch")


@dataclass(frozen=True, eq=False)
class Model:
    """A reference model.

    Attributes
    ----------
    kind
        ``scalex``, ``scvi``, ``scanvi``, ``totalvi`` or ``trvae``.
    module
        The network, in evaluation mode.
    schema
        Genes and categories that it knows; no batches where they are unknown.
    transform
        From counts to input.
    min_features
        Cells with fewer detected genes were left out.
    drop
        Genes whose name starts so are dropped before anything is counted.
    total
        What a cell's total counts: ``kept`` or ``all`` genes but the dropped, or the ``selected`` ones;
        ``geometric``: no total, but the geometric mean of 1 + x over the panel of proteins.
    scale_bg
        Table of the transform's division, float32 (n_batches, n_genes); None if unknown or unused. It and
        the next three are SCALEX's.
    stats
        Statistics of the encoder's pre-activations over the reference; None if unknown.
    clusters
        What the reference looks like in each of its clusters, to match queries with; None if unknown.
    norm
        How the reference's latents were normalised.
    id
        SHA-256 of weights and tables.
    card
        ``model.json``: what this value holds, and where it comes from.
    """

    kind: str
    module: Any
    schema: Schema
    transform: Transform
    min_features: int
    drop: tuple[str, ...]
    total: str
    scale_bg: np.ndarray | None
    stats: NormStats | None
    clusters: Clusters | None
    norm: str | None
    id: str
    path: Path | str
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def genes(self) -> tuple[str, ...]:
        """Features of its input, in order."""
        return self.schema.genes

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the reference batches; a batch's code is its position."""
        return self.schema.batches

    @property
    def latent_key(self) -> str:
        """obsm key of its latents."""
        return f"X_{self.kind}"

    @property
    def pooled_scale_g(self) -> np.ndarray | None:
        """Largest value of each gene over the reference's batches, float32 (n_genes,)."""
        return None if self.scale_bg is None else self.scale_bg.max(0)


def save_weights(
    location: Location, module: nn.Module, tables: Mapping[str, np.ndarray], key: str = WEIGHTS
) -> tuple[str, list[Any]]:
    """Write weights and tables: their SHA-256, and (bytes, crc32c)."""
    tensors = {
        f"weights.{name}": value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    for name, table in tables.items():
        tensors[f"tables.{name}"] = torch.as_tensor(np.ascontiguousarray(table))
    data = save_tensors(tensors)
    location.write(key, data)
    return hashlib.sha256(data).hexdigest(), describe(data)


def seal(card: dict[str, Any]) -> bytes:
    """The card as bytes that tell whether they were changed."""
    return dump(card | {"seal": hashlib.sha256(dump(card)).hexdigest()})


def read_card(location: Location) -> dict[str, Any] | None:
    """The card of a finished model, or None.

    Raises
    ------
    IntegrityError
        If its bytes are not those that were written.
    """
    if not location.exists(CARD):
        return None
    where = f"{location}/{CARD}"
    try:
        card = json.loads(location.read(CARD))
        seal = card.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise IntegrityError("is no model card", where=where, fix="restore it from a copy") from None
    if hashlib.sha256(dump(card)).hexdigest() != seal:
        raise IntegrityError("was changed after it was written", where=where, fix="restore it from a copy")
    if not _is_card(card):  # with a seal of its own, from somebody who means ill
        raise IntegrityError("is no model card", where=where, fix="don't use it; ask who made it")
    if card["format"] > FORMAT:
        raise BadFileError(f"model of format {card['format']}", where=where, fix="update streamx")
    return card


def _is_card(card: dict[str, Any]) -> bool:
    """Whether it has what every card has, in the shape that is read."""
    kinds = {"format": int, "model": str, "id": str, "files": dict}
    return all(isinstance(card.get(name), kind) for name, kind in kinds.items()) and all(
        isinstance(of, list) and len(of) == 2 for of in card["files"].values()
    )


def load_model(path: str | Path | Location) -> Model:
    """Load a model folder, or one that SCALEX, scvi-tools or scArches wrote.

    Raises
    ------
    IncompleteError
        If training has not finished.
    IntegrityError
        If a file's bytes are not those that were written.
    BadFileError
        If this is no model.
    """
    location = open_location(path)
    card = read_card(location)
    if card is None:
        if not location.shared and is_foreign(Path(location.root)):
            return _from_foreign(Path(location.root))
        if location.journal.exists():
            raise IncompleteError(
                "training has not finished", where=str(path), fix="run the same `streamx train` again"
            )
        raise BadFileError(
            "is no model: it holds no model.json",
            where=str(path),
            fix="give the folder that `train -o` wrote",
        )
    key = card.get("weights", WEIGHTS)
    data = location.read(key)
    if describe(data) != card["files"][key]:
        raise IntegrityError(
            "bytes are not those that were written",
            where=f"{location}/{key}",
            fix="restore it from a copy, or train again",
        )
    tensors = load_tensors(data)
    kind, schema = card["model"], Schema.of(card)
    module = build_module(kind, schema, network_of(kind, card["network"]))
    module.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("weights.")})
    tables = {k[7:]: v.numpy() for k, v in tensors.items() if k.startswith("tables.")}
    preprocessing = card["preprocessing"]
    scalex = kind == "scalex"
    return Model(
        kind=kind,
        module=module.eval(),
        schema=schema,
        transform=Transform.of(preprocessing["transform"]),
        min_features=preprocessing["recipe"]["min_features"],
        drop=tuple(preprocessing["recipe"]["drop"]),
        total=preprocessing["recipe"]["total"],
        scale_bg=tables.get("scale_bg"),
        stats=NormStats(tables["n_b"], tables["mean_bh"], tables["var_bh"]) if scalex else None,
        clusters=Clusters(**{f.name: tables[f.name] for f in fields(Clusters)}) if scalex else None,
        norm=card["norm"],
        id=card["id"],
        path=location.root,
        card=card,
    )


def _from_foreign(folder: Path) -> Model:
    """A model that another tool saved. SCALEX keeps neither batch names nor scale tables."""
    found = load_foreign(folder)
    scalex = found.kind == "scalex"
    weights = save_tensors({name: value.contiguous() for name, value in found.module.state_dict().items()})
    return Model(
        kind=found.kind,
        module=found.module,
        schema=found.schema,
        transform=SCALEX_RNA if scalex else Transform(),
        min_features=600 if scalex else 0,
        drop=("ERCC", "MT-", "mt-") if scalex else (),
        total="kept",
        scale_bg=None,
        stats=None,
        clusters=None,
        norm="minibatch" if scalex else None,
        id=hashlib.sha256(weights).hexdigest(),
        path=folder,
        card={"model": found.kind, "origin": f"{found.origin} checkpoint", "layer": found.layer},
    )
