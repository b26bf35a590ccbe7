"""``streamx preprocess`` and ``sx.preprocess``: store -> view."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamx.config import PreprocessConfig, build, parse_bytes
from streamx.errors import BatchError, UsageError, warn
from streamx.preprocess.cells import chosen_cells
from streamx.preprocess.drift import statistics_to_keep
from streamx.preprocess.features import select_features
from streamx.preprocess.passes import plan_resources
from streamx.preprocess.recipe import Recipe, is_final, make_recipe
from streamx.preprocess.rows import rows_of
from streamx.preprocess.update import update_view
from streamx.preprocess.view import (
    describe_view,
    lay_out,
    view_modalities,
    view_obs,
    view_sample,
    view_slabs,
    view_var,
    write_view,
)
from streamx.store.collection import Collection, open_collection
from streamx.store.location import Location, crc32c, open_location
from streamx.store.needs import Needs, needs_of
from streamx.store.obs import as_obs
from streamx.store.pack import Content
from streamx.store.spill import Slab
from streamx.threads import thread_count

log = logging.getLogger("streamx")

__all__ = ["preprocess", "update_view"]


def preprocess(store: Collection | str | Path, output: str | Path | Location, **settings: Any) -> Collection:
    """Filter cells and genes, find variable genes, and write the view that models train on.

    Two passes over the rows gather statistics that fit in memory, a third copies the rows and genes that
    stay. Values in the view are the store's raw ones; what a model sees follows from them by the view's
    declared transform. The result depends on the data and settings alone, never on memory or threads.

    Parameters
    ----------
    store
        A store, or its path or URL.
    output
        Folder of the view, or ``s3://bucket/prefix``.
    **settings
        Fields of :class:`streamx.config.PreprocessConfig`. `genes` may also be a list of names.

    Returns
    -------
    Collection
        The view: raw counts of the selected genes; in obs every column of the store, `_streamx_total` (total
        over the kept genes, before selection) and `_streamx_row` (row of the store); in var scanpy's columns.

    Raises
    ------
    UsageError
        For settings that can't be: an unknown batch or column, or contradictions.
    EmptyError
        If no cell or gene is left; names a value that would work.
    BatchError
        If a batch can't be ranked by the chosen flavour; names it.
    ResourceError
        If the statistics don't fit into the memory.
    """
    return preprocess_store(store, output, **settings)[0]


def preprocess_store(
    store: Collection | str | Path, output: str | Path | Location, **settings: Any
) -> tuple[Collection, Needs | None]:
    """Like :func:`preprocess`, and also what writing the view was predicted to take (None: it was there)."""
    store = store if isinstance(store, Collection) else open_collection(store)
    if store.kind != "store":
        raise UsageError("is a view; views are made from stores", where=str(store.path))
    listed = settings.get("genes")
    if listed is not None and not isinstance(listed, (str, Path)):
        settings["genes"] = "a list"
    config: PreprocessConfig = build(PreprocessConfig, settings)
    genes = None if listed is None else read_genes(listed)
    recipe = make_recipe(config)
    location = open_location(output)
    parameters = _parameters(config, genes)
    fingerprint = {
        "settings": parameters,
        "store": {
            "generation": store.generation,
            "parts": [part["crc32c"] for part in store.manifest.parts],
        },
    }
    return write_view(
        location,
        fingerprint,
        partial(_plan, store, location, config, recipe, genes, parameters, fingerprint),
        memory=parse_bytes(config.memory),
        threads=thread_count(config.threads),
    )


def _plan(
    store: Collection,
    location: Location,
    config: PreprocessConfig,
    recipe: Recipe,
    genes: list[str] | None,
    parameters: dict[str, Any],
    fingerprint: dict[str, Any],
    folder: Path,
) -> tuple[Content, list[Slab]]:
    """The statistics, all decisions, and the reading that is left to do."""
    if config.obsm is not None and config.obsm not in store.modalities:
        raise UsageError(
            f"no obsm matrix {config.obsm!r}",
            where=str(store.path),
            fix=f"one of: {', '.join(store.modalities) or 'none; convert carries those named by --obsm'}",
        )
    if config.obsm is None:
        _warn_of_the_wrong_values(store, config)
    elif config.profile == "ADT":
        _refuse_unmeasured(store, config)
    memory, threads = parse_bytes(config.memory), thread_count(config.threads)
    rows = rows_of(store, config.obsm)
    names = list(store.var_names) if config.obsm is None else list(store.modalities[config.obsm]["names"])
    cells = chosen_cells(store, config.batches, config.where, folder=folder)
    nnz = store.nnz / max(1, store.n_obs) if config.obsm is None else rows.n_vars
    resources = plan_resources(
        nnz,
        rows.n_vars,
        len(cells.batches),
        memory=memory,
        threads=threads,
        progress=True,
        scratch=folder,
    )
    selection = select_features(
        rows,
        names,
        cells,
        recipe,
        resources=resources,
        measured_bg=store.measured_bg if config.obsm is None else None,
        allow_unmeasured=config.allow_unmeasured,
        listed=genes,
        as_it_is=is_final(config),
    )
    one_part = len(store.manifest.parts) == 1
    layout = lay_out(selection.kept_n, cells.code_n, cells.batches, folder=folder, shuffled=one_part)
    tables = statistics_to_keep(selection, recipe, layout.from_store)
    if selection.scale_bg is not None:
        tables["scale_bg"] = selection.scale_bg[_rows_of(layout.from_store, len(layout.batches))]
    view = describe_view(store, location, recipe, parameters)
    content = Content(
        kind="view",
        obs=view_obs(store, layout, selection.total_n, folder),
        var=view_var(store, selection, config.obsm),
        batch_key=store.batch_key,
        fingerprint=fingerprint,
        obsm=view_modalities(store, layout.batches),
        uns={"parameters": parameters, "transform": recipe.transform, "flavor": recipe.search},
        tables=tables,
        view=view,
    )
    slabs = view_slabs(store, layout, selection.chosen, obsm=config.obsm, memory=memory, threads=threads)
    sample = view_sample(rows, layout, selection, content.obsm)
    needs = needs_of(sample, as_obs(content.obs), slabs, memory=memory, threads=threads)
    log.info(
        "%d cells, %d features, %d batches", len(layout.row_n), len(selection.names), len(layout.batches)
    )
    return replace(content, needs=needs), slabs


def _warn_of_the_wrong_values(store: Collection, config: PreprocessConfig) -> None:
    """Normalised values taken for counts, or the reverse: the result would look right and be wrong."""
    counts = store.read(0, min(1, store.n_obs), dtype="stored").dtype.kind in "ui"
    if config.processed and counts:
        warn(
            "processed is said, but the values are counts: they are neither normalised nor filtered",
            where=str(store.path),
            fix="leave --processed out",
        )
    if not config.processed and not counts:
        warn(
            "the values are no counts (the store was made with --allow-float), and are normalised again",
            where=str(store.path),
            fix="--processed, if they are normalised already; or convert the counts (--layer)",
        )


def _refuse_unmeasured(store: Collection, config: PreprocessConfig) -> None:
    """Proteins that are zero throughout a batch were not measured there, and say nothing of its cells."""
    measured = store.modalities[config.obsm or ""]["measured"]
    without = [name for name in config.batches or store.batches if not any(measured.get(name, [True]))]
    if without:
        with_them = [name for name in store.batches if any(measured.get(name, [True]))]
        raise BatchError(
            f"no protein of {config.obsm!r} was measured in {', '.join(without[:5])}",
            where=str(store.path),
            fix=f"--batches {' '.join(with_them[:20]) or 'with those that were'}",
        )


def _rows_of(from_store: np.ndarray, n_batches: int) -> np.ndarray:
    """Store code of each batch of the view."""
    codes = np.flatnonzero(from_store >= 0)
    out = np.empty(n_batches, dtype=np.int64)
    out[from_store[codes]] = codes
    return out


def read_genes(listed: str | Path | Sequence[str]) -> list[str]:
    """Names from a file with one per line, or as they are.

    Raises
    ------
    UsageError
        If the file can't be read, or nothing is listed.
    """
    if isinstance(listed, (str, Path)):
        try:
            lines = Path(listed).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"can't be read: {error}", where=f"--genes {listed}", fix="a text file, one feature per line"
            ) from None
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [str(name) for name in listed]
    if not names:
        raise UsageError("lists no feature", where=f"--genes {listed}", fix="one feature per line")
    return names


def _parameters(config: PreprocessConfig, genes: list[str] | None) -> dict[str, Any]:
    """Settings that decide the view, as JSON; a list of genes by its digest (var holds the names)."""
    values = {name: value for name, value in asdict(config).items() if name not in ("memory", "threads")}
    values["batches"] = None if config.batches is None else list(config.batches)
    if genes is not None:
        digest = crc32c("\n".join(genes).encode())
        values["genes"] = f"{len(genes)} listed, crc32c {digest}"
    return values
