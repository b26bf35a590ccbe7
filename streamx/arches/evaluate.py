"""How well a model integrates its cells: ``SCVI_EVAL`` and ``TRVAE_EVAL``, as scArches' users call them.

Differs from scArches' on purpose: there may be any number of types (its codes overflow above 127); cells
without a type count in no score of types; silhouettes run on any pandas; ``TRVAE_EVAL`` works; clusters are
Leiden's; nothing is printed, every method returns what scArches prints; what is random takes a ``seed``; of
many cells silhouettes and clusters are sampled.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from streamx.arches.state import opened, trained_model
from streamx.errors import UsageError, warn
from streamx.labels import Labels, encode_labels
from streamx.metrics import Scores, agreement, mixing, score_latent
from streamx.neighbors import nearest
from streamx.plots import embedding, history, umap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SCVI_EVAL:
    """Scores and pictures of an :class:`SCVI`, :class:`SCANVI` or :class:`TOTALVI` on its own or other cells.

    Parameters
    ----------
    model
        A trained object.
    adata
        AnnData, file, store or view; None: the data that the model was made with.
    trainer
        Accepted; the model knows its history.
    cell_type_key, batch_key
        obs columns; default: those of the model.
    give_mean
        Latents are the mean of q(z|x), and not one draw of it. Default as documented: totalVI's are means.
    seed
        Of draws.

    Raises
    ------
    UntrainedError
        If the model was not trained.
    """

    def __init__(
        self,
        model: Any,
        adata: Any = None,
        trainer: Any = None,
        cell_type_key: str | None = None,
        batch_key: str | None = None,
        *,
        give_mean: bool | None = None,
        seed: int = 0,
    ) -> None:
        trained_model(model.state)
        self.model, self.data, self.seed = model, adata, seed
        self.cell_type_key = cell_type_key or model.state.keys.labels_key
        self.batch_key = batch_key or model.state.keys.batch_key
        self.give_mean = model.kind == "totalvi" if give_mean is None else give_mean
        nothing = model.state.keys.unlabeled_category
        self._unlabeled = () if nothing is None else (nothing,)

    @cached_property
    def _latent(self) -> AnnData:
        z_nk = self.model.get_latent_representation(self.data, give_mean=self.give_mean, seed=self.seed)
        obs: dict[str, Any] = {}
        with opened(self.model.state, self.data, None, whole=False) as (_, cells):
            for name, key in (("cell_type", self.cell_type_key), ("batch", self.batch_key)):
                if key is not None:
                    obs[name] = _texts(cells.column(key))
            names = cells.names
        return AnnData(z_nk, obs=pd.DataFrame(obs, index=names.astype(str)).astype("category"))

    def latent_as_anndata(self) -> AnnData:
        """Latents as X, with obs ``cell_type`` and ``batch``."""
        return self._latent.copy()

    def get_model_arch(self) -> pd.DataFrame:
        """Name, shape and size of every parameter of the network."""
        found = trained_model(self.model.state).module.named_parameters()
        rows = [(name, tuple(value.shape), value.numel()) for name, value in found]
        return pd.DataFrame(rows, columns=["name", "shape", "size"]).set_index("name")

    # -- pictures --------------------------------------------------------------------------------------

    def plot_history(
        self, show: bool = True, save: bool = False, dir_path: str | Path | None = None
    ) -> list[Figure]:
        """Losses by epoch, of each training (scANVI: two); saved as ``history.png``, ``history_<n>.png``."""
        found = self.model.history
        tables = [table for table in found.values() if len(table)] if isinstance(found, dict) else [found]
        names = ["history"] if len(tables) == 1 else [f"history_{n}" for n in range(len(tables))]
        return [
            history(table.reset_index(), _path(save, dir_path, name), show=show)
            for table, name in zip(tables, names, strict=True)
        ]

    def plot_latent(
        self,
        show: bool = True,
        save: bool = False,
        dir_path: str | Path | None = None,
        n_neighbors: int = 8,
        predictions: bool = False,
        in_one: bool = False,
        colors: Any = None,
    ) -> list[Figure]:
        """A UMAP of the latents, coloured by cell type and by batch.

        Parameters
        ----------
        predictions
            Also by scANVI's labels, and whether they are right.
        in_one
            All colours in one figure.
        colors
            Colour per label.
        """
        adata = self._latent
        adata.obsm["X_umap"] = umap(np.asarray(adata.X), n_neighbors=n_neighbors, seed=self.seed)
        shown = [name for name in ("cell_type", "batch") if name in adata.obs]
        if predictions and self.get_classification_accuracy() is not None:
            shown += ["predictions", "type_check"]
        if in_one:
            import scanpy as sc

            figure = sc.pl.umap(adata, color=shown, palette=colors, show=False, return_fig=True)
            path = _path(save, dir_path, "latent")
            if path is not None:
                figure.savefig(path, bbox_inches="tight", dpi=150)
            return [figure]
        paths = [_path(save, dir_path, f"latent_{name}") for name in shown]
        return [
            embedding(adata, name, colors, None, save=path, show=show)
            for name, path in zip(shown, paths, strict=True)
        ]

    # -- scores ----------------------------------------------------------------------------------------

    def _codes(self, name: str) -> Labels:
        if name not in self._latent.obs:
            key = "cell_type_key" if name == "cell_type" else "batch_key"
            raise UsageError(f"no {name} is known", fix=f"{key}=..., an obs column")
        return encode_labels(self._latent.obs[name], self._unlabeled if name == "cell_type" else ())

    def get_ebm(
        self,
        n_neighbors: int = 50,
        n_pools: int = 50,
        n_samples_per_pool: int = 100,
        verbose: bool = True,
    ) -> float:
        """Entropy of batch mixing, 0 (apart) to 1 (mixed): of the neighbours' batches, mean over drawn cells.

        Parameters
        ----------
        n_pools
            Pools of draws; 1: the mean over all cells.
        """
        batch = self._codes("batch")
        if len(batch.names) < 2:
            raise UsageError("mixing needs two batches", fix="batch_key=..., a column with several")
        z_nk = np.asarray(self._latent.X)
        rows, drawn = np.arange(len(z_nk)), np.arange(len(z_nk))
        if n_pools > 1:
            draws = mixing.draw_cells(len(z_nk), n_pools, n_samples_per_pool, self.seed)
            rows, drawn = np.unique(draws, return_inverse=True)
        found = nearest(z_nk, z_nk[rows], n_neighbors, own_m=rows, seed=self.seed)
        entropies = mixing.batch_entropies(batch.codes_n[found.indices_nm], len(batch.names))
        return float(entropies[drawn].mean())

    def get_knn_purity(self, n_neighbors: int = 50, verbose: bool = True) -> float:
        """Share of the neighbours that are of a cell's own type; mean per type, then over types."""
        label = self._codes("cell_type")
        if not label.names:
            raise UsageError("no cell has a cell type", fix="cell_type_key=..., a column with labels")
        codes_n, z_nk = label.codes_n[label.known_n], np.asarray(self._latent.X)[label.known_n]
        found = nearest(z_nk, n_neighbors=n_neighbors, seed=self.seed)
        same_n = (codes_n[found.indices_nm] == codes_n[:, None]).mean(axis=1)
        return float(np.mean([same_n[codes_n == code].mean() for code in range(len(label.names))]))

    @cached_property
    def _scores(self) -> Scores:
        batch, label = (self._codes(name) for name in ("batch", "cell_type"))
        return score_latent(np.asarray(self._latent.X), batch, label, unlabeled=(), seed=self.seed)

    def get_asw(self) -> tuple[float | None, float | None]:
        """Silhouettes of batches (1: mixed) and of cell types (1: apart), both 0 to 1; None: not defined."""
        return self._scores["asw_batch"], self._scores["asw_label"]

    def get_nmi(self) -> float | None:
        """Best agreement of clusters with cell types over 20 resolutions, 0 to 1."""
        return self._scores["nmi"]

    def get_latent_score(self) -> float:
        """EBM + k-NN purity."""
        return self.get_ebm() + self.get_knn_purity()

    @cached_property
    def _agreement(self) -> dict[str, Any] | None:
        """How scANVI's labels agree with the cell types, the labels kept in the latents' obs."""
        if self.model.kind != "scanvi":
            warn(f"{type(self.model).__name__} predicts no labels", fix="SCANVI does")
            return None
        soft = self.model.predict(self.data, soft=True)
        obs = self._latent.obs
        obs["predictions"] = pd.Categorical(soft.columns[soft.to_numpy().argmax(axis=1)].astype(str))
        obs["certainty"] = soft.to_numpy().max(axis=1)
        right = obs["predictions"].astype(str).to_numpy() == obs["cell_type"].astype(str).to_numpy()
        checked = np.where(right, "Correct", "Incorrect").astype(object)
        checked[~self._codes("cell_type").known_n] = None
        obs["type_check"] = pd.Categorical(checked)
        return agreement(obs["cell_type"], obs["predictions"], unlabeled=self._unlabeled)

    def get_classification_accuracy(self) -> float | None:
        """Share of cells whose predicted label is their type; None, with a warning, of models without labels.

        Labels, their probability and whether they are right are then in :meth:`latent_as_anndata`'s obs
        ``predictions``, ``certainty``, ``type_check``.
        """
        return None if self._agreement is None else self._agreement["accuracy"]

    def get_f1_score(self) -> float | None:
        """Macro F1 of the predicted labels; of other models than scANVI None, with a warning."""
        return None if self._agreement is None else self._agreement["macro_f1"]


class TRVAE_EVAL(SCVI_EVAL):
    """The same of a :class:`TRVAE`, whose batches are conditions."""

    def __init__(
        self,
        model: Any,
        adata: Any = None,
        trainer: Any = None,
        condition_key: str | None = None,
        cell_type_key: str | None = None,
        *,
        give_mean: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, adata, trainer, cell_type_key, condition_key, give_mean=give_mean, seed=seed)


def _texts(column: pd.Series) -> np.ndarray:
    """Labels as text; None where there is none."""
    texts = column.astype(str).to_numpy(dtype=object)
    texts[column.isna().to_numpy()] = None
    return texts


def _path(save: bool, folder: str | Path | None, name: str) -> Path | None:
    """Where a picture is saved, if it is."""
    return Path(folder or ".") / f"{name}.png" if save else None
