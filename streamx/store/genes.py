"""Gene axes of several files become one, by name alone: nothing but headers is read."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.errors import GeneError
from streamx.schema import strip_version
from streamx.store.frame import safe_name


def resolve_names(
    names: Iterable[str], *, rule: str = "error", strip_versions: bool = False, where: str = ""
) -> list[str | None]:
    """The names that a file's columns go by; None drops a column.

    Parameters
    ----------
    names
        As in the file.
    rule
        What to do with a name that occurs twice: ``error``; ``first`` keeps the first column; ``sum`` adds
        them up; ``unique`` appends -1, -2, ... to the later ones.

    Raises
    ------
    GeneError
        If a name occurs twice and the rule is ``error``.
    """
    resolved: list[str | None] = [strip_version(str(n)) if strip_versions else str(n) for n in names]
    counts = Counter(resolved)
    twice = [name for name, n in counts.items() if n > 1]
    if not twice or rule == "sum":
        return resolved
    if rule == "error":
        some = ", ".join(str(name) for name in twice[:5])
        raise GeneError(
            f"{len(twice)} gene names occur more than once: {some}",
            where=where,
            fix="choose what to do with them: --duplicate-genes first, sum or unique",
        )
    seen: Counter[str | None] = Counter()
    taken = set(resolved)
    for i, name in enumerate(resolved):
        seen[name] += 1
        if counts[name] > 1 and seen[name] > 1:
            resolved[i] = None if rule == "first" else _next_free(str(name), seen[name] - 1, taken)
    return resolved


def _next_free(name: str, number: int, taken: set[str | None]) -> str:
    while f"{name}-{number}" in taken:
        number += 1
    taken.add(f"{name}-{number}")
    return f"{name}-{number}"


def join_genes(axes: Sequence[Sequence[str | None]], join: str) -> list[str]:
    """The common gene axis: of all files (inner) or of any (outer), in the order of the first that has them.

    Raises
    ------
    GeneError
        If no gene is left.
    """
    kept = [dict.fromkeys(name for name in axis if name is not None) for axis in axes]
    if join == "outer":
        return list(dict.fromkeys(name for axis in kept for name in axis))
    shared = set(kept[0]).intersection(*kept[1:])
    if not shared:
        raise GeneError(
            f"the {len(axes)} files share no gene",
            fix="check that all use the same kind of gene name; --strip-versions drops Ensembl versions; "
            "--join outer keeps the genes of any file",
        )
    return [name for name in kept[0] if name in shared]


def column_map(axis: Sequence[str | None], genes: Sequence[str]) -> np.ndarray:
    """Position among `genes` of each of a file's columns, int64; -1 where it is dropped."""
    position = {name: i for i, name in enumerate(genes)}
    return np.fromiter((-1 if n is None else position.get(n, -1) for n in axis), np.int64, len(axis))


def measured_mask(columns: np.ndarray, n_genes: int) -> np.ndarray:
    """bool, (n_genes,): which genes of the axis a file has."""
    mask = np.zeros(n_genes, dtype=bool)
    mask[columns[columns >= 0]] = True
    return mask


def map_columns(x_ng: sparse.csr_matrix, columns: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """A file's columns moved to their place on the gene axis; columns of the same place are added up."""
    target = columns[x_ng.indices]
    keep = target >= 0
    if keep.all():
        indptr, data = x_ng.indptr, x_ng.data
    else:
        kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        indptr, data, target = kept[x_ng.indptr], x_ng.data[keep], target[keep]
    summed = np.bincount(columns[columns >= 0]).max(initial=0) > 1
    if summed and data.dtype.kind in "ui":
        data = data.astype(np.int64)  # sums of small integers wrap
    mapped = sparse.csr_matrix((data, target.astype(np.int32), indptr), shape=(x_ng.shape[0], n_genes))
    mapped.sum_duplicates()
    if summed:
        mapped.eliminate_zeros()  # normalised values may cancel
    return mapped


def common_var(
    frames: Sequence[pd.DataFrame], axes: Sequence[Sequence[str | None]], genes: Sequence[str]
) -> pd.DataFrame:
    """The var columns that every file has and on which all agree."""
    var = pd.DataFrame(index=pd.Index(genes, dtype=object))
    aligned = []
    for frame, axis in zip(frames, axes, strict=True):
        kept = frame.set_axis(pd.Index([str(name) for name in axis], dtype=object), axis=0)
        kept = kept[[name is not None for name in axis]]
        aligned.append(kept[~kept.index.duplicated()])
    for name in aligned[0].columns if aligned else []:
        if not all(name in frame.columns for frame in aligned):
            continue
        merged = aligned[0][name].astype(object).reindex(genes)
        for frame in aligned[1:]:
            other = frame[name].astype(object).reindex(genes)
            if ((merged != other) & merged.notna() & other.notna()).any():
                break
            merged = merged.where(merged.notna(), other)
        else:
            numeric = aligned[0][name].dtype.kind in "iufb" and merged.notna().all()
            var[safe_name(name)] = (
                merged.astype(aligned[0][name].dtype)
                if numeric
                else merged.map(lambda value: "" if pd.isna(value) else str(value))
            )
    return var


def pack_mask(mask_g: np.ndarray) -> str:
    """A boolean array as text."""
    return base64.b64encode(np.packbits(mask_g).tobytes()).decode()


def unpack_mask(text: str, n: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n).astype(bool)
