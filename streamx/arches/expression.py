"""Expression as a model sees it: normalised, as parameters, drawn anew, correlated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.arches.evidence import Holder, Indices
from streamx.arches.state import generator_for, opened
from streamx.arches.write import write_expression
from streamx.errors import BatchError, GeneError, UsageError
from streamx.posterior.correlation import feature_correlation
from streamx.posterior.expression import (
    Asked,
    foreground_probability,
    likelihood_parameters,
    normalized_expression,
    posterior_predictive,
)
from streamx.train.model import Model

Names = Sequence[str] | None
BatchNames = str | int | Sequence[str | int] | None


def batches_of(model: Model, transform_batch: BatchNames) -> tuple[int | None, ...]:
    """Codes of batches to decode as; (None,): each cell's own.

    Raises
    ------
    BatchError
        If the model knows no such batch.
    """
    if transform_batch is None:
        return (None,)
    one = isinstance(transform_batch, (str, int, np.integer))
    names = [str(name) for name in ([transform_batch] if one else transform_batch)]  # type: ignore[union-attr]
    unknown = [name for name in names if name not in model.batches]
    if unknown:
        raise BatchError(
            f"the model knows no batch {unknown[0]!r}", fix=f"one of: {', '.join(model.batches[:10])}"
        )
    return tuple(model.batches.index(name) for name in names)


def positions_of(wanted: Names, names: Sequence[str], what: str) -> np.ndarray:
    """Where the wanted features are, in the model's order (as in scvi-tools); all where none are named.

    Raises
    ------
    GeneError
        If the model knows none of a name.
    """
    if wanted is None:
        return np.arange(len(names))
    chosen = {wanted} if isinstance(wanted, str) else set(map(str, wanted))
    unknown = sorted(chosen - set(names))
    if unknown:
        raise GeneError(f"the model knows no {what} {', '.join(unknown[:5])}", fix="name those it knows")
    return np.flatnonzero([name in chosen for name in names])


def get_normalized_expression(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    transform_batch: BatchNames = None,
    gene_list: Names = None,
    library_size: float | str = 1.0,
    n_samples: int = 1,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
) -> Any:
    """Expression without technical effects: scale x ``library_size``, or the mean count (``"latent"``).

    Parameters
    ----------
    transform_batch
        Batch, or batches, to decode every cell as; several are averaged. None: each cell's own.
    gene_list
        Only these genes, in the model's order.
    n_samples, return_mean
        Posterior draws per cell; their mean, or all of them.
    return_numpy
        An array instead of a table.
    out
        Folder for an AnnData-Zarr that takes the expression block by block, for many cells.

    Returns
    -------
    DataFrame (n_cells, n_genes) or float32 array; (n_samples, n_cells, n_genes) where all draws are
    asked for; with ``out`` its path.
    """
    with opened(self.state, adata, indices) as (model, cells):
        genes = positions_of(gene_list, model.genes, "gene")
        asked = Asked(
            batches=batches_of(model, transform_batch),
            genes=genes,
            library_size=library_size,
            n_samples=n_samples,
            return_mean=return_mean,
        )
        found = normalized_expression(model.module, cells, asked, generator_for(model, seed))
        columns = [model.genes[g] for g in genes]
        if out is not None:
            _only_means(n_samples, return_mean)
            return write_expression(out, cells.names, columns, found)
        values = np.concatenate([block for block, _ in found], axis=-2)
        return _table(values, cells.names, columns, return_numpy)


def get_normalized_expression_with_proteins(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    n_samples_overall: int | None = None,
    transform_batch: BatchNames = None,
    gene_list: Names = None,
    protein_list: Names = None,
    library_size: float | str = 1.0,
    n_samples: int = 1,
    sample_protein_mixing: bool = False,
    scale_protein: bool = False,
    include_protein_background: bool = False,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
) -> Any:
    """Denoised genes and proteins; proteins that a batch did not measure are imputed.

    To impute, decode as batches that measured them: ``transform_batch=[...]`` with, say, ``n_samples=25``.

    Parameters
    ----------
    n_samples_overall
        Take so many cells, drawn from those asked for.
    sample_protein_mixing
        Draw whether a protein is background, instead of weighting by the probability.
    scale_protein
        A cell's proteins add up to 1.
    include_protein_background
        Background counts as expression too.

    Returns
    -------
    Two tables, of genes and of proteins, as :meth:`SCVI.get_normalized_expression` gives one; all draws are
    (n_cells, n_features, n_samples) here, as in scvi-tools.
    """
    if n_samples_overall is not None:
        with opened(self.state, adata, indices) as (_, cells):
            indices = np.random.default_rng(seed).choice(cells.rows, n_samples_overall)
    with opened(self.state, adata, indices) as (model, cells):
        genes = positions_of(gene_list, model.genes, "gene")
        proteins = positions_of(protein_list, model.schema.proteins, "protein")
        asked = Asked(
            batches=batches_of(model, transform_batch),
            genes=genes,
            proteins=proteins,
            library_size=library_size,
            n_samples=n_samples,
            return_mean=return_mean,
            sample_mixing=sample_protein_mixing,
            scale_protein=scale_protein,
            include_background=include_protein_background,
        )
        found = normalized_expression(model.module, cells, asked, generator_for(model, seed))
        columns = [model.genes[g] for g in genes], [model.schema.proteins[p] for p in proteins]
        if out is not None:
            _only_means(n_samples, return_mean)
            return write_expression(out, cells.names, columns[0], found, columns[1])
        genes_ng, proteins_np = map(_joined, zip(*found, strict=True))
        return (
            _table(genes_ng, cells.names, columns[0], return_numpy),
            _table(proteins_np, cells.names, columns[1], return_numpy),
        )


def _joined(blocks: Iterable[Any]) -> np.ndarray:
    """Blocks of cells as one array; draws, which come first in a block, last (as totalVI's in scvi-tools)."""
    values = np.concatenate(list(blocks), axis=-2)
    return np.moveaxis(values, 0, -1) if values.ndim == 3 else values


def _only_means(n_samples: int, return_mean: bool) -> None:
    if n_samples > 1 and not return_mean:
        raise UsageError("all draws can't be written", fix="return_mean=True")


def _table(values: np.ndarray, rows: pd.Index, columns: Sequence[str], as_array: bool | None) -> Any:
    """A table, unless an array is wanted or all draws are there."""
    if as_array or values.ndim == 3:
        if as_array is False:
            raise UsageError("several draws are no table", fix="return_numpy=True, or return_mean=True")
        return values
    return pd.DataFrame(values, index=rows, columns=list(columns))


def get_protein_foreground_probability(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    transform_batch: BatchNames = None,
    protein_list: Names = None,
    n_samples: int = 1,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    *,
    seed: int = 0,
) -> Any:
    """Probability that a protein's counts are foreground, as a table (n_cells, n_proteins).

    All draws, where they are asked for, are (n_cells, n_proteins, n_samples).
    """
    with opened(self.state, adata, indices) as (model, cells):
        proteins = positions_of(protein_list, model.schema.proteins, "protein")
        asked = Asked(
            batches=batches_of(model, transform_batch),
            proteins=proteins,
            n_samples=n_samples,
            return_mean=return_mean,
        )
        found = foreground_probability(model.module, cells, asked, generator_for(model, seed))
        return _table(_joined(found), cells.names, [model.schema.proteins[p] for p in proteins], return_numpy)


def posterior_predictive_sample(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    n_samples: int = 1,
    gene_list: Names = None,
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Counts drawn anew, float32 (n_cells, n_genes) or, of several draws, (n_cells, n_genes, n_samples).

    totalVI's proteins follow its genes. (scvi-tools gives a sparse array of another package.)
    """
    with opened(self.state, adata, indices) as (model, cells):
        asked = Asked(genes=positions_of(gene_list, model.genes, "gene"), n_samples=n_samples)
        found = posterior_predictive(model.module, cells, asked, generator_for(model, seed))
        return _joined(np.concatenate([p for p in parts if p is not None], axis=-1) for parts in found)


def get_likelihood_parameters(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    n_samples: int = 1,
    give_mean: bool = False,
    batch_size: int | None = None,
    *,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Parameters of the counts' distribution by name: ``mean``, ``dispersions`` (inverse), ``dropout``.

    Each (n_cells, n_genes), or with several draws (n_samples, n_cells, n_genes). ``dropout`` is a
    probability. totalVI's proteins have theirs as ``protein_...``, which scvi-tools does not give.
    """
    with opened(self.state, adata, indices) as (model, cells):
        found = likelihood_parameters(model.module, cells, n_samples, give_mean, generator_for(model, seed))
        blocks = list(found)
    return {name: np.concatenate([block[name] for block in blocks], axis=-2) for name in blocks[0]}


def get_feature_correlation_matrix(
    self: Holder,
    adata: Any = None,
    indices: Indices = None,
    n_samples: int = 10,
    batch_size: int | None = 64,
    rna_size_factor: float = 1000.0,
    transform_batch: BatchNames = None,
    correlation_type: str = "spearman",
    log_transform: bool = False,
    *,
    max_rows: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of denoised features, the mean over the batches decoded as.

    Parameters
    ----------
    correlation_type
        ``"pearson"``, exact; ``"spearman"``, of at most ``max_rows`` denoised draws (cells x ``n_samples``),
        of which ``attrs["n_used"]`` says how many there were.
    log_transform
        Correlate logarithms.

    Returns
    -------
    Table (n_features, n_features): genes, then totalVI's proteins.
    """
    with opened(self.state, adata, indices) as (model, cells):
        found = feature_correlation(
            model.module,
            cells,
            kind=correlation_type,
            batches=batches_of(model, transform_batch),
            n_samples=n_samples,
            rna_size_factor=rna_size_factor,
            log_transform=log_transform,
            max_rows=max_rows,
            rng=np.random.default_rng(seed),
            generator=generator_for(model, seed),
        )
    names = [*model.genes, *(model.schema.proteins if model.kind == "totalvi" else ())]
    table = pd.DataFrame(found.matrix_ff, index=names, columns=names)
    table.attrs |= {"n_rows": found.n_rows, "n_used": found.n_used}
    return table
