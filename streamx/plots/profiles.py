"""How alike the cell types of different batches are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.errors import BatchError, UsageError
from streamx.labels import encode_labels
from streamx.plots import style
from streamx.plots.heat import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def meta(
    adata: Any,
    use_rep: str | None = None,
    color: str = "celltype",
    batch: str = "batch",
    colors: Sequence[str] | None = None,
    cmap: str = "Blues",
    vmax: float = 1,
    vmin: float = 0,
    mask: bool = True,
    annot: bool = False,
    save: str | Path | None = None,
    fontsize: float = 8,
    *,
    figsize: tuple[float, float] = (10, 10),
    show: bool = True,
) -> Figure:
    """Pearson correlation between the mean profiles of all (batch, category) pairs.

    Pairs are ordered by batch, then category; the names are categories, in the colour of their batch.

    Parameters
    ----------
    use_rep
        Name of the profiles: looked up in obsm, then layers; None: X.
    color, batch
        Columns of obs with categories and batches.
    colors
        One colour per batch, in sorted order.
    mask
        Draw the lower triangle (with the diagonal) only.
    figsize
        Inches, at most; few pairs make a smaller figure.
    """
    import matplotlib

    pairs, means = _pair_means(adata, use_rep, color, batch)
    values = _correlate(means, means)
    if mask:
        values[np.triu_indices(len(values), 1)] = np.nan
    batches = sorted({pair[0] for pair in pairs})
    given = None if colors is None else dict(zip(batches, colors, strict=False))
    shade = style.palette(batches, given)
    names, tints = [pair[1] for pair in pairs], [shade[pair[0]] for pair in pairs]
    with matplotlib.rc_context(style.RC):
        on_screen = style.can_show(show, save)
        figure = heat_map(
            values,
            names,
            names,
            cmap=cmap,
            limits=(vmin, vmax),
            annot=annot,
            fontsize=fontsize,
            figsize=figsize,
            row_colors=tints,
            column_colors=tints,
            bar="Pearson correlation",
            on_screen=on_screen,
        )
        _batch_legend(figure, shade)
        return style.finish(figure, save, on_screen)


def meta2(
    adata: Any,
    use_rep: str | None = "latent",
    color: str = "celltype",
    batch: str = "batch",
    color_map: Mapping[str, str] | None = None,
    figsize: tuple[float, float] = (10, 10),
    cmap: str = "Blues",
    batches: Sequence[str] | None = None,
    annot: bool = False,
    save: str | Path | None = None,
    cbar: bool = True,
    keep: bool = False,
    fontsize: float = 8,
    vmin: float = 0,
    vmax: float = 1,
    *,
    show: bool = True,
) -> Figure:
    """Pearson correlation between the categories of two batches: rows the second, columns the first.

    Parameters
    ----------
    batches
        The two (default: the first two, sorted).
    color_map
        Colour per category for its name.
    figsize
        Inches, at most; few categories make a smaller figure.
    keep
        Show every category on both sides; where a batch lacks it, the correlation is 0.
    """
    import matplotlib

    pairs, means = _pair_means(adata, use_rep, color, batch)
    known = sorted({pair[0] for pair in pairs})
    chosen = known[:2] if batches is None else [str(name) for name in batches]
    if len(chosen) != 2 or any(name not in known for name in chosen):
        raise BatchError(
            f"meta2 compares two batches, not {', '.join(chosen) or 'none'}", fix=f"two of {', '.join(known)}"
        )
    first, second = ([at for at, pair in enumerate(pairs) if pair[0] == name] for name in chosen)
    values = _correlate(means[second], means[first])
    rows, columns = [pairs[at][1] for at in second], [pairs[at][1] for at in first]
    if keep:
        names = sorted({pair[1] for pair in pairs})
        whole = np.zeros((len(names), len(names)))
        whole[np.ix_([names.index(n) for n in rows], [names.index(n) for n in columns])] = values
        values, rows, columns = whole, names, names
    shade = style.palette(sorted({*rows, *columns}), color_map) if color_map is not None else {}
    with matplotlib.rc_context(style.RC):
        on_screen = style.can_show(show, save)
        figure = heat_map(
            values,
            rows,
            columns,
            cmap=cmap,
            limits=(vmin, vmax),
            annot=annot,
            cbar=cbar,
            fontsize=fontsize,
            figsize=figsize,
            row_colors=[shade.get(name, "black") for name in rows],
            column_colors=[shade.get(name, "black") for name in columns],
            names=(chosen[1], chosen[0]),
            bar="Pearson correlation",
            on_screen=on_screen,
        )
        return style.finish(figure, save, on_screen)


def _pair_means(
    adata: Any, use_rep: str | None, color: str, batch: str
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """(batch, category) pairs that have cells, and their mean profiles (pairs, features)."""
    for name in (color, batch):
        if name not in adata.obs.columns:
            columns = ", ".join(map(str, adata.obs.columns))
            raise UsageError(f"no column {name!r} in obs", fix=f"one of {columns or 'none'}")
    if use_rep is None:
        profiles = adata.X
    elif use_rep in adata.obsm:
        profiles = adata.obsm[use_rep]
    elif use_rep in adata.layers:
        profiles = adata.layers[use_rep]
    else:
        raise UsageError(f"no {use_rep!r} in obsm or layers")
    labels, batches = encode_labels(adata.obs[color], ("",)), encode_labels(adata.obs[batch], ("",))
    both = labels.known_n & batches.known_n
    code = np.where(both, batches.codes_n.astype(np.int64) * len(labels.names) + labels.codes_n, -1)
    present = np.unique(code[code >= 0])
    if not len(present):
        raise UsageError(f"no cell has both a {batch} and a {color}")
    pairs = [
        (batches.names[at], labels.names[which])
        for at, which in (divmod(c, len(labels.names)) for c in present.tolist())
    ]
    pair_n = np.where(both, np.searchsorted(present, code), -1)
    return pairs, _means(profiles, pair_n, len(pairs))


def _means(profiles: Any, pair_n: np.ndarray, n_pairs: int, size: int = 10_000) -> np.ndarray:
    """Mean profile per pair, float64 (n_pairs, n_features), over its rows that are finite, in one pass.

    Profiles may be dense, sparse, a frame, or on disk (h5ad, zarr, dask): blocks of rows are read in order.
    Cells with pair -1 don't count; a pair without a finite row has zeros.
    """
    from scipy.sparse import csr_matrix, issparse

    if hasattr(profiles, "to_numpy"):
        profiles = profiles.to_numpy()
    total = np.zeros((n_pairs, profiles.shape[1]))
    n_rows = np.zeros(n_pairs)
    for start in range(0, len(pair_n), size):
        block, own = profiles[start : start + size], pair_n[start : start + size]
        block = block.compute() if hasattr(block, "compute") else block
        values = (
            csr_matrix(block, dtype=np.float64) if issparse(block) else np.asarray(block, dtype=np.float64)
        )
        finite = np.isfinite(np.asarray(values.sum(axis=1)).ravel())
        rows = np.flatnonzero((own >= 0) & finite)
        member = csr_matrix((np.ones(len(rows)), (own[rows], np.arange(len(rows)))), (n_pairs, len(rows)))
        sums = member @ values[rows]
        total += sums.toarray() if issparse(sums) else sums
        n_rows += np.bincount(own[rows], minlength=n_pairs)
    return total / np.maximum(n_rows, 1)[:, None]


def _correlate(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pearson correlation of every row profile with every column profile; 0 for a flat one."""

    def normed(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=1, keepdims=True)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)

    return np.clip(normed(rows) @ normed(columns).T, -1, 1)


def _batch_legend(figure: Figure, shade: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="s", markersize=6, color=color, label=name)
        for name, color in shade.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 6), title="batch")
