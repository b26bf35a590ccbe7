"""scANVI, as scArches' and scvi-tools' users call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from streamx.arches import differential, evidence, expression, methods
from streamx.arches.evidence import Indices
from streamx.arches.folder import reference_of
from streamx.arches.keys import setup_anndata
from streamx.arches.options import training_settings
from streamx.arches.state import (
    State,
    history_table,
    opened,
    train_model,
    train_reference,
)
from streamx.errors import UsageError
from streamx.posterior.draws import evaluating


class SCANVI:
    """scANVI (Xu 2021): scVI with labels, of which many may be missing.

    Parameters
    ----------
    adata
        As for :class:`~streamx.arches.scvi.SCVI`; ``labels_key`` has to be named.
    unlabeled_category
        Label that means none (missing ones always do).
    pretrained_model
        A trained :class:`~streamx.arches.scvi.SCVI` of the same data, whose network it goes on with.
    n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood
        And ``model_kwargs``: fields of :class:`~streamx.config.ScanviConfig`, and what ``SCVI`` takes.

    Raises
    ------
    UntrainedError
        If the pretrained model was not trained.
    """

    kind = "scanvi"
    state: State
    setup_anndata = staticmethod(setup_anndata)

    def __init__(
        self,
        adata: Any,
        unlabeled_category: str | None = None,
        pretrained_model: Any = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        use_cuda: bool = True,
        **model_kwargs: Any,
    ) -> None:
        named: dict[str, Any] = {
            "n_hidden": n_hidden,
            "n_latent": n_latent,
            "n_layers": n_layers,
            "dropout_rate": dropout_rate,
            "dispersion": dispersion,
            "gene_likelihood": gene_likelihood,
        }
        if pretrained_model is not None:
            named = asdict(reference_of(pretrained_model, "scvi")[0].module.config)
        given = named | model_kwargs | {"use_cuda": use_cuda}
        if unlabeled_category is not None:
            given["unlabeled_category"] = unlabeled_category
        self.state = methods.new_object("scanvi", adata, given)
        if self.state.keys.labels_key is None:
            raise UsageError("scanvi learns from labels", fix="labels_key, here or in setup_anndata")
        self.state.pretrained = pretrained_model

    @classmethod
    def from_scvi_model(
        cls,
        scvi_model: Any,
        unlabeled_category: str,
        labels_key: str | None = None,
        adata: Any = None,
        **scanvi_kwargs: Any,
    ) -> SCANVI:
        """Go on with a trained scVI, on its data or others (scvi-tools' name for ``pretrained_model``)."""
        own = scvi_model.state.keys
        keys = {name: value for name, value in asdict(own).items() if value}
        if labels_key is not None:
            keys["labels_key"] = labels_key
        keys["unlabeled_category"] = unlabeled_category
        adata = scvi_model.state.data if adata is None else adata
        return cls(adata, pretrained_model=scvi_model, **keys | scanvi_kwargs)

    def train(
        self,
        n_epochs_unsupervised: int | None = None,
        n_epochs_semisupervised: int | None = None,
        train_base_model: bool = True,
        train_size: float | None = None,
        test_size: float | None = None,
        lr: float | None = None,
        n_epochs_kl_warmup: int | None = None,
        n_iter_kl_warmup: int | None = None,
        frequency: int | None = None,
        unsupervised_trainer_kwargs: Mapping[str, Any] | None = None,
        semisupervised_trainer_kwargs: Mapping[str, Any] | None = None,
        unsupervised_train_kwargs: Mapping[str, Any] | None = None,
        semisupervised_train_kwargs: Mapping[str, Any] | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> None:
        """Train scVI first, unless there is one, then scANVI on top of it; a query trains scANVI alone.

        Classification and the rest of the loss are learnt together (scvi-tools from 0.9 on).

        Parameters
        ----------
        n_epochs_unsupervised, unsupervised_trainer_kwargs
            Of scVI; default epochs by size.
        n_epochs_semisupervised, semisupervised_trainer_kwargs
            Of scANVI; default: a third of scVI's, 2 to 10 (``max_epochs`` means the same).
        train_base_model
            False leaves scVI out.
        options
            Of both; see :meth:`SCVI.train`.
        """
        both = options | {
            "train_size": train_size,
            "test_size": test_size,
            "lr": lr,
            "n_epochs_kl_warmup": n_epochs_kl_warmup,
            "n_iter_kl_warmup": n_iter_kl_warmup,
            "frequency": frequency,
        }
        own = both | dict(semisupervised_trainer_kwargs or {}) | dict(semisupervised_train_kwargs or {})
        if n_epochs_semisupervised is not None:
            own["max_epochs"] = n_epochs_semisupervised
        settings, state = training_settings("scanvi", own), self.state
        if state.surgery is None and state.model is None:
            if state.pretrained is not None:
                settings["init"] = str(self._folder_of_pretrained())
            elif train_base_model:
                base = both | dict(unsupervised_trainer_kwargs or {}) | dict(unsupervised_train_kwargs or {})
                base |= {"max_epochs": n_epochs_unsupervised}
                path = state.folder / "base"
                of_base = training_settings("scvi", base)
                state.base = train_reference(state, "scvi", path, of_base, progress=progress)
                settings["init"] = str(path)
                settings.setdefault("max_epochs", min(10, max(2, round(len(state.base) / 3))))
        train_model(state, settings, progress=progress)

    def _folder_of_pretrained(self) -> Any:
        """Where the pretrained model lies, for training to begin from."""
        path = self.state.folder / "pretrained"
        if not path.exists():
            self.state.pretrained.save(path)
        return path

    def predict(
        self,
        adata: Any = None,
        indices: Indices = None,
        soft: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """Labels of cells, object (n_cells,); or with ``soft`` the probability of each, as a table."""
        parts = []
        with opened(self.state, adata, indices, whole=False) as (model, cells):
            with evaluating(model.module):
                for minibatch in cells:
                    parts.append(model.module.predict(minibatch).cpu().numpy())
            share_nl, labels = np.concatenate(parts), list(model.schema.labels)
            if soft:
                return pd.DataFrame(share_nl, index=cells.names, columns=labels)
        return np.array(labels, dtype=object)[share_nl.argmax(1)]

    @property
    def _labeled_indices(self) -> Sequence[int]:
        """Set to an empty list, and training takes no notice of labels (scArches' recipe for queries)."""
        raise UsageError("which cells have labels is in obs", fix="set it to [] to hide them all")

    @_labeled_indices.setter
    def _labeled_indices(self, rows: Sequence[int]) -> None:
        if len(rows):
            raise UsageError("some labels can't be hidden here", fix="unlabeled_category in obs")
        self.state.hide_labels = True

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """Losses of both trainings, as :attr:`SCVI.history` gives one."""
        return {
            "unsupervised_trainer_history": history_table(self.state.base),
            "semisupervised_trainer_history": history_table(self.state.history),
        }

    load_query_data = classmethod(methods.load_query_data)
    load = classmethod(methods.load)
    save = methods.save
    is_trained = property(methods.is_trained)
    __repr__ = methods.described
    adata = property(methods.adata)
    get_latent_representation = evidence.get_latent_representation
    get_elbo = evidence.get_elbo
    get_reconstruction_error = evidence.get_reconstruction_error
    get_latent_library_size = evidence.get_latent_library_size
    get_normalized_expression = expression.get_normalized_expression
    posterior_predictive_sample = expression.posterior_predictive_sample
    get_likelihood_parameters = expression.get_likelihood_parameters
    get_feature_correlation_matrix = expression.get_feature_correlation_matrix
    differential_expression = differential.differential_expression
