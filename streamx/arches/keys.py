"""Where data hold what a model asks for: batches, labels, counts, proteins, covariates."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import UsageError
from streamx.schema import Schema

# scArches' users set an object up in one call and name it in the next, so something has to remember. It is
# kept beside the object, not in it: files that are written from it carry nothing of ours.
_of_objects: dict[int, tuple[Any, Keys]] = {}


@dataclass(frozen=True)
class Keys:
    """Names of columns and matrices.

    Attributes
    ----------
    batch_key, labels_key
        obs columns; None: one batch, no labels.
    layer
        What holds the counts; None: X.
    protein_expression_obsm_key, protein_names_uns_key
        obsm matrix of protein counts, and the uns entry that names its columns where it is a plain array.
    categorical_covariate_keys, continuous_covariate_keys
        obs columns of further covariates.
    unlabeled_category
        Label that means none.
    """

    batch_key: str | None = None
    labels_key: str | None = None
    layer: str | None = None
    protein_expression_obsm_key: str | None = None
    protein_names_uns_key: str | None = None
    categorical_covariate_keys: tuple[str, ...] = ()
    continuous_covariate_keys: tuple[str, ...] = ()
    unlabeled_category: str | None = None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Keys:
        """From arguments, None for what is not there; lists become tuples."""
        many = ("categorical_covariate_keys", "continuous_covariate_keys")
        return cls(**settings | {name: tuple(settings.get(name) or ()) for name in many})

    def spoken(self, schema: Schema) -> Schema:
        """What a model knows, under the names that these data have for it."""
        names = self.categorical_covariate_keys or tuple(key for key, _ in schema.categories)
        numbers = self.continuous_covariate_keys or schema.continuous
        for ours, theirs in ((names, schema.categories), (numbers, schema.continuous)):
            if len(ours) != len(theirs):
                raise UsageError(
                    f"{len(ours)} covariates, the model has {len(theirs)}", fix="name them in its order"
                )
        levels = (levels for _, levels in schema.categories)
        protein_key = self.protein_expression_obsm_key if schema.proteins else None
        return replace(
            schema,
            batch_key=self.batch_key or schema.batch_key,
            label_key=self.labels_key or schema.label_key if schema.labels else None,
            categories=tuple(zip(names, levels, strict=True)),
            continuous=numbers,
            protein_key=protein_key or schema.protein_key,
        )


def setup_anndata(
    adata: Any,
    batch_key: str | None = None,
    labels_key: str | None = None,
    layer: str | None = None,
    protein_expression_obsm_key: str | None = None,
    protein_names_uns_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    copy: bool = False,
    unlabeled_category: str | None = None,
) -> Any:
    """Say once where an AnnData object holds what models ask for (documented signature).

    Nothing is written into the object. The models' constructors take the same arguments, which is the way for
    files and stores.

    Parameters
    ----------
    adata
        An AnnData object.
    copy
        Set up a copy, and return it.
    unlabeled_category
        Label that means none, for scANVI.

    Raises
    ------
    UsageError
        If it is no AnnData object, or has no such column or matrix.
    """
    keys = Keys.of(
        {
            "batch_key": batch_key,
            "labels_key": labels_key,
            "layer": layer,
            "protein_expression_obsm_key": protein_expression_obsm_key,
            "protein_names_uns_key": protein_names_uns_key,
            "categorical_covariate_keys": categorical_covariate_keys,
            "continuous_covariate_keys": continuous_covariate_keys,
            "unlabeled_category": unlabeled_category,
        }
    )
    if not hasattr(adata, "obsm"):
        raise UsageError(f"a {type(adata).__name__} can't be set up", fix="name the keys to the model itself")
    check_keys(adata, keys)
    adata = adata.copy() if copy else adata
    _of_objects[id(adata)] = (weakref.ref(adata), keys)
    weakref.finalize(adata, _of_objects.pop, id(adata), None)
    return adata if copy else None


def keys_of(data: Any, given: Keys | None = None, otherwise: Keys | None = None) -> Keys:
    """Key by key: what is given here, else what :func:`setup_anndata` was told, else what a model expects."""
    reference, said = _of_objects.get(id(data), (None, Keys()))
    if reference is not None and reference() is not data:
        said = Keys()
    found = otherwise or Keys()
    for keys in (said, given or Keys()):
        named = {f.name: getattr(keys, f.name) for f in fields(Keys)}
        found = replace(found, **{name: value for name, value in named.items() if value})
    return found


def check_keys(adata: Any, keys: Keys) -> None:
    """Whether an AnnData object has what the keys name.

    Raises
    ------
    UsageError
        If it lacks something.
    """
    single = filter(None, (keys.batch_key, keys.labels_key))
    wanted = [*single, *keys.categorical_covariate_keys, *keys.continuous_covariate_keys]
    obsm, uns = keys.protein_expression_obsm_key, keys.protein_names_uns_key
    for name, place, there in (
        *((name, "obs column", adata.obs.columns) for name in wanted),
        *([(keys.layer, "layer", [*adata.layers.keys(), "X", "raw"])] if keys.layer else []),
        *([(obsm, "obsm matrix", list(adata.obsm.keys()))] if obsm else []),
        *([(uns, "uns entry", list(adata.uns.keys()))] if uns else []),
    ):
        if name not in there:
            has = ", ".join(map(str, there)) or "none"
            raise UsageError(f"no {place} {name!r}", where="AnnData", fix=f"it has: {has}")


def with_protein_names(adata: Any, keys: Keys) -> Any:
    """The object; or, where its proteins are a plain array named in uns, a shell of it that names them."""
    key, names = keys.protein_expression_obsm_key, keys.protein_names_uns_key
    if key not in adata.obsm or names not in adata.uns or not isinstance(adata.obsm[key], np.ndarray):
        return adata
    from anndata import AnnData

    proteins = pd.DataFrame(adata.obsm[key], adata.obs_names, list(map(str, adata.uns[names])))
    obs, var = adata.obs.copy(deep=False), adata.var.copy(deep=False)
    return AnnData(adata.X, obs, var, layers=dict(adata.layers), obsm={key: proteins})
