"""trVAE, as scArches' users call it; a condition is a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from streamx.arches import evidence, methods
from streamx.arches.options import training_settings
from streamx.arches.state import State, generator_for, train_model, trained_model, training_cells
from streamx.config import TrvaeFreezeConfig
from streamx.errors import BatchError, UsageError
from streamx.models.cells import Cells
from streamx.posterior.draws import evaluating
from streamx.train.device import one_torch_thread

ROWS = 512
SEED = 2020


class TRVAE:
    """trVAE (Lotfollahi 2020) on an AnnData object, files, a store or a view.

    Parameters
    ----------
    adata
        As for :class:`~streamx.arches.scvi.SCVI`.
    condition_key
        obs column of the conditions.
    conditions
        Their names, to be checked against the data.
    hidden_layer_sizes, latent_dim, dr_rate, use_mmd, mmd_on, mmd_boundary, recon_loss, beta, use_bn, use_ln
        Fields of :class:`~streamx.config.TrvaeConfig`, as documented. With ``recon_loss="mse"`` X may hold
        normalised values; where these are logarithms already, add ``log_input=False``.
    options
        Its other fields, and what ``SCVI`` takes besides: ``folder``, ``memory``, ``layer``, ``use_cuda``.

    Raises
    ------
    UsageError
        With ``mmd_boundary``, if ``conditions`` are in another order than that of the alphabet, by which the
        boundary goes here.
    """

    kind = "trvae"
    state: State

    def __init__(
        self,
        adata: Any,
        condition_key: str | None = None,
        conditions: Sequence[str] | None = None,
        hidden_layer_sizes: Sequence[int] = (256, 64),
        latent_dim: int = 10,
        dr_rate: float = 0.05,
        use_mmd: bool = True,
        mmd_on: str = "z",
        mmd_boundary: int | None = None,
        recon_loss: str = "nb",
        beta: float = 1,
        use_bn: bool = False,
        use_ln: bool = True,
        **options: Any,
    ) -> None:
        named = {
            "hidden_layer_sizes": tuple(hidden_layer_sizes),
            "latent_dim": latent_dim,
            "dr_rate": dr_rate,
            "use_mmd": use_mmd,
            "mmd_on": mmd_on,
            "mmd_boundary": mmd_boundary,
            "recon_loss": recon_loss,
            "beta": float(beta),
            "use_bn": use_bn,
            "use_ln": use_ln,
        }
        asked = None if conditions is None else list(map(str, conditions))
        if asked is not None and mmd_boundary is not None and asked != sorted(asked):
            raise UsageError("mmd_boundary goes by the alphabet here", fix="conditions in that order")
        if condition_key is not None:
            options["batch_key"] = condition_key
        self.state = methods.new_object("trvae", adata, named | options)
        self.state.expected = asked

    def train(
        self,
        n_epochs: int | None = None,
        lr: float | None = None,
        eps: float | None = None,
        *,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        """Train, or train on. What is left out is as documented: 400 epochs, lr 1e-3, eps 0.01, patience 20.

        Parameters
        ----------
        kwargs
            ``train_frac``, ``batch_size``, ``weight_decay`` (0.04; of a query: 0), ``alpha_epoch_anneal``,
            ``alpha_iter_anneal``, ``early_stopping_kwargs``, ``use_early_stopping``,
            ``use_stratified_sampling``, ``seed``, ``train_indices``, ``validation_indices``.

        Raises
        ------
        BatchError
            If the conditions named to the constructor are not those of the data.
        """
        options = {"n_epochs": n_epochs, "lr": lr, "eps": eps, "seed": SEED} | kwargs
        expected = self.state.expected
        if expected is not None and set(expected) != set(training_cells(self.state).batches):
            there = ", ".join(training_cells(self.state).batches)
            raise BatchError(f"the data have the conditions {there}", fix="name these, or none")
        train_model(self.state, training_settings("trvae", options), progress=progress)

    @property
    def conditions_(self) -> list[str]:
        """Names of the conditions that the model knows; a condition's code is its position."""
        return list(trained_model(self.state).batches)

    def get_latent(self, x: Any = None, c: Any = None, mean: bool = False, *, seed: int = 0) -> np.ndarray:
        """Latents, float32 (n_cells, latent_dim): a draw of q(z|x), or its mean.

        Parameters
        ----------
        x, c
            Raw counts on the model's genes, (n_cells, n_genes) dense or sparse, and the condition of each
            cell. Default: the data that the model was made with.

        Raises
        ------
        BatchError
            For conditions that the model does not know.
        """
        if x is None:
            return evidence.get_latent_representation(self, give_mean=mean, seed=seed)
        model = trained_model(self.state)
        position = {name: code for code, name in enumerate(model.batches)}
        names = pd.Series(np.asarray(c, dtype=object).ravel()).astype(str)
        unknown = sorted(set(names) - set(position))
        if unknown:
            raise BatchError(f"Incorrect conditions: {', '.join(unknown)}", fix=f"one of {list(position)}")
        if x.shape[1] != len(model.genes) or len(names) != x.shape[0]:
            raise UsageError(f"x {x.shape} and {len(names)} conditions", fix="a column per gene, c per row")
        code_n = torch.tensor([position[name] for name in names])
        device, generator = next(model.module.parameters()).device, generator_for(model, seed)
        parts = []
        with one_torch_thread(), evaluating(model.module):
            for low in range(0, len(code_n), ROWS):
                part = x[low : low + ROWS]
                dense = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
                x_ng = torch.as_tensor(dense.astype(np.float32), device=device)
                cells = Cells(x_ng, code_n[low : low + ROWS].to(device))
                mean_nk, var_nk = model.module.encode(cells)
                noise_nk = torch.randn(mean_nk.shape, generator=generator, device=device)
                parts.append((mean_nk if mean else mean_nk + var_nk.sqrt() * noise_nk).cpu().numpy())
        return np.concatenate(parts)

    @classmethod
    def load_query_data(
        cls,
        adata: Any,
        reference_model: Any,
        freeze: bool = True,
        freeze_expression: bool = True,
        remove_dropout: bool = True,
        mask_missing: bool = False,
        **options: Any,
    ) -> TRVAE:
        """A new object that learns the new conditions of other data; the reference stays as it is.

        Parameters
        ----------
        reference_model
            A trained object, or the folder of a model, also of scArches.
        freeze, freeze_expression, remove_dropout
            :class:`~streamx.config.TrvaeFreezeConfig`.
        mask_missing
            As for :meth:`SCVI.load_query_data`.
        options
            ``condition_key``, where it has another name than in the reference; ``folder``, ``memory`` ...
        """
        found = cls.__new__(cls)
        if "condition_key" in options:
            options["batch_key"] = options.pop("condition_key")
        plan = TrvaeFreezeConfig(freeze, freeze_expression, remove_dropout)
        found.state = methods.query_object(
            "trvae", adata, reference_model, plan, options, mask_missing=mask_missing
        )
        return found

    load = classmethod(methods.load)
    save = methods.save
    history = property(methods.history)
    is_trained = property(methods.is_trained)
    __repr__ = methods.described
    is_trained_ = property(methods.is_trained)
    adata = property(methods.adata)
    get_latent_representation = evidence.get_latent_representation
