"""scVI, as scArches' and scvi-tools' users call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamx.arches import differential, evidence, expression, methods
from streamx.arches.keys import setup_anndata
from streamx.arches.options import training_settings
from streamx.arches.state import State, train_model


class SCVI:
    """scVI (Lopez 2018) on an AnnData object, files, a store or a view.

    Parameters
    ----------
    adata
        AnnData, set up by :func:`setup_anndata` or with the keys given here; a path, or a list of them; a
        store or view, or its path.
    n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, latent_distribution
        And ``model_kwargs``: fields of :class:`~streamx.config.ScviConfig`, named as in scvi-tools.
    use_cuda
        Compute on a GPU, where there is one.
    model_kwargs
        Also the arguments of :func:`setup_anndata`; ``folder``, which keeps the store and the trained models
        (default: a temporary one); ``memory``, bytes to use.

    Raises
    ------
    UsageError
        For unknown settings.
    """

    kind = "scvi"
    state: State
    setup_anndata = staticmethod(setup_anndata)

    def __init__(
        self,
        adata: Any,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        latent_distribution: str = "normal",
        use_cuda: bool = True,
        **model_kwargs: Any,
    ) -> None:
        named = {
            "n_hidden": n_hidden,
            "n_latent": n_latent,
            "n_layers": n_layers,
            "dropout_rate": dropout_rate,
            "dispersion": dispersion,
            "gene_likelihood": gene_likelihood,
            "latent_distribution": latent_distribution,
            "use_cuda": use_cuda,
        }
        self.state = methods.new_object("scvi", adata, named | model_kwargs)

    def train(
        self,
        n_epochs: int | None = None,
        train_size: float | None = None,
        test_size: float | None = None,
        lr: float | None = None,
        n_epochs_kl_warmup: int | None = None,
        n_iter_kl_warmup: int | None = None,
        frequency: int | None = None,
        early_stopping_kwargs: Mapping[str, Any] | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> None:
        """Train, or train on. What is left out is as documented: 0.9 of the cells, lr 1e-3, warm-up 400.

        Parameters
        ----------
        n_epochs
            Default: 400 up to 20,000 cells, fewer in proportion above.
        early_stopping_kwargs
            ``patience``, ``threshold``, ``reduce_lr_on_plateau``, ``lr_patience``, ``lr_factor``: see
            :func:`~streamx.arches.options.training_settings`.
        options
            ``max_epochs``, ``batch_size``, ``weight_decay`` (of a query: 0), ``eps``, ``seed``,
            ``train_indices`` and ``validation_indices`` (rows, instead of ``train_size``), scvi-tools'
            ``plan_kwargs``, ``early_stopping``, ``early_stopping_patience`` and so on.
        """
        options |= {
            "n_epochs": n_epochs if n_epochs is not None else options.pop("max_epochs", None),
            "train_size": train_size,
            "test_size": test_size,
            "lr": lr,
            "n_epochs_kl_warmup": n_epochs_kl_warmup,
            "n_iter_kl_warmup": n_iter_kl_warmup,
            "frequency": frequency,
            "early_stopping_kwargs": early_stopping_kwargs,
        }
        train_model(self.state, training_settings("scvi", options), progress=progress)

    load_query_data = classmethod(methods.load_query_data)
    load = classmethod(methods.load)
    save = methods.save
    history = property(methods.history)
    is_trained = property(methods.is_trained)
    __repr__ = methods.described
    adata = property(methods.adata)
    get_latent_representation = evidence.get_latent_representation
    get_elbo = evidence.get_elbo
    get_reconstruction_error = evidence.get_reconstruction_error
    get_marginal_ll = evidence.get_marginal_ll
    get_latent_library_size = evidence.get_latent_library_size
    get_normalized_expression = expression.get_normalized_expression
    posterior_predictive_sample = expression.posterior_predictive_sample
    get_likelihood_parameters = expression.get_likelihood_parameters
    get_feature_correlation_matrix = expression.get_feature_correlation_matrix
    differential_expression = differential.differential_expression
