"""totalVI, as scArches' and scvi-tools' users call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamx.arches import differential, evidence, expression, methods
from streamx.arches.keys import setup_anndata
from streamx.arches.options import training_settings
from streamx.arches.state import State, train_model


class TOTALVI:
    """totalVI (Gayoso 2021): genes and surface proteins of the same cells.

    Parameters
    ----------
    adata
        As for :class:`~streamx.arches.scvi.SCVI`; ``protein_expression_obsm_key`` (default:
        ``protein_expression``) holds the proteins. One without a count in a batch was not measured there.
    n_latent, gene_dispersion, protein_dispersion, gene_likelihood, latent_distribution
        And ``model_kwargs``: fields of :class:`~streamx.config.TotalviConfig`, and what ``SCVI`` takes.
    empirical_protein_background_prior
        Begin the prior of the background from mixtures fitted to some cells; None: with more than ten
        proteins.
    """

    kind = "totalvi"
    state: State
    setup_anndata = staticmethod(setup_anndata)

    def __init__(
        self,
        adata: Any,
        n_latent: int = 20,
        gene_dispersion: str = "gene",
        protein_dispersion: str = "protein",
        gene_likelihood: str = "nb",
        latent_distribution: str = "normal",
        empirical_protein_background_prior: bool | None = None,
        use_cuda: bool = True,
        **model_kwargs: Any,
    ) -> None:
        named = {
            "n_latent": n_latent,
            "gene_dispersion": gene_dispersion,
            "protein_dispersion": protein_dispersion,
            "gene_likelihood": gene_likelihood,
            "latent_distribution": latent_distribution,
            "empirical_protein_background_prior": empirical_protein_background_prior,
            "use_cuda": use_cuda,
        }
        self.state = methods.new_object("totalvi", adata, named | model_kwargs)

    def train(
        self,
        n_epochs: int | None = None,
        train_size: float | None = None,
        test_size: float | None = None,
        lr: float | None = None,
        n_epochs_kl_warmup: int | None = None,
        n_iter_kl_warmup: int | str | None = "auto",
        batch_size: int | None = None,
        frequency: int | None = None,
        early_stopping_kwargs: Mapping[str, Any] | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> None:
        """Train, or train on. What is left out is as documented: 400 epochs, lr 4e-3, minibatches of 256.

        Parameters
        ----------
        n_iter_kl_warmup
            ``"auto"``: three quarters of the number of cells, unless ``n_epochs_kl_warmup`` is given.
        early_stopping_kwargs, options
            As :meth:`SCVI.train`. Early stopping (patience 45, rate x 0.6 after 30) is on unless it is turned
            off with ``early_stopping=False``.
        """
        options |= {
            "n_epochs": n_epochs if n_epochs is not None else options.pop("max_epochs", None),
            "train_size": train_size,
            "test_size": test_size,
            "lr": lr,
            "n_epochs_kl_warmup": n_epochs_kl_warmup,
            "n_iter_kl_warmup": n_iter_kl_warmup,
            "batch_size": batch_size,
            "frequency": frequency,
            "early_stopping_kwargs": early_stopping_kwargs,
        }
        train_model(self.state, training_settings("totalvi", options), progress=progress)

    load_query_data = classmethod(methods.load_query_data)
    load = classmethod(methods.load)
    save = methods.save
    history = property(methods.history)
    is_trained = property(methods.is_trained)
    __repr__ = methods.described
    adata = property(methods.adata)
    get_latent_representation = evidence.get_latent_representation
    get_elbo = evidence.get_elbo
    get_reconstruction_error = evidence.get_reconstruction_error_by_part
    get_marginal_ll = evidence.get_marginal_ll
    get_latent_library_size = evidence.get_latent_library_size
    get_normalized_expression = expression.get_normalized_expression_with_proteins
    get_protein_foreground_probability = expression.get_protein_foreground_probability
    posterior_predictive_sample = expression.posterior_predictive_sample
    get_likelihood_parameters = expression.get_likelihood_parameters
    get_feature_correlation_matrix = expression.get_feature_correlation_matrix
    differential_expression = differential.differential_expression
