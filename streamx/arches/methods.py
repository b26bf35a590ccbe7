"""What all classes of this room share: how an object is made, saved, loaded, and begins with a reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from streamx.arches.folder import load_state, reference_of, save_state
from streamx.arches.keys import Keys
from streamx.arches.state import State, history_table, new_state, start_query
from streamx.config import FreezeConfig, TrvaeFreezeConfig, build
from streamx.errors import UsageError
from streamx.train.build import network_of


class Kind(Protocol):
    """A class of this room."""

    kind: str
    state: State


# -- how an object begins ------------------------------------------------------------------------------


def new_object(kind: str, adata: Any, given: Mapping[str, Any]) -> State:
    """A state from a constructor's arguments: keys, folder, memory, ``use_cuda``, and the network's settings.

    Raises
    ------
    UsageError
        If there are no data, or a setting is unknown.
    """
    own, network = _taken(given)
    settings = {}
    if kind == "totalvi":
        settings["empirical_prior"] = network.pop("empirical_protein_background_prior", None)
    return new_state(kind, _some(adata), **own, network=network_of(kind, network), settings=settings)


def query_object(
    kind: str,
    adata: Any,
    reference: Any,
    options: FreezeConfig | TrvaeFreezeConfig,
    given: Mapping[str, Any],
    *,
    mask_missing: bool,
) -> State:
    """A state that begins with a reference, and learns the new batches of other data."""
    (model, expected), (own, others) = reference_of(reference, kind), _taken(given)
    if others:
        raise UsageError(f"unknown option {min(others)!r}")
    state = new_state(kind, _some(adata), **own, otherwise=expected, network=model.module.config)
    start_query(state, model, options, mask_missing=mask_missing)
    return state


def _some(adata: Any) -> Any:
    if adata is None:
        raise UsageError("no data", fix="an AnnData object, a file, a store or a view")
    return adata


def _taken(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a state, and what is left of those that were given."""
    left = dict(given)
    keys = Keys.of({name: left.pop(name) for name in Keys.__dataclass_fields__ if name in left})
    device = "auto" if left.pop("use_cuda", True) else "cpu"
    own = {"keys": keys, "folder": left.pop("folder", None), "device": device}
    return own | {"memory": left.pop("memory", "4GB")}, left


# -- methods -------------------------------------------------------------------------------------------


def load_query_data(
    cls: Any,
    adata: Any,
    reference_model: Any,
    use_cuda: bool = True,
    freeze_dropout: bool = False,
    freeze_expression: bool = True,
    freeze_batchnorm_encoder: bool = True,
    freeze_batchnorm_decoder: bool = False,
    freeze_decoder_first_layer: bool = True,
    freeze_classifier: bool = True,
    unfrozen: bool = False,
    mask_missing: bool = False,
    **options: Any,
) -> Any:
    """A new object that learns the new batches of other data; the reference stays as it is.

    Parameters
    ----------
    reference_model
        A trained object, or the folder of a model: ours, or one that scvi-tools or scArches saved.
    freeze_dropout, freeze_expression, freeze_batchnorm_encoder, freeze_batchnorm_decoder
        And the others: :class:`~streamx.config.FreezeConfig` says what stays.
    mask_missing
        Ours: leave genes that the data lack out of their likelihood, instead of taking them as zero.
    options
        The arguments of :func:`setup_anndata`, where columns have other names than in the reference;
        ``folder``; ``memory``.

    Raises
    ------
    GeneError
        If the data share less than half of the reference's genes.
    """
    freeze = {
        "freeze_dropout": freeze_dropout,
        "freeze_expression": freeze_expression,
        "freeze_batchnorm_encoder": freeze_batchnorm_encoder,
        "freeze_batchnorm_decoder": freeze_batchnorm_decoder,
        "freeze_decoder_first_layer": freeze_decoder_first_layer,
        "freeze_classifier": freeze_classifier,
        "unfrozen": unfrozen,
    }
    found = object.__new__(cls)
    plan = build(FreezeConfig, freeze)
    given = options | {"use_cuda": use_cuda}
    found.state = query_object(cls.kind, adata, reference_model, plan, given, mask_missing=mask_missing)
    return found


def load(cls: Any, dir_path: str | Path, adata: Any = None, use_cuda: bool = True) -> Any:
    """An object from a folder, also of scvi-tools or scArches; with data, or those saved beside it."""
    found = object.__new__(cls)
    found.state = load_state(cls.kind, dir_path, adata, use_cuda=use_cuda)
    return found


def save(self: Kind, dir_path: str | Path, overwrite: bool = False, save_anndata: bool = False) -> None:
    """Write a model folder, which every ``streamx`` command reads too."""
    save_state(self.state, dir_path, overwrite=overwrite, save_anndata=save_anndata)


def described(self: Kind) -> str:
    """What a notebook shows of it."""
    name, model = type(self).__name__, self.state.model
    if model is None:
        return f"streamx {name}, not trained yet"
    schema = model.schema
    what = f"{len(schema.genes)} genes, {max(1, len(schema.batches))} batches"
    if schema.labels:
        what += f", {len(schema.labels)} labels"
    state = "trained" if self.state.trained else "with batches to learn: call train()"
    return f"streamx {name}, {state}: {what}"


def history(self: Kind) -> Any:
    """Losses by epoch; ``elbo_train_set`` and ``elbo_test_set`` are negative ELBOs, as in scArches."""
    return history_table(self.state.history)


def is_trained(self: Kind) -> bool:
    """Whether it may be asked."""
    return self.state.trained


def adata(self: Kind) -> Any:
    """The data that it was made with."""
    return self.state.data
