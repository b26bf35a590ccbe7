"""SCALEX's ``data`` module by its documented names: preprocessing, scaling, gene lists and minibatches."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from streamx.config import IntegrateConfig, build
from streamx.errors import BatchError, UsageError
from streamx.integrate.call import input_names, make_store, make_view
from streamx.integrate.result import assemble, input_order
from streamx.loader.loader import Loader
from streamx.schema import align
from streamx.store.collection import Collection

D = IntegrateConfig


class Minibatches:
    """Minibatches ``(x_ng, y_n, index_n)`` of a view: what the model sees, batch codes, rows of the AnnData.

    Iterating gives an epoch, and the next time the next one.
    """

    def __init__(self, loader: Loader, place_n: np.ndarray) -> None:
        self.loader, self.place_n = loader, place_n

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for minibatch in self.loader:
            yield minibatch.x_ng, minibatch.batch_n, self.place_n[minibatch.row_n]


def load_data(
    data_list: Any,
    batch_categories: Sequence[str] | None = D.batch_categories,
    profile: str = D.profile,
    join: str = D.join,
    batch_key: str = D.batch_key,
    batch_name: str = D.batch_name,
    min_features: int | None = D.min_features,
    min_cells: int = D.min_cells,
    target_sum: float | None = D.target_sum,
    n_top_features: int | str | Sequence[str] | None = None,
    backed: bool = D.backed,
    batch_size: int = D.batch_size,
    chunk_size: int = D.chunk_size,
    fraction: float | None = D.fraction,
    n_obs: int | None = D.n_obs,
    processed: bool = D.processed,
    log: Any = None,
    num_workers: int = D.num_workers,
    use_layer: str = D.use_layer,
    *,
    folder: str | Path | None = None,
) -> tuple[AnnData, Minibatches, Minibatches]:
    """Files as one preprocessed data set, and minibatches of it for training and for inference.

    Parameters
    ----------
    folder
        Where the store and the view lie, from which minibatches are read (default: a temporary one, which
        goes with the minibatches). The other arguments are :func:`streamx.SCALEX`'s.

    Returns
    -------
    The cells as the model sees them, in the order of the input; minibatches of all batches mixed, in an order
    that changes with the epoch, without an incomplete last one; and minibatches of one batch each.
    """
    settings = {name: value for name, value in locals().items() if name in D.__dataclass_fields__}
    home = Path(tempfile.mkdtemp(prefix="streamx-") if folder is None else folder)
    adata, view, names = _prepared(data_list, settings, n_top_features, home)
    place_n = np.arange(view.n_obs)
    if sparse.issparse(adata.X):  # else the cells are in the order of the view
        place_n = np.argsort(input_order(view, names))
    training = Minibatches(Loader(view, batch_size, drop_last=True), place_n)
    inference = Minibatches(Loader(view, batch_size, order="by_batch"), place_n)
    if folder is None:
        weakref.finalize(view, shutil.rmtree, home, ignore_errors=True)
    return adata, training, inference


def _prepared(
    data: Any, settings: dict[str, Any], features: Any, home: Path
) -> tuple[AnnData, Collection, list[str]]:
    """The cells as the model sees them, their view, and the names of the inputs."""
    genes = None
    if isinstance(features, (int, str)):
        settings["n_top_features"] = str(features)
    else:
        settings.pop("n_top_features", None)
        genes = None if features is None else [str(name) for name in features]
    call: IntegrateConfig = build(IntegrateConfig, settings)
    categories = None if call.batch_categories is None else list(map(str, call.batch_categories))
    inputs = input_names(data, categories)
    view = make_view(make_store(inputs, call, home), call, home, genes)
    adata = assemble(view, list(inputs), np.zeros((view.n_obs, 0), np.float32))
    del adata.obsm["latent"]
    return adata, view, list(inputs)


def preprocessing(
    adata: AnnData,
    profile: str = "RNA",
    min_features: int | None = 600,
    min_cells: int = 3,
    target_sum: float | None = None,
    n_top_features: int | str | Sequence[str] | None = None,
    backed: bool = False,
    chunk_size: int = 20_000,
    log: Any = None,
) -> AnnData:
    """Filter, normalise, choose features and scale: :func:`preprocessing_rna` or :func:`preprocessing_atac`.

    Raises
    ------
    UsageError
        For another profile.
    """
    settings = {
        "profile": profile,
        "min_features": min_features,
        "min_cells": min_cells,
        "target_sum": target_sum,
    }
    with tempfile.TemporaryDirectory(prefix="streamx-") as home:
        found = _prepared(adata, settings, n_top_features, Path(home))[0]
        if not sparse.issparse(found.X):
            found = found.to_memory()
    return found


def preprocessing_rna(
    adata: AnnData,
    min_features: int | None = 600,
    min_cells: int = 3,
    target_sum: float | None = 10_000,
    n_top_features: int | str | Sequence[str] | None = 2000,
    chunk_size: int = 20_000,
    backed: bool = False,
    log: Any = None,
) -> AnnData:
    """Counts of genes -> values in [0, 1] of the variable ones; None means 600, 10,000 and 2,000.

    Like release 1.0.2 it divides by each batch's maxima (``obs["batch"]``). ``raw`` is not kept.
    """
    return preprocessing(adata, "RNA", min_features, min_cells, target_sum, n_top_features)


def preprocessing_atac(
    adata: AnnData,
    min_features: int | None = 100,
    min_cells: int = 3,
    target_sum: float | None = None,
    n_top_features: int | str | Sequence[str] | None = 100_000,
    chunk_size: int = 20_000,
    backed: bool = False,
    log: Any = None,
) -> AnnData:
    """Counts of peaks -> values in [0, 1] of the variable ones; None means 100, 10,000 and 100,000.

    By the recipe of release 0.2.0, with which the documentation's results were made;
    :func:`streamx.preprocess` has those of 1.0.2 and 1.0.4 too (``atac``).
    """
    return preprocessing(adata, "ATAC", min_features or 100, min_cells, target_sum, n_top_features)


def batch_scale(adata: AnnData, chunk_size: int = 20_000) -> AnnData:
    """Divide each feature by its largest absolute value within the batch (``obs["batch"]``), in place.

    Where that is 0 the feature stays 0.

    Raises
    ------
    BatchError
        If obs has no column ``batch``.
    """
    if "batch" not in adata.obs:
        raise BatchError("obs has no column 'batch'", fix="adata.obs['batch'] = ...")
    x_ng = sparse.csr_matrix(adata.X, dtype=np.float32, copy=True)
    for name in adata.obs["batch"].unique():
        row_n = np.flatnonzero((adata.obs["batch"] == name).to_numpy())
        largest_g = np.asarray(abs(x_ng[row_n]).max(axis=0).todense()).ravel()
        largest_g[largest_g == 0] = 1
        for row in row_n:
            part = slice(x_ng.indptr[row], x_ng.indptr[row + 1])
            x_ng.data[part] /= largest_g[x_ng.indices[part]]
    adata.X = x_ng
    return adata


def reindex(adata: AnnData, genes: Sequence[str], chunk_size: int = 20_000) -> AnnData:
    """The cells on these genes, in this order; absent ones are 0, ``uns["reindex"]`` counts those found."""
    found = align(map(str, adata.var_names), genes)
    here = np.flatnonzero(found.columns >= 0)
    shape = (adata.n_vars, found.n_target)
    one_hot = sparse.csr_matrix((np.ones(len(here), np.float32), (here, found.columns[here])), shape=shape)
    x_ng = sparse.csr_matrix(adata.X) @ one_hot
    new = AnnData(x_ng.astype(adata.X.dtype), obs=adata.obs.copy())
    new.var_names = [str(name) for name in genes]
    for name, values in adata.obsm.items():
        new.obsm[name] = values
    new.uns["reindex"] = {"found": len(here), "asked": found.n_target}
    return new


class SingleCellDataset:
    """Cells of an AnnData as ``(x_g float32, batch code, row)``: for torch's loaders, or by number.

    Parameters
    ----------
    use_layer
        X, or the name of a layer or obsm matrix.
    """

    def __init__(self, adata: AnnData, use_layer: str = "X") -> None:
        self.adata, self.shape = adata, adata.shape
        self._batch_n = adata.obs["batch"].astype("category").cat.codes.to_numpy()
        if use_layer == "X":
            self._x = adata.X
        elif use_layer in adata.layers:
            self._x = adata.layers[use_layer]
        elif use_layer in adata.obsm:
            self._x = np.asarray(adata.obsm[use_layer])
        else:
            raise UsageError(f"no layer or obsm {use_layer!r}", fix="X, or one that is there")

    def __len__(self) -> int:
        return self.adata.n_obs

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int]:
        x_g = self._x[row]
        x_g = x_g.toarray() if sparse.issparse(x_g) else x_g
        return np.asarray(x_g, np.float32).ravel(), int(self._batch_n[row]), row


class BatchSampler:
    """Rows by minibatches that hold one batch each, in an order drawn anew at each iteration.

    As documented: rows are drawn in random order into a bucket per batch, which leaves when it is full; what
    is left over at the end leaves in smaller ones. ``len`` counts as if there were one batch.

    Parameters
    ----------
    batch_id
        Batch code of each row.
    drop_last
        Without what is left over.
    seed
        What the order depends on, besides how often it was iterated.
    """

    def __init__(self, batch_size: int, batch_id: Any, drop_last: bool = False, *, seed: int = 0) -> None:
        self.batch_size, self.drop_last = batch_size, drop_last
        self.batch_id = np.asarray(batch_id)
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.batch_id), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        buckets: dict[Any, list[int]] = {}
        for row in self._rng.permutation(len(self.batch_id)).tolist():
            bucket = buckets.setdefault(self.batch_id[row], [])
            bucket.append(row)
            if len(bucket) == self.batch_size:
                yield buckets.pop(self.batch_id[row])
        if not self.drop_last:
            yield from buckets.values()
