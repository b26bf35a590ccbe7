"""A dense obsm matrix of an input, taken as its features in place of X."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
from scipy import sparse

from streamx.errors import GeneError
from streamx.store.ingest.source import Source, plain_dtype


def of_obsm(source: Source, name: str) -> Source:
    """The same cells, with the columns of an obsm matrix as features.

    Raises
    ------
    GeneError
        If the input has no such matrix; names those that it has.
    """
    if name not in source.modalities:
        raise GeneError(
            f"no obsm matrix {name!r}",
            where=source.location,
            fix=f"one of: {', '.join(source.modalities)}" if source.modalities else "a file that has it",
        )
    matrix = source.modalities[name]

    def rows(start: int, stop: int) -> sparse.csr_matrix:
        return sparse.csr_matrix(plain_dtype(matrix.rows(start, stop)))

    var = pd.DataFrame(index=pd.Index(matrix.names, dtype=object))
    return replace(source, var=var, rows=rows, alternatives=list, opener=None)
