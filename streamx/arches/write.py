"""Expression of more cells than fit in memory: written block by block, as it comes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import UsageError

CHUNK_VALUES = 1 << 22
PROTEINS = "protein_expression"


def write_expression(
    out: str | Path,
    cells: pd.Index,
    genes: Sequence[str],
    blocks: Iterable[tuple[np.ndarray, np.ndarray | None]],
    proteins: Sequence[str] | None = None,
) -> Path:
    """Write an AnnData-Zarr with the expression as X and proteins as ``obsm["protein_expression"]``.

    Parameters
    ----------
    blocks
        Of all cells, in their order: float32 (n, n_genes), and (n, n_proteins) or None.

    Raises
    ------
    UsageError
        If the folder is there already.
    """
    import zarr
    from anndata.io import write_elem

    out = Path(out)
    if out.exists():
        raise UsageError("is there already", where=str(out), fix="choose another folder")
    root = zarr.open_group(str(out), mode="w", zarr_format=3)
    with warnings.catch_warnings():  # of anndata, about how its next release will lay out arrays
        warnings.simplefilter("ignore", UserWarning)
        write_elem(root, "obs", pd.DataFrame(index=pd.Index(cells, dtype=object)))
        write_elem(root, "var", pd.DataFrame(index=pd.Index(list(genes), dtype=object)))
        names = {} if proteins is None else {PROTEINS: np.array(list(proteins), dtype=object)}
        write_elem(root, "uns", names)
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(root, name, {})
    x = _array(root, "X", len(cells), len(genes))
    y = _array(root, f"obsm/{PROTEINS}", len(cells), len(proteins)) if proteins is not None else None
    low = 0
    for x_ng, y_np in blocks:
        high = low + len(x_ng)
        x[low:high] = x_ng
        if y is not None and y_np is not None:
            y[low:high] = y_np
        low = high
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})  # now it is one
    return out


def _array(root: Any, name: str, n: int, width: int) -> Any:
    """An empty float32 array of chunks of whole rows, some 16 MB each."""
    rows = max(1, min(4096, 1 << ((CHUNK_VALUES // max(width, 1)) or 1).bit_length() - 1))
    return root.create_array(
        name,
        shape=(n, width),
        dtype=np.float32,
        chunks=(rows, max(width, 1)),
        attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
    )
