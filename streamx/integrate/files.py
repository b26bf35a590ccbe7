"""SCALEX's documented ways to read and join files, as AnnData in memory; :func:`streamx.convert` streams."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
from anndata import AnnData
from scipy import sparse

from streamx.config import ConvertConfig, parse_bytes
from streamx.errors import UsageError
from streamx.store.ingest.inputs import open_sources

ROWS = 1 << 16  # read at a time


def load_file(path: str | Path, backed: bool = False) -> AnnData:
    """One file or mtx folder, of any format that :func:`streamx.convert` reads; X as CSR, names unique.

    Text tables are read as SCALEX reads them, with genes in rows.

    Parameters
    ----------
    backed
        Accepted, without effect, as in SCALEX.
    """
    path = Path(path).expanduser()
    if path.name.lower().endswith(".h5ad"):
        adata = anndata.read_h5ad(path)
        adata.X = sparse.csr_matrix(adata.X)
    else:
        adata = _read(path)
    adata.var_names_make_unique()
    return adata


def _read(path: Path) -> AnnData:
    with tempfile.TemporaryDirectory(prefix="streamx-") as scratch:
        found = open_sources([path], scratch=Path(scratch), memory=parse_bytes(ConvertConfig.memory))
        if len(found) != 1:
            raise UsageError(f"{len(found)} inputs", where=str(path), fix="load_files reads several")
        with closing(found[0]) as source:
            blocks = [source.rows(low, min(low + ROWS, source.n_obs)) for low in range(0, source.n_obs, ROWS)]
            return AnnData(sparse.vstack(blocks, format="csr"), obs=source.obs, var=source.var)


def read_mtx(path: str | Path) -> AnnData:
    """A folder with a matrix of features x cells and the files of their names beside it."""
    return _read(Path(path).expanduser())


def load_files(root: str | Path) -> AnnData:
    """One file; or, where the last part of the path is ``*``, all that match, told apart by ``sub_batch``."""
    if Path(root).name != "*":
        return load_file(root)
    paths = sorted(glob.glob(str(Path(root).expanduser())))
    if not paths:
        raise UsageError("nothing matches", where=str(root), fix="check the path")
    return anndata.concat({Path(path).name: load_file(path) for path in paths}, label="sub_batch")


def concat_data(
    data_list: Any,
    batch_categories: Sequence[str] | None = None,
    join: str = "inner",
    batch_key: str = "batch",
    index_unique: str | None = None,
    save: str | Path | None = None,
) -> AnnData:
    """Files and objects as one; ``obs[batch_key]`` says which a cell is from.

    Parameters
    ----------
    data_list
        A path, an AnnData, or a list of them; what is alone comes back as it is.
    batch_categories
        A name per item (default: 0, 1, ...).
    join
        Genes of all, or of any; absent ones count as 0.
    index_unique
        What joins a cell's name and its batch, where names have to become unique.
    save
        h5ad file to write, compressed.

    Raises
    ------
    UsageError
        If there are more or fewer names than items.
    """
    items = data_list if isinstance(data_list, (list, tuple)) else [data_list]
    loaded = [item if isinstance(item, AnnData) else load_files(item) for item in items]
    adata = loaded[0]
    if len(loaded) > 1:
        names = [str(name) for name in batch_categories or range(len(loaded))]
        if len(set(names)) != len(loaded):
            raise UsageError(
                f"{len(loaded)} items, {len(set(names))} different batch_categories", fix="one name for each"
            )
        named = dict(zip(names, loaded, strict=True))
        adata = anndata.concat(named, join=join, label=batch_key, index_unique=index_unique, fill_value=0)
    if save is not None:
        adata.write_h5ad(save, compression="gzip")
    return adata
