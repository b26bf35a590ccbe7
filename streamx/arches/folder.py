"""Objects of this room as folders: a model's, as ``streamx train`` writes it, and what the object adds."""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import streamx
from streamx.arches.keys import Keys
from streamx.arches.state import State, Surgery, new_state, read_history, trained_model
from streamx.config import FreezeConfig, TrvaeFreezeConfig
from streamx.errors import UsageError
from streamx.models.scanvi import Scanvi
from streamx.store.collection import Collection
from streamx.store.latents import write_latents
from streamx.store.location import Location, open_location
from streamx.store.manifest import describe
from streamx.train.build import TAKES_ROWS
from streamx.train.cells import columns_of
from streamx.train.counts import latents
from streamx.train.device import one_torch_thread, pick_device
from streamx.train.model import CARD, FORMAT, WEIGHTS, Model, load_model, read_card, save_weights, seal
from streamx.train.run import as_csv
from streamx.train.surgery import measured_in, narrowed

OURS = "arches"  # the entry of the card that is this room's
ADATA = "adata.h5ad"
NO_PREPROCESSING = {
    "transform": {},
    "recipe": {"min_features": 0, "drop": [], "total": "kept"},
    "parameters": {},
}


def save_state(state: State, folder: str | Path, *, overwrite: bool, save_anndata: bool) -> None:
    """Write a folder that :func:`load_state` and every ``streamx`` command read.

    Raises
    ------
    UntrainedError
        If the model was not trained yet.
    UsageError
        If the folder is there and may not be overwritten, or data to be saved are no AnnData object.
    """
    model, folder = trained_model(state), Path(folder)
    if folder.exists() and not overwrite:
        raise UsageError("is there already", where=str(folder), fix="overwrite=True, or another folder")
    if save_anndata and not hasattr(state.data, "write_h5ad"):
        raise UsageError("these data are in a file already", fix="leave save_anndata out")
    source = open_location(str(model.path))
    if folder.exists():
        if Path(source.root).resolve() == folder.resolve():
            return
        shutil.rmtree(folder)
    location = open_location(folder)
    if model.card.get("id") and read_card(source) is not None:
        shutil.copytree(source.root, folder)
        card = dict(model.card)
    else:  # changed since, or of another tool
        card = write_model(location, model)
        if state.cells is not None:
            write_cells(location, model, state.cells, card["id"])
    for name, history in (("history.csv", state.history), ("history-base.csv", state.base)):
        if history:  # of all trainings, where there were several
            table = as_csv(history)
            location.write(name, table)
            card["files"] = card["files"] | {name: describe(table)}
    location.write(CARD, seal(card | {OURS: _as_card(state)}))
    if save_anndata:
        state.data.write_h5ad(folder / ADATA)


def write_model(location: Location, model: Model) -> dict[str, Any]:
    """Write the weights, and give the card, which is to be written last."""
    digest, described = save_weights(location, model.module, {})
    module = model.module
    network = asdict(module.config) | (asdict(module.vae.config) if isinstance(module, Scanvi) else {})
    versions = {"streamx": streamx.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        "format": FORMAT,
        "model": model.kind,
        "id": digest,
        **asdict(model.schema),
        "network": network,
        "norm": None,
        "preprocessing": model.card.get("preprocessing", NO_PREPROCESSING),
        "versions": versions,
        "files": {WEIGHTS: described},
    }


def write_cells(location: Location, model: Model, cells: Collection, digest: str) -> None:
    """obs and latents of the cells that a model was trained on last, as ``streamx train`` writes them."""
    device = next(model.module.parameters()).device
    columns = columns_of(cells, model.schema, device)
    module = copy.deepcopy(model.module).cpu()
    module = narrowed(model.kind, model.schema, module, measured_in(cells, model.schema)).to(device)
    with one_torch_thread():
        z_nk = latents(module, cells, columns, device=device, sparse=model.kind in TAKES_ROWS)
    uns = {"streamx": {"model": digest, "batch_key": cells.batch_key}}
    write_latents(location.below("reference.zarr"), cells.obs, {model.latent_key: z_nk}, uns)


def _as_card(state: State) -> dict[str, Any]:
    return {
        "keys": asdict(state.keys),
        "surgery": None if state.surgery is None else asdict(state.surgery),
    }


def load_state(kind: str, folder: str | Path, data: Any, *, use_cuda: bool) -> State:
    """An object from a folder of ours, or one that scvi-tools or scArches wrote.

    Raises
    ------
    UsageError
        If it holds a model of another kind.
    """
    model = load_model(folder)
    if model.kind != kind:
        raise UsageError(f"holds a {model.kind}, not a {kind}", where=str(folder), fix=_class_of(model.kind))
    kept = model.card.get(OURS) or {}
    keys = keys_in(model)
    if data is None and (Path(folder) / ADATA).is_file():
        from anndata import read_h5ad

        data = read_h5ad(Path(folder) / ADATA)
    state = new_state(kind, data, Keys(), None, keys, device="auto" if use_cuda else "cpu")
    model.module.to(pick_device(state.device))
    state.model, state.trained, state.network = model, True, model.module.config
    if kept.get("surgery"):
        of = TrvaeFreezeConfig if kind == "trvae" else FreezeConfig
        state.surgery = Surgery(**kept["surgery"] | {"options": of(**kept["surgery"]["options"])})
    for name, target in (("history.csv", state.history), ("history-base.csv", state.base)):
        if (Path(folder) / name).is_file():
            target.extend(read_history(Path(folder) / name))
    return state


def _class_of(kind: str) -> str:
    return f"{kind.upper()}.load reads it" if kind != "scalex" else "map onto it with streamx.project"


def keys_in(model: Model) -> Keys:
    """What the data of a model in a folder were called, as far as it says."""
    kept = model.card.get(OURS)
    return Keys.of(kept["keys"]) if kept else Keys(layer=model.card.get("layer"))


def reference_of(reference: Any, kind: str | None = None) -> tuple[Model, Keys]:
    """The model of a trained object, or in a folder, and what its data were called.

    Raises
    ------
    UsageError
        If it is of another kind than asked for.
    """
    state = getattr(reference, "state", None)
    model = trained_model(state) if isinstance(state, State) else load_model(reference)
    if kind not in (None, model.kind):
        raise UsageError(f"the reference is a {model.kind}, not a {kind}", fix=_class_of(model.kind))
    return model, state.keys if isinstance(state, State) else keys_in(model)
