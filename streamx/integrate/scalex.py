"""``sx.scalex``: what SCALEX's documentation lists, by its own names and arguments.

Its classes of networks are :class:`streamx.models.scalex.Scalex` (which has the same weights:
:mod:`streamx.interop.scalex` reads and writes its checkpoints); training and inference are
:func:`streamx.train` and :func:`streamx.project`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from streamx.errors import UsageError
from streamx.integrate.call import LOG_FORMAT, SCALEX
from streamx.integrate.data import (
    BatchSampler,
    SingleCellDataset,
    batch_scale,
    load_data,
    preprocessing,
    preprocessing_atac,
    preprocessing_rna,
    reindex,
)
from streamx.integrate.files import concat_data, load_file, load_files, read_mtx
from streamx.metrics import batch_entropy_mixing_score
from streamx.metrics import silhouette_score as mean_silhouette
from streamx.plots import confusion as plot_confusion
from streamx.plots import embedding
from streamx.plots import meta as plot_meta
from streamx.plots import meta2 as plot_meta2
from streamx.transfer import transfer_labels

__all__ = [
    "SCALEX",
    "BatchSampler",
    "SingleCellDataset",
    "batch_entropy_mixing_score",
    "batch_scale",
    "concat_data",
    "create_logger",
    "embedding",
    "label_transfer",
    "load_data",
    "load_file",
    "load_files",
    "onehot",
    "plot_confusion",
    "plot_meta",
    "plot_meta2",
    "preprocessing",
    "preprocessing_atac",
    "preprocessing_rna",
    "read_mtx",
    "reindex",
    "silhouette_score",
]


def label_transfer(ref: AnnData, query: AnnData, rep: str = "latent", label: str = "celltype") -> np.ndarray:
    """Labels of the query's cells by a vote of the 5 nearest reference cells, object (n_query,).

    Parameters
    ----------
    rep
        obsm matrix of both; ``"X"``: X itself.
    label
        obs column of the reference.

    Raises
    ------
    UsageError
        If one of them has no such matrix, or the reference no such column.
    """
    for name, adata in (("reference", ref), ("query", query)):
        if rep != "X" and rep not in adata.obsm:
            there = ", ".join(adata.obsm.keys()) or "it has none"
            raise UsageError(f"no obsm matrix {rep!r}", where=name, fix=f"rep, one of: {there}")
    if label not in ref.obs:
        raise UsageError(
            f"no obs column {label!r}", where="reference", fix=f"label, one of: {', '.join(ref.obs.columns)}"
        )
    found = [np.asarray(adata.X if rep == "X" else adata.obsm[rep], np.float32) for adata in (ref, query)]
    return transfer_labels(found[0], ref.obs[label], found[1], method="vote", n_neighbors=5).labels_n


def onehot(y: Any, n: int) -> np.ndarray | None:
    """Codes (n_cells,) as rows with a single 1, float32 (n_cells, n); None without codes or for one level.

    Raises
    ------
    UsageError
        If a code is `n` or larger.
    """
    if y is None or n < 2:
        return None
    codes_n = np.asarray(y, dtype=np.int64).ravel()
    if len(codes_n) and not 0 <= codes_n.min() <= codes_n.max() < n:
        raise UsageError(f"codes up to {codes_n.max()}, and {n} levels", fix="a larger n")
    return np.eye(n, dtype=np.float32)[codes_n]


def silhouette_score(
    X: Any,
    labels: Any,
    *,
    metric: str = "euclidean",
    sample_size: int | None = None,
    random_state: int | None = None,
) -> float:
    """Mean silhouette, as sklearn's, whose arguments it has; every label counts, also ``Unknown``.

    Parameters
    ----------
    sample_size
        Score so many cells, drawn by `random_state` (None: 0): against *all* cells, unlike sklearn's.

    Raises
    ------
    UsageError
        For another metric; if there are not 2 to n - 1 labels.
    """
    if metric != "euclidean":
        raise UsageError(f"metric {metric!r}", fix="euclidean, or sklearn.metrics.silhouette_score")
    return mean_silhouette(
        np.asarray(X), labels, sample_size=sample_size, seed=random_state or 0, unlabeled=()
    )


def create_logger(
    name: str = "",
    ch: bool = True,
    fh: str | Path | bool = False,
    levelname: int = logging.INFO,
    overwrite: bool = False,
) -> logging.Logger:
    """A logger of lines "time - name - level - message".

    Calling it again gives the same logger with one handler of each kind: nothing is printed twice.

    Parameters
    ----------
    ch
        Log to the terminal, from `levelname` on.
    fh
        File to log to, everything; it begins anew.
    overwrite
        Replace handlers that the logger has already.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    if overwrite:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    handlers: list[logging.Handler] = []
    if ch and not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        handlers.append(logging.StreamHandler())
        handlers[0].setLevel(levelname)
    open_files = {h.baseFilename for h in logger.handlers if isinstance(h, logging.FileHandler)}
    if fh and str(Path(str(fh)).absolute()) not in open_files:
        handlers.append(logging.FileHandler(str(fh), mode="w"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(handler)
    return logger
