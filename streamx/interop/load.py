"""Models that other tools saved, as ours: scvi-tools' SCVI, SCANVI and TOTALVI, scArches' TRVAE, SCALEX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from streamx.errors import BadFileError
from streamx.interop.scalex import read_checkpoint
from streamx.interop.scarches_trvae import read_trvae
from streamx.interop.scvi_files import Saved, find_scvi, read_scvi
from streamx.interop.unpickle import first_line, read_pickle
from streamx.schema import Schema


@dataclass(frozen=True, eq=False)
class Foreign:
    """A model of another tool.

    Attributes
    ----------
    kind
        ``scvi``, ``scanvi``, ``totalvi``, ``trvae`` or ``scalex``.
    module
        The network, in evaluation mode.
    schema
        Genes and categories that it was trained on; of SCALEX's only the genes are known.
    origin
        The tool and its release, where that is known.
    layer
        The layer that held the counts, if it was not X.
    size_factor_key
        obs column with the size factors that the model was trained with, instead of the cells' sums.
    """

    kind: str
    module: nn.Module
    schema: Schema
    origin: str
    layer: str | None = None
    size_factor_key: str | None = None


def is_foreign(folder: Path) -> bool:
    """Whether another tool's model lies in a folder."""
    return _is_scalex(folder) or find_scvi(folder, None) is not None


def _is_scalex(folder: Path) -> bool:
    return any((folder / part / "config.pt").is_file() for part in ("", "checkpoint"))


def load_foreign(folder: str | Path, *, prefix: str | None = None, december_2020: bool = False) -> Foreign:
    """Load the model in a folder that another tool wrote; nothing in it is run.

    Parameters
    ----------
    prefix
        scvi-tools: what stands in front of the files' names; by default the only one that is there.
    december_2020
        trVAE: it was trained by scArches of that time (:func:`streamx.interop.scarches_trvae.read_trvae`).

    Raises
    ------
    BadFileError
        If it is no such model, is damaged or holds code.
    UsageError
        If the folder holds several models and no prefix says which.
    """
    folder = Path(folder)
    if _is_scalex(folder):
        scalex, genes = read_checkpoint(folder)
        return Foreign("scalex", scalex, Schema(genes=tuple(genes)), "SCALEX")
    found = find_scvi(folder, prefix)
    if found is None:
        raise BadFileError("no model of scvi-tools, scArches or SCALEX", where=str(folder))
    attributes = folder / "attr.pkl"
    if found[1] and attributes.is_file() and "conditions_" in read_pickle(attributes):
        trvae = read_trvae(folder, december_2020=december_2020)
        schema = Schema(tuple(trvae.genes), batches=tuple(trvae.batches), batch_key=trvae.batch_key)
        return Foreign("trvae", trvae.module, schema, "scArches")
    saved = read_scvi(folder, prefix)
    try:
        module = _module(saved)
    except (KeyError, ValueError) as error:
        raise BadFileError(first_line(error), where=str(found[0])) from None
    schema = _schema(saved)
    origin = f"scvi-tools {saved.version}"
    return Foreign(saved.kind, module.eval(), schema, origin, saved.layer, saved.size_factor_key)


def _module(saved: Saved) -> nn.Module:
    if saved.kind == "totalvi":
        from streamx.interop import scvi_totalvi

        return scvi_totalvi.module_from(saved.weights, saved.settings, saved.version, saved.protein_mask_bp)
    from streamx.interop import scvi_tools

    settings = saved.settings | {"scvi_version": saved.version}
    return scvi_tools.module_from(saved.kind, saved.weights, settings)


def _schema(saved: Saved) -> Schema:
    """Labels only where there were any: without a column scvi-tools makes up one label."""
    labelled = saved.label_key is not None
    parts: dict[str, Any] = {name: tuple(getattr(saved, name)) for name in ("genes", "batches", "continuous")}
    return Schema(
        **parts,
        batch_key=saved.batch_key,
        labels=tuple(saved.labels) if labelled else (),
        label_key=saved.label_key,
        unlabeled=saved.unlabeled,
        categories=tuple((key, tuple(levels)) for key, levels in saved.categories.items()),
        proteins=tuple(saved.proteins),
        protein_key=saved.protein_key,
    )
