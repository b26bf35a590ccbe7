"""What the settings mean: SCALEX's preprocessing recipes as plain data.

Sources: SCALEX's documentation and releases. RNA: names filtered, cells, genes, 10,000 per cell, log1p,
variable genes, maximum per batch (release 1.0.2; later ones scale over all cells: ``scale="global"``). ATAC
exists in three forms, named after the release that has them. SCALEX has none for proteins (ADT): here it is
the centred log ratio of each cell, as Seurat takes it (Stoeckius 2017): ln(1 + x / g), g the geometric mean
exp(mean of ln(1 + x)) over the panel. It is never negative, as SCALEX's loss needs, and follows from the
cell alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamx.config import PreprocessConfig
from streamx.errors import UsageError

SPIKE_INS = ("ERCC",)
MITOCHONDRIAL = ("MT-", "mt-")


@dataclass(frozen=True)
class Recipe:
    """Every decision, after the defaults of the profile.

    Attributes
    ----------
    drop
        Features whose name starts so are dropped before anything else.
    target
        Total that a cell is scaled to for the model; 0 for no scaling.
    rank_target
        The same for the search of variable features.
    total
        What the total is taken over: ``kept`` features, ``selected`` ones, or ``all`` but the dropped names;
        or ``geometric``: no total, but the geometric mean over the panel.
    search
        ``seurat``, ``cell_ranger``, ``seurat_v3``, ``peaks`` (episcanpy's rule) or ``none``.
    peaks_on
        ``binary`` or ``log``: values that the rule for peaks sees.
    scale
        ``batch``, ``global`` or None.
    """

    profile: str
    drop: tuple[str, ...]
    min_features: int
    min_cells: int
    target: float
    rank_target: float
    binarize: bool
    log1p: bool
    total: str
    search: str
    n_top: int
    by_batch: bool
    scale: str | None
    peaks_on: str = "binary"

    @property
    def transform(self) -> dict[str, Any]:
        """What loaders apply to the raw counts of a view, in this order."""
        return {
            "binarize": self.binarize,
            "target_sum": self.target or None,
            "total": "view_total" if self.target else None,
            "log1p": self.log1p,
            "scale": self.scale,
        }


def make_recipe(config: PreprocessConfig) -> Recipe:
    """The settings, with the defaults of their profile.

    Raises
    ------
    UsageError
        If settings contradict each other.
    """
    _refuse_contradictions(config)
    listed = config.genes is not None
    if is_final(config):
        return _as_it_is(config)
    if config.profile == "ATAC":
        return _atac(config, listed)
    if config.profile == "ADT":
        return _adt(config)
    counts = config.profile == "counts"
    n_top = (0 if counts else 2000) if config.n_top_features is None else config.n_top_features
    scale = None if counts else _scale(config, "batch")
    return Recipe(
        profile=config.profile,
        drop=() if counts else SPIKE_INS + (() if config.keep_mt else MITOCHONDRIAL),
        min_features=_default(config.min_features, 0 if counts else 600),
        min_cells=config.min_cells,
        target=0.0 if counts else config.target_sum,
        rank_target=config.target_sum,
        binarize=False,
        log1p=not counts,
        total="kept",
        search="none" if listed or n_top <= 0 else config.flavor,
        n_top=n_top,
        by_batch=config.hvg_batch,
        scale=scale,
    )


def _atac(config: PreprocessConfig, listed: bool) -> Recipe:
    n_top = _default(config.n_top_features, 100_000)
    search = {"0.2.0": "peaks", "1.0.2": "seurat", "1.0.4": "peaks"}[config.atac]
    scaled = config.atac != "1.0.2"
    search = "none" if listed or n_top <= 0 else search
    total = {"0.2.0": "selected" if search == "peaks" else "kept", "1.0.2": "kept", "1.0.4": "all"}[
        config.atac
    ]
    return Recipe(
        profile="ATAC",
        drop=(),
        min_features=_default(config.min_features, 100),
        min_cells=config.min_cells,
        target=config.target_sum if scaled else 0.0,
        rank_target=config.target_sum if config.atac == "1.0.4" else 0.0,
        binarize=config.atac != "1.0.4",
        log1p=config.atac == "1.0.4",
        total=total,
        search=search,
        n_top=n_top,
        by_batch=config.hvg_batch,
        scale=_scale(config, "global" if config.atac == "1.0.4" else "batch"),
        peaks_on="log" if config.atac == "1.0.4" else "binary",
    )


def _adt(config: PreprocessConfig) -> Recipe:
    """Every protein of the panel, by its centred log ratio; none is searched for, few as they are."""
    return Recipe(
        profile="ADT",
        drop=(),
        min_features=_default(config.min_features, 0),
        min_cells=config.min_cells,
        target=1.0,
        rank_target=1.0,
        binarize=False,
        log1p=True,
        total="geometric",
        search="none",
        n_top=0,
        by_batch=False,
        scale=_scale(config, "batch"),
    )


def is_final(config: PreprocessConfig) -> bool:
    """Values that someone else normalised, or those of an obsm matrix that is no panel of proteins."""
    return config.processed or (config.obsm is not None and config.profile != "ADT")


def _as_it_is(config: PreprocessConfig) -> Recipe:
    """Values that someone else normalised: no filter, the maximum over all cells (SCALEX from 1.0.4 on)."""
    return Recipe(
        profile=config.profile,
        drop=(),
        min_features=0,
        min_cells=0,
        target=0.0,
        rank_target=0.0,
        binarize=False,
        log1p=False,
        total="kept",
        search="none",
        n_top=0,
        by_batch=False,
        scale=_scale(config, "global"),
    )


def _default(value: int | None, default: int) -> int:
    return default if value is None else value


def _scale(config: PreprocessConfig, default: str) -> str | None:
    scale = config.scale or default
    return None if scale == "none" else scale


def _refuse_contradictions(config: PreprocessConfig) -> None:
    as_it_is = ("processed" if config.processed else "obsm") if is_final(config) else None
    for name in ("min_features", "n_top_features"):
        value = getattr(config, name)
        if value is not None and as_it_is and value > 0:
            raise UsageError(
                f"{name} = {value} means nothing with {as_it_is}: neither filter nor search is run",
                fix=f"leave {name} out, or give a list of features (--genes)",
            )
    if config.genes is not None and config.n_top_features:
        raise UsageError(
            f"n_top_features = {config.n_top_features} beside a list of genes", fix="give one of them"
        )
    if config.profile == "ADT" and config.n_top_features:
        raise UsageError(
            f"n_top_features = {config.n_top_features}: of a panel of proteins all are taken",
            fix="a list of them (--genes), to leave some out",
        )
    if config.target_sum <= 0:
        raise UsageError(f"target_sum = {config.target_sum}", fix="a positive number, such as 10000")
    for name in ("min_features", "min_cells", "n_top_features"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UsageError(f"{name} = {value}", fix="0 or more")
