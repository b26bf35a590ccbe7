"""``export``: a trained count model as a folder that scvi-tools loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamx.errors import UsageError
from streamx.store.location import local_folder

FILE = "model.pt"


def export(model: Any, out: str | Path, *, layer: str | None = None) -> dict[str, Any]:
    """Write a model in the files of scvi-tools 1.4, whose ``load(out, adata)`` then gives the same latents.

    ``out`` holds one ``model.pt``: weights under scvi-tools' names, genes, and the registry that its
    ``setup_anndata`` would have made. The data are not in it: ``load`` wants an AnnData object with raw
    counts of the same genes in the same order, and the obs columns (and obsm matrix of proteins) that the
    result names.

    Parameters
    ----------
    model
        A trained SCVI, SCANVI or TOTALVI object; or the folder of a model, also one that an older scvi-tools
        wrote.
    out
        A folder that is new, empty, or holds an earlier export.
    layer
        The layer of that AnnData object with the counts (default: what the model was made with, or X).

    Returns
    -------
    dict
        ``path``, ``model``, ``n_genes``, ``n_batches``, ``batch_key``, ``label_key``, ``category_keys``,
        ``continuous_keys``, ``protein_key``, ``layer``.

    Raises
    ------
    UsageError
        If scvi-tools has no such model (SCALEX, trVAE), would compute something else with its weights
        (totalVI on log1p counts), or the folder holds other files.
    """
    from streamx.arches.folder import reference_of
    from streamx.interop.save import save_for_scvi_tools

    folder = local_folder(out)
    others = [path.name for path in folder.iterdir() if path.name != FILE] if folder.is_dir() else []
    if others:
        raise UsageError(
            f"holds {others[0]}, and is not to be mixed with an export", where=str(out), fix="a new folder"
        )
    found, keys = reference_of(model)
    layer = layer or keys.layer
    schema = found.schema
    save_for_scvi_tools(folder, found.module, schema, layer=layer)
    return {
        "path": str(folder),
        "model": found.kind,
        "n_genes": len(schema.genes),
        "n_batches": len(schema.batches),
        "batch_key": schema.batch_key,
        "label_key": schema.label_key,
        "category_keys": [key for key, _ in schema.categories],
        "continuous_keys": list(schema.continuous),
        "protein_key": schema.protein_key,
        "layer": layer,
    }
