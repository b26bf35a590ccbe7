"""SCALEX's one call, in its own words: convert, preprocess, train or map, and everything into one AnnData.

Differs from the original on purpose: latents come from exact batch statistics (the limit of its minibatches,
without their randomness); the best epoch's weights are really restored; unknown names are errors; ``raw`` is
not kept (the store holds all genes' counts). Like the original, a query is normalised by its own maxima and
batch statistics, which fails on queries of few cell types: ``streamx project`` does not.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from streamx.config import IntegrateConfig, ProjectConfig, build
from streamx.errors import BadFileError, BatchError, UsageError, warn
from streamx.integrate.result import (
    add_clusters,
    add_imputed,
    add_umap,
    assemble,
    assess,
    draw_umap,
    join_reference,
)
from streamx.interop.scalex import write_checkpoint
from streamx.loader.loader import Loader
from streamx.models.scalex import NormStats, norm_stats, running_stats
from streamx.preprocess.run import preprocess, read_genes
from streamx.store.annotate import annotate_store
from streamx.store.cells import FILE
from streamx.store.collection import Collection
from streamx.store.convert import convert
from streamx.store.ingest.inputs import expand, open_sources
from streamx.store.location import local_folder
from streamx.train.latent import ROWS, latents
from streamx.train.model import Model, load_model
from streamx.train.run import train

log = logging.getLogger("streamx")
D = IntegrateConfig
LOG_FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"


def integrate(data: Any, output: str | Path | None = None, **settings: Any) -> AnnData:
    """:func:`SCALEX` with its folder as the second argument, as ``streamx integrate DATA... -o OUT``."""
    return SCALEX(data, outdir=None if output is None else str(output), **settings)


def SCALEX(
    data_list: Any = None,
    batch_categories: Sequence[str] | None = D.batch_categories,
    profile: str = D.profile,
    batch_name: str = D.batch_name,
    min_features: int | None = D.min_features,
    min_cells: int = D.min_cells,
    target_sum: float | None = D.target_sum,
    n_top_features: int | str | Sequence[str] | None = D.n_top_features,
    join: str = D.join,
    batch_key: str = D.batch_key,
    processed: bool = D.processed,
    fraction: float | None = D.fraction,
    n_obs: int | None = D.n_obs,
    use_layer: str = D.use_layer,
    backed: bool = D.backed,
    batch_size: int = D.batch_size,
    lr: float = D.lr,
    max_iteration: int = D.max_iteration,
    seed: int = D.seed,
    gpu: int = D.gpu,
    outdir: str | None = D.outdir,
    projection: str | None = D.projection,
    repeat: bool = D.repeat,
    impute: str | None = D.impute,
    chunk_size: int = D.chunk_size,
    ignore_umap: bool = D.ignore_umap,
    verbose: bool = D.verbose,
    assess: bool = D.assess,
    show: bool = D.show,
    eval: bool = D.eval,
    num_workers: int = D.num_workers,
) -> AnnData:
    """Online single-cell data integration (Xiong 2022), in one call.

    Parameters
    ----------
    data_list
        A path, an AnnData, or a list of them; each is one batch, unless `batch_name` names an obs column.
    batch_categories
        Names of the batches, one per item (default ``"0", "1", ...``).
    profile
        ``"RNA"`` or ``"ATAC"``.
    batch_name
        obs column with the batches, or several joined by commas; copied into ``obs["batch"]``.
    min_features, min_cells, target_sum
        Filters and the total per cell; None: 600 and 10,000 (ATAC: 100 features).
    n_top_features
        A number (None: RNA 2,000, ATAC 100,000; 0 keeps all), a list of names, or a file with one per line.
    join
        Genes of all files, or of any.
    batch_key
        obs column that records the files when they are joined.
    processed
        Data are preprocessed: no filter, only the scaling.
    fraction, n_obs
        Take only this share, or number, of the cells, drawn by `seed`, before anything else.
    use_layer
        Layer or obsm matrix to use; as it is, only scaled.
    batch_size, lr, max_iteration, seed
        Of the training.
    gpu
        Number of the GPU, where there is one.
    outdir
        Folder for the results; None keeps nothing.
    projection
        Output folder of a finished run (also of SCALEX itself): the data are mapped onto it, untrained.
    repeat
        With `projection`: return the new cells alone; else the reference's come along, told apart by
        ``obs["projection"]``.
    impute
        Name of a reference batch: ``layers["impute"]`` is what the cells would express in it.
    ignore_umap
        No UMAP, no clusters, no figure.
    assess
        Log the batch mixing (and silhouette of ``obs["celltype"]``) on the UMAP; kept in ``uns["scalex"]``.
    eval
        Latents by the running statistics of the encoder's batch norm instead of each batch's own.
    backed, chunk_size, num_workers, verbose, show
        Accepted: data are always streamed in chunks, by threads; `show` opens the figure where that can be.

    Returns
    -------
    AnnData
        Cells in the order of the input, the model's features; X in [0, 1] as the model sees it, on disk as a
        dask array where it would not fit; ``obsm["latent"]``, ``obsm["X_umap"]``, ``obsm["X_scalex_umap"]``,
        ``obs["batch"]``, ``obs["leiden"]``. In `outdir`: ``adata.h5ad``, ``checkpoint/``, ``log.txt``,
        ``umap.png``, and the store, view and model.

    Raises
    ------
    StreamxError
        By its kind, as for :func:`streamx.convert`, :func:`streamx.preprocess` and :func:`streamx.train`.
    """
    arguments = {name: value for name, value in locals().items() if name != "data_list"}
    names = None
    if isinstance(n_top_features, int | str):
        arguments["n_top_features"] = str(n_top_features)
    elif n_top_features is not None:
        names, arguments["n_top_features"] = [str(name) for name in n_top_features], None
    call: IntegrateConfig = build(IntegrateConfig, arguments)
    inputs = input_names(data_list, None if batch_categories is None else list(map(str, batch_categories)))
    with _folder(call.outdir) as folder, _log_file(folder / "log.txt"):
        if call.projection is not None:
            return _mapped(inputs, call, folder)
        return _trained(inputs, call, names, folder)


def _view_of(
    inputs: dict[str, Any], call: IntegrateConfig, names: list[str] | None, folder: Path
) -> Collection:
    view = make_view(make_store(inputs, call, folder), call, folder, names)
    if call.outdir is None:
        weakref.finalize(view, shutil.rmtree, folder, ignore_errors=True)
    return view


def _trained(inputs: dict[str, Any], call: IntegrateConfig, names: list[str] | None, folder: Path) -> AnnData:
    view = _view_of(inputs, call, names, folder)
    train(
        view,
        folder / "model",
        max_iteration=call.max_iteration,
        lr=call.lr,
        minibatch_size=call.batch_size,
        seed=call.seed,
        device=_device(call.gpu),
        norm="running" if call.eval else "domain",
    )
    model = load_model(folder / "model")
    write_checkpoint(folder / "checkpoint", model.module, list(model.genes))
    adata = assemble(view, list(inputs), latents(model.module, view, model.norm or "running", model.stats))
    return _finished(adata, model, call, folder)


def _mapped(inputs: dict[str, Any], call: IntegrateConfig, folder: Path) -> AnnData:
    home = local_folder(call.projection)
    model = load_model(home / "model" if (home / "model" / "model.json").is_file() else home)
    call = replace(call, join="outer", min_cells=0)
    view = _view_of(inputs, call, list(model.genes), folder)
    adata = assemble(view, list(inputs), _query_latents(model, view, call))
    if not call.repeat:
        reference = home / "adata.h5ad"
        if not reference.is_file():
            raise BadFileError(
                "no reference cells", where=str(reference), fix="repeat returns the query alone"
            )
        adata = join_reference(anndata.read_h5ad(reference), adata)
    return _finished(adata, model, call, folder)


def _finished(adata: AnnData, model: Model, call: IntegrateConfig, folder: Path) -> AnnData:
    if call.impute is not None:
        add_imputed(adata, model, call.impute)
    if not call.ignore_umap:
        add_umap(adata, call.seed)
        add_clusters(adata, call.seed)
        draw_umap(adata, folder if call.outdir is not None else None, show=call.show)
    if call.assess and not call.ignore_umap:
        assess(adata, call.seed)
    if call.outdir is not None:
        adata.write_h5ad(folder / "adata.h5ad", compression="gzip")
    return adata


# -- steps ---------------------------------------------------------------------------------------------


def input_names(data_list: Any, categories: list[str] | None) -> dict[str, Any]:
    """Batch name -> file or object; a folder or glob counts as the files that it stands for."""
    listed = data_list if isinstance(data_list, list | tuple) else [data_list]
    items = [member for item in listed for member in expand(item)]
    names = categories or [str(number) for number in range(len(items))]
    if len(names) != len(items) or len(set(names)) != len(names):
        raise UsageError(
            f"{len(items)} files, but {len(set(names))} different batch_categories",
            fix="give each file a name of its own",
        )
    return dict(zip(names, items, strict=True))


def make_store(inputs: dict[str, Any], call: IntegrateConfig, folder: Path) -> Collection:
    """The inputs as a store in `folder`."""
    as_it_is = call.processed or call.use_layer != "X"
    columns: tuple[str, ...] = ()
    obsm: tuple[str, ...] = ()
    if len(inputs) == 1 or call.use_layer != "X":
        first = next(iter(inputs.values()))
        columns, obsm = _peek(first, folder)
    from_obsm = call.use_layer in obsm
    # The original calls all cells one batch when the column is absent, also of several files; there the name
    # was probably mistyped, and convert says which columns there are.
    one_per_file = call.batch_name not in columns if len(inputs) == 1 else call.batch_name == call.batch_key
    try:
        return convert(
            inputs,
            folder / "store",
            batch_key=FILE if one_per_file else call.batch_name,
            join=call.join,
            layer=call.use_layer if call.use_layer != "X" and not from_obsm else None,
            obsm=(call.use_layer,) if from_obsm else (),
            allow_float=as_it_is,
        )
    except BatchError as error:  # convert's words for it are another setting's here
        error.fix = (error.fix or "").partition(";")[0].replace("--batch-key", "batch_name")
        raise


def _peek(item: Any, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of an input's obs columns and obsm matrices."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".peek-") as scratch:
        source = open_sources([item], scratch=Path(scratch), memory=1 << 30)[0]
        with closing(source):
            return tuple(map(str, source.cells.columns)), tuple(source.obsm)


def make_view(store: Collection, call: IntegrateConfig, folder: Path, names: list[str] | None) -> Collection:
    """The view that the model is trained on, beside its store."""
    settings: dict[str, Any] = {"profile": call.profile}
    wanted = call.n_top_features
    if call.use_layer in store.modalities:
        settings["obsm"] = call.use_layer
    elif call.processed or call.use_layer != "X":
        settings["processed"] = True
    else:
        filters = {"min_features": call.min_features, "target_sum": call.target_sum}
        settings |= {name: value for name, value in filters.items() if value is not None}
        settings["min_cells"] = call.min_cells
    if names is None and wanted is not None and Path(wanted).is_file():
        names = read_genes(wanted)
    if names is not None:
        settings["genes"] = names
    elif wanted is not None and "min_cells" in settings:
        try:
            settings["n_top_features"] = int(wanted)
        except ValueError:
            raise UsageError(
                f"n_top_features = {wanted!r}", fix="a number, or a file with one name per line"
            ) from None
    if call.fraction is not None or call.n_obs is not None:
        store = _with_sample(store, call)
        settings["where"] = "sampled == True"
    return preprocess(store, folder / "view", **settings)


def _with_sample(store: Collection, call: IntegrateConfig) -> Collection:
    """The store with an obs column that says which cells were drawn."""
    n = call.n_obs if call.n_obs is not None else round(store.n_obs * (call.fraction or 0))
    if not 0 < n <= store.n_obs:
        raise UsageError(
            f"{n:,} of {store.n_obs:,} cells", fix="fraction above 0 and at most 1, or a smaller n_obs"
        )
    if "sampled" not in store.obs_columns:
        drawn = np.zeros(store.n_obs, dtype=bool)
        drawn[np.random.default_rng(call.seed).choice(store.n_obs, n, replace=False)] = True
        annotate_store(store.path, pd.DataFrame({"sampled": drawn}, index=store.obs_names))
    return Collection(store.path)


def _query_latents(model: Model, view: Collection, call: IntegrateConfig) -> np.ndarray:
    """By the statistics of each query batch; below 200 cells by the reference's."""
    loader = Loader(view, ROWS, order="sequential")
    n_batches = max(len(view.batches), model.module.n_batches)
    stats = norm_stats(model.module, lambda: ((mb.x_ng, mb.batch_n) for mb in loader.at(0)), n_batches)
    mean_h, var_h = running_stats(model.module)
    few = stats.n_b < ProjectConfig.min_query_cells
    mean_bh, var_bh = (
        np.where(few[:, None], mean_h, stats.mean_bh),
        np.where(few[:, None], var_h, stats.var_bh),
    )
    small = [name for name, is_few in zip(view.batches, few, strict=False) if is_few]
    if small and not call.eval:
        warn(
            f"fewer than {ProjectConfig.min_query_cells} cells: the reference's statistics are used",
            where=f"query batch {', '.join(small)}",
        )
    stats = NormStats(stats.n_b, mean_bh, var_bh)
    return latents(model.module, view, "running" if call.eval else "domain", stats)


def _device(gpu: int) -> str:
    """As the original: the GPU with this number where there is one, else the processor."""
    import torch

    return f"cuda:{gpu}" if torch.cuda.is_available() else "cpu"


@contextmanager
def _folder(outdir: str | None) -> Iterator[Path]:
    """The output folder, or one that goes with the call, or with the view of it that an X on disk reads."""
    if outdir is not None:
        chosen = local_folder(outdir)
        if any((chosen / name).exists() for name in ("streamx.json", "model.json")):
            raise UsageError("holds a store, view or model", where=str(chosen), fix="choose another folder")
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    folder = Path(tempfile.mkdtemp(prefix="streamx-"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything that is logged meanwhile also goes to a file, in the original's form."""
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()
