"""What an object of this room is: data, a model, and how it was trained; nothing else outlives a call."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from streamx.arches.data import Opened, as_collection, open_data, open_files, rows_of
from streamx.arches.keys import Keys, keys_of, with_protein_names
from streamx.config import (
    NETWORKS,
    TRAINING,
    FreezeConfig,
    TrainConfig,
    TrvaeFreezeConfig,
    build,
    parse_bytes,
)
from streamx.errors import BadValuesError, UntrainedError, UsageError, warn
from streamx.preprocess.run import preprocess
from streamx.query import read_blocks
from streamx.store.cells import FILE
from streamx.store.collection import Collection
from streamx.store.convert import convert
from streamx.surgery.cells import lay_query
from streamx.train.build import takes_floats
from streamx.train.cells import names_in
from streamx.train.device import one_torch_thread, pick_device
from streamx.train.distributed import ALONE
from streamx.train.model import Model, load_model
from streamx.train.run import train
from streamx.train.surgery import (
    learn_batches,
    measured_in,
    narrowed,
    widen,
    with_batch,
    with_covariates,
)
from streamx.train.task import Run

History = list[dict[str, float]]


@dataclass(frozen=True)
class Surgery:
    """That a model learns the last ``n_new`` of its batches, and so many levels of each covariate; and what
    stays meanwhile.

    ``mask_missing``: genes that the data lack are left out of the likelihood, instead of counting as zero.
    """

    n_new: int
    options: FreezeConfig | TrvaeFreezeConfig
    mask_missing: bool = False
    n_new_levels: Sequence[int] = ()


@dataclass(eq=False)
class State:
    """What an object holds.

    Attributes
    ----------
    kind
        ``scvi``, ``scanvi``, ``totalvi`` or ``trvae``.
    data, keys
        What it was made with, and where that holds what.
    network, settings
        Of a new model: the network's configuration, and training settings that the constructor decides.
    folder
        Where stores and models lie while the object lives.
    memory, device
        Bytes to use; where the arithmetic runs.
    model
        None before the first training.
    trained
        Whether it may be asked.
    history, base
        Losses of all epochs; of scANVI's first training.
    surgery
        Where the model is a reference that learns new batches.
    hide_labels
        Train as if no cell had a label.
    pretrained
        A trained scVI that scANVI begins with.
    expected
        Names that the batches have to have.
    """

    kind: str
    data: Any
    keys: Keys
    network: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="streamx-")))
    memory: str = "4GB"
    device: str = "auto"
    model: Model | None = None
    trained: bool = False
    history: History = field(default_factory=list)
    base: History = field(default_factory=list)
    surgery: Surgery | None = None
    hide_labels: bool = False
    pretrained: Any = None
    expected: list[str] | None = None
    cells: Collection | None = None  # what it is trained on, once that was needed

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def model_folder(self) -> Path:
        """Place for one more model."""
        return self.folder / f"model-{len(list(self.folder.glob('model-*'))):03d}"


def new_state(
    kind: str, data: Any, keys: Keys, folder: str | Path | None, otherwise: Keys | None = None, **more: Any
) -> State:
    """A state in a folder that is given, or one that is removed when the state is."""
    keys = keys_of(data, keys, otherwise)
    if folder is not None:
        return State(kind, data, keys, folder=Path(folder), **more)
    state = State(kind, data, keys, **more)
    weakref.finalize(state, shutil.rmtree, state.folder, ignore_errors=True)
    return state


def trained_model(state: State) -> Model:
    """The model.

    Raises
    ------
    UntrainedError
        If it was not trained yet.
    """
    if state.model is None or not state.trained:
        raise UntrainedError("this model was not trained yet", fix="call its train() first")
    return state.model


@contextmanager
def opened(
    state: State, data: Any = None, indices: Sequence[int] | np.ndarray | None = None, *, whole: bool = True
) -> Iterator[tuple[Model, Opened]]:
    """The trained model, and data as it takes them: by default those that it was made with."""
    model = trained_model(state)
    data = state.data if data is None else data
    if data is None:
        raise UsageError("the model was loaded without data", fix="pass adata=")
    keys = state.keys if data is state.data else keys_of(data, otherwise=state.keys)
    with (
        one_torch_thread(),
        open_data(model, data, keys, indices, whole=whole, memory=state.memory) as found,
    ):
        yield model, found


def generator_for(model: Model, seed: int) -> torch.Generator:
    """A generator of its own for every call, on the model's device."""
    return torch.Generator(next(model.module.parameters()).device).manual_seed(seed)


# -- training ------------------------------------------------------------------------------------------


def train_model(state: State, settings: dict[str, Any], *, progress: bool) -> None:
    """Train, or go on training: with fresh optimiser and warm-up, from the weights as they are."""
    if state.surgery is not None:
        _train_query(state, settings, progress)
        return
    begin = None if state.model is None else str(state.model.path)
    if begin is None and state.kind == "scanvi":
        settings = {"base_epochs": 0} | settings
    path = state.model_folder()
    train_reference(state, state.kind, path, {"init": begin} | settings, progress=progress)
    adopt(state, path)


def train_reference(
    state: State, kind: str, path: Path, settings: dict[str, Any], *, progress: bool
) -> History:
    """A new model of the state's data in a folder, and its history."""
    keys = state.keys
    columns: dict[str, Any] = {
        "category_keys": keys.categorical_covariate_keys,
        "continuous_keys": keys.continuous_covariate_keys,
    }
    if keys.labels_key is not None and kind != "trvae":
        columns["label_key"] = keys.labels_key
    if keys.unlabeled_category is not None:
        columns["unlabeled"] = keys.unlabeled_category
    if kind == "totalvi" and keys.protein_expression_obsm_key is not None:
        columns["protein_key"] = keys.protein_expression_obsm_key
    known = {f.name for f in fields(NETWORKS[kind])}  # scVI comes before scANVI and has fewer settings
    network = {name: value for name, value in asdict(state.network).items() if name in known}
    own: dict[str, Any] = {"memory": state.memory, "device": state.device} | columns | state.settings
    settings = dict(settings)
    cells = training_cells(state)
    split = split_of(state, cells, settings.pop("indices", None))
    train(cells, path, model=kind, progress=progress, split=split, **network | own | settings)
    return read_history(path / "history.csv")


def adopt(state: State, path: Path) -> None:
    """Take a model that was trained into a folder as one's own."""
    model = load_model(path)
    model.module.to(pick_device(state.device))
    if state.keys.batch_key is None and as_collection(state.data) is None:
        # all cells are one batch; the name and the column that convert gives to it mean nothing
        schema = replace(model.schema, batch_key=None)
        model = replace(model, schema=schema, card=model.card | {"batch_key": None})
    state.model, state.trained = model, True
    state.history = [*state.history, *read_history(path / "history.csv")]


def training_cells(state: State) -> Collection:
    """A store of the data, made when it is first needed; a store or view as it is."""
    if state.cells is not None:
        return state.cells
    keys, collection = state.keys, as_collection(state.data)
    if collection is not None:
        if keys.batch_key not in (None, collection.batch_key):
            raise UsageError(
                f"its batches are in {collection.batch_key!r}, not in {keys.batch_key!r}",
                where=str(collection.path),
                fix="leave batch_key out, or convert with it",
            )
        state.cells = collection
        return collection
    if isinstance(state.data, (list, tuple)) and len(state.data) > 1 and keys.batch_key is None:
        raise UsageError("several files and no batch_key", fix="name the obs column that holds the batches")
    data = with_protein_names(state.data, keys) if hasattr(state.data, "obsm") else state.data
    obsm = keys.protein_expression_obsm_key if state.kind == "totalvi" else None
    try:
        state.cells = convert(
            data if isinstance(data, (list, tuple)) else [data],
            state.folder / "store",
            batch_key=keys.batch_key or FILE,
            layer=keys.layer,
            obsm=(obsm,) if obsm else (),
            allow_float=takes_floats(state.network),
            memory=state.memory,
        )
    except BadValuesError as error:
        model = "" if state.kind == "trvae" else "trVAE with "
        fix = (error.fix or "").replace("--allow-float", f"{model}recon_loss='mse'")
        raise BadValuesError(error.what, where=error.where, fix=fix) from None
    return state.cells


def split_of(
    state: State, cells: Collection, indices: tuple[Any, Any] | None
) -> dict[str, np.ndarray] | None:
    """Rows of the data that train and that validate -> masks over a store or view of them, by cells' names.

    Raises
    ------
    UsageError
        If the data are files, or their cells' names are not unique.
    """
    if indices is None:
        return None
    source = as_collection(state.data)
    names = getattr(state.data if source is None else source, "obs_names", None)
    if names is None or not names.is_unique:
        raise UsageError(
            "which rows train can't be told",
            fix="an AnnData object, a store or a view, with unique obs_names",
        )
    n, place_n = len(names), names.get_indexer(cells.obs_names)
    given = dict(zip(("train", "validation"), indices, strict=True))
    masks = {name: np.isin(np.arange(n), rows_of(r, n)) for name, r in given.items() if r is not None}
    masks.setdefault("train", ~masks.get("validation", np.zeros(n, bool)))
    masks.setdefault("validation", ~masks["train"])
    return {name: mask[place_n] & (place_n >= 0) for name, mask in masks.items()}


def read_history(path: Path) -> History:
    table = pd.read_csv(path)
    return [{str(name): float(value) for name, value in row.items()} for row in table.to_dict("records")]


def history_table(history: History) -> pd.DataFrame:
    """Mean losses by epoch (from 0 on), and the negative ELBO under the names that scArches gave to it."""
    table = pd.DataFrame(history).drop(columns="epoch", errors="ignore")
    table.index.name = "epoch"
    for prefix, name in (("", "elbo_train_set"), ("validation_", "elbo_test_set")):
        if f"{prefix}reconstruction" in table:
            parts = [c for c in table if c.startswith((f"{prefix}kl", f"{prefix}reconstruction"))]
            whole = [c for c in parts if "reconstruction_" not in c]  # totalVI's parts are in the sum
            table[name] = table[whole].sum(axis=1)
    return table


# -- surgery -------------------------------------------------------------------------------------------


def start_query(
    state: State, reference: Model, options: FreezeConfig | TrvaeFreezeConfig, *, mask_missing: bool
) -> None:
    """Let a state begin with a reference that has the data's new batches; the reference stays as it is."""
    schema = state.keys.spoken(reference.schema)
    model = replace(reference, schema=schema)
    view = query_cells(state, model, mask_missing)
    new = [name for name in view.batches if name not in model.batches]
    config = _query_config(state, {})
    module = copy.deepcopy(reference.module).cpu()
    for name in new:
        schema = schema.with_batches([name])
        run = Run(view, schema, config, None, torch.device("cpu"), ALONE, None)
        module = with_batch(run, module, name)
    schema = schema.with_levels({key: names_in(view.obs_column(key)) for key, _ in schema.categories})
    run = Run(view, schema, config, None, torch.device("cpu"), ALONE, None)
    module, n_new_levels = with_covariates(run, module)
    module.eval().to(pick_device(state.device))
    state.model = replace(model, module=module, schema=schema)
    state.surgery = Surgery(len(new), options, mask_missing, n_new_levels)
    state.trained = not new and not any(n_new_levels)
    if state.trained:
        warn("the reference knows all batches of these data: there is nothing to learn")


def query_cells(state: State, model: Model, mask_missing: bool) -> Collection:
    """The data on the model's genes, or on those that they have, as a view."""
    if state.cells is not None:
        return state.cells
    path, collection = state.folder / "query", as_collection(state.data)
    options = {"memory": state.memory, "threads": 0}
    if collection is not None:
        there = list(map(str, collection.var_names))
        same, known = there == list(model.genes), set(there)
        genes = [name for name in model.genes if name in known] if mask_missing else list(model.genes)
        settings: dict[str, Any] = {"profile": "counts", "genes": genes, "keep_mt": True}
        settings |= {"min_features": 0, "min_cells": 0}
        state.cells = collection if same else preprocess(collection, path, **settings, **options)
        return state.cells
    with tempfile.TemporaryDirectory(prefix="streamx-") as scratch:
        query, config = open_files(model, state.data, state.keys, Path(scratch), state.memory)
        try:
            blocks = read_blocks(query, model, config, parse_bytes(state.memory))
            state.cells = lay_query(
                model,
                query,
                query.batches,
                blocks,
                path,
                options,
                new_labels="refuse",
                mask_missing=mask_missing,
            )
        finally:
            query.close()
    return state.cells


def _query_config(state: State, settings: dict[str, Any]) -> TrainConfig:
    own = TRAINING[state.kind] | {"weight_decay": 0.0, "memory": state.memory, "device": state.device}
    own |= {name: value for name, value in state.settings.items() if name == "empirical_prior"}
    config: TrainConfig = build(TrainConfig, {"model": state.kind} | own | settings)
    return config


def _train_query(state: State, settings: dict[str, Any], progress: bool) -> None:
    assert state.model is not None
    assert state.surgery is not None
    view = query_cells(state, state.model, state.surgery.mask_missing)
    split = split_of(state, view, settings.pop("indices", None))
    config = _query_config(state, settings)
    schema, device = state.model.schema, pick_device(config.device)
    if state.hide_labels:
        schema = replace(schema, labels=())
    run = Run(view, schema, config, None, device, ALONE, None, split=split)
    module = copy.deepcopy(state.model.module).cpu()
    measured = measured_in(view, state.model.schema)
    learning = narrowed(state.kind, state.model.schema, module, measured)
    with one_torch_thread():
        new, options = state.surgery, state.surgery.options
        done = learn_batches(run, learning, new.n_new, options, new.n_new_levels, progress=progress)
    if measured is not None:
        widen(module, learning, measured)
    module.eval().to(device)
    state.history = [*state.history, *done.history]
    card = {name: value for name, value in state.model.card.items() if name == "preprocessing"}
    state.model = replace(state.model, module=module, id="", card=card)
    state.trained = True
