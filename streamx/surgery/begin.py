"""The updated model before its first file: a copy of the reference, or another tool's model as ours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

import streamx
from streamx.errors import SettingsChangedError
from streamx.mapping import INDEXES
from streamx.store.latents import write_latents
from streamx.store.location import Location, Put
from streamx.surgery.narrow import spread_of
from streamx.train.build import n_latent_of
from streamx.train.card import write_card
from streamx.train.model import FORMAT, WEIGHTS, Model, read_card, save_weights


def begin(source: Location, out: Location, model: Model) -> None:
    """The updated model before its first file: a copy of the reference.

    Raises
    ------
    SettingsChangedError
        If the folder holds the update of another model.
    """
    card = read_card(out)
    if card is not None:
        if card.get("origin", card["id"]) != model.id:
            raise SettingsChangedError(
                "holds a model that was not made from this reference",
                where=str(out),
                fix="choose another folder, or name the reference that it was made from",
            )
        return
    if "files" not in model.card:
        _adopt(out, model)
        return
    for key in model.card["files"]:
        out.write(key, source.read(key))
    for name in ["reference.zarr", *model.card.get("added", [])]:
        copy_tree(source.below(name), out.below(name))
    indexes = source.below(INDEXES)
    if isinstance(out.root, Path) and indexes.list():  # transfer appends the cells that come
        copy_tree(indexes, out.below(INDEXES))
    spread = spread_of(out.below("reference.zarr"), model.latent_key)
    fresh = {"earlier": [], "added": [], "surgery": [], "weights": WEIGHTS, "spread": spread}
    write_card(out, fresh | model.card | {"origin": model.id})


def _adopt(out: Location, model: Model) -> None:
    """Another tool's model as ours, without cells: files of its batches bring them."""
    digest, described = save_weights(out, model.module, {})
    nobody = np.zeros((0, n_latent_of(model.module.config)), np.float32)
    write_latents(
        out.below("reference.zarr"),
        pd.DataFrame(index=pd.Index([], dtype=object)),
        {model.latent_key: nobody},
        {"streamx": {"model": digest}},
    )
    recipe = {"min_features": model.min_features, "drop": list(model.drop), "total": model.total}
    card = {
        "format": FORMAT,
        "model": model.kind,
        "id": digest,
        **asdict(model.schema),
        "network": asdict(model.module.config),
        "norm": None,
        "preprocessing": {"transform": {}, "recipe": recipe, "parameters": {}},
        "settings": {},
        "training": {"made_by": model.card["origin"]},
        "versions": {"streamx": streamx.__version__},
        "files": {WEIGHTS: described},
        "origin": model.id,
        "earlier": [],
        "added": [],
        "surgery": [],
        "weights": WEIGHTS,
    }
    write_card(out, card)


def copy_tree(source: Location, target: Location) -> None:
    """All objects of a zarr hierarchy, put in place as a whole."""

    def copy(put: Put) -> None:
        for key in source.list():
            put(key, source.read(key))

    target.put_tree(copy)
