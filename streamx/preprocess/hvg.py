"""Highly variable genes from moments: scanpy's `seurat`, `cell_ranger` and `seurat_v3`, gene for gene.

Sources: Satija 2015 and Zheng 2017 (dispersions in bins of mean expression), Stuart 2019 (variance after
regularised standardisation); the order of steps, the treatment of ties and of genes that a batch lacks follow
scanpy 1.11 and 1.12. One deviation: 1.12 takes seurat_v3's mean of each batch by a running update, whose last
bit, and with it how the loess splits tied means, depends on the order of cells; sums of integers do not.
Inputs are sums per batch and gene; no matrix is seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import BatchError, EmptyError
from streamx.preprocess.kernels import SQUARES, SUM
from streamx.preprocess.moments import Moments, mean_variance, pool

N_BINS = 20
NORMAL_MAD = 0.6744897501960817  # norm.ppf(3/4): a median absolute deviation -> a standard deviation
LOESS_SPAN = 0.3


def dispersions(
    n: int,
    sum_g: np.ndarray,
    squares_g: np.ndarray,
    *,
    flavor: str,
    n_top: int,
    batch: str = "all cells",
) -> dict[str, np.ndarray]:
    """Normalised dispersions of one batch.

    Parameters
    ----------
    n
        Cells of the batch.
    sum_g, squares_g
        Sum and sum of squares of the normalised values, (n_genes,) float64: on the linear scale for
        ``seurat``, after log1p for ``cell_ranger`` (scanpy takes them as they come).
    flavor
        ``"seurat"`` or ``"cell_ranger"``.
    n_top
        Genes to flag; ties with the last one are flagged too.
    batch
        Name for errors.

    Returns
    -------
    ``means``, ``dispersions``, ``dispersions_norm`` (float64, NaN where undefined) and ``highly_variable``.

    Raises
    ------
    BatchError
        If cell_ranger's bins of the mean coincide.
    """
    mean, variance = mean_variance(n, sum_g, squares_g)
    mean = np.where(mean == 0, 1e-12, mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = variance / mean
        if flavor == "seurat":
            dispersion[dispersion == 0] = np.nan
            dispersion = np.log(dispersion)
            mean = np.log1p(mean)
    bins = _mean_bins(mean, flavor, batch)
    center, spread = _bin_statistics(dispersion, bins, flavor)
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = (dispersion - center) / spread
    known = np.sort(norm[~np.isnan(norm)])[::-1]
    # A batch of one cell has no dispersion at all: it flags nothing (scanpy raises an IndexError there).
    cutoff = known[min(n_top, len(known)) - 1] if len(known) else np.inf
    flagged = np.nan_to_num(norm, nan=-np.inf) >= cutoff
    return {"means": mean, "dispersions": dispersion, "dispersions_norm": norm, "highly_variable": flagged}


def _mean_bins(mean_g: np.ndarray, flavor: str, batch: str) -> np.ndarray:
    """Bin of each gene's mean, int; -1 for none."""
    if flavor == "seurat":
        return np.asarray(pd.cut(mean_g, bins=N_BINS, labels=False, retbins=False))
    edges = np.r_[-np.inf, np.percentile(mean_g, np.arange(10, 105, 5)), np.inf]
    if (np.diff(edges) <= 0).any():
        raise BatchError(
            f"cell_ranger's bins of mean expression coincide: too few distinct means in {len(mean_g)} genes",
            where=f"batch {batch!r}",
            fix="--flavor seurat, or a higher --min-cells",
        )
    return np.asarray(pd.cut(mean_g, bins=edges, labels=False))


def _bin_statistics(
    dispersion_g: np.ndarray, bin_g: np.ndarray, flavor: str
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and spread of the dispersions of each gene's bin."""
    by_bin = pd.Series(dispersion_g).groupby(bin_g)
    if flavor == "cell_ranger":
        stats = by_bin.agg(center="median", spread=_mad)
    else:
        stats = by_bin.agg(center="mean", spread="std")
        # A bin with a single gene: its normalised dispersion becomes 1, as in Seurat.
        single = stats["spread"].isna()
        stats.loc[single, "spread"] = stats.loc[single, "center"]
        stats.loc[single, "center"] = 0.0
    mine = stats.loc[bin_g]
    return mine["center"].to_numpy(), mine["spread"].to_numpy()


def _mad(values: pd.Series) -> float:
    x = values.to_numpy()
    return float(np.median(np.abs(x - np.median(x)) / NORMAL_MAD))


def _mean_over_batches(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean without NaN, with pandas' compensated summation: near-ties rank as they do in scanpy."""
    total = np.zeros(len(values[0]))
    lost = np.zeros(len(values[0]))
    n = np.zeros(len(values[0]))
    with np.errstate(invalid="ignore", divide="ignore"):
        for x in values:
            known = ~np.isnan(x)
            y = np.where(known, x, 0.0) - lost
            t = total + y
            rest = (t - total) - y
            lost = np.where(known, np.where(np.isnan(rest), 0.0, rest), lost)
            total = np.where(known, t, total)
            n += known
        return total / n


def rank_dispersions(
    moments: Moments, names: Sequence[str], batches: Sequence[str], *, flavor: str, n_top: int, by_batch: bool
) -> pd.DataFrame:
    """scanpy's table for ``flavor="seurat"`` and ``"cell_ranger"``, with or without ``batch_key``.

    Parameters
    ----------
    moments
        Of normalised values (see :func:`dispersions`), over the candidate genes only.
    names
        Names of these genes: with batches scanpy breaks ties by name.
    batches
        Name of each batch code.

    Returns
    -------
    One row per gene, in order: ``means``, ``dispersions``, ``dispersions_norm`` (float64) and
    ``highly_variable``; by batch also ``highly_variable_nbatches`` and ``highly_variable_intersection``.
    """
    if not by_batch:
        one = pool(moments)
        table = dispersions(int(one.n_b[0]), one.sum_bg[0], one.squares_bg[0], flavor=flavor, n_top=n_top)
        return pd.DataFrame(table, index=pd.Index(names))
    columns: dict[str, list[np.ndarray]] = {"means": [], "dispersions": [], "dispersions_norm": []}
    n_flags = np.zeros(len(names), np.int64)
    for k, code in enumerate(moments.code_b):
        here = moments.detected_bg[k] > 0
        full = {name: np.zeros(len(names)) for name in columns}
        if here.any():
            table = dispersions(
                int(moments.n_b[k]),
                moments.sum_bg[k, here],
                moments.squares_bg[k, here],
                flavor=flavor,
                n_top=min(n_top, int(here.sum())),
                batch=str(batches[int(code)]),
            )
            n_flags[here] += table["highly_variable"]
            for name in columns:
                full[name][here] = table[name]
        for name in columns:
            columns[name].append(full[name])
    out = pd.DataFrame({name: _mean_over_batches(x) for name, x in columns.items()}, index=pd.Index(names))
    by_name = np.argsort(np.asarray(names, dtype=object), kind="stable")
    norm = out["dispersions_norm"].to_numpy()[by_name]
    order = by_name[np.lexsort((np.where(np.isnan(norm), np.inf, -norm), -n_flags[by_name]))]
    out["highly_variable"] = np.isin(np.arange(len(names)), order[:n_top])
    out["highly_variable_nbatches"] = n_flags
    out["highly_variable_intersection"] = n_flags == len(moments.code_b)
    return out


def ones_as_logarithms(moments: Moments) -> Moments:
    """SCALEX 1.0.2 ranks binary peaks as if their ones were logarithms: exp(1) - 1 each."""
    table = moments.table_bg4.copy()
    table[:, :, SUM] *= np.expm1(1.0)
    table[:, :, SQUARES] *= np.expm1(1.0) ** 2
    return Moments(moments.code_b, moments.n_b, table)


def regularised_sd(n: int, sum_g: np.ndarray, squares_g: np.ndarray, *, batch: str) -> dict[str, np.ndarray]:
    """seurat_v3's first half: the trend of the variance over the mean of raw counts in one batch.

    Parameters
    ----------
    n, sum_g, squares_g
        Cells, sum and sum of squares of raw counts, float64 (n_genes,).
    batch
        Name for errors.

    Returns
    -------
    ``mean``, ``sd`` (regularised, by a loess of log10 variance on log10 mean, span 0.3, degree 2) and
    ``clip`` = mean + sd * sqrt(n), each float64 (n_genes,).

    Raises
    ------
    BatchError
        If the regression can't be fitted: where scanpy stops with the Fortran code's ValueError.
    """
    from skmisc.loess import loess

    mean, variance = mean_variance(n, sum_g, squares_g)
    varies = variance > 0
    fitted = np.zeros(len(mean))
    try:
        if n < 2 or not varies.any():
            raise ValueError(f"{n} cells, {int(varies.sum())} genes that vary")
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=LOESS_SPAN, degree=2)
        model.fit()
        fitted[varies] = model.outputs.fitted_values
    except ValueError as error:
        reason = " ".join(str(error).replace("b'", " ").split())
        raise BatchError(
            f"seurat_v3's regression of variance on mean fails over {int(varies.sum())} genes and {n} cells "
            f"({reason})",
            where=f"batch {batch!r}",
            fix="--flavor seurat; or a higher --min-cells, --no-hvg-batch, or --batches without this one",
        ) from None
    sd = np.sqrt(10**fitted)
    return {"mean": mean, "sd": sd, "clip": sd * np.sqrt(n) + mean}


def standardised_variance(
    n: int, trend: dict[str, np.ndarray], above_g: np.ndarray, sum_g: np.ndarray, squares_g: np.ndarray
) -> np.ndarray:
    """seurat_v3's second half: the variance after standardising and clipping (Stuart 2019), (n_genes,).

    Parameters
    ----------
    trend
        From :func:`regularised_sd`.
    above_g, sum_g, squares_g
        Cells above the clip; sum and sum of squares of the counts at or below it.
    """
    mean, sd, clip = trend["mean"], trend["sd"], trend["clip"]
    total = sum_g + above_g * clip
    squares = squares_g + above_g * np.square(clip)
    return (1 / ((n - 1) * np.square(sd))) * ((n * np.square(mean)) + squares - 2 * total * mean)


def rank_variances(raw: Moments, norm_bg: np.ndarray, names: Sequence[str], *, n_top: int) -> pd.DataFrame:
    """scanpy's table for ``flavor="seurat_v3"``.

    Parameters
    ----------
    raw
        Moments of raw counts over the candidate genes (all batches; pooled for means and variances).
    norm_bg
        Standardised variance per batch, (n_batches, n_genes); one row where batches are not told apart.

    Returns
    -------
    One row per gene: ``means``, ``variances``, ``highly_variable_rank`` (median of the ranks within batches;
    NaN for none), ``variances_norm``, ``highly_variable``, ``highly_variable_nbatches``.
    """
    one = pool(raw)
    means, variances = mean_variance(int(one.n_b[0]), one.sum_bg[0], one.squares_bg[0])
    rank_bg = np.argsort(np.argsort(-norm_bg, axis=1), axis=1).astype(np.float32)
    n_flags = (rank_bg < n_top).sum(axis=0)
    rank_bg[rank_bg >= n_top] = np.nan
    rank = np.full(len(names), np.nan, np.float32)
    some = n_flags > 0
    rank[some] = np.nanmedian(rank_bg[:, some], axis=0)
    order = np.lexsort((-n_flags, np.where(np.isnan(rank), np.inf, rank)))
    return pd.DataFrame(
        {
            "means": means,
            "variances": variances,
            "highly_variable_rank": rank,
            "variances_norm": norm_bg.mean(axis=0),
            "highly_variable": np.isin(np.arange(len(names)), order[:n_top]),
            "highly_variable_nbatches": n_flags,
        },
        index=pd.Index(names),
    )


def candidates(measured_bg: np.ndarray, keep_g: np.ndarray, *, allow_unmeasured: bool) -> np.ndarray:
    """Which genes may be variable, bool (n_genes,): kept and (or `allow_unmeasured`) measured in all batches.

    Raises
    ------
    EmptyError
        If no gene remains.
    """
    found = keep_g if allow_unmeasured else keep_g & measured_bg.all(axis=0)
    if not found.any():
        raise EmptyError(
            f"none of {int(keep_g.sum())} genes is measured in every batch",
            fix="--allow-unmeasured, or convert with --join inner",
        )
    return found


def expand(table: pd.DataFrame, found_g: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """A table over candidate genes -> over all genes; the others are not variable, their values NaN."""
    at = np.flatnonzero(found_g)
    columns: dict[str, Any] = {}
    for name in table.columns:
        values = table[name].to_numpy()
        empty: Any = np.nan if values.dtype.kind == "f" else values.dtype.type(0)
        full = np.full(len(names), empty, dtype=values.dtype)
        full[at] = values
        columns[name] = full
    return pd.DataFrame(columns, index=pd.Index(names))
